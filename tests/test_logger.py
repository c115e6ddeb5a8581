"""metrics.jsonl across resumes, what counts as a secret, and a real offline W&B run read back from
its files.
"""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

from eagle3.config import instantiate
from eagle3.errors import ConfigError
from eagle3.runs import logger
from eagle3.runs.logger import (
    REDACTED,
    JsonLines,
    NoTracker,
    Trackers,
    follow_metrics,
    read_metrics,
    redact,
)  # fmt: skip

SECRET_KEYS = """
    token HF_TOKEN hfToken access_token use_auth_token hub.token client_secret passwd db_password
    api_key apiKey api-key credentials private_key aws_secret_access_key Authorization passphrase
"""
ORDINARY_KEYS = """
    tokens_per_step max_new_tokens eos_token_ids eos_token pad_token tokens tokenizer_path token_ids
    bytes_per_token embedding_key key author monkey special_tokens api_key_env
"""


def test_each_line_is_on_disk_and_a_resume_drops_later_ones_and_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log({"loss": 2.5, "eval/accepted": [0.5, math.nan]}, 1)
    lines.log({"loss": math.nan, "grad_norm": math.inf}, 2)
    first = {"step": 1, "loss": 2.5, "eval/accepted": [0.5, None]}
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [first, {"step": 2, "loss": None, "grad_norm": None}]
    for step in (3, 4):
        lines.log({"loss": float(step)}, step)
    lines.log({"eval/acceptance_length": 2.0}, 3)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    JsonLines(path, resume_step=3).log({"loss": 40.0}, 4)
    rows = [(row["step"], row.get("loss")) for row in read_metrics(path)]
    assert rows == [(1, 2.5), (2, None), (3, 3.0), (3, None), (4, 40.0)]
    assert path.read_text().count("\n") == 5 and list(tmp_path.iterdir()) == [path]
    JsonLines(path)  # a new run starts the file anew
    assert read_metrics(path) == []


def test_what_counts_as_a_secret():
    for keys, value in ((SECRET_KEYS.split(), REDACTED), (ORDINARY_KEYS.split(), "x")):
        assert redact(dict.fromkeys(keys, "x")) == dict.fromkeys(keys, value)
        assert redact([f"{key}=x" for key in keys]) == [f"{key}={value}" for key in keys]


def test_redact_keeps_everything_but_secrets():
    def config(secret, login):
        model = {"eos_token": "</s>", "hf_token": secret, "keys": [{"password": secret}, "x"]}
        return {"train": {"betas": [0.9, 0.95]}, "model": model, "hub": {"credentials": login}}

    given = config("abc", {"user": "a"}) | {"token": None}
    redacted = redact(given)
    assert redacted == config(REDACTED, REDACTED) | {"token": None}
    assert given["model"]["hf_token"] == "abc" and redact(redacted) == redacted


UNCHANGED = (
    "model={eos_token_ids: [1,2], pad: x}", "hub={token: [", "a={day: 2026-99-99}",
    "the token: you know", "data.path=/home/secret/x.jsonl",
)  # fmt: skip
REDACTIONS = dict(zip(UNCHANGED, UNCHANGED)) | {
    "+model.hf_token=abc": f"+model.hf_token={REDACTED}",
    "--api-key=abc": f"--api-key={REDACTED}",
    "hub={user: me, token: abc}": f'hub={{"user": "me", "token": "{REDACTED}"}}',
    "hub={'token': 'a b'}": f'hub={{"token": "{REDACTED}"}}',
    "hub=[{token: abc}]": f'hub=[{{"token": "{REDACTED}"}}]',
    "a={day: 2026-01-01, token: b}": f'a={{"day": "2026-01-01", "token": "{REDACTED}"}}',
    "https://me:pw@host/x": f"https://{REDACTED}@host/x",
    "urls=[http://me:pw@host/v1]": f"urls=[http://{REDACTED}@host/v1]",
}


@pytest.mark.parametrize("text", REDACTIONS)
def test_redact_inside_strings(text):
    assert redact([text]) == [REDACTIONS[text]]


@pytest.fixture(autouse=True)
def poll_often(monkeypatch):
    monkeypatch.setattr(logger, "POLL_SECONDS", 0.02)


