"""Hidden states on disk: shards that any process may write, an index over them, and documents read
at random.

A shard is a safetensors file of flat tensors: per document `keys`, `lengths`, `teacher_rows`,
`supervised`, `checksums`; then `head_checksum`, of everything before it; then the states. Nothing
is padded and nothing runs code.

Documents are read with `pread` into fresh memory: as fast as copying out of a memory map (10 GB/s
from the page cache, the checksum included), and a file that is cut or fails while it is read
raises, where a map would kill the process.
"""

import errno
import json
import os
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from eagle3.batch import Document
from eagle3.errors import RunError
from eagle3.hidden_states.int8 import TOKENS, checksum, checksums, decode, encode, tensors

VERSION = 1
SHARD_BYTES = 256 << 20
READ_BYTES = 1 << 20
OPEN_SHARDS = 64
REMEDY = "hidden_states.on_damage=skip leaves damaged documents out, or delete the shard and capture again"
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
RECORD = np.dtype(
    [
        ("key", "<i8"),
        ("shard", "<i4"),
        ("place", "<i4"),
        ("tokens_start", "<i8"),
        ("tokens", "<i4"),
        ("teacher_rows_start", "<i8"),
        ("teacher_rows", "<i4"),
        ("supervised", "<i4"),
    ]
)


class DamageError(Exception):
    """Why a document cannot be read."""


class ShardDamageError(DamageError):
    """Why none of a shard can."""


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.safetensors"


def shard_number(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("shard_"))


def shard_is_complete(folder: Path, number: int) -> bool:
    return shard_path(folder, number).exists()


def header_of(documents: list[Document], dtype: str) -> tuple[bytes, dict[str, int], int]:
    """A shard's safetensors header, where each tensor starts in the file, and the file's size."""
    hidden_size = documents[0].features.last_hidden_states.shape[1]
    count = len(documents)
    totals = {
        "tokens": sum(len(document.input_ids) for document in documents),
        "teacher_rows": sum(len(document.features.argmax) for document in documents),
    }
    named = {
        name: ("I64", [count], 8 * count)
        for name in ("keys", "lengths", "teacher_rows", "supervised")
    }
    named |= {"checksums": ("U64", [count, 2], 16 * count), "head_checksum": ("U64", [1], 8)}
    for name, stored in tensors(hidden_size, dtype).items():
        rows = totals[stored.per]
        named[name] = NAMES[stored.dtype], [rows, *stored.columns], stored.bytes(rows)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "eagle3",
            "version": str(VERSION),
            "dtype": dtype,
            "hidden_size": str(hidden_size),
        }
    }
    starts, offset = {}, 0
    for name, (kind, shape, size) in named.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + size]}
        starts[name] = offset
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset


def write_shard(folder: Path, number: int, documents: list[Document], dtype: str) -> None:
    """Write one shard, complete or not at all.

    Raises RunError where a hidden state is not finite, and OSError (a full disk), after which
    nothing is left of it.
    """
    partial = reserve(folder, number, header_of(documents, dtype)[2])
    fill(partial, documents, dtype)
    publish(partial, shard_path(folder, number))


def reserve(folder: Path, number: int, size: int) -> Path:
    """A temporary file of that size for a shard."""
    path = shard_path(folder, number)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("xb") as stream:
            stream.truncate(size)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial


