"""Runs of several processes as users start them: equal to one process, stopped, killed and gone on
with otherwise.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    TRAIN_ONLY,
    kill_group,
    losses,
    make_config,
    run,
    run_command,
    start_command,
    wait_for,
)

from eagle3.checks import check
from eagle3.errors import ConfigError
from eagle3.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.runs
FIXED = [
    TRAIN_ONLY,
    "launch.threads=1",
    "train.documents_per_update=12",
    "train.max_steps=30",
    "train.epochs=20",
]
FIXED += ["train.eval_every=15"]  # three updates an epoch
TWO = ["launch.nproc_per_node=2"]


@pytest.fixture
def start():
    """`start_command`, of which nothing is left behind when the test ends."""
    started = []

    def start(overrides, run_dir):
        started.append(start_command(overrides, run_dir))
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


def same(one, other):
    return one == pytest.approx(other, rel=1e-4)


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    run([*settings, *FIXED], run_dir)
    return run_dir


def test_a_stopped_run_of_two_goes_on_in_one_process(alone, settings, tmp_path, start):
    """USP over two ranks, online; SIGTERM after some updates; one process goes on, and all is as if
    it had begun.
    """
    run_dir = tmp_path / "run"
    process = start([*settings, *FIXED, *TWO, "parallel=usp", "parallel.ulysses=2"], run_dir)
    wait_for(lambda: len(logged(run_dir)) >= 2, process)
    pids = [pid_of(run_dir, rank) for rank in (0, 1)]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 143, errors[-2000:]
    assert (
        f"go on with: python run.py train.resume={run_dir}" in errors and "Traceback" not in errors
    )
    assert "death signal" not in errors, "the launcher's own words"
    assert not any(map(is_alive, pids))
    done = load_checkpoint(run_dir / "checkpoints" / "last").plain["update"]
    seen = logged(run_dir)
    assert max(seen) == done >= 2
    run([f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1", "parallel=ddp"], run_dir)
    assert len(losses(run_dir)) == 30 and same(losses(run_dir), losses(alone))


def test_a_killed_rank_ends_the_run_and_it_goes_on(alone, settings, tmp_path, start):
    """Two ranks keep what they compute (hybrid); one is killed in the second epoch."""
    hybrid = [*settings, *FIXED, *TWO, "mode=hybrid", "hidden_states.dtype=fp32"]
    hybrid = [*hybrid, f"hidden_states.path={tmp_path / 'kept'}"]
    run_dir = tmp_path / "run"
    process = start([*hybrid, "train.save_every=1"], run_dir)
    wait_for(lambda: len(logged(run_dir)) >= 4, process)
    pids = [pid_of(run_dir, rank) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    assert re.search(
        r"^error: process 1 was killed by SIGKILL .* train\.resume=\S+$", errors, re.M
    ), errors[-2000:]
    assert "Traceback" not in errors and "Terminating" not in errors
    assert not any(map(is_alive, pids))
    before = load_checkpoint(run_dir / "checkpoints" / "last").plain["update"]
    assert before >= 3
    run([f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1"], run_dir)
    assert len(losses(run_dir)) == 30 and same(losses(run_dir), losses(alone))


def test_stages_behind_the_training_come_to_their_end(settings, tmp_path):
    """Ranks are born for capture and train; the other stages run in the launcher."""
    stages = ["stages=[prepare,generate,capture,train,export,benchmark]", "mode=offline"]
    done = run_command(
        *settings, *FIXED, *TWO, *stages, "train.max_steps=2", f"hydra.run.dir={tmp_path}"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "draft" / "config.json").exists() and (tmp_path / "evaluation.json").exists()
    assert done.stdout.count("capture: ") == 1, "one process speaks"


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_the_same_layout_goes_on_bit_for_bit(settings, tmp_path, stopped, start):
    layout = [*settings, *FIXED, *TWO, "train.save_every=1"]
    for name in ("whole", "stopped"):
        process = start(layout, tmp_path / name)
        if name == "stopped":
            wait_for(lambda: len(logged(tmp_path / "stopped")) >= 3, process)
            process.send_signal(signal.SIGTERM) if stopped else os.kill(
                pid_of(tmp_path / name, 1), signal.SIGKILL
            )
            process.communicate(timeout=240)
            assert process.returncode == (143 if stopped else 1)
            process = start([o for o in layout if o != TRAIN_ONLY] + [TRAIN_ONLY], tmp_path / name)
        assert process.wait(240) == 0, process.stderr.read()[-2000:]
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    whole, again = (
        load_checkpoint(tmp_path / name / "checkpoints" / "last") for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(settings, tmp_path, start):
    process = start(
        [*settings, *FIXED, *TWO, "train.max_steps=5000", "train.epochs=5000"], tmp_path
    )
    wait_for(lambda: len(logged(tmp_path)) >= 2, process)
    pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
    process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), process)
    assert load_checkpoint(tmp_path / "checkpoints" / "last").plain["update"] >= 2


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "run.py",
]  # fmt: skip


@pytest.mark.slow
def test_torchrun_and_a_sweep(settings, tmp_path):
    """Plain torchrun; each job of the sweep has one run dir and one .hydra."""
    sweep = ["optimizer.lr=1e-3,1e-4", "train.max_steps=2", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(
        [*TORCHRUN, "-m", *settings, *FIXED, *sweep],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["0", "1"]
    for job in ("0", "1"):
        assert (tmp_path / job / ".hydra" / "config.yaml").exists() and len(
            losses(tmp_path / job)
        ) == 2
        assert (
            json.loads((tmp_path / job / "run.json").read_text())["config"]["launch"][
                "nproc_per_node"
            ]
            == 2
        )


@pytest.mark.slow
def test_torchrun_shows_a_plan_and_ends(settings):
    done = subprocess.run(
        [*TORCHRUN, *settings, "plan=true"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_layouts_that_cannot_be_are_refused(settings, tmp_path, monkeypatch):
    def refused(*overrides):
        with pytest.raises(ConfigError) as error:
            check(make_config([*settings, *overrides], tmp_path))
        return str(error.value)

    assert refused("parallel=usp", "parallel.ulysses=2", "launch.nproc_per_node=3").startswith(
        "parallel.ulysses x parallel.ring = 2 must divide launch.nproc_per_node x launch.nnodes = 3"
    )
    assert "parallel.ulysses has no value" in refused("parallel=usp")
    assert re.match(
        r"parallel\.ulysses=8 must divide the draft's \d key/value heads; .*parallel\.ring larger",
        refused("parallel=usp", "parallel.ulysses=8", "launch.nproc_per_node=8"),
    )
    assert "needs launch/torchrun.sh" in refused("launch.nnodes=2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refused("launch.nproc_per_node=4").startswith(
        "launch.nproc_per_node=4 is more than the 2 GPUs that torch sees here; set "
    )
