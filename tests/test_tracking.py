"""run.json and what stages print: a first start, a resumed run, a run that fails."""

import io
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import compose_config
from omegaconf import OmegaConf
from rich.console import Console

from eagle3.errors import ConfigError, RunError
from eagle3.runs import artefact as artefact_module
from eagle3.runs import tracking
from eagle3.runs.artefact import artefact, fingerprint
from eagle3.runs.logger import REDACTED, NoTracker
from eagle3.runs.resume import command_to_resume
from eagle3.runs.tracking import Tracking, git_commit, read_acceptance, track_run

pytestmark = pytest.mark.runs  # git is a process
FACTS = {"rows": 9006, "documents": 9000, "vocab_coverage": 0.87654321, "digest": "abc"}
FACTS |= {"rejected": {"[no] turn": 6}, "repaired": {}}


class Recorder(NoTracker):
    """Keeps the names of its calls, and what `start` was given."""

    def start(self, *given):
        self.given, self.ended, self.shown = given, [], []

    def keep(self, path):
        self.shown.append(path.name)

    def table(self, name, columns, rows):
        self.shown.append((name, rows))

    def finish(self, exit_code=0):
        self.ended.append(exit_code)


def arguments(run_dir, overrides=()):
    config = OmegaConf.to_object(compose_config("model=hf", "model.path=x", "seed=3"))
    config.regenerate["extra_body"], config.stages = {"api_key": "SESAME"}, ["prepare", "train"]
    return config, run_dir, list(overrides)


def track(run_dir, overrides):
    console = Console(file=io.StringIO(), markup=False, soft_wrap=True)
    return Tracking(*arguments(run_dir, overrides), Recorder(), console)


def test_a_resumed_run_keeps_how_it_was_started_and_a_listed_stage_prints(tmp_path):
    first = track(tmp_path, ["seed=3", "hub.token=SESAME"])
    first.note("prepare", (Path("some_folder"), FACTS))
    first.note("generate", (tmp_path, {"answers": 3}))
    lines = [line.split() for line in first.console.file.getvalue().splitlines()]
    counts = {" ".join(words[:-1]): words[-1] for words in lines[:-2] if len(words) > 1}
    assert counts == {"rows": "9,006", "documents": "9,000", "vocab coverage": "0.8765"}
    rejected = ["prepare:", "rejected", "6", "x", "[no]", "turn"]
    assert lines[-2:] == [["prepare:", "some_folder"], rejected]
    resumed = track(tmp_path, ["train.resume=x"])
    run_id, goes_on = resumed.tracker.given[3:]
    assert run_id == first.tracker.given[3] and goes_on, "the run at the tracker goes on too"
    assert resumed.tracker.given[1] == "test seed=3 token=redacted"
    resumed.note("generate", (tmp_path, {"answers": 4}))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["overrides"] == ["seed=3", f"hub.token={REDACTED}"]
    assert content["resumed_with"] == ["train.resume=x"] and content["tracker_id"] == run_id
    assert content["config"]["regenerate"]["extra_body"] == {"api_key": REDACTED}
    assert content["seeds"] == {"seed": 3}
    assert content["inputs"]["prepared"] == FACTS | {"path": "some_folder"}
    assert content["inputs"]["generated"] == {"answers": 4, "path": str(tmp_path)}
    assert {"torch", "python"} <= content["versions"].keys()


@pytest.mark.parametrize("fails", [True, False])
def test_the_tracker_ends_with_the_run(tmp_path, monkeypatch, fails):
    tracker, console = Recorder(), Console(file=io.StringIO())
    monkeypatch.setattr(tracking, "instantiate", lambda node: tracker)
    with suppress(KeyError), track_run(*arguments(tmp_path), torch.device("cpu"), console):
        content = json.loads((tmp_path / "run.json").read_text())
        assert content["hardware"]["device"] == "cpu"
        if fails:
            raise KeyError
    assert tracker.ended == [int(fails)] and (tmp_path / "report.html").exists() != fails
    assert tracker.shown == ([] if fails else ["report.html"])


