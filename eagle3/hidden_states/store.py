"""A store of hidden states: a folder of shards that processes add to, read document by document.

`store.json` says what the states were made from. A store that is complete, whether captured or
imported, also has `index.npz`: how many shards there are, what the training data is in its order,
and its draft vocabulary, so that training needs nothing else. `mode=hybrid` fills a store that is
never complete.
"""

import io
import json
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from eagle3.batch import Document
from eagle3.config import HiddenStates, parse_size
from eagle3.data.vocab import choose_vocab
from eagle3.errors import RunError
from eagle3.hidden_states import shards
from eagle3.hidden_states.shards import DamageError, Shard, shard_number, shard_path
from eagle3.runs.artefact import fingerprint
from eagle3.runs.disk import free_bytes
from eagle3.target.handle import TargetHandle

INPUTS, INDEX, LOCK = "store.json", "index.npz", ".lock"
OPEN_SHARDS = 64
SHARDS_PER_RANK = 100_000
REMEDY = "set hidden_states.on_damage=skip to do without, or delete the shard and make it again"


def store_inputs(target: TargetHandle, dtype: str, digest: str | None) -> dict[str, Any]:
    """What hidden states depend on, under the names of the config's keys.

    `digest` is that of the prepared documents; None where a store is read without them.
    """
    known = target.identity
    inputs = {
        "format": shards.VERSION,
        "model": fingerprint(known["target"]),
        "model.dtype": known["dtype"],
        "model.aux_layer_ids": known["aux_layer_ids"],
        "hidden_states.dtype": dtype,
    }
    if "quantization" in known:
        inputs["target.quantization"] = known["quantization"]
    return inputs if digest is None else inputs | {"documents": digest}


class Store:
    """The store in `folder`; `index` has the arrays of index.npz once it is complete, else is None.

    A complete one has of the training data's documents the keys, `order` int64 (some may be the
    same), and `lengths` and `supervised` int64.

    With `on_damage` "fail" a document that cannot be read is a RunError; with "skip" it is as if it
    were not there, and `damaged` has the reason, by the document's key, or by the name of a shard
    whose documents are not known. Any thread may read.
    """

    def __init__(self, folder: Path, on_damage: str = "fail", scan: bool = True):
        self.folder, self.on_damage = Path(folder), on_damage
        self.inputs = read_inputs(self.folder) or {}
        self.index = read_index(self.folder)
        if self.index is not None:
            self.order, self.lengths, self.supervised = (
                self.index[name] for name in ("order", "lengths", "supervised")
            )
        self.fingerprint = fingerprint(self.inputs)
        self.open = lru_cache(OPEN_SHARDS)(self.open_shard)
        self.indexed: set[int] = set()  # numbers of shards
        # By key, which is a document's number in the data: its shard << 32 | its place there, or
        # -1. Eight bytes a document, where a dict would take 150.
        self.places = np.full(1024, -1)
        self.damaged: dict[int | str, str] = {}
        self.totals: Counter[str] = Counter()
        if scan:
            self.scan()

    def open_shard(self, number: int) -> Shard:
        return Shard(shard_path(self.folder, number), self.fingerprint)

    def vocab(self, size: int) -> np.ndarray:
        """The draft vocabulary, ascending target ids: the data's own, or an import's `size` tokens
        that are supervised most.
        """
        counts = self.index["counts"]
        return choose_vocab(counts, size, set()) if len(counts) else self.index["vocab"]

    @property
    def facts(self) -> dict[str, Any]:
        """Counts over the shards that were scanned."""
        per_token = round(self.totals["bytes"] / max(1, self.totals["tokens"]), 1)
        return {**self.totals, "bytes_per_token": per_token}

    def write(self, number: int, documents: list[Document]) -> None:
        """Write a shard, complete or not at all.

        Raises RunError where a hidden state is not finite, OSError for a full disk.
        """
        pieces = shards.serialise(documents, self.inputs["hidden_states.dtype"], self.fingerprint)
        shards.write_atomically(shard_path(self.folder, number), pieces)

    def complete(self, num_shards: int, **arrays: np.ndarray) -> None:
        """Write the index: `order`, `lengths`, `supervised` of the data, `vocab` or `counts`."""
        content = io.BytesIO()
        np.savez(content, **{"shards": num_shards, "vocab": [], "counts": []} | arrays)
        shards.write_atomically(self.folder / INDEX, [content.getvalue()])
        for left in [*self.folder.glob("*.tmp"), *self.folder.glob(".claim_*")]:
            left.unlink(missing_ok=True)

    def scan(self) -> None:
        """Read the heads of shards that were written since. Raises RunError, or notes damage."""
        numbers = set(map(shard_number, shard_files(self.folder)))
        if self.index is not None:
            numbers = set(range(self.index["shards"]))
        reasons = {}
        for number in sorted(numbers - self.indexed):
            try:
                self.index_shard(number)
            except DamageError as damage:
                reasons[shard_path(self.folder, number).name] = str(damage)
        if self.index is None:
            for name, reason in reasons.items():
                self.note_damage(name, reason, [name])
            return
        lost = np.setdiff1d(self.order, np.flatnonzero(self.places >= 0)).tolist()
        if lost:
            reason = next(iter(reasons.values()), "no shard has them")
            self.note_damage(f"{len(lost)} documents", reason, lost)

    def index_shard(self, number: int) -> None:
        """Note where the documents of a shard lie. Raises DamageError."""
        self.indexed.add(number)
        shard = self.open(number)
        keys = shard.records["key"]
        if keys.max() >= len(self.places):
            self.places = np.append(self.places, np.full(keys.max() + 1, -1))
        self.places[keys] = (number << 32) + np.arange(len(keys))
        self.totals.update(shards=1, documents=len(keys), bytes=shard.bytes)
        for name in ("tokens", "teacher_rows"):
            self.totals[name] += int(shard.records[name].sum())

    def __contains__(self, key: int) -> bool:
        return key < len(self.places) and self.places[key] >= 0

    def load(self, keys: list[int]) -> dict[int, Document]:
        """Those documents that are there, by key, every byte of them checked. Raises RunError."""
        found = {}
        for key in keys:
            if key not in self:
                continue
            number, place = divmod(int(self.places[key]), 1 << 32)
            try:
                found[key] = self.open(number).load(place)
            except DamageError as damage:
                self.places[key] = -1
                self.note_damage(f"document {key}", str(damage), [key])
        return found

    def note_damage(self, what: str, reason: str, keys: list[int | str]) -> None:
        if self.on_damage == "fail":
            raise RunError(f"{what} cannot be read: {reason}; {REMEDY}")
        self.damaged.update(dict.fromkeys(keys, reason))


