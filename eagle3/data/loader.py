"""Which documents each update trains on, and their packed batches. The order depends on the seed and nothing else."""

import heapq
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from eagle3.data.packing import Batch, SupervisedMask, pack
from eagle3.data.prepare import Prepared


@dataclass
class Update:
    """The micro-batches of one optimiser step; `normaliser` is theirs together."""

    batches: list[Batch]
    normaliser: int


def plan_epoch(
    lengths: np.ndarray, seed: int, epoch: int, tokens_per_update: int, documents_per_update: int | None
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


def split(documents: np.ndarray, costs: np.ndarray, replicas: int) -> list[np.ndarray]:
    """Deal an update's documents to replicas: the costliest first, each to the one with the least so far."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [(0, replica) for replica in range(replicas)]
    for index in sorted(documents.tolist(), key=lambda i: (-costs[i], i)):
        load, replica = heapq.heappop(loads)
        shares[replica].append(index)
        heapq.heappush(loads, (load + int(costs[index]), replica))
    return [np.array(share, dtype=np.int64) for share in shares]


def fill_micro_steps(documents: np.ndarray, lengths: np.ndarray, tokens_per_step: int) -> list[list[int]]:
    """First fit, longest first: as few micro-steps of at most `tokens_per_step` tokens as that finds."""
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

    State is (epoch, update within the epoch): taking it up again reads nothing that was consumed. An update's
    documents are fixed for all replicas together; this one packs its share, so that the order of training does not
    depend on how many there are.
    """

    def __init__(
        self,
        prepared: Prepared,
        t2d: torch.Tensor,
        mask: SupervisedMask,
        ttt_steps: int,
        epochs: int,
        max_steps: int | None,
        tokens_per_step: int,
        grad_accum: int,
        documents_per_update: int | None,
        seed: int,
        replica: int = 0,
        replicas: int = 1,
    ):
        self.prepared, self.t2d, self.mask, self.ttt_steps = prepared, t2d, mask, ttt_steps
        self.tokens_per_step = tokens_per_step
        self.lengths, self.replica, self.replicas = prepared.lengths, replica, replicas
        # the target passes over every token, the unroll over the supervised ones, at about the same cost each
        self.costs = self.lengths + prepared.supervised
        tokens_per_update = tokens_per_step * grad_accum * replicas
        self.plan = lambda epoch: plan_epoch(self.lengths, seed, epoch, tokens_per_update, documents_per_update)
        planned = sum(len(self.plan(epoch)) for epoch in range(epochs))
        self.total_updates = planned if max_steps is None else min(planned, max_steps)
        self.state = {"epoch": 0, "update": 0}

    def pack_update(self, documents: np.ndarray) -> Update:
        mine = split(documents, self.costs, self.replicas)[self.replica]
        batches = [
            pack([self.prepared.document(i) for i in indices], self.t2d, self.ttt_steps, self.mask)
            for indices in fill_micro_steps(mine, self.lengths, self.tokens_per_step)
        ]
        return Update(batches, sum(batch.normaliser for batch in batches))

    def positions(self) -> Iterator[tuple[int, int, np.ndarray]]:
        epoch, first = self.state["epoch"], self.state["update"]
        while True:
            plan = self.plan(epoch)
            for number in range(first, len(plan)):
                yield epoch, number, plan[number]
            epoch, first = epoch + 1, 0

    def __iter__(self) -> Iterator[Update]:
        """Endless; `state` already points behind the update that was handed out."""
        with ThreadPoolExecutor(1) as packer:
            positions = self.positions()
            epoch, number, documents = next(positions)
            ahead = packer.submit(self.pack_update, documents)
            while True:
                update = ahead.result()
                self.state = {"epoch": epoch, "update": number + 1}
                epoch, number, documents = next(positions)
                ahead = packer.submit(self.pack_update, documents)
                yield update
