"""Which documents each update trains on, and their packed batches.

The order depends on the seed and nothing else: an update's documents are fixed for all replicas
together, and then dealt, so that training does not depend on how many there are.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eagle3.batch import Batch, Document, fill, split_by_cost
from eagle3.config import Train


class DocumentSource(Protocol):
    """What a loader packs: `lengths` and `supervised` int64 [documents] count tokens of each.

    `load` leaves out documents that are damaged and may be skipped. In epoch 0 there is nothing yet
    that `mode=hybrid` could have kept. `begin` is called by all ranks alike when an epoch begins,
    or is taken up again.
    """

    lengths: np.ndarray
    supervised: np.ndarray

    def begin(self, epoch: int) -> None: ...

    def load(self, numbers: list[int], epoch: int = 0) -> list[Document]: ...


@dataclass
class Update:
    """This replica's micro-batches of one optimiser step; `normaliser` is theirs together."""

    batches: list[Batch]
    normaliser: int


class Loader:
    """Iterates over updates from where `state` says; packs one update ahead in a thread.

    State is (epoch, update within the epoch): taking it up again reads nothing that was consumed.
    """

    def __init__(
        self,
        documents: DocumentSource,
        section: Train,
        pack_documents: Callable[[list[Document]], Batch],
        tokens_per_update: int,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
    ):
        """`tokens_per_update` is of all replicas; void where `section` counts documents."""
        self.documents, self.section, self.pack_documents = documents, section, pack_documents
        self.tokens_per_update, self.seed = tokens_per_update, seed
        self.replica, self.replicas = replica, replicas
        self.lengths = documents.lengths
        # The target passes over every token, the unroll over the supervised ones, at about the same
        # cost each.
        self.costs = self.lengths + documents.supervised
        planned = sum(len(self.plan_epoch(epoch)) for epoch in range(section.epochs))
        self.total_updates = min(planned, section.max_steps or planned)
        self.state = {"epoch": 0, "update": 0}

    def plan_epoch(self, epoch: int) -> list[np.ndarray]:
        per_update = self.section.documents_per_update
        return plan_epoch(self.lengths, self.seed, epoch, self.tokens_per_update, per_update)

    def pack_update(self, epoch: int, documents: np.ndarray) -> Update:
        mine = split_by_cost(documents, self.costs, self.replicas)[self.replica]
        batches = []
        for numbers in fill_micro_steps(mine, self.lengths, self.section.tokens_per_step):
            loaded = self.documents.load(numbers, epoch)
            if loaded:
                batches.append(self.pack_documents(loaded))
        return Update(batches, sum(batch.normaliser for batch in batches))

    def positions(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(epoch, number within it, documents) of every update from `state` on, endlessly."""
        epoch, first = self.state["epoch"], self.state["update"]
        while True:
            plan = self.plan_epoch(epoch)
            for number in range(first, len(plan)):
                yield epoch, number, plan[number]
            epoch, first = epoch + 1, 0

    def __iter__(self) -> Iterator[Update]:
        """Endless; `state` already points behind the update that was handed out.

        The first update of an epoch is packed only when it is asked for, since hybrid keeps
        features up to the end of the epoch before.
        """
        with ThreadPoolExecutor(1) as packer:
            packed_ahead, positions = None, self.positions()
            position = next(positions)
            while True:
                epoch, number, documents = position
                if packed_ahead is None:
                    self.documents.begin(epoch)
                    packed_ahead = packer.submit(self.pack_update, epoch, documents)
                update = packed_ahead.result()
                self.state = {"epoch": epoch, "update": number + 1}
                position = next(positions)
                packed_ahead = None
                if position[1] > 0:
                    packed_ahead = packer.submit(self.pack_update, position[0], position[2])
                yield update


def plan_epoch(
    lengths: np.ndarray, seed: int, epoch: int, tokens_per_update: int, num_documents: int | None
) -> list[np.ndarray]:
    """Document numbers of each update of an epoch: a seeded shuffle, cut by either budget."""
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    if num_documents is not None:
        return np.split(order, range(num_documents, len(order), num_documents))
    updates = fill(order.tolist(), lengths[order].tolist(), tokens_per_update)
    return list(map(np.array, updates))


def fill_micro_steps(
    documents: np.ndarray, lengths: np.ndarray, tokens_per_step: int
) -> list[list[int]]:
    """First fit, longest first: few micro-steps of at most `tokens_per_step` tokens."""
    steps, room = [], []
    for number in sorted(documents.tolist(), key=lambda i: (-lengths[i], i)):
        place = next((i for i, free in enumerate(room) if free >= lengths[number]), None)
        if place is None:
            steps.append([])
            room.append(tokens_per_step)
            place = len(room) - 1
        steps[place].append(number)
        room[place] -= lengths[number]
    return steps
