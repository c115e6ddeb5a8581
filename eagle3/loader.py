"""Which documents each update trains on, and their packed batches.

The order depends on the seed and nothing else: an update's documents are fixed for all replicas
together, and then dealt, so that training does not depend on how many there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from eagle3.batch import Batch, Document, SupervisedMask, fill, pack, split_by_cost
from eagle3.config import DraftSection, Train
from eagle3.draft.model import DraftConfig


def packing(
    section: DraftSection, shape: DraftConfig, in_draft_vocab: torch.Tensor, mask: SupervisedMask
) -> Callable[[list[Document]], Batch]:
    """How a run packs documents: `pack` with all else that it takes."""
    settings = {"ttt_steps": section.ttt_steps, "mask": mask}
    if shape.reads_mask_token:
        settings["anchors"] = section.anchors
    return partial(pack, in_draft_vocab=in_draft_vocab, **settings)


class DocumentSource(Protocol):
    """What a loader packs: `lengths` and `supervised` int64 [documents] count tokens of each.

    `load` leaves out documents that are damaged and may be skipped. `begin` is called by all ranks
    alike when an epoch begins, or is taken up again.
    """

    lengths: np.ndarray
    supervised: np.ndarray

    def begin(self, epoch: int) -> None: ...

    def load(self, numbers: list[int]) -> list[Document]: ...


@dataclass
class Loader:
    """Iterates over updates, this replica's micro-batches of each, from where `state` says.

    State is (epoch, update within the epoch): taking it up again reads nothing that was consumed.
    One update is packed ahead in a thread.
    `tokens_per_update` is of all replicas; void where `section` counts documents.
    """

    documents: DocumentSource
    section: Train
    pack_documents: Callable[[list[Document]], Batch]
    tokens_per_update: int
    seed: int
    replica: int = 0
    replicas: int = 1

    def __post_init__(self):
        self.lengths = self.documents.lengths
        # The target passes over every token, the unroll over the supervised ones, at about the same
        # cost each.
        self.costs = self.lengths + self.documents.supervised
        # A smaller share is part of a larger one, and everything is in its old order.
        drawn = np.random.default_rng(self.seed).permutation(len(self.lengths))
        kept = max(1, round(self.section.data_share * len(drawn)))
        self.chosen = np.sort(drawn[:kept])
        planned = sum(len(self.plan_epoch(epoch)) for epoch in range(self.section.epochs))
        self.total_updates = min(planned, self.section.max_steps or planned)
        self.state = {"epoch": 0, "update": 0}

    def plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """Document numbers of each update of an epoch: a seeded shuffle, cut by either budget."""
        order = self.chosen[np.random.default_rng([self.seed, epoch]).permutation(len(self.chosen))]
        count = self.section.documents_per_update
        if count is not None:
            return np.split(order, range(count, len(order), count))
        updates = fill(order.tolist(), self.lengths[order].tolist(), self.tokens_per_update)
        return list(map(np.array, updates))

    def pack_update(self, documents: np.ndarray, epoch: int = 0) -> list[Batch]:
        mine = split_by_cost(documents, self.costs, self.replicas)[self.replica]
        batches = []
        for numbers in fill_micro_steps(mine, self.lengths, self.section.tokens_per_step):
            loaded = self.documents.load(numbers)
            for document in loaded:
                document.epoch = epoch
            if loaded:
                batches.append(self.pack_documents(loaded))
        return batches

    def __iter__(self) -> Iterator[list[Batch]]:
        """Endless; `state` already points behind the update that was handed out.

        The first update of an epoch is packed only when it is asked for, since hybrid keeps
        features up to the end of the epoch before.
        """
        epoch, number = self.state["epoch"], self.state["update"]
        with ThreadPoolExecutor(1) as packer:
            while True:
                plan = self.plan_epoch(epoch)
                if number < len(plan):
                    self.documents.begin(epoch)
                    packed_ahead = packer.submit(self.pack_update, plan[number], epoch)
                while number < len(plan):
                    update, number = packed_ahead.result(), number + 1
                    self.state = {"epoch": epoch, "update": number}
                    if number < len(plan):
                        packed_ahead = packer.submit(self.pack_update, plan[number], epoch)
                    yield update
                epoch, number = epoch + 1, 0


def fill_micro_steps(
    documents: np.ndarray, lengths: np.ndarray, tokens_per_step: int
) -> list[list[int]]:
    """First fit, longest first: few micro-steps of at most `tokens_per_step` tokens."""
    steps, room = [], []
    for number in sorted(documents.tolist(), key=lambda i: (-lengths[i], i)):
        fitting = (i for i, free in enumerate(room) if free >= lengths[number])
        place = next(fitting, len(room))
        if place == len(room):
            steps.append([])
            room.append(tokens_per_step)
        steps[place].append(number)
        room[place] -= lengths[number]
    return steps


class Feed:
    """Batches on the device, for one after the other to be worked on.

    A GPU copies a batch while it works on the one before: the copy is on a stream of its own, and
    the host, which never waits in a step, issues it long before that work is done.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.used: deque[tuple[Batch, torch.cuda.Event]] = deque()  # with the end of its work

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Each batch on the device; what its work needs is issued before the next is asked for."""
        for batch in batches:
            if self.stream is None:
                yield batch.to(self.device)
                continue
            computing = torch.cuda.current_stream(self.device)
            with torch.cuda.stream(self.stream):
                # Memory of a batch goes back to this stream's pool. Another stream works on it, so
                # nothing may be put there before that has ended: the batch is held here until this
                # stream waits for the end. (`record_stream` would keep the memory from being used
                # again until the host looks, and a host far ahead would take ever more.)
                while len(self.used) > 1:
                    self.stream.wait_event(self.used[0][1])
                    self.used.popleft()
                moved = batch.to(self.device)
            computing.wait_stream(self.stream)
            yield moved
            self.used.append((moved, computing.record_event()))
