"""launch/speedrun_llama3_8b.sh from nothing to the serve command, with the embedded target in the
large one's place.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.runs

RECIPE = (
    "model=tiny data=tiny data.num_samples=400 train.max_steps=40 train.eval_every=40 "
    "eval.num_prompts=4 eval.max_new_tokens=32 benchmark.suites=[heldout:2] "
    "benchmark.max_new_tokens=16 device=cpu"
)


@pytest.mark.slow
def test_one_script_from_nothing_to_the_serve_command(tmp_path):
    for name in ("eagle3", "conf", "launch", "run.py", "setup.cfg", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = (
        tmp_path / ".venv" / "bin" / "python"
    )  # an environment that is up to date: nothing is installed here
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    made = subprocess.run(
        "cat setup.cfg launch/constraints.txt | cksum", shell=True, cwd=ROOT, capture_output=True
    )
    (tmp_path / ".venv" / "installed").write_text(made.stdout.decode().strip() + " \n")
    environment = os.environ | {
        "SPEEDRUN_RECIPE": RECIPE,
        "SPEEDRUN_ENGINE": "builtin",
        "ENGINES_DIR": str(tmp_path),
    }

    def speedrun():
        script = ["bash", str(tmp_path / "launch" / "speedrun_llama3_8b.sh")]
        return subprocess.run(
            script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
        )

    done = speedrun()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    run = tmp_path / "outputs" / "speedrun_llama3_8b"
    order = [
        "Recommended:",
        "train: best acceptance length",
        "export: ",
        "check: ",
        "served by",
        "launch_server",
    ]
    places = [done.stdout.index(words) for words in order]
    assert places == sorted(places)
    assert f"--speculative-draft-model-path {run / 'draft'}" in done.stdout
    assert json.loads((run / "check.json").read_text())["findings"] == []
    assert json.loads((run / "benchmark" / "benchmark.json").read_text())["suites"]["heldout"]

    again = speedrun()
    assert again.returncode == 0 and "train:" not in again.stdout
    assert again.stdout.splitlines()[-8:] == done.stdout.splitlines()[-8:]
