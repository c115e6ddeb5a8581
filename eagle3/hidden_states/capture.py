"""The stage `capture`: the target's hidden states of all documents, once, to disk.

Batches and shards are planned from the documents and `target.batch_tokens` and claimed one by one,
by any number of processes, also of several commands: the finished store does not depend on who
wrote what, nor on who was killed when.
"""

import errno
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from eagle3.batch import Document, pack, serving, split_features
from eagle3.data.prepare import Prepared
from eagle3.errors import RunError
from eagle3.hidden_states.shards import SHARD_BYTES, write_atomically
from eagle3.hidden_states.store import (
    check_inputs,
    document_bytes,
    finish,
    shard_is_complete,
    shard_path,
    write_shard,
)
from eagle3.runs import disk
from eagle3.runs.artefact import describe_file, read_facts
from eagle3.target.hf import HFTarget

POLL_SECONDS = 1.0

Shards = list[list[list[int]]]


def plan_shards(documents: Prepared, hidden_size: int, dtype: str, batch_tokens: int) -> Shards:
    """Document numbers by shard and batch: longest first, at most `batch_tokens` in a batch, whole
    batches in a shard.

    A document that an epoch passes over several times is captured once.
    """
    _, firsts = np.unique(documents.index["start"], return_index=True)
    lengths = documents.lengths
    order = firsts[np.lexsort((firsts, -lengths[firsts]))]
    payload = document_bytes(lengths, documents.teachers, hidden_size, dtype)
    shards: Shards = []
    tokens, size = 0, SHARD_BYTES
    for number in order.tolist():
        if not shards or tokens + lengths[number] > batch_tokens:
            if size >= SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append([])
            tokens = 0
        shards[-1][-1].append(number)
        tokens += lengths[number]
        size += payload[number]
    return shards


def see(target: HFTarget, loaded: list[Document]) -> list[Document]:
    """Documents with the target's features, computed in one packed batch."""
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    batch = pack(loaded, everything, 1, serving)
    features = split_features(batch, target(batch.to(target.device)))
    return [
        Document(d.key, d.input_ids, d.loss_mask, f) for d, f in zip(loaded, features, strict=True)
    ]


class Claims:
    """Which shards are still to be written, and the lock of the one that this process takes."""

    def __init__(self, folder: Path, num_shards: int):
        self.folder = folder
        self.missing = [n for n in range(num_shards) if not shard_is_complete(folder, n)]
        self.complete = sorted(set(range(num_shards)) - set(self.missing))
        self.bytes = sum(shard_path(folder, number).stat().st_size for number in self.complete)

    def take(self) -> tuple[int, FileLock] | None:
        """The next shard that nobody writes; None when all missing ones are claimed. A dead process
        holds no lock.
        """
        for number in list(self.missing):
            lock = FileLock(self.folder / f".claim_{number:06d}")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if not shard_is_complete(self.folder, number):
                return number, lock
            lock.release()
            self.note(number)
        return None

    def note(self, number: int) -> None:
        self.missing.remove(number)
        self.complete.append(number)
        self.bytes += shard_path(self.folder, number).stat().st_size