def test_a_tracker_gets_the_draft_the_report_and_acceptance_by_position(tmp_path, monkeypatch):
    tracker, console = Recorder(), Console(file=io.StringIO())
    monkeypatch.setattr(tracking, "instantiate", lambda node: tracker)
    config, *given = arguments(tmp_path)
    config.stages = ["export"]
    rows = [{"config": [1, 2, 1, 3], "acceptance_length": 2.5, "accepted_by_position": [0.9]}]
    evaluation = {"acceptance_length": {"1": 1.5}, "draft_length": 1, "accepted_at": [0.5, 0.25]}
    evaluation["sampled"] = {"1": {"acceptance_length": {"1": 1.25}, "accepted_at": [0.25]}}
    with track_run(config, *given, torch.device("cpu"), console) as noted:
        noted.finish("export")
        (tmp_path / "benchmark.json").write_text(json.dumps({"suites": {"a": rows}}))
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    held_out = [["held-out prompts", "walked", k, share] for k, share in ((1, 0.5), (2, 0.25))]
    held_out.append(["held-out prompts, temperature 1", "walked", 1, 0.25])
    table = "acceptance_by_position", [*held_out, ["a", "[1, 2, 1, 3]", 1, 0.9]]
    assert tracker.shown == ["report.html", "draft", table]


NAMES = [
    ([], "n"),
    (["optimizer.lr=1e-4", "+draft.ttt_steps=5", "seed=1"], "n lr=1e-4 ttt_steps=5 seed=1"),
    (["name=n", "cache_dir=/x", "logger=wandb", "logger.mode=offline", "hydra.run.dir=/y"], "n"),
    (["data.path=s3://key:word@host/a/chat.jsonl", "model=hf"], "n path=chat model=hf"),
    (["hub.token=SESAME"], "n token=redacted"),
    (["data.path=" + "x" * 200], "n path=" + "x" * 121),
]


@pytest.mark.parametrize("overrides, name", NAMES)
def test_a_tracker_names_a_run_by_its_overrides(overrides, name):
    assert tracking.run_name("n", overrides) == name


FAILURES = [
    (
        RunError("a"),
        "a; when that is mended, go on with: python run.py seed=3 'stages=[generate]'",
        "",
    ),
    (
        ConfigError("b"),
        "b; when that is mended, go on with: python run.py seed=3 'stages=[generate]'",
        "",
    ),
    (RunError("c; go on with: that"), "c; go on with: that", ""),
    (MemoryError("d"), "d", "go on with: python run.py seed=3 'stages=[generate]'"),
    (KeyboardInterrupt("e"), "e", ""),  # which run.py ends in the command
]


@pytest.mark.parametrize("error, said, printed", FAILURES)
def test_a_run_that_fails_late_is_reported_with_the_command_that_goes_on(
    tmp_path, monkeypatch, error, said, printed
):
    """The command takes a second to find, and is not looked for where it is not said."""
    asked = []

    def command(*given):
        asked.append(given)
        return command_to_resume(*given)

    monkeypatch.setattr("eagle3.runs.tracking.command_to_resume", command)
    console = Console(file=io.StringIO(), width=200, markup=False)
    config, *given = arguments(tmp_path, ["seed=3", "stages=[prepare,generate]"])
    config.stages = ["prepare", "generate"]
    with (
        pytest.raises(type(error)) as raised,
        track_run(config, *given, torch.device("cpu"), console) as tracking,
    ):
        tracking.finish("prepare")
        raise error
    lines = console.file.getvalue()
    assert (tmp_path / "report.html").exists() and f"report: {tmp_path}" in lines
    assert str(raised.value) == said and lines.count("go on with") == bool(printed)
    assert printed in lines and len(asked) == ("seed=3" in said + printed)


def test_the_command_that_goes_on_repeats_what_is_left(tmp_path):
    """Also what lets a run start programs, which is given again."""
    config = compose_config("benchmark.execute_code=true", "stages=[export,train,benchmark]")
    started = Tracking(OmegaConf.to_object(config), tmp_path, [], Recorder(), Console())
    started.write()
    started.finish("prepare")
    assert started.left == ["train", "export", "benchmark"]
    started.finish("export")
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    command = f"python run.py train.resume={tmp_path} 'stages=[benchmark]'"
    command += " ++benchmark.execute_code=true"
    assert command_to_resume(tmp_path, [], started.left) == command
    assert "SESAME" not in command_to_resume(tmp_path / "none", ["+hub.token=SESAME"])


def test_stages_behind_regenerate_read_its_answers_again(tmp_path):
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    given, device = arguments(tmp_path), torch.device("cpu")
    given[0].stages = ["benchmark", "regenerate", "prepare"]
    with (
        pytest.raises(RunError) as raised,
        track_run(*given, device, Console(file=io.StringIO())) as tracking,
    ):
        tracking.finish("prepare")
        raise RunError("a")
    assert str(raised.value).endswith(f"resume={tmp_path} 'stages=[regenerate,benchmark]'")