class HybridStore(Store):
    """A store that the ranks of one run add to while training; they share `max_bytes` of disk.

    What is added is written in the background, and can be loaded once its shard is complete. Once
    something did not fit, `full` is true and nothing more is taken.
    """

    def __init__(
        self,
        folder: Path,
        inputs: dict[str, Any],
        max_bytes: int,
        rank: int = 0,
        on_damage: str = "fail",
        shard_bytes: int = shards.SHARD_BYTES,
    ):
        create_store(folder, inputs)
        super().__init__(folder, on_damage, scan=False)
        self.max_bytes, self.shard_bytes = max_bytes, shard_bytes
        self.disk = FileLock(self.folder / LOCK)
        self.owner = FileLock(self.folder / f"owner_{rank}")
        try:
            self.owner.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another run writes hidden states to {folder}; wait for it, or set "
                "hidden_states.path to another folder"
            ) from error
        own = range(rank * SHARDS_PER_RANK, (rank + 1) * SHARDS_PER_RANK)
        # What was refused once stays refused: a resumed run then reads what an uninterrupted one
        # does.
        self.refused = self.folder / "full.json"
        with self.disk:
            for partial in self.folder.glob("shard_*.tmp"):
                # What a killed process left; of another rank only what nobody can still be at.
                if shard_number(partial) in own or time.time() - partial.stat().st_mtime > 3600:
                    partial.unlink(missing_ok=True)
            self.scan()
            refused = self.refused.exists() and int(self.refused.read_text()) >= max_bytes
            self.full = refused or self.room() <= 0
        self.next_number = max(self.indexed & set(own), default=own.start - 1) + 1
        self.buffer: list[Document] = []
        self.buffered = 0
        self.waiting: set[int] = set()  # keys of what is not written yet
        self.writer = ThreadPoolExecutor(1)
        self.writes: deque[Future] = deque()

    def room(self) -> int:
        """Bytes left; ask while `disk` is locked, or a file that is renamed meanwhile is missed."""
        return self.max_bytes - folder_bytes(self.folder)

    def add(self, documents: list[Document]) -> None:
        """Have them written, unless they are there or the disk is full; waits for a slow disk.

        Raises RunError for what an earlier writing ran into.
        """
        self.wait_for_writes(2)
        for document in documents:
            if self.full or document.key in self.waiting or document.key in self:
                continue
            self.waiting.add(document.key)
            self.buffer.append(document)
            self.buffered += stored_bytes(document, self.inputs["hidden_states.dtype"])
            if self.buffered >= self.shard_bytes:
                self.flush()

    def flush(self) -> None:
        documents, self.buffer, self.buffered = self.buffer, [], 0
        if documents:
            self.writes.append(self.writer.submit(self.write_within_budget, documents))
        self.wait_for_writes(2)  # one shard is being written, and one waits

    def wait_for_writes(self, allowed: int) -> None:
        """Wait until at most so many shards are not written; raises what writing ran into."""
        while self.writes and (len(self.writes) > allowed or self.writes[0].done()):
            self.writes.popleft().result()

    def sync(self) -> None:
        """Wait until everything added so far is written, or dropped because the disk is full."""
        self.flush()
        self.wait_for_writes(0)

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self.writer.shutdown()
            self.owner.release()

    def write_within_budget(self, documents: list[Document]) -> None:
        """Write a shard of those of the documents that fit; `full` when some do not."""
        if self.full:
            return
        dtype, path = self.inputs["hidden_states.dtype"], shard_path(self.folder, self.next_number)
        try:
            pieces = shards.serialise(documents, dtype, self.fingerprint)
            with self.disk:
                room = self.room()
                if sum(piece.nbytes for piece in pieces) > room:
                    self.full = True
                    self.refused.write_text(str(self.max_bytes))
                    ends = np.cumsum([stored_bytes(document, dtype) for document in documents])
                    documents = documents[: int((ends + pieces[0].nbytes <= room).sum())]
                    if not documents:
                        return
                    pieces = shards.serialise(documents, dtype, self.fingerprint)
                partial = shards.reserve(path, sum(piece.nbytes for piece in pieces))
            shards.write_atomically(path, pieces, partial, self.disk)
        except Exception as error:
            self.full = True
            if not isinstance(error, OSError):
                raise
            raise RunError(
                f"hidden states cannot be written to {self.folder} ({error.strerror}); those "
                "already there stay usable; lower hidden_states.max_disk or set hidden_states.path "
                "to a larger disk"
            ) from error
        self.index_shard(self.next_number)
        self.next_number += 1
        self.waiting.difference_update(document.key for document in documents)


