"""Which documents an update holds, how replicas share them, and going on in the middle."""

import numpy as np
import pytest
import torch

from eagle3.batch import serving
from eagle3.batch import split_by_cost as split
from eagle3.data.prepare import INDEX, Prepared
from eagle3.loader import Loader, fill_micro_steps, plan_epoch


@pytest.fixture(scope="module")
def prepared():
    randomly = np.random.default_rng(0)
    lengths = randomly.integers(10, 100, 57)
    index = np.zeros(57, INDEX)
    index["length"], index["start"] = lengths, np.cumsum(lengths) - lengths
    mask = randomly.random(lengths.sum()) < 0.6
    index["supervised"] = np.add.reduceat(mask, index["start"])
    return Prepared(
        randomly.integers(0, 50, lengths.sum()).astype(np.int32), mask, index, np.arange(50), []
    )


def loader(prepared, **changes):
    options = {
        "ttt_steps": 3, "epochs": 2, "max_steps": None, "tokens_per_step": 128, "tokens_per_update": 256,
        "documents_per_update": None, "seed": 0,
    }  # fmt: skip
    return Loader(prepared, torch.ones(50, dtype=torch.bool), serving, **{**options, **changes})


def take(source, n):
    updates = iter(source)
    return [next(updates) for _ in range(n)]


def keys(update):
    return sorted(key for batch in update.batches for key in batch.document_keys)


def test_plans_depend_on_the_seed_alone(prepared):
    lengths = prepared.lengths
    plan = plan_epoch(lengths, 0, 0, 300, None)
    assert sorted(np.concatenate(plan).tolist()) == list(range(57))
    assert all(lengths[update].sum() <= 300 for update in plan)
    assert [u.tolist() for u in plan] == [u.tolist() for u in plan_epoch(lengths, 0, 0, 300, None)]
    assert (
        np.concatenate(plan).tolist()
        != np.concatenate(plan_epoch(lengths, 0, 1, 300, None)).tolist()
    )
    assert [len(u) for u in plan_epoch(lengths, 0, 0, 300, 8)] == [8] * 7 + [1]


def test_micro_steps_hold_every_document_once(prepared):
    steps = fill_micro_steps(np.arange(40), prepared.lengths, 128)
    assert sorted(i for step in steps for i in step) == list(range(40))
    assert all(sum(prepared.lengths[i] for i in step) <= 128 for step in steps)


def test_replicas_share_by_cost():
    costs = np.random.default_rng(1).integers(1, 1000, 64)
    for replicas in (1, 2, 3, 8):
        shares = split(np.arange(64), costs, replicas)
        assert sorted(np.concatenate(shares).tolist()) == list(range(64))
        loads = [costs[share].sum() for share in shares]
        assert max(loads) - min(loads) <= costs.max()
        assert max(loads) < 1.1 * np.mean(loads)
    assert [len(share) for share in split(np.arange(2), costs, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("budget", [{"documents_per_update": 8}, {"tokens_per_step": 64}])
def test_updates_do_not_depend_on_the_number_of_replicas(prepared, budget):
    """The same global budget: the union of the replicas' shares is what one process trains on."""
    whole = loader(prepared, tokens_per_update=512, **budget)
    parts = [
        loader(prepared, tokens_per_update=512, replica=r, replicas=4, **budget) for r in range(4)
    ]
    assert {part.total_updates for part in parts} == {whole.total_updates}
    shares = [take(part, whole.total_updates) for part in parts]
    for number, update in enumerate(take(whole, whole.total_updates)):
        together = [share[number] for share in shares]
        assert keys(update) == sorted(key for part in together for key in keys(part))
        assert update.normaliser == sum(part.normaliser for part in together)
        assert {part.micro_steps for part in together} == {
            max(len(part.batches) for part in together)
        }


def test_loader_goes_on_where_it_was(prepared):
    whole = loader(prepared)
    expected = take(whole, 20)
    assert whole.total_updates == sum(len(whole.plan(epoch)) for epoch in (0, 1))
    for consumed in (1, 5, len(whole.plan(0)), 13):
        first, second = loader(prepared), loader(prepared)
        take(first, consumed)
        second.state = dict(first.state)
        for got, want in zip(take(second, 20 - consumed), expected[consumed:], strict=True):
            assert [b.document_keys for b in got.batches] == [b.document_keys for b in want.batches]
            assert all(
                torch.equal(a.input_ids, b.input_ids)
                for a, b in zip(got.batches, want.batches, strict=True)
            )
