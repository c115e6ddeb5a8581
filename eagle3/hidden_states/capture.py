"""The stage `capture`: the target's hidden states of all documents, once, to disk.

Batches and shards are planned from the documents and claimed one by one by any number of processes:
the finished store does not depend on who wrote what, nor on who was killed when.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from eagle3.batch import Document, fill, pack, serving, split_features
from eagle3.config import HiddenStates
from eagle3.data.prepare import Prepared
from eagle3.hidden_states.shards import SHARD_BYTES, document_bytes, shard_path
from eagle3.hidden_states.store import Store, bytes_by_owner, create_store, store_inputs
from eagle3.runs.artefact import fingerprint
from eagle3.runs.disk import check_disk, parse_size
from eagle3.runs.progress import Progress
from eagle3.target.handle import TargetHandle

POLL_SECONDS = 1.0
LEAST_SHARDS = 64  # of which a kill costs two, or two batches where these are larger


def locate_store(
    section: HiddenStates, prepared: Prepared, target: TargetHandle, cache_dir: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of the prepared documents' store, be it there or not, and what it is made from."""
    inputs = store_inputs(target, section.dtype, prepared.digest)
    return Path(section.path or Path(cache_dir, "hidden_states", fingerprint(inputs))), inputs


def capture(
    hidden: HiddenStates, prepared: Prepared, target: TargetHandle, cache_dir: str, shown: bool
) -> None:
    """Complete the store of the prepared documents together with others that call it. RunError."""
    folder, inputs = locate_store(hidden, prepared, target, cache_dir)
    loaded, sizes = target.load(), (target.spec.config.hidden_size, target.spec.aux_size)
    payload = document_bytes(prepared.lengths, prepared.teachers, sizes, hidden.dtype)
    # Only whole shards outlast a kill.
    shard_bytes = min(SHARD_BYTES, int(payload.sum()) // LEAST_SHARDS)
    # Other batches round differently and other shards overlap, so who goes on must plan alike.
    planned = {"batch_tokens": loaded.batch_tokens, "shard_bytes": shard_bytes}
    create_store(folder, {"kind": "capture"} | inputs | planned)
    shards = plan_shards(prepared, payload, loaded.batch_tokens, shard_bytes)
    missing = [n for n in range(len(shards)) if not shard_path(folder, n).exists()]
    needed = sum(int(payload[batch].sum()) for number in missing for batch in shards[number])
    used = bytes_by_owner(folder).total()
    check_disk(needed, folder, hidden.max_disk and parse_size(hidden.max_disk) - used)
    store = Store(folder, on_damage="skip")  # a deleted shard is no reason not to write it
    sizes = [sum(map(len, shard)) for shard in shards]

    def kept() -> int:
        return sum(size for n, size in enumerate(sizes) if shard_path(folder, n).exists())

    tokens = sum(int(prepared.lengths[batch].sum()) for n in missing for batch in shards[n])
    with Progress("capture", sum(sizes), "documents", kept(), shown, kept, tokens) as bar:
        write_shards(store, prepared, loaded, shards, missing, bar)
    data = {"lengths": prepared.lengths, "supervised": prepared.supervised}
    data |= {"order": document_keys(prepared), "vocab": np.asarray(prepared.vocab)}
    store.complete(len(shards), **data)


def document_keys(prepared: Prepared) -> np.ndarray:
    """int64 [N]: the number that each document is stored under, once however often it comes."""
    starts = prepared.index["start"]
    # Sources that an epoch passes over several times begin at the same token.
    _, firsts, numbers = np.unique(starts, return_index=True, return_inverse=True)
    return firsts[numbers]


def plan_shards(
    prepared: Prepared, payload: np.ndarray, batch_tokens: int, shard_bytes: int
) -> list:
    """Document numbers by shard and batch; `payload` int64 [N] has each document's bytes."""
    lengths, firsts = prepared.lengths, np.unique(document_keys(prepared))
    # Equal lengths side by side pack tightly, and the last shards are the quick ones.
    order = firsts[np.lexsort((firsts, -lengths[firsts]))]
    batches = fill(order.tolist(), lengths[order].tolist(), batch_tokens)
    return fill(batches, [int(payload[batch].sum()) for batch in batches], shard_bytes)


def compute_features(target: Any, documents: list[Document]) -> list[Document]:
    """Documents with the target's features, computed in one packed batch."""
    # A target's features do not depend on the draft vocabulary, which `pack` asks for.
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    batch = pack(documents, everything, 1, serving)
    parts = split_features(batch, target(batch.to(target.device)))
    return [replace(document, features=part) for document, part in zip(documents, parts)]


def write_shards(
    store: Store, prepared: Prepared, target: Any, shards: list, missing: list[int], bar: Progress
) -> None:
    """Claim, compute, and write behind the next computation, until no shard is missing."""
    own: set[int] = set()

    def count(batch: list[int]) -> None:
        bar.advance(len(batch), int(prepared.lengths[batch].sum()))

    # Two shards in memory: one is written while the next is computed.
    with ThreadPoolExecutor(1) as writer:
        writing = None
        while missing:
            before = set(missing)
            claim = claim_shard(store.folder, missing)
            for number in before.difference(missing, own):  # others have written it
                for batch in shards[number]:
                    count(batch)
            computed: list[Document] = []
            if claim is not None:
                own.add(claim[0])
                for batch in shards[claim[0]]:
                    computed += compute_features(target, prepared.load(batch))
                    count(batch)
            elif writing is None and missing:
                time.sleep(POLL_SECONDS)  # other processes write what is missing
            if writing is not None:
                writing.result()
            writing = claim and writer.submit(write_claimed, store, *claim, computed)


def claim_shard(folder: Path, missing: list[int]) -> tuple[int, FileLock] | None:
    """The first missing shard that nobody writes, locked; complete ones leave `missing`."""
    for number in list(missing):
        # A dead process holds no lock of the system. The thread that writes releases this one.
        lock = FileLock(folder / f".claim_{number:08d}", thread_local=False)
        with suppress(Timeout):
            lock.acquire(timeout=0)
            if not shard_path(folder, number).exists():
                return number, lock
            lock.release()
            missing.remove(number)
    return None


def write_claimed(store: Store, number: int, lock: FileLock, documents: list[Document]) -> None:
    try:
        store.write(number, documents)
    finally:
        lock.release()
