"""Which documents an update holds, how replicas share them, and going on in the middle."""

import contextlib
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from eagle3 import train
from eagle3.batch import Document, pack, serving, split_by_cost
from eagle3.loader import Feed, Loader, fill_micro_steps


class Documents:
    """57 documents of 10 to 99 random tokens, 60 % of them supervised."""

    def __init__(self):
        randomly = np.random.default_rng(0)
        self.lengths = randomly.integers(10, 100, 57)
        self.masks = [torch.from_numpy(randomly.random(n) < 0.6) for n in self.lengths]
        self.ids = [torch.from_numpy(randomly.integers(0, 50, n)) for n in self.lengths]
        self.supervised = np.array([int(mask.sum()) for mask in self.masks])

    def begin(self, epoch):
        pass

    def load(self, numbers):
        return [Document(number, self.ids[number], self.masks[number]) for number in numbers]


@pytest.fixture(scope="module")
def documents():
    return Documents()


def loader(documents, replica=0, replicas=1, tokens_per_update=256, **changes):
    section = {"epochs": 2, "max_steps": None, "tokens_per_step": 128, "data_share": 1.0}
    section |= {"documents_per_update": None}
    in_vocab = torch.ones(50, dtype=torch.bool)
    pack_documents = partial(pack, in_draft_vocab=in_vocab, ttt_steps=3, mask=serving)
    section = SimpleNamespace(**section | changes)
    return Loader(documents, section, pack_documents, tokens_per_update, 0, replica, replicas)


def take(source, count):
    updates = iter(source)
    return [next(updates) for _ in range(count)]


def keys(update):
    return [key for batch in update for key in batch.document_keys]


def test_plans_depend_on_the_seed_alone(documents):
    plans = [loader(documents, tokens_per_update=300).plan_epoch(0) for _ in range(2)]
    assert sorted(np.concatenate(plans[0]).tolist()) == list(range(57))
    assert all(documents.lengths[update].sum() <= 300 for update in plans[0])
    assert [u.tolist() for u in plans[0]] == [u.tolist() for u in plans[1]]
    other = loader(documents, tokens_per_update=300).plan_epoch(1)
    assert np.concatenate(plans[0]).tolist() != np.concatenate(other).tolist()
    counted = loader(documents, documents_per_update=8).plan_epoch(0)
    assert [len(update) for update in counted] == [8] * 7 + [1]


def test_a_smaller_share_of_the_data_is_part_of_a_larger_one(documents):
    """Every epoch passes over the same documents, in an order of its own."""
    trained = {}
    for share in (0.001, 0.25, 0.5, 1.0):
        epochs = [loader(documents, data_share=share).plan_epoch(epoch) for epoch in (0, 1)]
        first, second = (sorted(np.concatenate(epoch).tolist()) for epoch in epochs)
        assert first == second
        trained[share] = set(first)
    assert [len(each) for each in trained.values()] == [1, 14, 28, 57]
    assert trained[0.001] < trained[0.25] < trained[0.5] < trained[1.0]


def test_micro_steps_hold_every_document_once(documents):
    steps = fill_micro_steps(np.arange(40), documents.lengths, 128)
    assert sorted(i for step in steps for i in step) == list(range(40))
    assert all(sum(documents.lengths[i] for i in step) <= 128 for step in steps)


def test_replicas_share_by_cost():
    costs = np.random.default_rng(1).integers(1, 1000, 64)
    for replicas in (1, 2, 3, 8):
        shares = split_by_cost(np.arange(64), costs, replicas)
        assert sorted(np.concatenate(shares).tolist()) == list(range(64))
        loads = [costs[share].sum() for share in shares]
        assert max(loads) - min(loads) <= costs.max()
        assert max(loads) < 1.1 * np.mean(loads)
    assert [len(share) for share in split_by_cost(np.arange(2), costs, 4)] == [1, 1, 0, 0]


@pytest.mark.parametrize("budget", [{"documents_per_update": 8}, {"tokens_per_step": 64}])
def test_updates_do_not_depend_on_the_number_of_replicas(documents, budget):
    """The same global budget: the union of the replicas' shares is what one process trains on."""
    whole = loader(documents, tokens_per_update=512, **budget)
    parts = [loader(documents, r, 4, tokens_per_update=512, **budget) for r in range(4)]
    assert {part.total_updates for part in parts} == {whole.total_updates}
    shares = [take(part, whole.total_updates) for part in parts]
    for number, update in enumerate(take(whole, whole.total_updates)):
        together = [share[number] for share in shares]
        assert sorted(keys(update)) == sorted(key for part in together for key in keys(part))
        batches = [batch for part in together for batch in part]
        assert sum(b.normaliser for b in update) == sum(b.normaliser for b in batches)


def test_loader_goes_on_where_it_was(documents):
    whole = loader(documents)
    expected = take(whole, 20)
    assert whole.total_updates == sum(len(whole.plan_epoch(epoch)) for epoch in (0, 1))
    for consumed in (1, 5, len(whole.plan_epoch(0)), 13):
        first, second = loader(documents), loader(documents)
        take(first, consumed)
        second.state = dict(first.state)
        for got, want in zip(take(second, 20 - consumed), expected[consumed:], strict=True):
            assert keys(got) == keys(want)
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one.input_ids, other.input_ids)


def test_a_batch_is_held_until_the_copying_stream_waits_for_its_work(monkeypatch):
    """Two batches are on the device; the third is copied behind the work on the first."""
    calls, moved = [], []

    class Stream:
        def __init__(self, device):
            self.name = "copying"

        def wait_event(self, number):
            held = moved[number]() is not None
            calls.append(f"{self.name} waits for work {number}, held: {held}")

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return len(moved) - 1

    class Batch:
        def to(self, device):
            calls.append(f"copy {len(moved)}, on the device: {sum(x() is not None for x in moved)}")
            batch = Batch()
            moved.append(weakref.ref(batch))
            return batch

    computing = Stream("cuda")
    computing.name = "computing"
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    feed = Feed(torch.device("cuda"))
    for update in [[Batch()], [Batch(), Batch()]]:
        for _ in feed(update):
            calls.append("work")
    ahead = "computing waits for copying"
    assert calls == [
        "copy 0, on the device: 0", ahead, "work", "copy 1, on the device: 1", ahead, "work",
        "copying waits for work 0, held: True", "copy 2, on the device: 1", ahead, "work",
    ]  # fmt: skip


def test_a_micro_step_leaves_nothing_to_the_next():
    """A graph keeps copies of the weights, and what it was made of, as long as anyone holds it."""
    made = []

    def unroll(*given):
        assert all(each() is None for each in made)
        hidden = torch.ones(2, requires_grad=True) * 2
        made.append(weakref.ref(hidden))
        return hidden

    class Loss:
        weights = MagicMock()

        def __call__(self, draft, hidden, *given, scale):
            return SimpleNamespace(loss=hidden.sum(), step_loss=0, step_correct=0, correct=0)

    trainer = MagicMock(feed=iter, loss=Loss(), update=0)
    trainer.draft.unroll, trainer.draft.training_flops = unroll, lambda *given: 0
    trainer.ranks.all_reduce = int
    batches = [SimpleNamespace(features=SimpleNamespace(aux_hidden_states=0), normaliser=1)] * 3
    train.Trainer.train_update(trainer, batches, waited=0.0)
    assert len(made) == 3
