"""What jobs of a sweep share: failures by name, finished jobs, Optuna's study; the command."""

import importlib
import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import TRAIN_ONLY, compose_config, losses, read_jsonl, run, run_command
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import OmegaConf

from eagle3.config import CONF, Sweep, flatten
from eagle3.errors import ConfigError
from eagle3.runs import sweep
from eagle3.runs.resume import sweep_folder
from hydra_plugins import eagle3_optuna
from hydra_plugins.eagle3_optuna import OptunaSweeper


class OddError(Exception):
    code = None  # as the errors of some libraries have


FAILED = {
    "a=1 is wrong": ConfigError("a=1 is wrong"),
    "a=http://<redacted>@host": ConfigError("a=http://me:SESAME@host"),
    "ValueError: x": ValueError("x\nmore"),
    "OddError: OddError": OddError(),
}


def sweep_of(folder, *overrides):
    """A sweep's folder as hydra leaves it."""
    folder.mkdir(exist_ok=True)
    hydra = {"hydra": {"overrides": {"task": list(overrides)}}}
    (folder / "multirun.yaml").write_text(yaml.safe_dump(hydra))
    return folder


def test_bad_jobs_are_named_with_their_sentences(tmp_path, capsys):
    """What they have in common is not repeated; a folder in which no run began goes."""
    folder = sweep_of(tmp_path / "sweep", "x=1,2,3", "y.api_key=<redacted>")
    for number, raised in enumerate(FAILED.values(), start=1):
        with sweep.note_failure(folder / f"{number}", number, [f"x={number}", "y.api_key=SESAME"]):
            raise raised
    (folder / "2" / "run.json").write_text("{}")
    shown = capsys.readouterr().err
    assert "error: a=1 is wrong\n" in shown and "SESAME" not in shown
    lines = sweep.collect_failures(folder)
    assert lines == [f"job {n} (x={n}): {sentence}" for n, sentence in enumerate(FAILED, start=1)]
    assert sorted(path.name for path in folder.rglob("*")) == ["2", "multirun.yaml", "run.json"]
    assert sweep.collect_failures(folder) == []


def test_a_job_that_is_repeated_has_not_failed_yet(tmp_path):
    with sweep.note_failure(tmp_path, 0, []):
        raise ValueError
    with pytest.raises(SystemExit), sweep.note_failure(tmp_path, 0, []):
        raise SystemExit(143)  # a signal ends all jobs
    assert list(tmp_path.iterdir()) == []


FINISHED = {
    "nothing began": (None, False),
    "finished": ({"overrides": ["x=1", "y=2"], "finished": True}, True),
    "stopped": ({"overrides": ["x=1", "y=2"]}, False),
    "in another order": ({"overrides": ["y=2", "sweep=lr", "x=1"], "finished": True}, True),
    "another job": ({"overrides": ["x=3", "y=2"], "finished": True}, None),
}


@pytest.mark.parametrize("case", FINISHED)
def test_finished_jobs_are_known(tmp_path, case):
    recorded, expected = FINISHED[case]
    if recorded:
        (tmp_path / "run.json").write_text(json.dumps(recorded))
    if expected is None:
        with pytest.raises(ConfigError, match="was made by x=3 y=2, not by x=1 y=2; give the comm"):
            sweep.is_finished(tmp_path, ["x=1", "y=2"])
    else:
        assert sweep.is_finished(tmp_path, ["x=1", "y=2"]) == expected


def test_a_trial_without_a_study_is_not_pruned(tmp_path):
    assert not sweep.is_pruned(Sweep(resume=None, trial=3), tmp_path, 1, 1.0)


def test_only_a_sweep_is_gone_on_with(tmp_path):
    with pytest.raises(ConfigError, match="is no folder of a sweep"):
        sweep_folder(str(tmp_path), "unused")
    assert sweep_folder(str(sweep_of(tmp_path)), "unused") == str(tmp_path)


def test_the_command_that_goes_on(monkeypatch, tmp_path):
    given = ["-m", "x=1,2", "a.api_key=SESAME", "hydra.sweep.dir=z", "sweep.resume=y"]
    monkeypatch.setattr("sys.argv", ["run.py", *given])
    assert sweep.how_to_go_on() == "", "no sweep in this process"
    monkeypatch.setattr(sweep, "FOLDERS", [])
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    sweep.NoteFolder().on_multirun_start(config=config, config_name="run")
    again = "python run.py -m x=1,2 'a.api_key=<redacted>'"
    assert sweep.how_to_go_on() == f"; go on with: {again} sweep.resume={tmp_path}"
    assert sweep.own(["sweep=lr", "x=1", "sweep.trial=3"]) == ["x=1"]