def open_store(section: HiddenStates, folder: Path, inputs: dict[str, Any]) -> Store:
    """The complete store in `folder`. Raises RunError where it was made from something else."""
    store = Store(folder, section.on_damage, scan=False)
    if store.index is None:
        raise RunError(
            f"{folder} holds no complete store of hidden states; add capture to stages, or set "
            "hidden_states.path to one"
        )
    known = store.inputs
    if "imported" in known:  # of its target only the weights are known
        inputs = {key: value for key, value in inputs.items() if key in known}
    check_inputs({key: value for key, value in known.items() if key in inputs}, inputs, folder)
    store.scan()
    return store


def open_for_hybrid(
    section: HiddenStates, inputs: dict[str, Any], cache_dir: str, rank: int
) -> HybridStore:
    """The store that this rank adds to, in the folder that the user names or one of the cache."""
    inputs = inputs | {"kind": "hybrid"}
    folder = Path(section.path or Path(cache_dir, "hybrid", fingerprint(inputs)))
    if section.max_disk:
        max_bytes = parse_size(section.max_disk)
    else:
        max_bytes = (free_bytes(folder) + folder_bytes(folder)) * 9 // 10
    return HybridStore(folder, inputs, max_bytes, rank, section.on_damage)


def create_store(folder: Path, inputs: dict[str, Any]) -> None:
    """Make a store from `inputs`, or find it. Raises RunError where `folder` holds another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            known = read_inputs(folder)
            if known is None:
                shards.write_atomically(folder / INPUTS, [json.dumps(inputs, indent=1).encode()])
            else:
                check_inputs(known, inputs, folder)
    except OSError as error:
        raise RunError(
            f"hidden_states.path={folder} cannot be written: {error}; name another folder"
        ) from error


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """What the store was made from, None where there is none. RunError for other files."""
    path = folder / INPUTS
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        if any(folder.glob("*.safetensors")):
            raise RunError(
                f"hidden_states.path={folder} holds files that are no store of this version; "
                "delete them, or name an empty folder"
            ) from None
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged; delete {folder} and make the store again") from error


def read_index(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a complete store's index, which the archive has checksums of. RunError."""
    names = ("shards", "order", "lengths", "supervised", "vocab", "counts")
    try:
        with np.load(folder / INDEX, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive makes zipfile and numpy raise nearly anything
        raise RunError(
            f"{folder / INDEX} is damaged; delete it and add capture to stages, or delete the "
            "folder and import again"
        ) from error


def is_complete(folder: Path) -> bool:
    """Whether the index was written and no shard has been deleted since."""
    index = read_index(folder)
    return index is not None and len(shard_files(folder)) >= index["shards"]


def shard_files(folder: Path) -> list[Path]:
    return list(folder.glob("shard_*.safetensors"))


def folder_bytes(folder: Path) -> int:
    used = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process deletes what it failed to write
            used += path.stat().st_size
    return used


def stored_bytes(document: Document, dtype: str) -> int:
    states = document.features.last_hidden_states
    return shards.document_bytes(len(document.input_ids), len(states), states.shape[1], dtype)


def check_inputs(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise RunError naming the first key in which a store was made from something else."""
    for key in {**wanted, **stored}:
        made, run = (
            f"{key}={json.dumps(known[key])}" if key in known else f"no {key}"
            for known in (stored, wanted)
        )
        if made != run:
            raise RunError(
                f"the store in {folder} was made with {made}, this run has {run}; make them agree "
                "or set hidden_states.path to another folder"
            )