def test_the_acceptance_of_a_run_is_the_drafts_own(tmp_path):
    assert read_acceptance(tmp_path) is None
    evaluation = {"acceptance_length": {"1": 1.5, "2": 2.0}, "draft_length": 2}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert read_acceptance(tmp_path) == 2.0
    rows = [{"config": [1, 0, 0, 0]}, {"config": [1, 3, 1, 4], "acceptance_length": 2.5}]
    (tmp_path / "benchmark.json").write_text(json.dumps({"suites": {"a": rows}}))
    assert read_acceptance(tmp_path) == 2.5


def test_the_commit_says_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True)

    file = tmp_path / "record.py"
    monkeypatch.setattr(tracking, "__file__", str(file))
    assert git_commit() is None
    git("init", "-q")
    file.write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    git("tag", "v1")
    commit = git_commit()
    assert len(commit) == 40
    file.write_text("2")
    assert git_commit() == commit + "+"


def made(folder, stage="prepare", **inputs):
    """The artefact of `inputs`, written where it is not there."""

    def write(folder):
        (folder / "file").write_text("content")
        return {}

    return artefact(str(folder), "prepared", inputs, write, stage)


FIRST = {
    "data.max_length": 2048,
    "chat": {"template": "t" * 50, "options": {}},
    "files": [[1, "a"]],
}
FIRST |= {"aux_layer_ids": [1, 2, 3], "dtype": "float32", "data.system_prompt": None}
PROMPTS = [{"input_ids": [5, 6, 7]}] * 4
# Other inputs, and what is said of them.
NEAR = [
    ({"data.max_length": 1024}, "data.max_length 2048 -> 1024"),
    (
        {"dtype": "bfloat16", "aux_layer_ids": (1, 2, 4)},
        "[1, 2, 3] -> [1, 2, 4], dtype float32 -> ",
    ),
    ({"chat": {"template": "u", "options": {}}}, "chat.template (changed)"),
    ({"chat": FIRST["chat"] | {"options": {"a": True}}}, "chat.options.a null -> true"),
    ({"files": PROMPTS}, "files 1 -> 4"),
    ({"files": [PROMPTS[0]]}, "files (changed)"),
    ({"data.system_prompt": "Be as brief as you can."}, "data.system_prompt (changed)"),
    ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "dtype": "x"}, "c null -> 3 and 2 more\n"),
]


def test_runs_that_start_together_make_an_artefact_once(tmp_path, monkeypatch):
    """The second says that it waits, and finds what the first has made."""
    begun, told, written = threading.Event(), threading.Event(), []

    def note(line):
        if line == f"prepare: another run makes {fingerprint({'a': 1})}; waiting for it":
            told.set()

    def write(folder):
        written.append(folder)
        begun.set()
        assert told.wait(60)
        return {}

    monkeypatch.setattr(artefact_module, "print", note, raising=False)
    asked = str(tmp_path), "prepared", {"a": 1}, write, "prepare"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(artefact, *asked)
        assert begun.wait(60)
        second = pool.submit(artefact, *asked)
        assert first.result() == second.result() and len(written) == 1


@pytest.mark.parametrize("changes, words", NEAR)
def test_what_sets_an_artefact_apart_from_the_nearest(tmp_path, capsys, changes, words):
    near, _ = made(tmp_path, **FIRST), made(tmp_path, **dict.fromkeys(FIRST, "other"))
    capsys.readouterr()
    made(tmp_path, **FIRST | changes)
    said = capsys.readouterr().out
    assert said.startswith(f"prepare: not the one of {near}: ") and words in said
    assert said.count("\n") == 1


def test_what_another_run_is_making_is_not_looked_at(tmp_path, capsys, monkeypatch):
    near = made(tmp_path, **FIRST)
    near.with_name("other.partial").mkdir()  # and may be renamed at any moment
    monkeypatch.setattr(os.path, "getmtime", {near: 0.0}.__getitem__)
    made(tmp_path, **FIRST | {"data.max_length": 1})
    assert f"prepare: not the one of {near}: " in capsys.readouterr().out


def test_an_artefact_that_is_used_again_says_so_once(tmp_path, capsys, monkeypatch):
    path = made(tmp_path, **FIRST)
    assert capsys.readouterr().out == "", "nothing is near in an empty cache"
    made(tmp_path, **FIRST)
    assert capsys.readouterr().out == f"prepare: reused {path}\n"
    monkeypatch.setenv("RANK", "1")
    for inputs in (FIRST, {"a": 1}):
        made(tmp_path, **inputs)
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    (path / "artefact.json").write_text("{")  # of no use, but no reason to end
    made(tmp_path, **FIRST | {"data.max_length": 1})
    assert capsys.readouterr().out.startswith("prepare: not the one of ")
