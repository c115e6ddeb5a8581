"""launch/torchrun.sh and launch/slurm.sbatch with stand-ins for torchrun and Slurm; sweeps through
submitit.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytestmark = pytest.mark.runs

TASKS = 'trap "exit $AFTER_SIGNAL" {signals}\ntouch "$LOG.begun"\n[ -z "$LAST" ] || exit "$LAST"\n'
TASKS += "for _ in $(seq 100); do sleep 0.1; done\n"


@pytest.fixture
def stand_ins(tmp_path):
    """A folder of commands that write their names and arguments to `log`, and what scripts need to
    know.
    """
    log = tmp_path / "log"
    commands = {
        "python": TASKS.format(signals="TERM"),
        "srun": 'echo "node $NNODES $HEAD" >> "$LOG"\necho $$ > "$LOG.pid"\n'
        + TASKS.format(signals="USR2"),
        "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n"\ntrue\n',
        "scancel": 'kill -USR2 "$(cat "$LOG.pid")"\n',
    }
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> "$LOG"\n{body}')
        path.chmod(0o755)
    known = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
        "LOG": str(log), "LAST": "", "AFTER_SIGNAL": "143", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "eagle3", "SLURM_JOB_ID": "4711",
    }  # fmt: skip
    return log, known


def run(script, stand_ins, *overrides, send=None, **known):
    """Exit code and calls of a script that gets the signal `send` once its processes began."""
    log, always = stand_ins
    environment = {k: v for k, v in os.environ.items() if k != "RUN_DIR"} | always | known
    process = subprocess.Popen(["bash", str(ROOT / "launch" / script), *overrides], env=environment)
    if send is not None:
        deadline = time.monotonic() + 20
        while not log.with_suffix(".begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(send)
    return process.wait(timeout=20), log.read_text().splitlines()


def test_torchrun_on_one_node(stand_ins):
    code, calls = run("torchrun.sh", stand_ins, "2", "-m", "seed=0,1", "data.path=a b", LAST="0")
    assert code == 0
    assert calls == [
        "python -m eagle3.parallel.torchrun --standalone --nproc-per-node=2 --shutdown-timeout=600 "
        "run.py -m seed=0,1 data.path=a b"
    ]


def test_torchrun_on_several_nodes(stand_ins):
    code, calls = run(
        "torchrun.sh", stand_ins, "8", LAST="1", NNODES="2", NODE_RANK="1", HEAD="node7:2345"
    )
    assert code == 1
    assert (
        "--nnodes=2 --node-rank=1 --master-addr=node7 --master-port=2345 --nproc-per-node=8"
        in calls[0]
    )


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("sys.exit(2)", 2, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: process 0 was killed by SIGKILL\n"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(20)", 143, ""),
    ],
)
def test_torchrun_ends_as_its_processes_do(tmp_path, script, code, said):
    """torchrun itself would leave with 1."""
    (tmp_path / "run.py").write_text(f"import os, signal, sys, time\n{script}\n")
    command = [
        sys.executable,
        "eagle3/parallel/torchrun.py",
        "--standalone",
        "--shutdown-timeout=5",
        str(tmp_path / "run.py"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_job_starts_one_torchrun_a_node(stand_ins):
    code, calls = run("slurm.sbatch", stand_ins, "seed=1", "data.path=a b", LAST="0")
    assert code == 0
    assert calls == [
        "scontrol show hostnames node[1-2]",
        "srun --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=1 bash launch/torchrun.sh "
        "hydra.run.dir=outputs/eagle3-4711 hydra.sweep.dir=outputs/eagle3-4711 seed=1 "
        "data.path=a b",
        "node 2 first:24711",
    ]


@pytest.mark.parametrize(
    ("ends_with", "comes_back"),
    [
        ("143", True),
        ("0", False),
        ("1", False),
    ],  # a checkpoint; over before it heard; no room for the checkpoint
)
def test_a_job_comes_back_from_its_limit(stand_ins, ends_with, comes_back):
    code, calls = run("slurm.sbatch", stand_ins, send=signal.SIGUSR1, AFTER_SIGNAL=ends_with)
    assert code == int(ends_with)
    assert "scancel --signal=TERM 4711" in calls
    assert ("scontrol requeue 4711" in calls) == comes_back


@pytest.mark.parametrize(
    "ends_with", ["2", "143"]
)  # an error; cancelled, which Slurm tells the tasks itself
def test_other_jobs_stay_away(stand_ins, ends_with):
    code, calls = run("slurm.sbatch", stand_ins, LAST=ends_with, RUN_DIR="runs/mine")
    assert code == int(ends_with) and "hydra.run.dir=runs/mine" in calls[1]
    assert not any("requeue" in call for call in calls)


@pytest.mark.slow
def test_a_sweep_through_submitit(tmp_path):
    """launch=slurm takes its defaults outside of Slurm; each job has one folder, and two processes
    in it.
    """
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [
        sys.executable, "run.py", "-m", "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=20", f"hydra.sweep.dir={tmp_path}",
        f"cache_dir={tmp_path / 'cache'}", "launch=slurm", "launch.nproc_per_node=2",
        "launch.threads=1", "stages=[prepare,generate,train]", "seed=0,1", "train.max_steps=1",
        "data.num_samples=60", "data.num_proc=1", "eval.num_prompts=2", "eval.max_new_tokens=8",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.parent.name for path in tmp_path.glob("*/.hydra")) == ["0", "1"]
    for job in "01":
        assert (tmp_path / job / "checkpoints" / "last").exists() and (
            tmp_path / job / "logs/rank_1.log"
        ).exists()
