"""Which documents each update trains on, and their packed batches. The order depends on the seed
and nothing else.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from eagle3.batch import Batch, Document, SupervisedMask, concatenate_features, pack, split_by_cost


class DocumentSource(Protocol):
    """What a loader packs; `load` leaves out documents that are damaged and may be skipped.

    In epoch 0 there is nothing yet that `mode=hybrid` could have kept. `begin` is called when an
    epoch begins, or is taken up again, by all processes alike.
    """

    lengths: np.ndarray
    supervised: np.ndarray

    def begin(self, epoch: int) -> None: ...

    def load(self, numbers: list[int], epoch: int = 0) -> list[Document]: ...


@dataclass
class Update:
    """This process' micro-batches of one optimiser step; `normaliser` is theirs together."""

    batches: list[Batch]
    normaliser: int


def plan_epoch(
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    tokens_per_update: int,
    documents_per_update: int | None,
) -> list[np.ndarray]:
    """Document indices of each update of an epoch: a seeded shuffle, cut where the budget is full."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    if documents_per_update is not None:
        return np.split(order, range(documents_per_update, len(order), documents_per_update))
    updates, start, used = [], 0, 0
    for place, length in enumerate(lengths[order]):
        if used + length > tokens_per_update and place > start:
            updates.append(order[start:place])
            start, used = place, 0
        used += length
    return [*updates, order[start:]]


def fill_micro_steps(
    documents: np.ndarray, lengths: np.ndarray, tokens_per_step: int
) -> list[list[int]]:
    """First fit, longest first: as few micro-steps of at most `tokens_per_step` tokens as that
    finds.
    """
    steps: list[list[int]] = []
    room: list[int] = []
    for index in sorted(documents.tolist(), key=lambda i: (-lengths[i], i)):
        place = next((i for i, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            steps.append([])
            room.append(tokens_per_step)
            place = len(room) - 1
        steps[place].append(index)
        room[place] -= lengths[index]
    return steps


class Loader:
    """Iterates over updates from where `state` says; packs one update ahead in a thread.

    State is (epoch, update within the epoch): taking it up again reads nothing that was consumed.
    An update's documents are fixed for all replicas together; this one packs its share, so that the
    order of training does not depend on how many there are.
    """

    def __init__(
        self,
        documents: DocumentSource,
        t2d: torch.Tensor,
        mask: SupervisedMask,
        ttt_steps: int,
        epochs: int,
        max_steps: int | None,
        tokens_per_step: int,
        tokens_per_update: int,
        documents_per_update: int | None,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
        deal: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        """`deal` leaves of a batch what is this process' to do, where several share a replica."""
        self.documents, self.t2d, self.mask, self.ttt_steps = documents, t2d, mask, ttt_steps
        self.tokens_per_step, self.tokens_per_update, self.deal = (
            tokens_per_step,
            tokens_per_update,
            deal,
        )
        self.lengths, self.replica, self.replicas = documents.lengths, replica, replicas
        # the target passes over every token, the unroll over the supervised ones, at about the same
        # cost each
        self.costs = self.lengths + documents.supervised
        self.plan = lambda epoch: plan_epoch(
            self.lengths, seed, epoch, tokens_per_update, documents_per_update
        )
        planned = sum(len(self.plan(epoch)) for epoch in range(epochs))
        self.total_updates = planned if max_steps is None else min(planned, max_steps)
        self.state = {"epoch": 0, "update": 0}

    def pack_update(self, epoch: int, documents: np.ndarray) -> Update:
        shares = split_by_cost(documents, self.costs, self.replicas)
        steps = [fill_micro_steps(share, self.lengths, self.tokens_per_step) for share in shares]
        mine = steps[self.replica]
        batches = [
            self.pack_step(loaded)
            for numbers in mine
            if (loaded := self.documents.load(numbers, epoch))
        ]
        return Update(batches, sum(batch.normaliser for batch in batches))

    def pack_step(self, loaded: list[Document]) -> Batch:
        batch = pack(loaded, self.t2d, self.ttt_steps, self.mask)
        features = [document.features for document in loaded]
        if None in features:
            return self.deal(replace(batch, loaded=loaded))
        return self.deal(replace(batch, features=concatenate_features(features)))

    def positions(self) -> Iterator[tuple[int, int, np.ndarray]]:
        epoch, first = self.state["epoch"], self.state["update"]
        while True:
            plan = self.plan(epoch)
            for number in range(first, len(plan)):
                yield epoch, number, plan[number]
            epoch, first = epoch + 1, 0

    def __iter__(self) -> Iterator[Update]:
        """Endless; `state` already points behind the update that was handed out.

        The first update of an epoch is packed when it is asked for, since hybrid keeps features up
        to the end of one.
        """
        with ThreadPoolExecutor(1) as packer:
            ahead = None
            positions = self.positions()
            following = next(positions)
            while True:
                epoch, number, documents = following
                if ahead is None:
                    self.documents.begin(epoch)
                update = (ahead or packer.submit(self.pack_update, epoch, documents)).result()
                self.state = {"epoch": epoch, "update": number + 1}
                following = next(positions)
                ahead = (
                    packer.submit(self.pack_update, following[0], following[2])
                    if following[1]
                    else None
                )
                yield update
