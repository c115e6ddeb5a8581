"""The simulator of dev/roofline, in a process of its own, as it comes before torch: what a step and
a prefill of Llama-3.1-8B may take, so that nothing slows them down unseen.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from eagle3 import plan

pytestmark = pytest.mark.runs

SCRIPT = """
import json, sys
sys.path.insert(0, "dev/roofline")
import sim, torch
from prices import likely, play
from record import CUDA, recording

@torch.library.custom_op("eagle3::doubled_rows", mutates_args=("total",))
def doubled_rows(x: torch.Tensor, total: torch.Tensor) -> torch.Tensor: ...

@doubled_rows.register_fake
def _(x, total):
    return torch.empty_like(x)

def small():
    host = torch.zeros(1 << 20)
    with recording([4]) as recorder:
        x = torch.empty(1 << 18, 4, device=CUDA)
        before = recorder.now
        host.to(CUDA, non_blocking=True)
        pinned = torch.zeros(1 << 20, pin_memory=True)
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            pinned.to(CUDA, non_blocking=True)
        host.pin_memory()
        x[0, 0].item()
        torch.cuda.synchronize()
        doubled_rows(x[:1024], x)
        calls = [call for call in recorder.calls if call.cost.bytes]
        yield [(call.name, call.cost.kind, call.cost.bytes, call.hidden) for call in calls]
        played = play(recorder.calls, likely(2))
        memory = recorder.now - before, recorder.peak - before
        yield [played.syncs, played.waits, *memory]

results = [list(small())]
for arguments in json.loads(sys.argv[1]):
    results.append(sim.predict(sim.parse(["--json", *arguments]))[1])
print(json.dumps(results))
"""
# The most of each, with about a fiftieth to spare; GiB with the draft's weights and moments.
LIMITS = {
    "--supervised 0.6": {
        "likely_milliseconds": 276, "host_milliseconds": 6.9, "gigabytes": 178, "kernels": 744,
        "peak_gib": 19.7,
    },
    "--supervised 1.0": {
        "likely_milliseconds": 437, "host_milliseconds": 7.7, "gigabytes": 262, "kernels": 817,
        "peak_gib": 26.1,
    },
    "--prefill": {
        "likely_milliseconds": 413, "host_milliseconds": 9.3, "gigabytes": 241, "kernels": 511,
        "peak_gib": 19.5,
    },
    "--supervised 0.6 loss=lk loss/weights=reached": {"likely_milliseconds": 277},
    "--supervised 0.6 draft=dspark loss=mix": {
        "likely_milliseconds": 612, "host_milliseconds": 9, "gigabytes": 461, "kernels": 1160,
        "peak_gib": 42.3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def simulated():
    """(the two rows of `small`, what each of LIMITS comes to)"""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the simulator compiles guard.cpp: there is no C++ compiler")
    arguments = json.dumps([each.split() for each in LIMITS])
    command = [sys.executable, "-c", SCRIPT, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    small, *found = json.loads(done.stdout)
    return small, dict(zip(LIMITS, found, strict=True))


def test_what_is_recorded(simulated):
    """Copies from pinned memory on a side stream are hidden, other large ones wait; a kernel of our
    own costs the rows of its first argument, twice of what it changes; memory goes when freed.
    """
    calls, numbers = simulated[0]
    mega = 1 << 20
    assert calls == [
        ["aten::_to_copy", "copy", 4 * mega, False],
        ["aten::_to_copy", "copy", 4 * mega, True],
        ["pin_memory", "host", 4 * mega, False],
        ["eagle3::doubled_rows", "plain", 1024 * 4 * 4 * 4, False],
    ]
    assert numbers[:3] == [2, 1, 0] and numbers[3] >= 4 * mega


@pytest.mark.parametrize("arguments", LIMITS)
def test_nothing_slows_down_unseen(simulated, arguments):
    """Nothing is waited for, and nothing takes more than its limit, or less than nine tenths of it:
    who makes a step better lowers the limits.
    """
    found = simulated[1][arguments]
    assert (found["syncs"], found["waits_for_copies"]) == (0, 0)
    for name, most in LIMITS[arguments].items():
        assert 0.9 * most <= found[name] <= most, (name, found[name])


def test_the_plan_knows_what_the_simulator_predicts(simulated):
    """The shares in eagle3/plan.py are those that `dev/roofline/sim.py --json` prints."""
    found = {name: each["share_of_products"] for name, each in simulated[1].items()}
    assert found["--prefill"] == pytest.approx(plan.IN_PREFILL, rel=0.02)
    for supervised in (0.6, 1.0):
        share = found[f"--supervised {supervised}"]
        assert share == pytest.approx(plan.IN_TRAINING[supervised], rel=0.02)