def test_a_sweep_that_ends_by_an_error_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    """Such as a launcher's, one of whose processes was killed."""
    monkeypatch.setattr("sys.argv", ["run.py", "-m", "x=1,2"])
    monkeypatch.setattr(sweep, "FOLDERS", [tmp_path])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which it sets
    command = importlib.import_module("run")
    monkeypatch.setattr(command, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(command, "job", lambda: {}["killed"])
    with pytest.raises(KeyError):
        command.main()
    how = f"python run.py -m x=1,2 sweep.resume={tmp_path}"
    assert capsys.readouterr().err == f"the sweep has stopped; go on with: {how}\n"


@pytest.mark.runs
def test_a_sweep_goes_on_after_a_bad_job_and_is_taken_up_again(settings, tmp_path):
    """Each job has a run dir; a finished one is not repeated; the end is a comparison."""
    swept = ["sweep=lr", "optimizer.lr=1e-4,x,5e-4", "train.max_steps=2", TRAIN_ONLY]
    first = run_command(*settings, *swept, f"hydra.sweep.dir={tmp_path}")
    bad, last = first.stderr.splitlines()[-2:]
    assert first.returncode == 1, first.stderr
    assert bad.startswith("job 1 (optimizer.lr=x): optimizer.lr=x is a str"), bad
    assert last.startswith("error: 1 job of the sweep failed; go on with: python run.py model=hf")
    assert last.endswith(f"sweep.resume={tmp_path}")
    for number, rate in ((0, 1e-4), (2, 5e-4)):
        info = json.loads((tmp_path / str(number) / "run.json").read_text())
        assert info["config"]["optimizer"]["lr"] == rate and info["finished"]
        assert (tmp_path / str(number) / ".hydra" / "config.yaml").exists()
    page = (tmp_path / "compare.html").read_text()
    assert "2 runs compared" in page and "optimizer.lr" in page and "0.0005" in page
    before = (tmp_path / "0" / "metrics.jsonl").stat().st_mtime_ns
    swept[1] = "optimizer.lr=1e-4,x,1e-3"
    again = run_command(*settings, *swept, f"sweep.resume={tmp_path}")
    assert f"{tmp_path}/0 is finished" in again.stdout and again.returncode == 1
    assert (tmp_path / "0" / "metrics.jsonl").stat().st_mtime_ns == before
    assert "error: 2 jobs of the sweep failed" in again.stderr
    assert f"{tmp_path}/2 was made by " in again.stderr
    alone = run_command(f"sweep.resume={tmp_path}")
    assert alone.returncode == 2 and "goes on with a sweep: add -m" in alone.stderr


JOBS = {
    "lr": [f"optimizer.lr={rate}" for rate in (5e-5, 1e-4, 2e-4, 4e-4)],
    "lr optimizer.lr=1e-3,2e-3": ["optimizer.lr=0.001", "optimizer.lr=0.002"],
    "ttt_steps": [f"draft.ttt_steps={steps}" for steps in (3, 5, 7, 9)],
    "data": [f"train.data_share={share}" for share in ("0.125", "0.25", "0.5", "1")],
    "drafts": ["draft=eagle3 draft/initial=induction", "draft=eagle3 draft/initial=random"],
}


@pytest.mark.parametrize("given", JOBS)
def test_the_jobs_of_each_sweep_compose(given):
    """As hydra's own sweeper makes them, without -m; further kinds of draft may come."""
    choice, *more = given.split()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("run", [f"sweep={choice}"], return_hydra_config=True)
        assert whole.hydra.mode == RunMode.MULTIRUN
        loader = GlobalHydra.instance().config_loader()
    parser, params = OverridesParser.create(loader), whole.hydra.sweeper.params
    swept = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *more])
    (jobs,) = BasicSweeper.split_arguments(swept, None)
    assert set(JOBS[given]) <= {" ".join(job) for job in jobs}, jobs
    for job in jobs:
        assert flatten(compose_config(f"sweep={choice}", *job))["train.data_share"] <= 1
    if choice == "data":
        assert compose_config("sweep=data").train.max_steps is None


