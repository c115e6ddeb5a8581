"""A store of hidden states: a folder of shards that processes add to, read document by document.

`store.json` says what the states were made from. A store that was captured or imported also has
`index.npz`: how many shards there are, the training data's order and its draft vocabulary, so that
training needs nothing else. `mode=hybrid` fills a store that is never complete.
"""

import io
import json
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from eagle3.batch import Document
from eagle3.config import HiddenStates
from eagle3.data.vocab import choose_vocab
from eagle3.errors import DamageError, RunError
from eagle3.hidden_states import shards
from eagle3.hidden_states.shards import Shard, shard_number, shard_path
from eagle3.runs.artefact import announce, fingerprint
from eagle3.runs.disk import free_bytes, parse_size, read_json, write_atomically
from eagle3.target.handle import TargetHandle

INPUTS, INDEX, LOCK, SHARDS = "store.json", "index.npz", ".lock", "shard_*.safetensors"
HEADS = 1024  # of shards that are kept in memory, a few kB each
SHARDS_PER_RANK = 10_000_000  # of mode=hybrid; their numbers say who wrote them
REMEDY = "set hidden_states.on_damage=skip to do without, or delete the shard and make it again"


def store_inputs(target: TargetHandle, dtype: str, digest: str | None) -> dict[str, Any]:
    """What hidden states depend on, by config key; `digest` is of the documents, where known."""
    known = target.identity
    inputs = {"format": shards.VERSION, "model": fingerprint(known["target"])}
    inputs |= {"model.dtype": known["dtype"], "model.aux_layer_ids": known["aux_layer_ids"]}
    inputs |= {"target.quantization": known.get("quantization"), "hidden_states.dtype": dtype}
    return inputs if digest is None else inputs | {"documents": digest}


class Store:
    """The store in `folder`; `index` has the arrays of index.npz, None as long as it is incomplete.

    A complete one has `order`, `lengths` and `supervised`, int64 [N], of the training data. With
    `on_damage` "skip" `damaged` has by document why it cannot be read. Any thread may read.
    """

    def __init__(self, folder: Path, on_damage: str = "fail"):
        self.folder, self.on_damage = Path(folder), on_damage
        self.inputs, self.index = check_inputs(self.folder, {}), read_index(self.folder)
        if self.index is not None:
            self.order, self.lengths = self.index["order"], self.index["lengths"]
            self.supervised = self.index["supervised"]
        self.fingerprint = fingerprint(self.inputs)
        self.open = lru_cache(HEADS)(lambda n: Shard(shard_path(self.folder, n), self.fingerprint))
        self.indexed: set[int] = set()  # numbers of shards
        # By key: a document's shard << 24 | its place there, or -1. A dict would be 20 times that.
        self.places, self.damaged = np.full(1024, -1), {}
        self.counts = np.zeros((1024, 2), int)  # by key: tokens, teacher rows
        self.totals: Counter[str] = Counter()  # over the shards that were scanned
        self.scan()

    def vocab(self, size: int) -> np.ndarray:
        """The draft vocabulary, ascending target ids: the data's, or an import's commonest."""
        counts = self.index["counts"]
        return choose_vocab(counts, size, set()) if len(counts) else self.index["vocab"]

    @property
    def facts(self) -> dict[str, Any]:
        per_token = round(self.totals["bytes"] / max(1, self.totals["tokens"]), 1)
        return {**self.totals, "bytes_per_token": per_token}

    def write(self, number: int, documents: list[Document]) -> None:
        """Write a shard or nothing. Raises RunError for the disk, or a state that is not finite."""
        pieces = shards.serialise(documents, self.inputs["hidden_states.dtype"], self.fingerprint)
        try:
            write_atomically(shard_path(self.folder, number), pieces)
        except OSError as error:
            remedy = "free space, set a lower hidden_states.max_disk or another hidden_states.path"
            why = f"({error.strerror}): {remedy}; the same command goes on"
            raise RunError(f"{self.folder} cannot be written {why}") from error

    def complete(self, num_shards: int, **arrays: np.ndarray) -> None:
        """Write the index, with `vocab` or the `counts` of supervised tokens to choose it by."""
        # Last of all, as it says that everything else is there.
        content = io.BytesIO()
        np.savez(content, **{"shards": num_shards, "vocab": [], "counts": []} | arrays)
        with FileLock(self.folder / LOCK):
            write_atomically(self.folder / INDEX, [content.getvalue()])
            for left in [*self.folder.glob("*.tmp"), *self.folder.glob(".claim_*")]:
                left.unlink(missing_ok=True)

    def scan(self) -> None:
        """Read the heads of shards that were written since. Raises RunError."""
        numbers = set(map(shard_number, self.folder.glob(SHARDS)))
        if self.index is not None:  # then it is known what must be there
            numbers = set(range(self.index["shards"]))
        reason = "no shard has it"
        for number in sorted(numbers - self.indexed):
            try:
                self.index_shard(number)
            except DamageError as damage:
                reason = self.tolerate(damage)
        if self.index is not None:
            lost = np.setdiff1d(self.order, np.flatnonzero(self.places >= 0))
            self.damaged.update(dict.fromkeys(lost.tolist(), reason))

    def index_shard(self, number: int) -> None:
        """Note where the documents of a shard lie. Raises DamageError."""
        self.indexed.add(number)
        shard = self.open(number)
        keys = shard.records["key"]
        if keys.max() >= len(self.places):
            self.counts = np.append(self.counts, np.zeros((keys.max() + 1, 2), int), 0)
            self.places = np.append(self.places, np.full(keys.max() + 1, -1))
        counts = np.stack([shard.records[name] for name in ("tokens", "teacher_rows")], 1)
        self.counts[keys], self.empty_states = counts, shard.empty_states
        self.places[keys] = (number << 24) + np.arange(len(keys))  # last, as threads read by it
        tokens, teacher_rows = counts.sum(0).tolist()
        found = {"documents": len(keys), "tokens": tokens, "teacher_rows": teacher_rows}
        self.totals.update(found, shards=1, bytes=shard.bytes)

    def __contains__(self, key: int) -> bool:
        return key < len(self.places) and self.places[key] >= 0

    def load(self, keys: list[int]) -> dict[int, Document]:
        """Those documents that are there, by key, every byte of them checked. Raises RunError.

        Their hidden states lie side by side in the order of the keys, as in a batch.
        """
        found, keys = {}, [key for key in dict.fromkeys(keys) if key in self]
        ends = self.counts[keys].cumsum(0)
        starts = (ends - self.counts[keys]).tolist()
        states = self.empty_states(*ends[-1].tolist()) if keys else ()
        for key, *spans in zip(keys, starts, ends.tolist()):
            number, place = divmod(int(self.places[key]), 1 << 24)
            own = [x[start:end] for x, start, end in zip(states, *spans)]
            try:
                found[key] = self.open(number).load(place, *own)
            except DamageError as damage:
                # From now on it is as if it were not there: mode=hybrid computes and adds it again.
                self.places[key] = -1
                self.damaged[key] = self.tolerate(damage, f"document {key} cannot be read: ")
        return found

    def tolerate(self, damage: DamageError, what: str = "") -> str:
        """The reason of what is left out. Raises RunError where that is not wanted."""
        if self.on_damage == "fail":
            raise RunError(f"{what}{damage}; {REMEDY}") from damage
        return str(damage)


