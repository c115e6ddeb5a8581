"""Where the trainer's hidden states come from: one class for each option of `mode`."""

from dataclasses import replace
from functools import cached_property

import numpy as np

from eagle3.batch import Batch, Document, Features, concatenate_features, split_features
from eagle3.data.prepare import Prepared
from eagle3.errors import RunError
from eagle3.hidden_states.capture import compute_features, document_keys
from eagle3.hidden_states.store import Store
from eagle3.target.handle import TargetHandle


class Supply:
    """A loader's documents, and `features` for batches whose have none."""

    captures = False  # whether the stage `capture` writes a store before
    keeps = False  # whether training writes one
    needs_target = True

    def __init__(
        self, prepared: Prepared | None, store: Store | None, target: TargetHandle, barrier=None
    ):
        self.prepared, self.store, self.target, self.barrier = prepared, store, target, barrier
        data = store if prepared is None else prepared
        self.lengths, self.supervised = data.lengths, data.supervised

    def begin(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def load(self, numbers: list[int]) -> list[Document]:
        return self.prepared.load(numbers)

    def features(self, batch: Batch) -> Features:
        return self.target.load()(batch)

    def sync(self) -> None:
        """Wait until all that was computed so far is on disk, which a checkpoint needs."""
        if self.keeps:
            self.store.sync()

    def close(self) -> None:
        if self.keeps:
            self.store.close()


class Online(Supply):
    """`mode=online`: the target computes hidden states batch by batch."""


class Offline(Supply):
    """`mode=offline`: everything was captured; neither target nor prepared data is needed."""

    captures = True
    needs_target = False

    def load(self, numbers: list[int]) -> list[Document]:
        keys = self.store.order[numbers].tolist()
        found = self.store.load(keys)
        missing = [key for key in keys if key not in found]
        if missing and self.store.on_damage == "fail":
            raise RunError(f"{self.store.folder} has no document {missing[0]}; capture it again")
        return [found[key] for key in keys if key in found]


class Hybrid(Supply):
    """`mode=hybrid`: what the first epoch computes is kept, as far as it fits, and read later."""

    keeps = True
    epoch = 0

    @cached_property
    def keys(self) -> np.ndarray:
        return document_keys(self.prepared)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        if epoch > 0:
            # Each rank kept what it trained on, and any may be given it in this epoch.
            self.store.sync()
            self.barrier()
            self.store.scan()

    def load(self, numbers: list[int]) -> list[Document]:
        loaded = [replace(d, key=int(self.keys[d.key])) for d in self.prepared.load(numbers)]
        # The first epoch reads nothing of what it keeps, so that losses depend neither on how fast
        # the disk is, nor on where a run was stopped.
        found = self.store.load([document.key for document in loaded]) if self.epoch else {}
        return [found.get(document.key, document) for document in loaded]

    def features(self, batch: Batch) -> Features:
        unknown = [document for document in batch.loaded if document.features is None]
        if len(unknown) == len(batch.loaded):
            # The batch as it is, so that the first epoch's losses are those of mode=online.
            features = self.target.load()(batch)
            if not self.store.full:
                parts = split_features(batch, features)
                self.store.add([replace(d, features=part) for d, part in zip(unknown, parts)])
            return features
        computed = compute_features(self.target.load(), unknown) if unknown else []
        self.store.add(computed)
        known = {document.key: document for document in computed}
        parts = [known.get(document.key, document).features for document in batch.loaded]
        return concatenate_features(parts).to(batch.input_ids.device)