def test_a_missing_optuna_is_named(monkeypatch):
    monkeypatch.setattr(eagle3_optuna.importlib.util, "find_spec", lambda name: None)
    sweeper = OptunaSweeper(2, 1, 1, 0, None)
    with pytest.raises(ConfigError, match=r"package that is missing: optuna; pip install -e '\.\["):
        sweeper.setup(hydra_context=None, task_function=None, config=None)


class Launcher:
    """Jobs that return what `values` has for their numbers."""

    def __init__(self, values):
        self.values, self.launched = values, []

    def launch(self, jobs, initial_job_idx):
        self.launched += jobs
        numbers = range(initial_job_idx, initial_job_idx + len(jobs))
        for number, job in zip(numbers, jobs, strict=True):
            assert job[-1] == f"sweep.trial={number}"
        returned = [self.values.get(number) for number in numbers]
        if KeyboardInterrupt in returned:
            raise KeyboardInterrupt
        return [SimpleNamespace(return_value=value) for value in returned]


@pytest.fixture
def optuna_sweep(tmp_path, monkeypatch):
    """A function: values of jobs by their numbers, the most jobs -> overrides of those launched."""
    pytest.importorskip("optuna")
    context = SimpleNamespace(config_loader=None)
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})

    def go(values, n_trials, n_jobs=1):
        launcher = Launcher(values)
        plugins = SimpleNamespace(instantiate_launcher=lambda **given: launcher)
        monkeypatch.setattr(Plugins, "instance", lambda: plugins)
        params = OmegaConf.create({"a": "tag(log, interval(1e-5, 1e-3))", "b": "choice(5, 7)"})
        sweeper = OptunaSweeper(n_trials, n_jobs, 2, 0, params)
        sweeper.setup(hydra_context=context, task_function=None, config=config)
        try:
            sweeper.sweep(["c=x", "b=range(3,5)"])
        except KeyboardInterrupt:
            return launcher.launched
        return launcher.launched

    return go


def test_optuna_asks_for_values_and_is_told_acceptance(optuna_sweep, tmp_path):
    """The command line's range counts; failed jobs are made up for when the sweep is resumed."""
    jobs = optuna_sweep({0: 2.0, 1: float("nan"), 2: 2.5, 3: KeyboardInterrupt}, 4, n_jobs=1)
    for fixed, a, b, trial in jobs:
        assert fixed == "c=x" and 1e-5 <= float(a.removeprefix("a=")) <= 1e-3
        assert b in ("b=3", "b=4") and trial.startswith("sweep.trial=")
    study = sweep.open_study(tmp_path / sweep.STUDY)
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "RUNNING"]
    assert study.best_trial.number == 2 and study.best_value == 2.5
    resumed = optuna_sweep({3: 2.2, 4: 2.1}, 4, n_jobs=2)
    assert resumed[0] == jobs[3], "the job that was stopped, in its folder"
    assert [job[-1] for job in resumed] == ["sweep.trial=3", "sweep.trial=4"]
    assert optuna_sweep({}, 4) == [], "nothing is left to do"


@pytest.mark.runs
def test_a_trial_behind_the_others_median_ends_early(settings, tmp_path):
    """It keeps its evaluation and has no draft; someone may go on with it by hand."""
    optuna = pytest.importorskip("optuna")
    study = sweep.open_study(tmp_path / sweep.STUDY, 0, 1)
    good = study.ask()
    for update in (2, 4, 6):
        good.report(1.0 if update == 2 else 9.0, update)
    study.tell(good, 9.0)
    study.ask()
    given = [*settings, "sweep.trial=1", "stages=[prepare,generate,train,export,benchmark]"]
    acceptance = run(given, tmp_path / "1")
    assert max(losses(tmp_path / "1")) == 4 and not (tmp_path / "1" / "draft").exists()
    assert json.loads((tmp_path / "1" / "run.json").read_text())["finished"]
    ended = study.trials[1]
    assert ended.state == optuna.trial.TrialState.PRUNED and 1 <= acceptance < 9
    logged = read_jsonl(tmp_path / "1" / "metrics.jsonl")
    measured = {r["step"]: r["eval/acceptance_length"] for r in logged if "eval/loss" in r}
    assert ended.intermediate_values == measured
    run(given, tmp_path / "1")
    assert max(losses(tmp_path / "1")) == 6 and (tmp_path / "1" / "draft").exists()