class HybridStore(Store):
    """A store that the ranks of a run add to, each within its share of the disk, until `full`."""

    def __init__(
        self, section: HiddenStates, inputs: dict, cache_dir: str, rank: int, world_size: int
    ):
        inputs = inputs | {"kind": "hybrid"}
        folder = Path(section.path or Path(cache_dir, "hybrid", fingerprint(inputs)))
        if rank == 0:
            announce_store("train", folder, inputs)
        create_store(folder, inputs)
        super().__init__(folder, section.on_damage)
        # Two runs would give their shards the same numbers.
        self.owner = FileLock(folder / f"owner_{rank}")
        try:
            self.owner.acquire(timeout=0)
        except Timeout as error:
            remedy = "wait for it, or set another hidden_states.path"
            raise RunError(f"another run writes to {folder}; {remedy}") from error
        for partial in folder.glob("shard_*.tmp"):
            # What a killed process left: of this rank, or of one that this run does not have.
            if owner_of(partial) % world_size == rank:
                partial.unlink(missing_ok=True)
        own = {n for n in self.indexed if n // SHARDS_PER_RANK == rank}
        self.next_number = max(own, default=rank * SHARDS_PER_RANK - 1) + 1
        used = bytes_by_owner(folder)
        most = (free_bytes(folder) + used.total()) * 9 // 10
        self.max_bytes = parse_size(section.max_disk) if section.max_disk else most
        # Equal shares, so that no rank needs to know what others write. What a run of other ranks
        # left beyond the shares of now is taken off each; so is the file `refused`.
        share = self.max_bytes // world_size
        beyond = [size - share * (0 <= owner < world_size) for owner, size in used.items()]
        excess = sum(size for size in beyond if size > 0) + len(str(self.max_bytes))
        self.room = share - used[rank] - excess
        # What was refused once stays refused: a resumed run reads what an uninterrupted one does.
        self.refused = folder / f"full_{rank}"
        refused = self.refused.exists() and int(self.refused.read_text()) >= self.max_bytes
        self.full = refused or self.room <= 0
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def add(self, documents: list[Document]) -> None:
        """Write those that are not there yet, as a shard, behind the next computation."""
        self.sync()  # one at a time, or a slow disk would fill the memory
        new = {document.key: document for document in documents if document.key not in self}
        if new and not self.full:
            self.writing = self.writer.submit(self.write_what_fits, list(new.values()))

    def sync(self) -> None:
        """Wait until what was added is written, as far as it fits. Raises RunError."""
        if self.writing is not None:
            self.writing.result()

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self.writer.shutdown()
            self.owner.release()

    def write_what_fits(self, documents: list[Document]) -> None:
        """Write a shard of the first of the documents, as far as they fit; `full` if not all do."""
        dtype = self.inputs["hidden_states.dtype"]
        ends = np.cumsum([stored_bytes(document, dtype) for document in documents])
        fitting = documents[: int((ends + shards.HEADER_BYTES <= self.room).sum())]
        if fitting:
            self.write(self.next_number, fitting)
            self.index_shard(self.next_number)
            self.room -= self.open(self.next_number).bytes
            self.next_number += 1
        # A smaller one behind it might still fit, but what is kept would be an odd sample.
        if len(fitting) < len(documents):
            self.full = True
            write_atomically(self.refused, [str(self.max_bytes).encode()])


def bytes_by_owner(folder: Path) -> Counter[int]:
    used: Counter[int] = Counter()
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process renames what it has written
            used[owner_of(path)] += path.stat().st_size
    return used


def owner_of(path: Path) -> int:
    """The rank that wrote a hybrid store's shard; -1 for other files."""
    return shard_number(path) // SHARDS_PER_RANK if path.name.startswith("shard_") else -1


def open_store(section: HiddenStates, folder: Path, inputs: dict[str, Any]) -> Store:
    """The complete store in `folder`. Raises RunError where it was made from something else."""
    if not check_inputs(folder, inputs) or read_index(folder) is None:
        missing = INDEX if (folder / INPUTS).exists() else INPUTS
        remedy = "add capture to stages, or set hidden_states.path"
        raise RunError(f"{folder} holds no complete store (no {missing}): {remedy}")
    return Store(folder, section.on_damage)


def create_store(folder: Path, inputs: dict[str, Any]) -> None:
    """Make a store from `inputs`, or find it. Raises RunError where `folder` holds another one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):  # or two that begin at once would both find nothing here
            if not check_inputs(folder, inputs):
                if any(folder.glob("*.safetensors")):
                    words = f"hidden_states.path={folder} holds .safetensors, but no {INPUTS}"
                    raise RunError(f"{words}: put it back, or name an empty folder")
                write_atomically(folder / INPUTS, [json.dumps(inputs, indent=1).encode()])
    except OSError as error:
        raise RunError(f"hidden_states.path={folder} cannot be written: {error}") from error


def announce_store(stage: str, folder: Path, inputs: dict[str, Any]) -> None:
    """What `announce` says, of a store, whose file may have more than `inputs`."""

    def read(other: Path) -> dict[str, Any]:
        stored = read_json(other / INPUTS)
        if not stored:
            raise DamageError(f"{other} holds no store")
        return {key: stored.get(key) for key in inputs}

    if check_inputs(folder, inputs) or not folder.exists():  # another one is refused
        announce(stage, folder, inputs, read)


def check_inputs(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the store was made from, {} where there is none. Raises RunError where it differs."""
    stored = read_json(folder / INPUTS, remedy=f"; delete {folder}, to make it anew")
    # Only what both know: an import knows just its target's weights, and training no documents.
    for key in stored:
        if key in wanted and stored[key] != wanted[key]:
            made, now = f"{key}={json.dumps(stored[key])}", f"{key}={json.dumps(wanted[key])}"
            remedy = "make them agree, or set another hidden_states.path"
            raise RunError(f"{folder} was made with {made}, this run has {now}: {remedy}")
    return stored


def read_index(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a complete store's index, which the archive has checksums of. RunError."""
    names = ("shards", "order", "lengths", "supervised", "vocab", "counts")
    try:
        with np.load(folder / INDEX, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive makes zipfile and numpy raise nearly anything
        remedy = "delete its folder, or that file and add capture to stages"
        raise RunError(f"{folder / INDEX} is damaged; {remedy}") from error


def is_complete(folder: Path) -> bool:
    """Whether the index was written and no shard has been deleted since."""
    index = read_index(folder)
    return index is not None and len(list(folder.glob(SHARDS))) >= index["shards"]


def stored_bytes(document: Document, dtype: str) -> int:
    counts = len(document.input_ids), len(document.features.argmax)
    return shards.document_bytes(*counts, shards.sizes_of(document), dtype)
