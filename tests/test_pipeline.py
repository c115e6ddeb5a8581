"""The whole pipeline on an untrained target: what is written, reuse, resuming bit for bit,
interruption.
"""

import json
import os
import re
import shlex
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    TRAIN_ONLY,
    handle_of,
    kill_group,
    losses,
    read_jsonl,
    run,
    run_command,
    start_command,
    stop_after,
    wait_for,
    write_jsonl,
)
from safetensors.torch import load_file

from eagle3 import pipeline
from eagle3.benchmark.builtin import Builtin
from eagle3.errors import ConfigError, RunError
from eagle3.hidden_states.supply import Online
from eagle3.runs.checkpoint import load_checkpoint, load_draft
from eagle3.train import Trainer

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def given(settings):
    """A line of the log is the mean of two updates."""
    return [*settings, "train.log_every=2", "train.best_by=[0,1]"]


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    value = run([*given, "logger=wandb", "logger.mode=offline"], run_dir)
    return run_dir, value


def test_a_draft_is_pushed_at_the_end(finished, tmp_path, monkeypatch):
    run_dir, pushed = shutil.copytree(finished[0], tmp_path / "run", symlinks=True), []
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(pipeline, "push", lambda *given: pushed.append(given))
    given = [f"train.resume={run_dir}", "stages=[export]", "export.push_to_hub=me/draft"]
    run(given, run_dir)
    ((_, report, repository, command),) = pushed
    assert report.exists() and repository == "me/draft"
    assert command == f"python run.py train.resume={run_dir} 'stages=[export]'"
    text = (run_dir / "draft" / "README.md").read_text()
    assert "--speculative-draft-model-path me/draft" in text and "| heldout |" in text


def option(settings, name):
    return next(o.removeprefix(f"{name}=") for o in settings if o.startswith(f"{name}="))