class Recorder(NoTracker):
    """Keeps what it is sent; fails at the updates in `failing`."""

    def __init__(self, failing=()):
        self.failing, self.rows, self.arrived = failing, [], threading.Event()

    def log(self, metrics, step):
        if step in self.failing:
            raise OSError("no network")
        self.rows.append((step, metrics))
        self.arrived.set()


def test_a_tracker_gets_lines_while_they_are_written_and_the_rest_at_the_end(tmp_path):
    path, tracker = tmp_path / "metrics.jsonl", Recorder()
    with follow_metrics(path, tracker):  # the file is not there yet
        lines = JsonLines(path)
        lines.log({"loss": 3.0, "accuracy/step_4": math.nan}, 1)
        assert tracker.arrived.wait(timeout=60)
        lines.log({"loss": 2.0}, 2)
        lines.log({"eval/loss": 1.0}, 2)
        with path.open("a") as file:
            file.write('{"step": 3, "lo')
    assert tracker.rows == [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"eval/loss": 1.0})]


def test_a_resumed_run_sends_no_line_twice(tmp_path):
    path, tracker = tmp_path / "metrics.jsonl", Recorder()
    lines = JsonLines(path)
    lines.log({"loss": 4.0}, 1)
    lines.log({"loss": 9.0}, 2)  # behind the checkpoint: it is computed again
    state = tmp_path / "checkpoints" / "last" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"update": 1}')
    with follow_metrics(path, tracker):
        lines.log({"loss": 3.0}, 2)
        lines.log({"loss": 2.0}, 3)
        assert tracker.arrived.wait(timeout=60)
        resumed = JsonLines(path, resume_step=1)
        for step in range(2, 5):
            resumed.log({"loss": 5.0 - step}, step)
            if step == 3:
                resumed.log({"eval/loss": 1.0}, step)
    steps = [(step, *metrics) for step, metrics in tracker.rows]
    assert steps == [(2, "loss"), (3, "loss"), (3, "eval/loss"), (4, "loss")]
    (state.parent / "state.json").unlink()
    tracker.rows.clear()
    with follow_metrics(path, tracker):  # a run that starts anew is sent whole
        JsonLines(path).log({"loss": 4.0}, 1)
    assert tracker.rows == [(1, {"loss": 4.0})]


class Stuck(Recorder):
    """Never answers, and notes that it was left."""

    def log(self, metrics, step):
        self.arrived.wait()

    def abandon(self):
        self.rows.append("left")


def test_a_tracker_that_fails_or_hangs_is_said_once_and_ends_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logger, "CALL_SECONDS", 0.2)
    made = Recorder(failing=(1, 2)), Stuck(), Recorder()
    trackers = Trackers("p", None, None, None, None, *(lambda *given, t=t: t for t in made))
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(KeyError), follow_metrics(path, trackers):  # the thread ends in any case
        lines = JsonLines(path)
        for step in range(1, 4):
            lines.log({"loss": 1.0}, step)
        raise KeyError
    failing, stuck, whole = (tracker.rows for tracker in made)
    assert failing == [(3, {"loss": 1.0})] and stuck == ["left"] and len(whole) == 3
    trackers.finish()
    said = capsys.readouterr().err.splitlines()
    goes_on = "the run goes on, and metrics.jsonl has all of it"
    assert sorted(said) == [
        f"logger=tensorboard failed: no answer for 0 seconds; {goes_on}",
        f"logger=wandb failed: no network; {goes_on}",
    ]


class Asleep(Stuck):
    def start(self, *given):
        self.arrived.wait()


class Broken(NoTracker):
    def start(self, *given):
        raise OSError("no disk")


def test_a_tracker_that_cannot_begin_is_left(capsys, monkeypatch):
    monkeypatch.setattr(logger, "START_SECONDS", 0.05)
    made = Asleep(), Broken(), Recorder()
    trackers = Trackers("p", None, None, None, None, *(lambda *given, t=t: t for t in made))
    trackers.start(Path("."), "name", {}, "id", False)
    assert list(trackers.used) == ["trackio"] and made[0].rows == ["left"]
    said = capsys.readouterr().err
    assert "wandb failed: no answer" in said and "tensorboard failed: no disk; the run" in said


