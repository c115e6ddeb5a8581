"""A store that grows while training, for `mode=hybrid`."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Queue

from filelock import FileLock, Timeout

from eagle3.batch import Document
from eagle3.errors import RunError
from eagle3.hidden_states.int8 import document_bytes
from eagle3.hidden_states.shards import (
    SHARD_BYTES,
    DamageError,
    ShardDamageError,
    Shards,
    check_inputs,
    fill,
    header_of,
    publish,
    reserve,
    shard_number,
    shard_path,
    write_atomically,
)

SHARDS_PER_RANK = 100_000


class Growing:
    """A store that is added to while training; processes share its folder, and `max_bytes` of disk
    between them.

    What is added is written in the background, and can be loaded once its shard is complete. What
    an earlier process left is found again; `notes` has a sentence for each damaged shard or
    document, which is absent from then on.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        max_bytes: int,
        inputs: dict,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        on_damage: str = "fail",
    ):
        self.folder, self.dtype, self.max_bytes, self.shard_bytes = (
            Path(folder),
            dtype,
            max_bytes,
            shard_bytes,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.on_damage, self.refused = on_damage, self.folder / "full.json"
        self.disk = FileLock(self.folder / "lock")
        self.owner = FileLock(self.folder / f"owner_{rank}")
        try:
            self.owner.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"another run is keeping hidden states in {self.folder}; wait for it, or set hidden_states.path to "
                "another folder"
            ) from error
        self.shards = Shards(self.folder)
        self.places: dict[int, tuple[int, int]] = {}
        self.notes: list[str] = []
        self.rank, self.next_number = rank, rank * SHARDS_PER_RANK
        with self.disk:
            if (self.folder / "inputs.json").exists():
                check_inputs(
                    json.loads((self.folder / "inputs.json").read_text()), inputs, self.folder
                )
            else:
                write_atomically(
                    self.folder / "inputs.json", json.dumps(inputs, indent=1, default=str).encode()
                )
            self.clean()
            self.find()
            # What was refused once stays refused, so that a resumed run keeps what an uninterrupted
            # one does.
            self.full = self.room() <= 0 or (
                self.refused.exists() and int(self.refused.read_text()) >= max_bytes
            )
        self.known = set(self.places)
        self.buffering = threading.RLock()  # a loader's thread asks for what the trainer's adds
        self.buffer: list[Document] = []
        self.buffered = 0
        self.error: Exception | None = None
        # One shard waits while one is written.
        self.queue: Queue[list[Document] | None] = Queue(1)
        self.thread = threading.Thread(target=self.write_shards, daemon=True)
        self.thread.start()

    def clean(self) -> None:
        """Delete what killed writers left, of other ranks only what no writer can still be at."""
        for path in self.folder.glob("shard_*.tmp"):
            if (
                shard_number(path) // SHARDS_PER_RANK == self.rank
                or time.time() - path.stat().st_mtime > 3600
            ):
                path.unlink(missing_ok=True)

    def find(self) -> None:
        """Take up complete shards that are not known yet. Raises RunError for a damaged one, or
        notes it.
        """
        known = {number for number, _ in self.places.values()}
        for path in sorted(self.folder.glob("shard_*.safetensors"), key=shard_number):
            number = shard_number(path)
            if number in known:
                continue
            if number // SHARDS_PER_RANK == self.rank:
                self.next_number = number + 1
            try:
                keys = self.shards[number].records["key"].tolist()
            except ShardDamageError as damage:
                self.remember(f"{damage}; its documents are computed again")
                continue
            self.places.update((key, (number, place)) for place, key in enumerate(keys))

    def __len__(self) -> int:
        return len(self.places)

    def room(self) -> int:
        """Bytes left; asked while `disk` is held, as what is reserved or renamed meanwhile would be
        missed.
        """
        used = 0
        for path in self.folder.iterdir():
            # Another process deletes what it failed to write.
            with suppress(FileNotFoundError):
                used += path.stat().st_size
        return self.max_bytes - used

    def add(self, documents: list[Document]) -> None:
        """Write them some time, unless they are there or the budget is used up; waits when writing
        is too slow.

        The tensors are kept until they are written. Raises RunError for what the last writing ran
        into.
        """
        self.surface()
        with self.buffering:
            self.take(documents)

    def take(self, documents: list[Document]) -> None:
        for document in documents:
            if self.full or document.key in self.known:
                continue
            self.known.add(document.key)
            self.buffer.append(document)
            self.buffered += stored_bytes(document, self.dtype)
            if self.buffered >= self.shard_bytes:
                self.flush()

    def flush(self) -> None:
        with self.buffering:
            documents, self.buffer, self.buffered = self.buffer, [], 0
            if documents:
                self.queue.put(documents)

    def sync(self) -> None:
        """Wait until everything added so far is written, or dropped for want of room. Raises what
        writing ran into.
        """
        self.flush()
        self.queue.join()
        self.surface()

    def load(self, keys: list[int]) -> dict[int, Document]:
        """Those documents that are completely written and intact."""
        self.surface()
        found = {}
        for key in keys:
            number, place = self.places.get(key, (None, None))
            if number is None:
                continue
            try:
                shard = self.shards[number]
                found[key] = shard.document(shard.records[place])
            except DamageError as damage:
                self.places.pop(key, None)
                self.known.discard(key)
                self.remember(f"document {key} cannot be read and is computed again: {damage}")
        return found

    def remember(self, note: str) -> None:
        if self.on_damage == "fail":
            raise RunError(
                f"{note.split(';')[0]}; delete the shard, or set hidden_states.on_damage=skip"
            )
        self.notes.append(note)

    def close(self) -> None:
        """Write what is buffered and wait for it."""
        if self.thread.is_alive():
            self.flush()
            self.queue.put(None)
            self.thread.join()
        self.owner.release()
        self.surface()

    def surface(self) -> None:
        """Raise what the writer ran into, once; it takes no more documents then."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def write_shards(self) -> None:
        while (documents := self.queue.get()) is not None:
            if not self.full:
                try:
                    self.write(documents)
                except OSError as error:
                    self.full = True
                    self.error = RunError(
                        f"hidden states cannot be written to {self.folder} ({error.strerror}); those already there "
                        "stay usable; lower hidden_states.max_disk or set hidden_states.path to a larger disk"
                    )
                except Exception as error:
                    self.full, self.error = True, error
            self.known.difference_update(
                {document.key for document in documents} - self.places.keys()
            )
            del documents  # else they stay in memory until the next shard comes
            self.queue.task_done()

    def write(self, documents: list[Document]) -> None:
        """Write as many as the budget allows; `full` when those are not all."""
        number = self.next_number
        with self.disk:
            room = self.room()
            while documents and header_of(documents, self.dtype)[2] > room:
                self.full = True
                self.refused.write_text(str(self.max_bytes))
                documents = documents[:-1]
            if not documents:
                return
            partial = reserve(self.folder, number, header_of(documents, self.dtype)[2])
        fill(partial, documents, self.dtype)
        with self.disk:
            publish(partial, shard_path(self.folder, number))
        self.next_number += 1
        self.places.update(
            (document.key, (number, place)) for place, document in enumerate(documents)
        )


def stored_bytes(document: Document, dtype: str) -> int:
    states = document.features.last_hidden_states
    return document_bytes(len(document.input_ids), len(states), states.shape[1], dtype)