def test_everything_is_written(finished, given):
    run_dir, value = finished
    info = json.loads((run_dir / "run.json").read_text())
    assert info["config"]["optimizer"]["lr"] == 1e-3 and info["overrides"][: len(given)] == given
    assert torch.__version__.startswith(info["versions"]["torch"]) and info["seeds"] == {"seed": 0}
    assert 0 < info["inputs"]["generated"]["vocab_coverage"] <= 1
    rows = read_jsonl(run_dir / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [2, 4, 6]
    named = "loss loss/step_2 accuracy/step_2 lr grad_norm tokens_per_second supervised_tokens"
    assert {*named.split(), "data_wait_fraction", "peak_memory_bytes"} <= trained[0].keys()
    first = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    documented = re.findall(r"`(\S+)`", " ".join(first))
    logged = {re.sub(r"_\d+$", "_k", key) for row in rows for key in row} - {"step"}
    logged = {re.sub(r"_t[\d.]+$", "_tT", key) for key in logged}
    others = "suite config position accepted mfu tokens seconds eval/acceptance_length_tT"
    assert logged | {*others.split()} == {*documented}
    assert trained[-1]["loss"] < trained[0]["loss"]
    evaluated = [row for row in rows if "eval/acceptance_length" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 6] and "eval/accepted_at_3" in evaluated[0]
    checkpoints, names = run_dir / "checkpoints", ("", "_t1")
    assert os.readlink(checkpoints / "last") == "step_6"
    means = [sum(row[f"eval/acceptance_length{name}"] for name in names) for row in evaluated]
    best = [2, 4, 6][means.index(max(means))]
    assert os.readlink(checkpoints / "best") == f"step_{best}"
    assert (checkpoints / "best" / "state.json").exists()
    kept = {path.name for path in checkpoints.glob("step_*")}
    assert kept == {os.readlink(checkpoints / "best"), "step_4", "step_6"}
    assert load_file(run_dir / "draft" / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    (row,) = json.loads((run_dir / "benchmark.json").read_text())["suites"]["heldout"]
    assert row["lossless"] is True and value == row["acceptance_length"] >= 1
    assert "| heldout | 1, 3, 1, 4 | 2 |" in (run_dir / "draft" / "README.md").read_text()
    # The walk over cached text and real decoding of the exported draft (bf16) see about the same.
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert abs(evaluation["acceptance_length"]["3"] - value) < 1
    (measured,) = [row for row in evaluated if row["step"] == evaluation["update"] == best]
    sampled = evaluation["sampled"]["1"]
    assert measured["eval/acceptance_length_t1"] == sampled["acceptance_length"]["3"] > 1
    assert sampled["acceptance_length"]["3"] == sum(sampled["tokens"]) / sum(sampled["rounds"])
    assert "<svg" in (run_dir / "report.html").read_text()
    (recorded,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    content = recorded.read_bytes()
    assert info["tracker_id"] in recorded.name
    assert all(word in content for word in (b"eval/acceptance_length", b"report", b"ttt_steps"))


def test_a_variant_of_the_draft_is_exported_and_decoded(given, tmp_path):
    asked = "draft=eagle31", "model.aux_layer_ids=[0,1,3,4,6]", "train.max_steps=2"
    run([*given, *asked], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "draft" / "config.json").read_text())
    expected = {"fc_norm": True, "norm_output": True, "num_aux_hidden_states": 5}
    assert expected.items() <= config.items()
    tensors = load_file(tmp_path / "run" / "draft" / "model.safetensors")
    assert tensors["fc_norm.4.weight"].shape == (64,) and tensors["fc.weight"].shape == (64, 320)
    benchmark = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert benchmark["suites"]["heldout"][0]["lossless"] is True


def test_the_same_command_gives_the_same_losses_and_reuses_artefacts(finished, given, tmp_path):
    cache = Path(option(given, "cache_dir"))

    def artefacts():
        return {path: path.stat().st_mtime_ns for path in cache.glob("*/*/artefact.json")}

    before = artefacts()
    run([*given, TRAIN_ONLY], tmp_path / "again")
    assert losses(tmp_path / "again") == losses(finished[0])
    assert before and artefacts() == before


def test_a_stopped_run_goes_on_bit_for_bit_and_on_no_other_data(
    finished, given, tmp_path, monkeypatch, capsys
):
    """Stopped between two lines of the log, of which the next still averages all updates."""
    run_dir, own = tmp_path / "stopped", tmp_path / "chat.jsonl"
    text = Path(option(given, "data.path")).read_text()
    own.write_text(text)
    again = [*given, TRAIN_ONLY, f"data.path={own}"]
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit) as stopped:
            run(again, run_dir)
    assert stopped.value.code == 130
    before, _, said = capsys.readouterr().out.partition("stopped after update 3 of 6, which is")
    assert f"train.resume={run_dir}\n" in said and not before.endswith("\n\n")
    assert os.readlink(run_dir / "checkpoints" / "last") == "step_3"
    own.write_text("".join(text.splitlines(keepends=True)[:-3]))
    with pytest.raises(ConfigError, match=r"the data is \w+, but the checkpoint has \w+"):
        run(again, run_dir)
    own.write_text(text)
    torch.manual_seed(12345)  # a new process starts with another state
    run([f"train.resume={run_dir}", TRAIN_ONLY], run_dir)
    assert losses(run_dir) == losses(finished[0])
    resumed, whole = (load_checkpoint(d / "checkpoints" / "last") for d in (run_dir, finished[0]))
    assert any(name.endswith("exp_avg_sq") for name in resumed.tensors)
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    for name in ("scheduler", "loader"):
        assert resumed.plain[name] == whole.plain[name]


def test_a_second_interrupt_leaves_the_last_checkpoint(settings, tmp_path, monkeypatch):
    original = Trainer.train_update

    def train_update(self, *given, **named):
        if self.update == 5:
            raise KeyboardInterrupt
        return original(self, *given, **named)

    monkeypatch.setattr(Trainer, "train_update", train_update)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run([*settings, TRAIN_ONLY], tmp_path / "run")
    assert stopped.value.kept in ("train keeps 2 of 6 updates", "train keeps 4 of 6 updates")


def test_a_plan_and_a_refused_config_leave_a_run_as_it_was(finished):
    def content():
        files = [path for path in finished[0].rglob("*") if path.is_file() and path.name != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = content()
    for given, exit_code in (("plan=true", 0), ("optimizer.lr=5", 2)):
        done = run_command(f"train.resume={finished[0]}", given)
        assert done.returncode == exit_code, done.stderr
        assert content() == before


def test_regenerated_answers_feed_prepare(settings, tmp_path):
    """The target itself answers both sources of a mix, and only its answers are shown and trained
    on.
    """
    answer = "The dataset's own answer."
    rows = [{"instruction": f"Count to {i}.", "output": answer} for i in range(20)]
    other = write_jsonl(tmp_path / "other.jsonl", *rows)
    one = f"one:{{path:{option(settings, 'data.path')},weight:0.5}}"
    overrides = [
        *[o for o in settings if not o.startswith("data.path=") and o != "data=jsonl"],
        f"+data.sources={{{one},two:{{path:{other},weight:2}}}}", "data.path=null",
        "data.eval_path=null", "regenerate=builtin", "regenerate.max_new_tokens=9",
        "stages=[regenerate,view,prepare]", "data.num_proc=1",
    ]  # fmt: skip
    run(overrides, tmp_path / "run")
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    one, two = inputs["regenerated"]
    assert 8 < one["rows"] < 32 and two["rows"] == 20
    paths = [Path(part["path"]) / "conversations.jsonl" for part in (one, two)]
    said = [row for path in paths for row in read_jsonl(path)]
    assert len(said) == one["answered"] + two["answered"]
    assert not any("own answer" in row["messages"][-1]["content"] for row in said)
    prepared = inputs["prepared"]
    assert prepared["rows"] == len(said) and prepared["documents_per_epoch"] > prepared["documents"]
    shown = re.sub("<[^>]+>", "", (tmp_path / "run" / "view.html").read_text())
    assert "Say alpha" in shown and "own answer" not in shown, "view shows what prepare reads"


def test_non_finite_gradients_are_skipped_and_end_the_run(settings, tmp_path, monkeypatch, capsys):
    poisoned, count, original = {2}, [0], Online.features

    def features(self, batch):
        found = original(self, batch)
        count[0] += 1
        if count[0] in poisoned:
            found.aux_hidden_states[0] = float("nan")
        return found

    monkeypatch.setattr(Online, "features", features)
    run([*settings, TRAIN_ONLY, "train.max_steps=4"], tmp_path / "one")
    trained = [row for row in read_jsonl(tmp_path / "one" / "metrics.jsonl") if "loss" in row]
    assert [row["skipped_updates"] for row in trained] == [0, 1, 1, 1]
    assert "train: 1 of 4 updates were skipped: " in capsys.readouterr().out
    weights = load_draft(tmp_path / "one" / "checkpoints" / "last")[1]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    poisoned.update(range(99))
    with pytest.raises(RunError, match=r"non_finite_batch\.pt"):
        run([*settings, TRAIN_ONLY, "train.max_steps=9"], tmp_path / "many")
    assert (tmp_path / "many" / "non_finite_batch.pt").exists()


@pytest.mark.parametrize("stage", ["check", "benchmark"])
def test_a_draft_that_is_not_there(settings, tmp_path, stage):
    cold = [*settings, f"stages=[prepare,{stage}]", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ConfigError, match=r"no draft at .*draft; set draft_path="):
        run(cold, tmp_path / "run")
    assert not (tmp_path / "cache").exists(), "it is missed before the first stage"


def test_a_start_that_is_no_draft_is_missed_before_the_first_stage(settings, tmp_path):
    wrong = [f"draft.init_from={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(RunError, match=r"draft at .* cannot be read: .*config\.json"):
        run([*settings, *wrong], tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_kernels_that_cannot_run_are_missed_before_the_first_stage(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("eagle3.kernels.fused.has_triton", lambda: False)
    fused = ["draft/kernels=fused", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(ConfigError, match="draft/kernels=fused needs Triton"):
        run([*settings, *fused], tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_questions_are_read_before_the_first_stage(settings, tmp_path):
    suite = write_jsonl(tmp_path / "own.jsonl", {"prompt": "one"}, {"nothing": 1})
    own = [f"benchmark.suites=['{suite}:1']", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(RunError, match=r"line 2: no question .*no messages; it has 'nothing'\)"):
        run([*settings, *own], tmp_path / "run")
    assert not (tmp_path / "cache").exists()


def test_a_failed_benchmark_is_repeated_alone(settings, tmp_path, monkeypatch, capsys):
    """Behind what was trained, which is reported."""
    run_dir, short = tmp_path / "run", [*settings, "train.max_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Builtin, "open", fail)
        with pytest.raises(RunError) as failed:
            run(short, run_dir)
    message, _, command = str(failed.value).partition("; when that is mended, go on with: ")
    assert message == "no more" and "held-out prompts" in capsys.readouterr().out
    assert "no benchmark was measured" in (run_dir / "report.html").read_text()
    trained = losses(run_dir)
    overrides = shlex.split(command)[2:]
    assert overrides == [f"train.resume={run_dir}", "stages=[benchmark]"]
    assert run(overrides, run_dir) >= 1
    assert "no benchmark was measured" not in (run_dir / "report.html").read_text()
    assert losses(run_dir) == trained


def fail(*arguments):
    raise RunError("no more")


def test_folders_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"cache_dir=.* cannot be written"):
        run([*settings, TRAIN_ONLY, f"cache_dir={tmp_path / 'file' / 'cache'}"], tmp_path / "run")
    result = run_command(*settings, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    said = result.stderr
    assert result.returncode == 1 and said.startswith("error: Not a directory"), said
    assert said.count("\n") == 1


def test_sweep_makes_a_run_dir_a_job(settings, tmp_path):
    """Which a tracker takes for a group; whatever is printed is ours."""
    sweep = [f"hydra.sweep.dir={tmp_path}", "optimizer.lr=1e-4,5e-4", "train.max_steps=2"]
    tracker = ["logger=wandb", "logger.mode=disabled"]
    result = run_command("-m", *settings, *sweep, *tracker, TRAIN_ONLY)
    assert result.returncode == 0 and not result.stderr, result.stderr
    end = r"^train: 2 updates, \S+ tokens, .* tokens/s, loss \S+, accuracy 0\.\d\d to 0\.\d\d, "
    end += r"memory \S+ GB, acceptance \d\.\d{3}, in \d"
    assert len(re.findall(end, result.stdout, re.M)) == 2, result.stdout
    for number, rate in enumerate((1e-4, 5e-4)):
        info = json.loads((tmp_path / str(number) / "run.json").read_text())
        assert info["config"]["optimizer"]["lr"] == rate
        assert info["config"]["logger"]["group"] == f"{tmp_path.parent.name} {tmp_path.name}"
        assert (tmp_path / str(number) / ".hydra" / "config.yaml").exists()


def test_terminated_process_leaves_a_resumable_run(settings, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start_command([*settings, TRAIN_ONLY], tmp_path / "run", pause_at=3)
    try:
        wait_for(lambda: metrics.exists() and len(losses(tmp_path / "run")) == 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    finally:
        kill_group(process)
    assert process.returncode == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last").plain["update"] == 4


@pytest.mark.parametrize(
    ("stages", "mode", "missing"),
    [
        ("train", "online", "prepare"),
        ("generate", "online", "prepare"),
        ("prepare,train", "online", "generate"),
        ("prepare,generate,train", "offline", "capture"),
    ],
)
def test_a_stage_that_is_not_listed_must_have_left_what_is_read(
    settings, tmp_path, stages, mode, missing
):
    cold = [*settings, f"cache_dir={tmp_path / 'cache'}", f"stages=[{stages}]", f"mode={mode}"]
    with pytest.raises(RunError, match=f"add {missing} to stages"):
        run(cold, tmp_path / "run")
    assert (tmp_path / "cache" / "prepared").exists() == ("prepare" in stages)


@pytest.mark.parametrize("warm", [False, True])
def test_a_benchmark_on_ones_own_suite_prepares_nothing(finished, settings, tmp_path, warm):
    """The bigram is counted in what is prepared, where that is there."""
    suite = tmp_path / "own.jsonl"
    suite.write_text('{"prompt": "Say alpha."}\n')
    overrides = [o for o in settings if not o.startswith("benchmark.suites")]
    overrides += [f"benchmark.suites=['{suite}:1']"]
    overrides += ["stages=[benchmark]", f"draft_path={finished[0] / 'draft'}"]
    overrides += [] if warm else [f"cache_dir={tmp_path / 'cache'}", "data.path=moved.jsonl"]
    assert run(overrides, tmp_path / "run") >= 1
    assert not (tmp_path / "cache" / "prepared").exists()
    benchmark = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    (row,) = benchmark["suites"][str(suite)]
    assert ("bigram" in row) is warm


def test_a_closed_target_leaves_its_memory_to_an_engine(target_folder):
    handle = handle_of(target_folder)
    model = weakref.ref(handle.load().model)
    handle.close()
    assert model() is None
