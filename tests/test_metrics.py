"""The meter against sums written out by hand."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3.runs import metrics
from eagle3.runs.metrics import Meter, peak_flops

GAMMA = 0.8
FIRST = [6.0, 4.0], [3.0, 1.0], SimpleNamespace(pair_counts=[10, 5], normaliser=12, tokens=100)
SECOND = [2.0, 8.0], [2.0, 2.0], SimpleNamespace(pair_counts=[10, 15], normaliser=8, tokens=60)


def add(meter, losses, correct, batch, waited=0.0, flops=0.0):
    meter.add(torch.tensor(losses), torch.tensor(correct), batch, waited, flops)


def add_one(meter, tokens=1, **more):
    """A micro-step of one pair, of a meter of one step."""
    batch = SimpleNamespace(pair_counts=[1], normaliser=1, tokens=tokens)
    add(meter, [1.0], [1.0], batch, **more)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_loss_and_accuracy_are_ratios_of_the_sums_of_a_window():
    meter = Meter(2, GAMMA)
    add(meter, *SECOND)
    meter.read()
    add(meter, *FIRST)
    add(meter, *SECOND)
    read = meter.read()
    assert read["loss/step_0"] == pytest.approx(8 / 20)
    assert read["loss/step_1"] == pytest.approx(12 / 20)
    assert read["loss"] == pytest.approx((8 + GAMMA * 12) / 20)
    assert read["accuracy/step_0"] == pytest.approx(5 / 20)
    assert read["accuracy/step_1"] == pytest.approx(3 / 20)
    assert read["supervised_tokens"] == 20


def test_names_are_those_of_the_contract():
    meter = Meter(1, GAMMA)
    add_one(meter, flops=1e9)
    read = meter.read()
    assert set(read) == {
        "loss", "loss/step_0", "accuracy/step_0", "tokens_per_second", "supervised_tokens",
        "data_wait_fraction", "peak_memory_bytes",
    }  # fmt: skip
    assert 50e6 < read["peak_memory_bytes"] < 1e12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restored_window_reads_as_one_that_was_not_interrupted(ranks):
    """Of two ranks, gone on with by as many or by one."""
    states = []
    for _ in range(2):
        meter = Meter(2, GAMMA)
        add(meter, *FIRST)
        add(meter, *SECOND)
        states.append(json.loads(json.dumps(meter.state())))
    resumed = [Meter(2, GAMMA) for _ in range(ranks)]
    for rank, meter in enumerate(resumed):
        meter.restore(states, rank, ranks)
    read = [meter.read() for meter in resumed]
    assert sum(each["supervised_tokens"] for each in read) == 40
    for each in read:
        assert each["loss"] == (8 / 20 + GAMMA * (12 / 20))
        assert each["accuracy/step_1"] == 3 / 20


def test_steps_without_a_pair_are_nan():
    meter = Meter(2, GAMMA)
    batch = SimpleNamespace(pair_counts=[2, 0], normaliser=2, tokens=1)
    add(meter, [1.0, 0.0], [1.0, 0.0], batch)
    read = meter.read()
    assert read["accuracy/step_0"] == 0.5 and math.isnan(read["accuracy/step_1"])
    assert read["loss"] == 0.5


def test_many_small_sums_keep_their_digits():
    meter = Meter(1, GAMMA)
    batch = SimpleNamespace(pair_counts=[1], normaliser=1, tokens=1)
    add(meter, [2.0**25], [0.0], batch)
    batch.normaliser = 0
    for _ in range(100):
        add(meter, [1.0], [0.0], batch)
    assert meter.read()["loss"] == 2**25 + 100


def test_rates_count_training_time_only(clock):
    meter = Meter(1, GAMMA)
    add_one(meter, tokens=300, waited=0.5)
    clock[0] += 5
    meter.leave_out(3.0)
    read = meter.read()
    assert (read["tokens_per_second"], read["data_wait_fraction"]) == (150, 0.25)
    add_one(meter, tokens=300)
    clock[0] += 3
    read = meter.read()
    assert (read["tokens_per_second"], read["data_wait_fraction"]) == (100, 0)


def test_two_processes_read_the_same_global_numbers(clock):
    meters = [Meter(2, GAMMA) for _ in range(2)]
    sums = []
    for _ in range(2):  # first to know what each process sends, then to read the sum of both
        clock[0] = 0.0
        for meter, numbers, waited in zip(meters, (FIRST, SECOND), (1.0, 0.0), strict=True):
            meter.restart()
            add(meter, *numbers, waited)
        clock[0] = 2.0
        read = [meter.read(lambda own: sums.append(own) or sum(sums[:2])) for meter in meters]
    for each in read:
        assert each["loss"] == pytest.approx((8 + GAMMA * 12) / 20)
        assert each["accuracy/step_1"] == pytest.approx(3 / 20)
        assert each["tokens_per_second"] == 80 and each["data_wait_fraction"] == 0.25


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero"))
        return function(*args, **(kwargs or {}))


def test_adding_never_waits_for_the_device():
    meter = Meter(2, GAMMA)
    with NoSync():
        add(meter, *FIRST)
    assert meter.read()["supervised_tokens"] == 10


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    meter = Meter(2, GAMMA, "cuda")
    sums = [torch.tensor(numbers, device="cuda") for numbers in FIRST[:2]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.add(*sums, FIRST[2], 0.0, 1e9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = meter.read()
    assert read["loss"] == pytest.approx((6 + GAMMA * 4) / 12)
    assert read["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    assert ("mfu" in read) == (peak_flops(torch.cuda.get_device_name()) is not None)


def test_mfu_is_model_flops_over_the_peak_of_all_gpus(monkeypatch, clock):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(metrics, "peak_memory_bytes", lambda device: 0)
    meter = Meter(1, GAMMA)
    meter.device = SimpleNamespace(type="cuda")
    add_one(meter, flops=500 * 989e9)
    clock[0] += 1.0
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor)
    assert meter.read()["mfu"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
    ],
)
def test_peak_of_known_cards_only(name, flops):
    assert peak_flops(name) == flops
