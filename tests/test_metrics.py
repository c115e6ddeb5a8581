"""The meter against sums written out by hand."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eagle3.loss import Powers
from eagle3.runs import metrics
from eagle3.runs.metrics import Meter, peak_flops

GAMMA = 0.8
WEIGHTS = Powers(GAMMA)
FIRST = [6.0, 4.0], [3.0, 1.0], SimpleNamespace(pair_counts=[10, 5], normaliser=12, tokens=100)
SECOND = [2.0, 8.0], [2.0, 2.0], SimpleNamespace(pair_counts=[10, 15], normaliser=8, tokens=60)


def add(meter, losses, correct, batch, waited=0.0, flops=0.0):
    meter.add(torch.tensor(losses), torch.tensor(correct), batch, waited, flops)


def add_one(meter, tokens=1, normaliser=1, loss=1.0, **more):
    """A micro-step of one pair, of a meter of one step."""
    batch = SimpleNamespace(pair_counts=[1], normaliser=normaliser, tokens=tokens)
    add(meter, [loss], [1.0], batch, **more)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_loss_and_accuracy_are_ratios_of_the_sums_of_a_window():
    meter = Meter(2, WEIGHTS)
    add(meter, *SECOND)
    meter.read()
    add(meter, *FIRST)
    add(meter, *SECOND)
    read = meter.read()
    expected = {"loss/step_0": 8 / 20, "loss/step_1": 12 / 20, "loss": (8 + GAMMA * 12) / 20}
    expected |= {"accuracy/step_0": 5 / 20, "accuracy/step_1": 3 / 20, "supervised_tokens": 20}
    assert {name: read[name] for name in expected} == pytest.approx(expected)
    expected |= {"tokens": 160}
    rest = {"tokens_per_second", "seconds", "data_wait_fraction", "peak_memory_bytes"}
    rest |= {f"seconds/{part}" for part in ("data", "target", "draft", "checkpoint")}
    assert set(read) == expected.keys() | rest and 50e6 < read["peak_memory_bytes"] < 1e12
    add(meter, [1.0, 0.0], [1.0, 0.0], SimpleNamespace(pair_counts=[2, 0], normaliser=2, tokens=1))
    read = meter.read()
    assert read["accuracy/step_0"] == read["loss"] == 0.5
    assert math.isnan(read["accuracy/step_1"]), "a step without a pair"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_restored_window_reads_as_one_that_was_not_interrupted(ranks):
    """Of two ranks, gone on with by as many or by one."""
    meter = Meter(2, WEIGHTS)
    add(meter, *FIRST)
    add(meter, *SECOND)
    states = [json.loads(json.dumps(meter.state()))] * 2
    resumed = [Meter(2, WEIGHTS) for _ in range(ranks)]
    for rank, meter in enumerate(resumed):
        meter.restore(states, rank, ranks)
    read = [meter.read() for meter in resumed]
    assert sum(each["supervised_tokens"] for each in read) == 40
    assert all(each["loss"] == (8 / 20 + GAMMA * (12 / 20)) for each in read)
    assert all(each["accuracy/step_1"] == 3 / 20 for each in read)


def test_many_small_sums_keep_their_digits():
    meter = Meter(1, WEIGHTS)
    add_one(meter, loss=2.0**25)
    for _ in range(100):
        add_one(meter, normaliser=0)
    assert meter.read()["loss"] == 2**25 + 100


def test_rates_count_training_time_only(clock):
    meter = Meter(1, WEIGHTS)
    add_one(meter, tokens=300, waited=0.5)
    clock[0] += 5
    meter.excluded_seconds += 3.0
    meter.checkpoint_seconds += 2.5
    with meter.target():
        clock[0] += 0.25
    clock[0] -= 0.25
    read = meter.read()
    parts = [read[f"seconds/{name}"] for name in ("data", "target", "draft", "checkpoint")]
    assert parts == [0.5, 0.25, 1.25, 2.5]
    assert (read["tokens_per_second"], read["data_wait_fraction"]) == (150, 0.25)
    assert (read["tokens"], read["seconds"]) == (300, 2)
    add_one(meter, tokens=300)
    clock[0] += 3
    read = meter.read()
    assert (read["tokens_per_second"], read["data_wait_fraction"]) == (100, 0)


def test_two_processes_read_the_same_global_numbers(clock):
    meters, sums = [Meter(2, WEIGHTS) for _ in range(2)], []
    for _ in range(2):  # first to know what each process sends, then to read the sum of both
        clock[0] = 0.0
        for meter, numbers, waited in zip(meters, (FIRST, SECOND), (1.0, 0.0), strict=True):
            meter.restart()
            add(meter, *numbers, waited)
        clock[0] = 2.0
        read = [meter.read(lambda own: sums.append(own) or sum(sums[:2])) for meter in meters]
    expected = {"loss": (8 + GAMMA * 12) / 20, "accuracy/step_1": 3 / 20}
    expected |= {"tokens_per_second": 80, "data_wait_fraction": 0.25, "tokens": 160, "seconds": 2}
    for each in read:
        assert {name: each[name] for name in expected} == pytest.approx(expected)


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value is asked for on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero"))
        return function(*args, **(kwargs or {}))


def test_adding_never_waits_for_the_device():
    meter = Meter(2, WEIGHTS)
    with NoSync():
        add(meter, *FIRST)
    assert meter.read()["supervised_tokens"] == 10


@pytest.mark.gpu
def test_on_a_gpu():
    meter = Meter(2, WEIGHTS, "cuda")
    sums = [torch.tensor(numbers, device="cuda") for numbers in FIRST[:2]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with meter.target():
            meter.add(*sums, FIRST[2], 0.0, 1e9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    read = meter.read()
    assert read["loss"] == pytest.approx((6 + GAMMA * 4) / 12)
    assert read["seconds/target"] > 0
    assert read["peak_memory_bytes"] == torch.cuda.max_memory_allocated()
    assert ("mfu" in read) == (peak_flops(torch.cuda.get_device_name()) is not None)


def test_mfu_is_model_flops_over_the_peak_of_all_gpus_of_known_cards(monkeypatch, clock):
    cards = {"H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "A100-SXM4-80GB": 312e12}
    for name, flops in (cards | {"L40": None, "H200 MIG 1g.18gb": None}).items():
        assert peak_flops(f"NVIDIA {name}") == flops
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(metrics, "peak_memory_bytes", lambda device: 0)
    meter = Meter(1, WEIGHTS)
    meter.device = SimpleNamespace(type="cuda")
    add_one(meter, flops=500 * 989e9)
    clock[0] += 1.0
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor)
    assert meter.read()["mfu"] == pytest.approx(0.5)
