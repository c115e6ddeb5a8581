"""Where the trainer's hidden states come from: one function for each option of `mode`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eagle3.batch import Batch, Document, Features, concatenate_features, split_features
from eagle3.data.prepare import Prepared
from eagle3.hidden_states.capture import see
from eagle3.hidden_states.growing import Growing
from eagle3.hidden_states.store import Store
from eagle3.loader import DocumentSource


@dataclass
class Supply:
    """`features_of` is asked for batches whose documents came without features.

    `sync` waits until all that was computed so far is kept, which a checkpoint needs; `close` ends
    the writing. `stand_by` takes part in what other processes ask of a target that several share,
    that many times.
    """

    documents: DocumentSource
    features_of: Callable[[Batch], Features]
    sync: Callable[[], Any] = lambda: None
    close: Callable[[], Any] = lambda: None


def online(run) -> Supply:
    """`mode=online`: the target says its Features batch by batch."""
    target = run.target
    return Supply(run.prepared, target)


class Stored:
    """Documents of a store, in the order of the data it was made from; some of them may be the
    same.
    """

    def __init__(self, store: Store, order: np.ndarray):
        self.store, self.order = store, order
        place = {key: i for i, key in enumerate(store.keys.tolist())}
        places = np.array([place[key] for key in order.tolist()])
        self.lengths, self.supervised = store.lengths[places], store.supervised[places]

    def begin(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def load(self, numbers: list[int], epoch: int = 0) -> list[Document]:
        return self.store.load(self.order[numbers].tolist())


def offline(run) -> Supply:
    """`mode=offline`: everything was captured; neither the target nor the prepared data is needed."""

    def no_target(batch: Batch) -> Features:
        raise AssertionError("a store gives every document with its features")

    return Supply(Stored(run.store, run.store_order), no_target)


class Kept:
    """Prepared documents, from the second epoch on with the features that the first has kept.

    Reading only what an earlier epoch kept makes a run's losses independent of how fast the disk
    was, and a resumed run's of where it was stopped.
    """

    def __init__(self, prepared: Prepared, kept: Growing, meet: Callable[[], None]):
        """`meet` waits for the other processes, each of which keeps the documents that it trained
        on.
        """
        self.prepared, self.kept, self.meet = prepared, kept, meet
        self.lengths, self.supervised = prepared.lengths, prepared.supervised
        _, firsts, places = np.unique(
            prepared.index["start"], return_index=True, return_inverse=True
        )
        self.keys = firsts[
            places
        ]  # a document that an epoch passes over several times is kept once

    def begin(self, epoch: int) -> None:
        if epoch > 0:
            self.kept.sync()
            self.meet()
            self.kept.find()

    def load(self, numbers: list[int], epoch: int = 0) -> list[Document]:
        loaded = [replace(d, key=int(self.keys[d.key])) for d in self.prepared.load(numbers)]
        if epoch == 0:
            return loaded
        known = self.kept.load([document.key for document in loaded])
        return [known.get(document.key, document) for document in loaded]


class Online:
    captures, keeps, needs_target = False, False, True

    def __new__(cls, run) -> Supply:
        return online(run)


class Offline:
    captures, keeps, needs_target = True, False, False

    def __new__(cls, run) -> Supply:
        return offline(run)


class Hybrid:
    captures, keeps, needs_target = False, True, True

    def __new__(cls, run) -> Supply:
        return hybrid(run)


def hybrid(run) -> Supply:
    """`mode=hybrid`: what the first pass computes is kept, as far as the disk budget goes, and read
    afterwards.
    """
    kept, target = run.growing_store(), run.target
    everything = Kept(run.prepared, kept, run.ranks.meet)

    def features_of(batch: Batch) -> Features:
        unknown = [document for document in batch.loaded if document.features is None]
        if len(unknown) == len(batch.loaded):
            features = target(batch)
            if not kept.full:
                parts = split_features(batch, features)
                kept.add([replace(d, features=f) for d, f in zip(unknown, parts, strict=True)])
            return features
        seen = {document.key: document for document in see(target, unknown)} if unknown else {}
        if not kept.full:
            kept.add(list(seen.values()))
        features = concatenate_features(
            [seen.get(document.key, document).features for document in batch.loaded]
        )
        return features.to(batch.input_ids.device)

    return Supply(everything, features_of, kept.sync, kept.close)
