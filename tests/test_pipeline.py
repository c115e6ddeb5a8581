"""The whole pipeline on an untrained target: what is written, reuse, resuming bit for bit,
interruption, sweeps.
"""

import json
import os
import re
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import (
    TRAIN_ONLY,
    kill_group,
    losses,
    make_config,
    run,
    run_command,
    spec_of,
    start_command,
    stop_after,
    wait_for,
)
from safetensors.torch import load_file

from eagle3.errors import ConfigError, RunError
from eagle3.hidden_states.supply import Online
from eagle3.runs.checkpoint import load_checkpoint, load_draft
from eagle3.target.handle import TargetHandle

pytestmark = pytest.mark.runs
HF = {"_target_": "eagle3.target.hf.HFTarget", "_partial_": True}


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished")
    value = run(settings, run_dir)
    return run_dir, value


def test_everything_is_written(finished, settings):
    run_dir, value = finished
    info = json.loads((run_dir / "run.json").read_text())
    assert info["config"]["optimizer"]["lr"] == 1e-3 and info["overrides"] == settings
    assert torch.__version__.startswith(info["versions"]["torch"]) and info["seeds"] == {"seed": 0}
    assert 0 < info["inputs"]["prepared"]["vocab_coverage"] <= 1
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    named = {
        "loss",
        "loss/step_2",
        "accuracy/step_2",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "supervised_tokens",
    }
    assert named | {"data_wait_fraction", "peak_memory_bytes"} <= trained[0].keys()
    assert trained[-1]["loss"] < trained[0]["loss"]
    evaluated = [row for row in rows if "eval/acceptance_length" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 6] and "eval/accepted_at_3" in evaluated[0]
    checkpoints = run_dir / "checkpoints"
    assert (
        os.readlink(checkpoints / "last") == "step_6"
        and (checkpoints / "best" / "state.json").exists()
    )
    assert load_file(run_dir / "draft" / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    benchmark = json.loads((run_dir / "benchmark.json").read_text())
    (row,) = benchmark["suites"]["heldout"]
    assert row["lossless"] is True and value == row["acceptance_length"] >= 1
    assert "<svg" in (run_dir / "report.html").read_text()


def test_evaluation_and_benchmark_agree(finished):
    """The walk over cached text and real decoding of the exported draft (bf16) see about the same
    drafts.
    """
    run_dir, value = finished
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert abs(evaluation["acceptance_length"]["3"] - value) < 1


def test_the_same_command_gives_the_same_losses_and_reuses_artefacts(finished, settings, tmp_path):
    (cache,) = (o.removeprefix("cache_dir=") for o in settings if o.startswith("cache_dir="))

    def artefacts():
        return {path: path.stat().st_mtime_ns for path in Path(cache).glob("*/*/artefact.json")}

    before = artefacts()
    run([*settings, TRAIN_ONLY], tmp_path / "again")
    assert losses(tmp_path / "again") == losses(finished[0])
    assert before and artefacts() == before


def test_regenerated_answers_feed_prepare(settings, tmp_path, target_folder):
    """The target itself answers both sources of a mix, and only its answers are shown and trained
    on.
    """
    other = tmp_path / "other.jsonl"
    rows = [
        {"instruction": f"Count to {i}.", "output": "The dataset's own answer."} for i in range(20)
    ]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = next(o.removeprefix("data.path=") for o in settings if o.startswith("data.path="))
    sources = f"+data.sources={{one:{{path:{path},weight:0.5}},two:{{path:{other},weight:2}}}}"
    overrides = [
        *[o for o in settings if not o.startswith("data.path=") and o != "data=jsonl"],
        sources, "data.path=null", "data.eval_path=null", "regenerate=builtin",
        "regenerate.max_new_tokens=9", "stages=[regenerate,view,prepare]", "data.num_proc=1",
    ]  # fmt: skip
    run(overrides, tmp_path / "run")
    inputs = json.loads((tmp_path / "run" / "run.json").read_text())["inputs"]
    one, two = inputs["regenerated"]
    assert 8 < one["rows"] < 32 and two["rows"] == 20
    said = [
        json.loads(line)
        for part in (one, two)
        for line in (Path(part["path"]) / "conversations.jsonl").open()
    ]
    assert len(said) == one["answered"] + two["answered"]
    assert not any("own answer" in row["messages"][-1]["content"] for row in said)
    prepared = inputs["prepared"]
    assert prepared["rows"] == len(said) and prepared["documents_per_epoch"] > prepared["documents"]
    shown = re.sub("<[^>]+>", "", (tmp_path / "run" / "view.html").read_text())
    assert "Say alpha" in shown and "own answer" not in shown, "view shows what prepare reads"


def test_wandb_follows_a_run(settings, tmp_path):
    run(
        [*settings, TRAIN_ONLY, "train.max_steps=2", "logger=wandb", "logger.mode=offline"],
        tmp_path,
    )
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert json.loads((tmp_path / "run.json").read_text())["tracker_id"] in recorded.name
    content = recorded.read_bytes()
    assert b"eval/acceptance_length" in content and b"report" in content and b"ttt_steps" in content


def test_a_resumed_window_of_the_log_is_whole(finished, settings, tmp_path, monkeypatch):
    """Stopped between two log lines, the next line still averages all updates since the last."""
    often = [*settings, TRAIN_ONLY, "train.log_every=2"]
    run(often, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit):
            run(often, tmp_path / "stopped")
    run(often, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_run_is_not_resumed_on_other_data(settings, tmp_path, monkeypatch):
    own = tmp_path / "chat.jsonl"
    original = next(s for s in settings if s.startswith("data.path=")).removeprefix("data.path=")
    own.write_text(Path(original).read_text())
    changed = [*settings, TRAIN_ONLY, f"data.path={own}"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(SystemExit):
            run(changed, tmp_path / "run")
    own.write_text("".join(own.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(ConfigError, match=r"the data is \w+, but the checkpoint has \w+"):
        run(changed, tmp_path / "run")


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_stopped_run_goes_on_bit_for_bit(finished, settings, tmp_path, monkeypatch, capsys, how):
    run_dir = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit) as stopped:
            run([*settings, TRAIN_ONLY], run_dir)
    assert stopped.value.code == 130
    assert f"train.resume={run_dir}" in capsys.readouterr().out.replace("\n", "")
    assert os.readlink(run_dir / "checkpoints" / "last") == "step_3"
    torch.manual_seed(12345)  # a new process starts with another state
    run(
        [*settings, TRAIN_ONLY] if how == "auto" else [f"train.resume={run_dir}", TRAIN_ONLY],
        run_dir,
    )
    assert losses(run_dir) == losses(finished[0])
    resumed, whole = (load_checkpoint(d / "checkpoints" / "last") for d in (run_dir, finished[0]))
    assert any(name.endswith("exp_avg_sq") for name in resumed.tensors)
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())
    assert (
        resumed.plain["scheduler"] == whole.plain["scheduler"]
        and resumed.plain["loader"] == whole.plain["loader"]
    )


def test_a_run_is_not_resumed_as_another(finished, settings):
    run_dir, _ = finished
    with pytest.raises(ConfigError, match=r"optimizer\.lr=0\.5 differs .* has 0\.001"):
        make_config([*settings, "optimizer.lr=0.5"], run_dir)
    with pytest.raises(ConfigError, match=r"draft\.ttt_steps=4 differs"):
        make_config([f"train.resume={run_dir}", "draft.ttt_steps=4"], run_dir)
    kept = make_config([f"train.resume={run_dir}", "train.keep_last=9", "stages=[export]"], run_dir)
    assert kept.train.keep_last == 9 and kept.stages == ["export"] and kept.optimizer["lr"] == 1e-3


def test_non_finite_gradients_are_skipped_and_end_the_run(settings, tmp_path, monkeypatch):
    poisoned, count, original = {2}, [0], Online.features

    def features(self, batch):
        found = original(self, batch)
        count[0] += 1
        if count[0] in poisoned or count[0] > 20:
            found.aux_hidden_states[0] = float("nan")
        return found

    monkeypatch.setattr(Online, "features", features)
    run([*settings, TRAIN_ONLY, "train.max_steps=4"], tmp_path / "one")
    rows = [json.loads(line) for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_updates"] for row in rows if "loss" in row] == [0, 1, 1, 1]
    assert all(torch.isfinite(t).all() for t in draft_of(tmp_path / "one").values())
    poisoned.update(range(20))
    count[0] = 0
    with pytest.raises(RunError, match=r"non_finite_batch\.pt"):
        run([*settings, TRAIN_ONLY, "train.max_steps=9"], tmp_path / "many")
    assert (tmp_path / "many" / "non_finite_batch.pt").exists()


def draft_of(run_dir: Path):
    return load_draft(run_dir / "checkpoints" / "last")[1]


def test_checkpoints_are_pruned_but_the_best_is_kept(finished):
    kept = sorted(path.name for path in (finished[0] / "checkpoints").glob("step_*"))
    best = os.readlink(finished[0] / "checkpoints" / "best")
    assert set(kept) == {best, "step_4", "step_6"}


def test_a_cut_checkpoint_says_so(finished, settings, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    (tensors,) = (tmp_path / "checkpoints" / "last").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1000])
    with pytest.raises(
        RunError, match=r"last is damaged .*; to go on from step_4: ln -sfn step_4 .*/last"
    ):
        load_checkpoint(tmp_path / "checkpoints" / "last")


def test_folders_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"cache_dir=.* cannot be written"):
        run([*settings, TRAIN_ONLY, f"cache_dir={tmp_path / 'file' / 'cache'}"], tmp_path / "run")
    result = run_command(*settings, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert result.returncode == 1 and result.stderr.startswith("error: Not a directory"), (
        result.stderr
    )
    assert result.stderr.count("\n") == 1


def test_sweep_makes_a_run_dir_a_job(settings, tmp_path):
    sweep = [
        f"hydra.sweep.dir={tmp_path}",
        "optimizer.lr=1e-4,5e-4",
        "train.max_steps=2",
        TRAIN_ONLY,
    ]
    result = run_command("-m", *settings, *sweep)
    assert result.returncode == 0, result.stderr
    rates = [
        json.loads((tmp_path / n / "run.json").read_text())["config"]["optimizer"]["lr"]
        for n in ("0", "1")
    ]
    assert rates == [1e-4, 5e-4]
    assert all((tmp_path / n / ".hydra" / "config.yaml").exists() for n in ("0", "1"))


def test_terminated_process_leaves_a_resumable_run(settings, tmp_path):
    endless = [*settings, TRAIN_ONLY, "train.max_steps=10000", "train.epochs=3000"]
    process = start_command(endless, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    finally:
        kill_group(process)
    assert process.returncode == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last").plain["update"] >= 3


@pytest.mark.parametrize(
    ("stages", "missing"),
    [("[train]", "prepare"), ("[generate]", "prepare"), ("[prepare,train]", "generate")],
)
def test_a_stage_that_is_not_listed_must_have_left_what_is_read(
    settings, tmp_path, stages, missing
):
    cold = [*settings, f"cache_dir={tmp_path / 'cache'}", f"stages={stages}"]
    with pytest.raises(RunError, match=f"add {missing} to stages"):
        run(cold, tmp_path / "run")
    if missing == "prepare":
        assert not (tmp_path / "cache" / "prepared").exists()


def test_offline_training_names_capture(settings, tmp_path):
    stages = "stages=[prepare,generate,train]"
    with pytest.raises(RunError, match="add capture to stages"):
        run(
            [*settings, stages, "mode=offline", f"cache_dir={tmp_path / 'cache'}"], tmp_path / "run"
        )


def test_a_benchmark_on_ones_own_suite_prepares_nothing(finished, settings, tmp_path):
    suite = tmp_path / "own.jsonl"
    suite.write_text('{"prompt": "Say alpha."}\n')
    overrides = [o for o in settings if not o.startswith("benchmark.suites")]
    overrides += [f"benchmark.suites=['{suite}:1']", f"cache_dir={tmp_path / 'cache'}"]
    overrides += ["stages=[benchmark]", f"draft_path={finished[0] / 'draft'}"]
    assert run(overrides, tmp_path / "run") >= 1
    assert not (tmp_path / "cache" / "prepared").exists()


def test_a_closed_target_leaves_its_memory_to_an_engine(target_folder):
    handle = TargetHandle(spec_of(target_folder), HF, torch.device("cpu"))
    model = weakref.ref(handle.load().model)
    handle.close()
    assert model() is None