@pytest.mark.parametrize("name, module", [("tensorboard", "tensorboard"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_named_with_its_command(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in [each for each in sys.modules if each.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, loaded)
    config = compose_config(f"logger=[wandb,{name}]", "logger.mode=disabled").logger
    node = OmegaConf.to_container(config, resolve=True)
    del node["wandb"]
    with pytest.raises(ConfigError) as raised:
        instantiate(node).start(Path("."), "name", {}, "id", False)
    said = f"logger={name} needs {module}: pip install -e '.[{name}]'"
    assert str(raised.value) == said


def test_several_trackers_are_chosen_at_once():
    config = compose_config("logger=[jsonl,wandb,tensorboard,trackio]", "logger.project=mine")
    trackers = instantiate(OmegaConf.to_container(config.logger, resolve=True))
    assert list(trackers.used) == ["wandb", "tensorboard", "trackio"]
    assert {tracker.project for tracker in trackers.used.values()} == {"mine"}
    assert not instantiate(OmegaConf.to_container(compose_config().logger)).used


def test_tensorboard_reads_what_a_resumed_run_has_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, resumed in ((1, False), (2, True)):  # update 2 is computed again
        trackers = Trackers(tensorboard=logger.TensorBoard)
        trackers.start(tmp_path, "name", {"hub": {"token": "SESAME"}}, "id", resumed)
        for step in (first, first + 1):
            trackers.log({"loss": first / step}, step)
        trackers.table("acceptance", ["position", "accepted"], [[1, 0.5]])
        trackers.finish()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [
        (1, 1.0), (2, 1.0), (3, pytest.approx(2 / 3)),
    ]  # fmt: skip
    texts = [read.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in read.Tags()["tensors"]]
    assert any(b"| 1 | 0.5 |" in text for text in texts)
    assert not any(b"SESAME" in path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


@pytest.mark.runs
def test_trackio_goes_on_with_a_run(tmp_path):
    pytest.importorskip("trackio")
    code = (
        "import sys\nfrom pathlib import Path\nfrom eagle3.runs.logger import Trackers, Trackio\n"
        "for first in (1, 3):\n"
        "    trackers = Trackers('proj', group='grp', trackio=Trackio)\n"
        "    trackers.start(Path(sys.argv[1]), 'my run', {'token': 'SESAME'}, 'id', first > 1)\n"
        "    for step in (first, first + 1):\n"
        "        trackers.log({'loss': 3.0 / step}, step)\n"
        "    trackers.table('acceptance', ['position'], [[1]])\n"
        "    trackers.finish()\n"
        "import trackio\n"
        "(run,) = trackio.Api().runs('proj')\n"
        "rows = trackio.SQLiteStorage.get_logs('proj', run.name)\n"
        "print(run.name, *(row['loss'] for row in rows if row.get('loss')))\n"
    )
    ended = run_python(code, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert ended.returncode == 0 and "failed" not in ended.stderr, ended.stderr
    assert ended.stdout.split("\n")[:-1] == ["my run id 3.0 1.5 1.0 0.75"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"SESAME" in path.read_bytes()]


def run_python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "WANDB_MODE": "offline", **environment}
    return subprocess.run(
        command, cwd=ROOT, timeout=600, capture_output=True, text=True, env=environment
    )


@pytest.mark.runs
def test_wandb_without_a_login_is_one_sentence(tmp_path):
    code = "from pathlib import Path\nfrom eagle3.runs.logger import Trackers, Wandb\n"
    code += "trackers = Trackers(mode='online', wandb=Wandb)\n"
    code += f"trackers.start(Path({str(tmp_path)!r}), 'n', {{}}, 'id', False)\n"
    ended = run_python(code, HOME=str(tmp_path), WANDB_API_KEY="", WANDB_MODE="online")
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("eagle3.errors.ConfigError: logger=wandb: ")
    assert "logger.mode=offline" in last


BROKEN = """
import os, signal, sys
from pathlib import Path
from eagle3.runs import logger
logger.START_SECONDS, logger.CALL_SECONDS, logger.FINISH_SECONDS = 1.0, 1.5, 1.5
trackers = logger.Trackers(mode=sys.argv[2], wandb=logger.Wandb)
trackers.start(Path(sys.argv[1]), "name", {}, "abc", False)
if sys.argv[3] != "0":
    service = trackers.used["wandb"].wandb.setup().ensure_service()._proc._process
    service.send_signal(int(sys.argv[3]))
for step in range(3):
    trackers.log({"loss": 1.0}, step)
trackers.keep(Path(sys.argv[1]))
trackers.finish()
"""
BREAKS = [
    ("offline", signal.SIGKILL, r"failed: [^;]+; the run goes on"),
    ("offline", signal.SIGSTOP, "failed: no answer for 2 seconds; the run goes on"),
    ("online", 0, "connection refused: this run is kept offline"),
]


@pytest.mark.runs
@pytest.mark.parametrize("mode, number, said", BREAKS)
def test_a_broken_wandb_ends_no_run_and_holds_up_no_process(tmp_path, mode, number, said):
    """Its service crashes or hangs; the network is dead."""
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    ended = run_python(BROKEN, tmp_path, mode, int(number), WANDB_MODE=mode, **nowhere)
    shown = ended.stdout + ended.stderr
    assert (
        ended.returncode == 0 and len(re.findall(said, shown)) == 1 and "Traceback" not in shown
    ), shown
    assert list((tmp_path / "wandb").glob("offline-run-*-abc/*.wandb"))


OFFLINE_RUN = """
import sys, time
from pathlib import Path
from eagle3.runs.logger import Trackers, Wandb
def children():
    task = Path("/proc/self/task") / str(Path("/proc/self").readlink())
    return len((task / "children").read_text().split())
run_dir = Path(sys.argv[1])
tracker = Trackers("proj", group="grp", mode="offline", tags=["a"], wandb=Wandb)
config = {"optimizer": {"lr": 1e-4}, "hub": {"token": "SESAME"}}
config["overrides"] = ["hub.token=SESAME", "seed=3"]
tracker.start(run_dir, "my run", config, "abc", False)
for step in range(1, 4):
    tracker.log({"loss": 3.0 / step, "accuracy/step_0": 0.1 * step}, step)
tracker.keep(run_dir / "report.html")
tracker.keep(run_dir / "draft")
tracker.table("acceptance", ["position", "accepted"], [[1, 0.75], [2, 0.5]])
before = children()
tracker.finish()
for _ in range(6000):
    if children():
        time.sleep(0.1)
print(before, children())
again = Trackers("proj", mode="offline", wandb=Wandb)
again.start(run_dir / "again", "my run", config, "abc", True)
again.finish()
"""


def offline_records(path):
    """The records of a .wandb file: LevelDB's log format, whose header here is seven bytes, holding
    protobufs.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.runs
def test_an_offline_run_holds_config_and_curves_but_no_secret(tmp_path):
    """In its own process, whose command line holds the secret too; then gone on with."""
    (tmp_path / "report.html").write_text("<!doctype html><title>the report</title>")
    (tmp_path / "again").mkdir()
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text('{"hidden_size": 64}')
    ended = run_python(OFFLINE_RUN, tmp_path, "hub.token=SESAME")
    assert ended.returncode == 0, ended.stderr
    said, counts, _ = ended.stdout.splitlines()
    before, after = counts.split()
    assert int(before) > 0 and int(after) == 0, "finish ends the background service"
    assert said.startswith("logger=wandb: offline; to send it: wandb sync ") and not ended.stderr
    assert list((tmp_path / "again" / "wandb").glob("offline-run-*-abc"))
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    records = offline_records(path)
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, run.run_group) == ("abc", "proj", "grp")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert run.display_name == "my run" and config["hub"] == {"token": REDACTED}
    assert config["overrides"] == [f"hub.token={REDACTED}", "seed=3"]
    curves = []
    for record in records:
        items = record.history.item
        found = {item.key or "/".join(item.nested_key): item.value_json for item in items}
        if "loss" in found:
            curves.append([json.loads(found[key]) for key in ("step", "loss", "accuracy/step_0")])
    assert curves == [[1, 3.0, 0.1], [2, 1.5, 0.2], [3, 1.0, pytest.approx(0.3)]]
    axes = [(record.metric.glob_name, record.metric.step_metric) for record in records]
    assert ("*", "step") in axes
    assert list(run.tags) == ["a"]
    kept = [record.artifact for record in records if record.HasField("artifact")]
    kept += [record.request.log_artifact.artifact for record in records]
    names = {each.name: each.type for each in kept if each.type in ("draft", "report")}
    assert names == {"draft-abc": "draft", "report-abc": "report"}
    (table,) = (folder / "files/media/table").glob("acceptance_*.json")
    assert json.loads(table.read_text())["data"] == [[1, 0.75], [2, 0.5]]
    (page,) = (folder / "files/media/html").glob("report_*.html")
    assert page.read_text() == "<!doctype html><title>the report</title>"
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"SESAME" in path.read_bytes()]
