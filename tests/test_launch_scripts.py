"""launch/torchrun.sh and launch/slurm.sbatch with stand-ins for torchrun and Slurm; sweeps through
submitit; launch/gpu_check.sh without a GPU.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, kill_group, wait_for

pytestmark = pytest.mark.runs

TASKS = 'trap "exit $AFTER_SIGNAL" {}\ntouch "$LOG.begun"\n[ -z "$LAST" ] || exit "$LAST"\n'
TASKS += "for _ in $(seq 3000); do sleep 0.1; done\n"
SRUN = 'echo "node $NNODES $HEAD" >> "$LOG"\necho $$ > "$LOG.pid"\n' + TASKS.format("USR2")
COMMANDS = {
    "python": TASKS.format("TERM"), "srun": SRUN, "scancel": 'kill -USR2 "$(cat "$LOG.pid")"\n',
    "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n"\ntrue\n',
}  # fmt: skip


@pytest.fixture
def script(tmp_path):
    """Exit code and calls of a script, whose commands are stand-ins that write their names and
    arguments to a log; it gets the signal `send` once its processes began.
    """
    log = tmp_path / "log"
    for name, body in COMMANDS.items():
        text = f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> "$LOG"\n{body}'
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    always = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
        "LOG": str(log), "LAST": "", "AFTER_SIGNAL": "143", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "96",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "eagle3", "SLURM_JOB_ID": "4711",
    }  # fmt: skip

    def run(name, *overrides, send=None, **known):
        environment = {k: v for k, v in os.environ.items() if k != "RUN_DIR"} | always | known
        command = ["bash", str(ROOT / "launch" / name), *overrides]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            if send is not None:
                wait_for(log.with_suffix(".begun").exists, process)
                process.send_signal(send)
            return process.wait(timeout=300), log.read_text().splitlines()
        finally:
            kill_group(process)

    return run


def test_torchrun_on_one_node_and_on_several(script):
    torchrun = "python -m eagle3.parallel.torchrun "
    code, calls = script("torchrun.sh", "2", "-m", "seed=0,1", "data.path=a b", LAST="0")
    options = "--standalone --nproc-per-node=2 --shutdown-timeout=600 run.py -m seed=0,1 "
    assert (code, calls) == (0, [f"{torchrun}{options}data.path=a b"])
    several = {"NNODES": "2", "NODE_RANK": "1", "HEAD": "node7:2345"}
    code, calls = script("torchrun.sh", "8", LAST="1", **several)
    master = "--master-addr=node7 --master-port=2345"
    assert code == 1 and f"--nnodes=2 --node-rank=1 {master} --nproc-per-node=8" in calls[-1]


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("sys.exit(2)", 2, ""),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "error: process 0 was killed by SIGKILL\n"),
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)", 143, ""),
    ],
)
def test_torchrun_ends_as_its_processes_do(tmp_path, script, code, said):
    """torchrun itself would leave with 1."""
    (tmp_path / "run.py").write_text(f"import os, signal, sys, time\n{script}\n")
    options = ["--standalone", "--shutdown-timeout=5", str(tmp_path / "run.py")]
    command = [sys.executable, "eagle3/parallel/torchrun.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_job_starts_one_torchrun_a_node(script):
    code, calls = script("slurm.sbatch", "seed=1", "data.path=a b", LAST="0")
    assert code == 0
    assert calls == [
        "scontrol show hostnames node[1-2]",
        "srun --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=1 bash launch/torchrun.sh "
        "hydra.run.dir=outputs/eagle3-4711 hydra.sweep.dir=outputs/eagle3-4711 seed=1 "
        "data.path=a b",
        "node 2 first:24711",
    ]


# With a checkpoint; over before it heard; no room for the checkpoint.
@pytest.mark.parametrize(("code", "comes_back"), [(143, True), (0, False), (1, False)])
def test_a_job_comes_back_from_its_limit(script, code, comes_back):
    left, calls = script("slurm.sbatch", send=signal.SIGUSR1, AFTER_SIGNAL=str(code))
    assert left == code and "scancel --signal=TERM 4711" in calls
    assert ("scontrol requeue 4711" in calls) == comes_back


# An error; cancelled, which Slurm tells the tasks itself.
@pytest.mark.parametrize("code", [2, 143])
def test_other_jobs_stay_away(script, code):
    left, calls = script("slurm.sbatch", LAST=str(code), RUN_DIR="runs/mine")
    assert left == code and "hydra.run.dir=runs/mine" in calls[1]
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
    for job in (tmp_path / "0", tmp_path / "1"):
        assert (job / "checkpoints" / "last").exists() and (job / "logs/rank_1.log").exists()


@pytest.mark.slow
def test_the_gpu_script_without_a_gpu(tmp_path):
    """At tiny shapes each part leaves its numbers and its row, beside what is predicted."""
    command = ["bash", "launch/gpu_check.sh"]
    environment = os.environ | {
        "INSTALL": "0",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    given = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 1200}
    refused = subprocess.run(command, **given)
    assert refused.returncode == 1 and "torch sees no CUDA device" in refused.stderr
    options = ["--tiny", "--repeats", "1", "--minutes", "60", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *options], **given)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    steps = [f"step, eager, {share} %" for share in (60, 90, 100)]
    steps += ["step, 60 %, lk", "online, 60 %", "online, 100 %", "prefill, eager"]
    assert set(results) == {*steps, "machine", "tests", "costliest", "predicted"}
    assert len(results["costliest"]) == 20 and set(results["predicted"]) == set(steps)
    assert all(results[step]["tokens_per_second"] > 0 for step in steps)
    table = (tmp_path / "speed.md").read_text()
    assert all(f"| {name} | " in table for name in (*steps, "speculators, 7 steps, as published"))
    matched = [line for line in table.splitlines() if line.startswith("| mm ")]
    assert matched and not any("| - |" in line for line in matched)
