"""A folder that someone sends runs no code, code that a model wrote harms nobody, logins stay where
they belong, and two runs never share a folder.
"""

import json
import os
import re
import shlex
import signal
import socket
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from conftest import (
    as_sent,
    compose_config,
    kill_group,
    make_config,
    run_command,
    spec_of,
    start_command,
    wait_for,
)
from omegaconf import OmegaConf

from eagle3.benchmark import scoring
from eagle3.checks import check
from eagle3.config import instantiate
from eagle3.errors import ConfigError
from eagle3.hydra_errors import one_sentence
from eagle3.runs.logger import REDACTED, NoTracker
from eagle3.runs.resume import RUNS_CODE, claim, literal, load_config, run_folder
from eagle3.runs.tracking import Tracking


@pytest.mark.parametrize(
    "override",
    [
        "optimizer._target_=os.system",
        "optimizer._target_=torch.utils.collect_env.run",
        "optimizer._target_=transformers.pipeline",
        "logger._target_=eagle3.runs.logger.os.system",  # reached through a module of ours
        "logger._target_=eagle3.runs.logger.JsonLines",  # empties the file that it is given
        "+target.server_args=[{_target_: os.system, command: id}]",
        "+regenerate.extra_body.deep=[[{_target_: os.system, command: id}]]",
        "+data.chat_template_kwargs.deep={_target_: os.system}",
        "loss.pointwise._target_=3",
    ],
)
def test_a_target_that_is_not_offered_is_refused(override, tmp_path):
    with pytest.raises(ConfigError, match=r"_target_=\S+ is not offered: allowed is"):
        load_config(compose_config(override), tmp_path, [override])


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "lr_scheduler.CosineAnnealingLR"])
def test_torchs_own_are_offered(name, tmp_path):
    section = "scheduler" if "." in name else "optimizer"
    overrides = [f"~{section}", f"+{section}={{_target_: torch.optim.{name}, _partial_: true}}"]
    check(load_config(compose_config(*overrides), tmp_path, overrides))


def resumed(run_dir, *overrides):
    overrides = [f"train.resume={run_dir}", *overrides]
    return load_config(compose_config(*overrides), run_dir, overrides)


def test_the_run_json_of_a_stranger_calls_nothing(tmp_path):
    made = tmp_path / "made"
    command = {"_target_": "torch.utils.collect_env.run", "command": f"touch {made}"}
    as_sent(tmp_path, **{"logger": command})
    with pytest.raises(ConfigError, match=r"logger\._target_=torch.* is not offered"):
        resumed(tmp_path)
    assert not made.exists()


def test_a_target_that_brings_code_runs_none_of_it(tmp_path):
    made = tmp_path / "made"
    (tmp_path / "own.py").write_text(f"open({str(made)!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"only with model\.trust_remote_code=true$"):
        spec_of(tmp_path)
    assert not made.exists()


@pytest.mark.parametrize("key", RUNS_CODE)
def test_what_lets_a_run_start_programs_is_given_again(key, tmp_path):
    value = {"python": "/tmp/evil", "server_args": ["--trust-remote-code"]}
    as_sent(tmp_path, **{key: value.get(key.split(".")[1], True)})
    with pytest.raises(ConfigError, match=f"{key}=.* lets it run code; where you") as said:
        resumed(tmp_path)
    (again,) = shlex.split(str(said.value).partition("again: ")[2])
    assert resumed(tmp_path, again)


def test_a_run_json_is_not_resolved_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_LOGIN", "SESAME")
    as_sent(tmp_path, **{"data.system_prompt": "${oc.env:SOME_LOGIN}"})
    assert resumed(tmp_path).data.system_prompt == "${oc.env:SOME_LOGIN}"
    called = instantiate({"_target_": "builtins.dict", "text": ["${oc.env:SOME_LOGIN}"]})
    assert called == {"text": ["${oc.env:SOME_LOGIN}"]}
    for text in ("${a}", r"\${a}", r"\\${a", r"a\b${", "$", r"\\", "{}", r"${a}\${b}\\\${c}\\"):
        config = OmegaConf.create(literal({"key": [text]}))
        assert OmegaConf.to_container(config, resolve=True) == {"key": [text]}


@pytest.mark.runs  # git is a process
def test_what_a_run_needs_is_kept_apart_from_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", "open-sesame")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")  # a switch, in no text a login
    run_dir, login = tmp_path / "run", "http://me:SESAME@host/x.jsonl"
    (run_dir / "checkpoints" / "last").mkdir(parents=True)
    path = "/models/hf_tiny-1aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
    overrides = ["model=hf", f"model.path={path}", "data=jsonl", f"data.path={login}"]
    overrides += ["data.system_prompt=say open-sesame", "train.resume=auto"]

    def start(*more):
        given = [*overrides, *more]
        config = load_config(compose_config(*given), run_dir, given)
        Tracking(config, run_dir, given, NoTracker(), None).write()
        return config

    first = start()
    shown = (run_dir / "run.json").read_text()
    assert "SESAME" not in shown and "open-sesame" not in shown
    shown = json.loads(shown)["config"]
    assert shown["model"]["path"] == path and shown["data"]["system_prompt"] == "say <redacted>"
    (kept,) = (tmp_path / ".cache" / "private").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert resumed(run_dir).data == first.data and resumed(run_dir).model == first.model
    assert start().data.path == login, "found in its folder it goes on as well"
    other = login.replace("SESAME", "OTHER")
    assert start(f"data.path={other}").data.path == other, "another login is no other draft"

    kept.unlink()  # the folder was sent to another machine
    with pytest.raises(ConfigError, match=r"data\.\w+ of the run in .* holds a login; give data\."):
        resumed(run_dir)
    again = [f"data.path={login}", "data.system_prompt=say open-sesame"]
    assert resumed(run_dir, *again).data == first.data


