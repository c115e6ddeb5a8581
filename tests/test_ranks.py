"""Runs of several processes as users start them: equal to one process, stopped, killed and gone on
with otherwise.
"""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, TRAIN_ONLY, kill_group, losses, run, run_command, start_command, wait_for

from eagle3.parallel import ranks
from eagle3.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.runs
FIXED = [  # three updates an epoch
    TRAIN_ONLY, "launch.threads=1", "train.documents_per_update=12", "train.epochs=20",
    "train.eval_every=15",
]  # fmt: skip
WHOLE, TWO = [*FIXED, "train.max_steps=30"], "launch.nproc_per_node=2"


@pytest.fixture
def start():
    """`start_command`, of which nothing is left behind when the test ends."""
    started = []

    def start(*given, **options):
        started.append(start_command(*given, **options))
        return started[-1]

    yield start
    for process in started:
        kill_group(process)
        process.communicate()


def logged(run_dir):
    path = run_dir / "metrics.jsonl"
    return losses(run_dir) if path.exists() else {}


def is_alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rsplit(")")[-1].split()[0]
    except FileNotFoundError:
        return False


def pid_of(run_dir, rank):
    return json.loads((run_dir / "logs" / f"rank_{rank}.json").read_text())["pid"]


def last_checkpoint(run_dir):
    return load_checkpoint(run_dir / "checkpoints" / "last")


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    run([*settings, *WHOLE], run_dir)
    return losses(run_dir)


def stop(process, run_dir, updates, how):
    """End a paused run; returns what it says."""
    wait_for(lambda: len(logged(run_dir)) >= updates, process)
    pids = [pid_of(run_dir, rank) for rank in (0, 1)]
    how(process, pids)
    _, errors = process.communicate(timeout=600)
    assert not any(map(is_alive, pids))
    assert "Traceback" not in errors and "Terminating" not in errors, errors[-2000:]
    return errors


