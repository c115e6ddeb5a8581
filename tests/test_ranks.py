"""Runs of several processes as users start them: equal to one process, stopped, killed and gone on
with otherwise.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_pipeline import TRAIN_ONLY, compose_config, losses, run, run_command, settings  # noqa: F401

from eagle3.checks import check
from eagle3.errors import ConfigError
from eagle3.runs import checkpoint

FIXED = [
    TRAIN_ONLY,
    "launch.threads=1",
    "train.documents_per_update=12",
    "train.max_steps=30",
    "train.epochs=20",
]
FIXED += ["train.eval_every=15"]  # three updates an epoch
TWO = ["launch.nproc_per_node=2"]


def start(overrides, run_dir):
    """A run in the background, whose processes are a group of their own."""
    command = [sys.executable, str(ROOT / "run.py"), *overrides, f"hydra.run.dir={run_dir}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process, seconds=240):
    give_up = time.time() + seconds
    while not condition() and process.poll() in (None, -signal.SIGKILL) and time.time() < give_up:
        time.sleep(0.05)
    assert condition(), (
        process.communicate()[1][-3000:]
        if process.poll() is not None
        else "nothing happened in time"
    )


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
def alone(settings, tmp_path_factory):  # noqa: F811
    run_dir = tmp_path_factory.mktemp("alone")
    run([*settings, *FIXED], run_dir)
    return run_dir


def test_a_stopped_run_of_two_goes_on_in_one_process(alone, settings, tmp_path):  # noqa: F811
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
    done = checkpoint.load(run_dir / "checkpoints" / "last").plain["update"]
    seen = logged(run_dir)
    assert max(seen) == done >= 2
    run([f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1", "parallel=ddp"], run_dir)
    assert len(losses(run_dir)) == 30 and same(losses(run_dir), losses(alone))


def test_a_killed_rank_ends_the_run_and_it_goes_on(alone, settings, tmp_path):  # noqa: F811
    """Two ranks share the target and keep what they see (hybrid); one is killed in the second
    epoch.
    """
    hybrid = [
        *settings,
        *FIXED,
        *TWO,
        "mode=hybrid",
        "hidden_states.dtype=fp32",
        "target.tp_size=2",
    ]
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
    before = checkpoint.load(run_dir / "checkpoints" / "last").plain["update"]
    assert before >= 3
    run(
        [f"train.resume={run_dir}", TRAIN_ONLY, "launch.nproc_per_node=1", "target.tp_size=1"],
        run_dir,
    )
    assert len(losses(run_dir)) == 30 and same(losses(run_dir), losses(alone))


def test_a_target_over_two_ranks_comes_to_its_end(settings, tmp_path):  # noqa: F811
    """Stages behind the training find the ranks that share a target where they wait for them."""
    stages = ["stages=[prepare,generate,train,export]", "train.max_steps=2", "launch.timeout=60"]
    done = run_command(
        *settings,
        *FIXED,
        *TWO,
        "target.tp_size=2",
        *stages,
        f"hydra.run.dir={tmp_path}",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "draft" / "config.json").exists() and (tmp_path / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_the_same_layout_goes_on_bit_for_bit(settings, tmp_path, stopped):  # noqa: F811
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
        checkpoint.load(tmp_path / name / "checkpoints" / "last") for name in ("whole", "stopped")
    )
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(settings, tmp_path):  # noqa: F811
    process = start(
        [*settings, *FIXED, *TWO, "train.max_steps=5000", "train.epochs=5000"], tmp_path
    )
    wait_for(lambda: len(logged(tmp_path)) >= 2, process)
    pids = [pid_of(tmp_path, rank) for rank in (0, 1)]
    process.kill()
    wait_for(lambda: not any(map(is_alive, pids)), process)
    assert checkpoint.load(tmp_path / "checkpoints" / "last").plain["update"] >= 2


@pytest.mark.slow
def test_torchrun_and_a_sweep(settings, tmp_path):  # noqa: F811
    """Plain torchrun; each job of the sweep has one run dir and one .hydra."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "run.py",
    ]
    sweep = ["optimizer.lr=1e-3,1e-4", "train.max_steps=2", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(
        [*command, "-m", *settings, *FIXED, *sweep],
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
def test_torchrun_shows_a_plan_and_ends(settings):  # noqa: F811
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "run.py",
    ]
    done = subprocess.run(
        [*command, *settings, "plan=true"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_layouts_that_cannot_be_are_refused(settings, tmp_path, monkeypatch):  # noqa: F811
    def refused(*overrides):
        with pytest.raises(ConfigError) as error:
            check(compose_config([*settings, *overrides], tmp_path))
        return str(error.value)

    assert refused("parallel=usp", "parallel.ulysses=2", "launch.nproc_per_node=3").startswith(
        "parallel.ulysses x parallel.ring = 2 must divide launch.nproc_per_node x launch.nnodes = 3"
    )
    assert "parallel.ulysses has no value" in refused("parallel=usp")
    assert re.match(
        r"parallel\.ulysses=8 must divide the draft's \d key/value heads .*parallel\.ring larger",
        refused("parallel=usp", "parallel.ulysses=8", "launch.nproc_per_node=8"),
    )
    assert "needs launch.rdzv_endpoint=" in refused("launch.nnodes=2")
    assert "set target.tp_size=1 or benchmark=sglang" in refused(
        "target.tp_size=2", "launch.nproc_per_node=2"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert refused("launch.nproc_per_node=4").startswith(
        "launch.nproc_per_node=4 is more than the 2 GPUs that torch sees here; set launch.nproc_per_node=2"
    )


def test_a_port_in_use_is_named(settings, tmp_path):  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run_command(
            *settings, *FIXED, *TWO, f"launch.rdzv_endpoint={where}", f"hydra.run.dir={tmp_path}"
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert f"launch.rdzv_endpoint={where}" in done.stderr.strip().splitlines()[-1]