def test_an_error_shows_no_login(capsys):
    with pytest.raises(SystemExit), one_sentence(False):
        raise ConfigError("data.path=http://me:SESAME@host/x does not exist")
    assert capsys.readouterr().err == f"error: data.path=http://{REDACTED}@host/x does not exist\n"


@pytest.mark.runs
def test_hydras_own_files_hold_no_login(tmp_path):
    login = ["+regenerate.extra_body.api_key=SESAME", "data.path=http://me:SESAME@host/x.jsonl"]
    sweep = ["-m", "train.epochs=1,2", f"hydra.sweep.dir={tmp_path}", f"cache_dir={tmp_path}/c"]
    run_command(*sweep, "stages=[export]", *login)  # which fails: nothing was trained
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    files = [path for path in found if path.parent.name != "private"]
    assert not [path for path in files if "SESAME" in path.read_text()]
    folder = tmp_path / "1" / ".hydra"
    assert yaml.safe_load((folder / "overrides.yaml").read_text())[0] == "train.epochs=2"
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["epochs"] == 2
    choices = yaml.safe_load((folder / "hydra.yaml").read_text())["hydra"]["runtime"]["choices"]
    assert choices["model"] == "tiny" and (tmp_path / "multirun.yaml") in files


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(run_folder, ["auto"] * 8, [f"{tmp_path}/now"] * 8)
    assert sorted(found) == [f"{tmp_path}/now", *(f"{tmp_path}/now-{n}" for n in range(2, 9))]


@pytest.mark.runs
def test_a_folder_in_use_is_refused(tmp_path):
    with claim(tmp_path):
        refused = run_command("plan=true", f"hydra.run.dir={tmp_path}")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert refused.returncode == 2
    assert refused.stderr == f"error: {tmp_path} is in use by a run; set another hydra.run.dir\n"
    with claim(tmp_path):
        pass  # its run has ended


@pytest.mark.runs
@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT] * 2])
def test_a_signal_outside_training_is_said(settings, tmp_path, numbers):
    """While a server is asked that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        asks = ["stages=[regenerate]", f"regenerate.urls=[{url}]", "regenerate.model=x"]
        process = start_command([*settings, *asks], tmp_path / "run")
        try:
            wait_for((tmp_path / "run" / "run.json").exists, process)
            for number in numbers:
                process.send_signal(number)
            errors = process.communicate()[1]
        finally:
            kill_group(process)
    assert process.returncode in (128 + numbers[0], -numbers[0])
    assert re.search("^interrupted; .* (is kept|rows); go on with: python run.py ", errors, re.M)
    assert "Traceback" not in errors


@pytest.fixture
def namespaces():
    if not scoring.namespaces():
        pytest.skip("this system gives a program no namespaces of its own")


@pytest.mark.runs
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import os; os.kill(PARENT, 0)",
        "import os; os.kill(os.getppid(), 0); assert os.getppid()",
        "open('FOLDER/written', 'w')",
        "import os; os.remove('FOLDER/kept')",
        "open('FOLDER/kept').read()",
        "import os; os.mkdir('/usr/local/made')",
        "import os; os.setuid(0); os.listdir('/root')",
        "import os; os.chroot('/usr')",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 2)",
        "import os; os.write(1, b'x')\nraise SystemExit",
    ],
)
def test_a_confined_program_cannot(code, namespaces, tmp_path):
    tmp_path.chmod(0o777)
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "kept").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = {"PORT": server.getsockname()[1], "FOLDER": tmp_path, "PARENT": os.getpid()}
        for name, value in known.items():
            code = code.replace(name, str(value))
        assert not scoring.passes(code)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.runs
def test_a_confined_program_can(namespaces):
    assert scoring.passes("import os, json\nassert os.getpid() == 1\nopen('own', 'w').write('x')")


@pytest.mark.runs
@pytest.mark.parametrize("early", ["os._exit(0)", "os._exit(97)", "sys.exit(0)"])
@pytest.mark.parametrize("confined", [True, False])
def test_only_its_end_passes_a_program(early, confined):
    command = scoring.namespaces() if confined else ()
    assert scoring.passes("print('x')", command)
    assert not scoring.passes(f"import os, sys; {early}", command)


def test_code_is_refused_where_nothing_confines_it(monkeypatch, tmp_path):
    monkeypatch.setattr("eagle3.checks.namespaces", lambda: ())
    asked = ["benchmark.execute_code=true"]
    with pytest.raises(ConfigError, match=r"set benchmark\.execute_code_unc.* to run"):
        check(make_config(asked, tmp_path))
    check(make_config([*asked, "benchmark.execute_code_unconfined=true"], tmp_path))