def test_a_stopped_run_of_two_goes_on_in_one_process(alone, settings, tmp_path, start):
    """USP over two ranks, online; SIGTERM after some updates; one process goes on, and all is as if
    it had begun.
    """
    run_dir = tmp_path / "run"
    usp = ["parallel=usp", "parallel.ulysses=2"]
    process = start([*settings, *WHOLE, TWO, *usp], run_dir, pause_at=2)
    errors = stop(process, run_dir, 2, lambda process, pids: process.send_signal(signal.SIGTERM))
    assert process.returncode == 143, errors[-2000:]
    assert f"go on with: python run.py train.resume={run_dir}" in errors
    assert "death signal" not in errors, "the launcher's own words"
    assert max(logged(run_dir)) == last_checkpoint(run_dir).plain["update"] == 3
    run([f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1", "parallel=ddp"], run_dir)
    assert losses(run_dir) == pytest.approx(alone, rel=1e-4)


def test_a_killed_rank_ends_the_run_and_it_goes_on(alone, settings, tmp_path, start):
    """Two ranks keep what they compute (hybrid); one is killed in the second epoch."""
    run_dir, kept = tmp_path / "run", f"hidden_states.path={tmp_path / 'kept'}"
    hybrid = [*settings, *WHOLE, TWO, "mode=hybrid", "hidden_states.dtype=fp32", kept]
    process = start([*hybrid, "train.save_every=1"], run_dir, pause_at=4)
    errors = stop(process, run_dir, 4, lambda process, pids: os.kill(pids[1], signal.SIGKILL))
    assert process.returncode == 1
    said = r"^error: process 1 was killed by SIGKILL .* train\.resume=\S+$"
    assert re.search(said, errors, re.M), errors[-2000:]
    assert last_checkpoint(run_dir).plain["update"] in (3, 4)
    run([f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1"], run_dir)
    assert losses(run_dir) == pytest.approx(alone, rel=1e-4)


def test_stages_around_the_training_and_the_first_error(settings, tmp_path):
    """Ranks are born for capture and train; the other stages run in the launcher. Two capture what
    one does; what the first that fails says is what users see.
    """
    offline = [*settings, "mode=offline", "hidden_states.dtype=fp32", "target.batch_tokens=200"]
    one = ["stages=[prepare,capture]", f"hidden_states.path={tmp_path / 'one'}"]
    run([*offline, *one], tmp_path / "alone")
    stages = "stages=[prepare,generate,capture,train,export,benchmark]"
    given = [*offline, *FIXED, TWO, "train.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    done = run_command(*given, stages, f"hidden_states.path={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "draft" / "config.json").exists()
    assert (tmp_path / "run" / "evaluation.json").exists()
    for stage, unit in ("capture", "documents"), ("train", "updates"):
        assert len(re.findall(rf"^{stage}: \d+ {unit}\b", done.stdout, re.M)) == 1, "one speaks"
    shards = list((tmp_path / "one").glob("*.safetensors"))
    assert shards
    for path in shards:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    stages = "stages=[prepare,capture]"
    done = run_command(*given, stages, f"hidden_states.path={tmp_path / 'other'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: hidden_states.path=")


@pytest.mark.slow
def test_the_same_layout_goes_on_bit_for_bit(settings, tmp_path, start):
    layout = [*settings, *WHOLE, TWO, "train.save_every=1"]
    stops = {
        "terminated": (143, lambda process, pids: process.send_signal(signal.SIGTERM)),
        "killed": (1, lambda process, pids: os.kill(pids[1], signal.SIGKILL)),
    }
    for name, (code, how) in stops.items():
        process = start(layout, tmp_path / name, pause_at=3)
        stop(process, tmp_path / name, 3, how)
        assert process.returncode == code
    for name in ("whole", *stops):
        process = start(layout, tmp_path / name)
        assert process.wait(400) == 0, process.stderr.read()[-2000:]
    whole = last_checkpoint(tmp_path / "whole").tensors
    for name in stops:
        assert losses(tmp_path / "whole") == losses(tmp_path / name)
        again = last_checkpoint(tmp_path / name).tensors
        assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(settings, tmp_path, start):
    run_dir = tmp_path / "run"
    process = start([*settings, *WHOLE, TWO], run_dir, pause_at=2)
    wait_for(lambda: len(logged(run_dir)) >= 2, process)
    pids = [pid_of(run_dir, rank) for rank in (0, 1)]
    process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), process)
    assert last_checkpoint(run_dir).plain["update"] >= 2


def torchrun(*overrides):
    script = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "run.py"]
    command = [sys.executable, "-m", *script, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_torchrun_shows_a_plan_and_sweeps(settings, tmp_path):
    """Plain torchrun; each job of the sweep has one run dir and one .hydra."""
    torchrun(*settings, "plan=true")
    sweep = ["optimizer.lr=1e-3,1e-4", "train.max_steps=2", f"hydra.sweep.dir={tmp_path}"]
    torchrun("-m", *settings, *FIXED, *sweep)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0", "1"]
    for job in (tmp_path / "0", tmp_path / "1"):
        assert (job / ".hydra" / "config.yaml").exists() and len(losses(job)) == 2
        launch = json.loads((job / "run.json").read_text())["config"]["launch"]
        assert launch["nproc_per_node"] == 2


def test_blocks_of_gpu_memory_can_grow_unless_the_user_chose_otherwise(monkeypatch):
    """Batches differ in rows: what one leaves free, the next would often just not fit into."""
    set_settings, launch = Mock(), SimpleNamespace(threads=None)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", set_settings)
    monkeypatch.setattr(ranks, "choose_device", torch.device)
    train = SimpleNamespace(deterministic=False)
    config = SimpleNamespace(launch=launch, device="cuda", train=train)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    ranks.set_up_process(config)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    ranks.set_up_process(config)
    set_settings.assert_called_once_with("expandable_segments:True")