def begin(folder: Path, inputs: dict[str, Any]) -> None:
    """Note in `folder` what the store is made from. Raises RunError when it holds one made from
    something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        noted = folder / "inputs.json"
        with FileLock(folder / ".lock"):
            if noted.exists():
                check_inputs(json.loads(noted.read_text()), json.loads(json.dumps(inputs)), folder)
                return
            if any(path.suffix == ".safetensors" for path in folder.iterdir()):
                raise RunError(
                    f"hidden_states.path={folder} holds files that are no store of ours; name an empty folder"
                )
            write_atomically(noted, json.dumps(inputs, indent=1).encode())
    except OSError as error:
        raise RunError(
            f"hidden_states.path={folder} cannot be written: {error}; name another folder"
        ) from error


def is_complete(folder: Path) -> bool:
    """Whether the index was written and no shard has been deleted since."""
    if not (folder / "artefact.json").is_file():
        return False
    return all(shard_is_complete(folder, number) for number in range(read_facts(folder)["shards"]))


def read_beside(folder: Path, name: str) -> np.ndarray:
    """An array that `complete` wrote beside the index. Raises RunError where it is no longer that."""
    path = folder / name
    noted = json.loads((folder / "artefact.json").read_text())["files"][name]
    if not path.is_file() or describe_file(path) != noted:
        raise RunError(
            f"{path} is missing or damaged; delete {folder / 'artefact.json'} and capture again"
        )
    return np.load(path)


def capture(
    folder: Path,
    documents: Prepared,
    target: HFTarget,
    inputs: dict[str, Any],
    dtype: str,
    batch_tokens: int,
    max_disk: int | None,
    console: Console,
) -> None:
    """Fill `folder` together with every other process that captures into it; returns when the store
    is complete.

    Raises RunError when the disk can't hold it or fills up; what was written stays, and the same
    call goes on.
    """
    begin(
        folder,
        {"kind": "capture"} | inputs | {"batch_tokens": batch_tokens, "shard_bytes": SHARD_BYTES},
    )
    shards = plan_shards(documents, target.config.hidden_size, dtype, batch_tokens)
    write_shards(folder, documents, target, shards, dtype, max_disk, console)
    complete(folder, documents, inputs, len(shards))


def write_shards(
    folder: Path,
    documents: Prepared,
    target: HFTarget,
    shards: Shards,
    dtype: str,
    max_disk: int | None,
    console: Console,
) -> None:
    """Claim, compute, and write behind the next computation, until no shard is missing; holds two
    shards in memory.
    """
    tokens = [sum(int(documents.lengths[batch].sum()) for batch in shard) for shard in shards]
    claims = Claims(folder, len(shards))
    missing = [number for shard in claims.missing for batch in shards[shard] for number in batch]
    needed = document_bytes(
        documents.lengths[missing], documents.teachers[missing], target.config.hidden_size, dtype
    )
    disk.check_disk(
        int(np.sum(needed)), folder, None if max_disk is None else max_disk - claims.bytes
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, transient=True, console=console)
    with ThreadPoolExecutor(1) as writer, bar as progress:
        task = progress.add_task("capture", total=float(sum(tokens)))
        writing: tuple[Future, int, FileLock] | None = None
        while claims.missing:
            done = sum(tokens[number] for number in claims.complete)
            progress.update(
                task,
                completed=done,
                description=f"capture: {done:,} tokens, {claims.bytes / 1e9:,.2f} GB",
            )
            taken = claims.take()
            seen = None
            if taken is not None:
                seen = [
                    document
                    for batch in shards[taken[0]]
                    for document in see(target, documents.load(batch))
                ]
            if writing is not None:
                settle(claims, *writing)
                writing = None
            if taken is not None:
                writing = (writer.submit(write_shard, folder, taken[0], seen, dtype), *taken)
            elif claims.missing:
                time.sleep(POLL_SECONDS)


def settle(claims: Claims, future: Future, number: int, lock: FileLock) -> None:
    """Wait until a shard is written; its claim is free afterwards, whatever came of it. Raises
    RunError.
    """
    try:
        future.result()
        claims.note(number)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else f"writing failed ({error})"
        raise RunError(
            f"{why}: {len(claims.missing)} shards of {claims.folder} are still missing; free space, or set "
            "hidden_states.dtype=int8, data.num_samples or another hidden_states.path; the same command goes on"
        ) from error
    finally:
        lock.release()


def complete(folder: Path, documents: Prepared, inputs: dict[str, Any], num_shards: int) -> None:
    """Write the index, once."""
    with FileLock(folder / ".lock"):
        if (folder / "artefact.json").is_file():
            return
        learnt = finish(folder, inputs, num_shards)
        _, firsts, numbers = np.unique(
            documents.index["start"], return_index=True, return_inverse=True
        )
        np.save(folder / "order.npy", firsts[numbers])
        np.save(folder / "vocab.npy", documents.vocab)
        for claim in folder.glob(".claim_*"):
            claim.unlink(missing_ok=True)
        files = {name: describe_file(folder / name) for name in ("order.npy", "vocab.npy")}
        content = json.dumps({"inputs": inputs, "facts": learnt, "files": files}, indent=1)
        write_atomically(folder / "artefact.json", content.encode())
