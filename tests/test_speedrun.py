"""launch/speedrun_llama3_8b.sh from nothing to the serve command, with the embedded target in the
large one's place.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.runs, pytest.mark.slow]
RECIPE = (
    "model=tiny data=tiny data.num_samples=400 train.max_steps=40 train.eval_every=40 "
    "eval.num_prompts=4 eval.max_new_tokens=32 benchmark.suites=[heldout:2] "
    "benchmark.max_new_tokens=16 device=cpu"
)


def test_one_script_from_nothing_to_the_serve_command(tmp_path):
    for name in ("eagle3", "conf", "launch", "run.py", "setup.cfg", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    # An environment that is up to date: nothing is installed here.
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    installed = f"cat setup.cfg launch/constraints.txt | cksum | sed 's/$/ /' > {tmp_path}/.venv/"
    subprocess.run(f"{installed}installed", shell=True, cwd=ROOT, check=True)
    known = {"SPEEDRUN_RECIPE": RECIPE, "SPEEDRUN_ENGINE": "builtin", "ENGINES_DIR": str(tmp_path)}

    def speedrun():
        script = ["bash", str(tmp_path / "launch" / "speedrun_llama3_8b.sh")]
        given = {"cwd": tmp_path, "env": os.environ | known, "capture_output": True, "text": True}
        done = subprocess.run(script, timeout=1200, **given)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    said = speedrun()
    run = tmp_path / "outputs" / "speedrun_llama3_8b"
    order = ["Recommended:", "train: best acceptance length", "export: ", "check: ", "served by"]
    places = [said.index(words) for words in [*order, "launch_server"]]
    assert places == sorted(places)
    assert f"--speculative-draft-model-path {run / 'draft'}" in said
    findings = json.loads((run / "check.json").read_text())["findings"]
    assert {(found["severity"], *found["engines"]) for found in findings} == {
        ("warning", "official")  # which has no EAGLE-3.1, as the embedded target is drafted for
    }
    assert json.loads((run / "benchmark" / "benchmark.json").read_text())["suites"]["heldout"]
    again = speedrun()
    assert "train:" not in again and again.splitlines()[-8:] == said.splitlines()[-8:]