def fill(partial: Path, documents: list[Document], dtype: str) -> None:
    """Write a shard, with one encoded document in memory at a time; what fails is deleted."""
    header, starts, _ = header_of(documents, dtype)
    sums = []
    try:
        with partial.open("r+b") as stream:
            for document in documents:
                encoded = encode(document, dtype)
                sums.append(checksums(encoded))
                for name, piece in encoded.items():
                    stream.seek(starts[name])
                    stream.write(piece)
                    starts[name] += piece.nbytes
            columns = (
                [document.key for document in documents],
                [len(document.input_ids) for document in documents],
                [len(document.features.argmax) for document in documents],
                [int(document.loss_mask.sum()) for document in documents],
            )
            head = header + np.array(columns, "<i8").tobytes() + np.array(sums, "<u8").tobytes()
            stream.seek(0)
            stream.write(head + checksum([head]).to_bytes(8, "little"))
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """On disk when this returns."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with partial.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    publish(partial, path)


def publish(partial: Path, path: Path) -> None:
    """Rename, so that it lasts."""
    os.replace(partial, path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shard:
    """An open shard whose head is intact: `records` (RECORD) and `checksums` uint64 [documents,2].

    Raises ShardDamageError for what cannot be trusted as a whole, DamageError for one document. Any
    thread may read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ShardDamageError(f"{path} is missing") from None
        self.bytes = os.fstat(self.descriptor).st_size
        try:
            start = 8 + int.from_bytes(self.read(0, 8), "little")
            header = json.loads(self.read(8, start - 8).tobytes())
            head = self.read(0, start + header["head_checksum"]["data_offsets"][1]).tobytes()
            if checksum([head[:-8]]) != int.from_bytes(head[-8:], "little"):
                raise ValueError
        except DamageError as damage:
            raise ShardDamageError(str(damage)) from damage
        except (ValueError, KeyError, TypeError) as error:
            raise ShardDamageError(f"{path}: its head does not match its checksum") from error
        metadata = header.pop("__metadata__")
        if metadata["version"] != str(VERSION):
            raise ShardDamageError(
                f"{path} has format {metadata['version']}, and this version reads {VERSION}"
            )
        self.dtype, self.hidden_size, self.head = (
            metadata["dtype"],
            int(metadata["hidden_size"]),
            head[-8:].hex(),
        )
        size = start + max(entry["data_offsets"][1] for entry in header.values())
        if self.bytes != size:
            raise ShardDamageError(f"{path} has {self.bytes} bytes, not {size}")
        self.tensors = tensors(self.hidden_size, self.dtype)
        self.starts = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
        (count,) = header["keys"]["shape"]
        columns = np.frombuffer(head, "<i8", 4 * count, self.starts["keys"]).reshape(4, count)
        self.checksums = np.frombuffer(head, "<u8", 2 * count, self.starts["checksums"]).reshape(
            count, 2
        )
        self.records = np.zeros(count, RECORD)
        self.records["shard"], self.records["place"] = shard_number(path), np.arange(count)
        for name, column in zip(
            ("key", "tokens", "teacher_rows", "supervised"), columns, strict=True
        ):
            self.records[name] = column
        for name in ("tokens", "teacher_rows"):
            self.records[f"{name}_start"][1:] = self.records[name][:-1].cumsum()

    def __del__(self, close=os.close):
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    def read(self, start: int, size: int, digest: xxhash.xxh3_64 | None = None) -> np.ndarray:
        """Bytes uint8 [size], which `digest` takes in while they are in the cache."""
        if not 0 <= size <= self.bytes - start:
            raise ShardDamageError(f"{self.path} is shorter than its header says")
        memory = np.empty(size, np.uint8)
        done = 0
        while done < size:
            try:
                count = os.preadv(self.descriptor, [memory[done : done + READ_BYTES]], start + done)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                raise DamageError(f"{self.path} cannot be read ({error.strerror})") from error
            if count == 0:
                raise ShardDamageError(f"{self.path} was cut while it was read")
            if digest is not None:
                digest.update(memory[done : done + count])
            done += count
        return memory

    def encoded(self, record: np.void, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Checked bytes of a document: all of its tensors, or TOKENS."""
        read, digests = {}, (xxhash.xxh3_64(), xxhash.xxh3_64())
        for name in names:
            per, size = self.tensors[name].per, self.tensors[name].bytes(1)
            start = self.starts[name] + int(record[f"{per}_start"]) * size
            read[name] = self.read(start, int(record[per]) * size, digests[name not in TOKENS])
        known = self.checksums[record["place"]].tolist()
        if digests[0].intdigest() != known[0] or (
            names is not TOKENS and digests[1].intdigest() != known[1]
        ):
            raise DamageError(f"its bytes in {self.path} do not match their checksum")
        return read

    def document(self, record: np.void) -> Document:
        return decode(
            int(record["key"]), self.encoded(record, self.tensors), self.hidden_size, self.dtype
        )

    def ids_and_mask(self, record: np.void) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [n], bool [n]."""
        encoded = self.encoded(record, TOKENS)
        ids, mask = (self.tensors[name].view(encoded[name]) for name in TOKENS)
        return ids, mask


class Shards:
    """The shards of a folder, of which at most `OPEN_SHARDS` are open; one in use closes when its
    reader is done.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        self.open: dict[int, Shard] = {}

    def __getitem__(self, number: int) -> Shard:
        with self.lock:
            shard = self.open.pop(number, None) or Shard(shard_path(self.folder, number))
            self.open[number] = shard
            if len(self.open) > OPEN_SHARDS:
                del self.open[next(iter(self.open))]
        return shard


def check_inputs(stored: dict, wanted: dict, folder: Path) -> None:
    """Raise RunError naming the first (dotted) key in which a store was made from something else."""
    stored, wanted = (
        flatten(json.loads(json.dumps(inputs, default=str))) for inputs in (stored, wanted)
    )
    for key in {**wanted, **stored}:
        if key not in stored or key not in wanted or stored[key] != wanted[key]:
            made, run = (
                f"{key}={json.dumps(d[key])}" if key in d else f"no {key}" for d in (stored, wanted)
            )
            raise RunError(
                f"the store in {folder} was made with {made}, this run has {run}; make them agree or set "
                "hidden_states.path to another folder"
            )


def flatten(inputs: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in inputs.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat
