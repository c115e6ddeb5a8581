"""The format of a shard: a safetensors file in which each document can be read alone.

The tensor `documents` int64 [N,5] has a `RECORD` of each; the other tensors are the documents'
rows, one behind the other, without padding. The metadata names the store that the shard belongs to
and has a checksum of both, so that a folder of shards needs no index. Nothing in it runs code.

N documents of n tokens and u teacher rows, H hidden size.
"""

import errno
import json
import math
import os
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from eagle3.batch import Document, Features
from eagle3.errors import RunError
from eagle3.hidden_states.int8 import GROUP, dequantise, quantise

VERSION = 2
SHARD_BYTES = 256 << 20
READ_BYTES = 1 << 20
FREE = nullcontext()
DTYPES = ("fp32", "bf16", "int8")
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
COUNTS = ("key", "tokens", "teacher_rows", "supervised")
RECORD = np.dtype([(name, "<i8") for name in COUNTS] + [("checksum", "<u8")])


class DamageError(Exception):
    """Why a document, or a whole shard, cannot be read."""


class Column(NamedTuple):
    """A tensor of a shard: one row of `shape` for each of what the record's field `per` counts."""

    per: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def columns(hidden_size: int, dtype: str) -> dict[str, Column]:
    """What is stored of documents; wide numbers first, so that all are aligned."""
    hidden = torch.float32 if dtype == "fp32" else torch.bfloat16
    aux = {"aux_hidden_states": Column("tokens", hidden, (3 * hidden_size,))}
    if dtype == "int8":
        groups = math.ceil(3 * hidden_size / GROUP)
        aux = {
            "aux_scales": Column("tokens", torch.bfloat16, (groups,)),
            "aux_hidden_states": Column("tokens", torch.int8, (3 * hidden_size,)),
        }
    return {
        "logsumexp": Column("teacher_rows", torch.float32, ()),
        "argmax": Column("teacher_rows", torch.int32, ()),
        "input_ids": Column("tokens", torch.int32, ()),
        "last_hidden_states": Column("teacher_rows", hidden, (hidden_size,)),
        **aux,
        "loss_mask": Column("tokens", torch.bool, ()),
    }


def document_bytes(length, teacher_rows, hidden_size: int, dtype: str):
    """Bytes of documents in a shard, beside its header; int for ints, int64 array for arrays."""
    rows = {
        "tokens": np.asarray(length, np.int64),
        "teacher_rows": np.asarray(teacher_rows, np.int64),
    }
    stored = columns(hidden_size, dtype).values()
    size = RECORD.itemsize + sum(rows[column.per] * column.row_bytes for column in stored)
    return size if np.ndim(size) else int(size)


def encode(document: Document, dtype: str) -> dict[str, np.ndarray]:
    """A document's bytes uint8 of each column. Raises RunError where a state is not finite."""
    features = document.features
    u, hidden_size = features.last_hidden_states.shape
    rows = {"tokens": len(document.input_ids), "teacher_rows": u}
    values = vars(features) | {"input_ids": document.input_ids, "loss_mask": document.loss_mask}
    if dtype == "int8":
        values["aux_hidden_states"], values["aux_scales"] = quantise(features.aux_hidden_states)
    encoded = {}
    for name, column in columns(hidden_size, dtype).items():
        value = values[name].to("cpu", column.dtype).contiguous()
        assert value.shape == (rows[column.per], *column.shape), name
        if value.is_floating_point() and not is_finite(value):
            raise RunError(
                f"document {document.key}: its {name.replace('_', ' ')} in {dtype} are not finite, "
                "so the target is broken or its dtype too narrow; nothing of its shard was written"
            )
        encoded[name] = value.flatten().view(torch.uint8).numpy()
    return encoded


def is_finite(value: torch.Tensor) -> bool:
    """By the extremes, because a mask of the tensor's size would cost as much as the tensor."""
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())


def serialise(documents: list[Document], dtype: str, store: str) -> list[np.ndarray]:
    """The content of a shard of the store with fingerprint `store`, in pieces. Raises RunError.

    The pieces are the documents' own memory where nothing is converted: safetensors' own writer
    would copy a shard two or three times.
    """
    hidden_size = documents[0].features.last_hidden_states.shape[1]
    records, encoded = np.empty(len(documents), RECORD), []
    for place, document in enumerate(documents):
        encoded.append(encode(document, dtype))
        digest = xxhash.xxh3_64()
        for piece in encoded[-1].values():
            digest.update(piece)
        n, u = len(document.input_ids), len(document.features.argmax)
        supervised = int(document.loss_mask.sum())
        records[place] = document.key, n, u, supervised, digest.intdigest()
    about = {"version": VERSION, "store": store, "dtype": dtype, "hidden_size": hidden_size}
    text = json.dumps(about)
    header: dict[str, Any] = {"__metadata__": {"eagle3": f"{checksum_head(text, records)} {text}"}}
    pieces, end = [records.view(np.uint8)], records.nbytes
    shape = [len(records), len(RECORD)]
    header["documents"] = {"dtype": "I64", "shape": shape, "data_offsets": [0, end]}
    for name, column in columns(hidden_size, dtype).items():
        rows, start = int(records[column.per].sum()), end
        end += rows * column.row_bytes
        shape, span = [rows, *column.shape], [start, end]
        header[name] = {"dtype": NAMES[column.dtype], "shape": shape, "data_offsets": span}
        pieces += [tensors[name] for tensors in encoded]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return [np.frombuffer(len(head).to_bytes(8, "little") + head, np.uint8), *pieces]


def checksum_head(text: str, records: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode() + records.tobytes())


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:08d}.safetensors"


def shard_number(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("shard_"))


def reserve(path: Path, size: int) -> Path:
    """A temporary file for `path` that already counts as `size` bytes of its folder."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with partial.open("xb") as stream:
        stream.truncate(size)
    return partial


def write_atomically(
    path: Path,
    pieces: Iterable[bytes | np.ndarray],
    partial: Path | None = None,
    lock: AbstractContextManager = FREE,
) -> None:
    """On disk when this returns, or nothing is left of it and OSError raised (a full disk).

    `partial` was reserved for it; it is renamed while `lock` is held.
    """
    partial = partial or reserve(path, 0)
    try:
        with partial.open("r+b") as stream:
            stream.writelines(pieces)
            stream.flush()
            os.fsync(stream.fileno())
        with lock:
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)  # else a power cut may undo the renaming
    os.fsync(descriptor)
    os.close(descriptor)


class Shard:
    """An open shard of the store with fingerprint `store`, whose head is intact.

    `records` RECORD [N]. Raises DamageError; any thread may read.
    """

    def __init__(self, path: Path, store: str):
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise DamageError(f"{path} is missing") from None
        self.bytes = os.fstat(self.descriptor).st_size
        try:
            start = 8 + int.from_bytes(self.read(0, 8), "little")
            header = json.loads(self.read(8, start - 8).tobytes())
            checksum, _, text = header.pop("__metadata__")["eagle3"].partition(" ")
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            first, end = spans["documents"]
            self.records = self.read(start + first, end - first).view(RECORD)
            if checksum_head(text, self.records) != checksum:
                raise DamageError(f"{path}: its head does not match its checksum")
            head = json.loads(text)
            self.dtype = head["dtype"]
            self.columns = columns(head["hidden_size"], self.dtype)
            self.starts = {name: start + spans[name][0] for name in self.columns}
            size = start + max(end for _, end in spans.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{path}: its head is damaged") from error
        if head["store"] != store:
            raise DamageError(f"{path} belongs to another store")
        if self.bytes != size:
            raise DamageError(f"{path} has {self.bytes} bytes, not {size}")
        counts = {per: self.records[per] for per in ("tokens", "teacher_rows")}
        self.rows_before = {per: count.cumsum() - count for per, count in counts.items()}

    def __del__(self, close=os.close):
        if hasattr(self, "descriptor"):
            close(self.descriptor)

    # A memory map would be simpler, but a page that cannot be read (another process cuts the file,
    # a disk fails) kills the process with SIGBUS, where `pread` raises. It is as fast as copying
    # out of a map: 10 GB/s from the page cache, the checksum included.
    def read(self, start: int, size: int, digest: xxhash.xxh3_64 | None = None) -> np.ndarray:
        """Bytes uint8 [size], which `digest` takes in while they are in the processor's cache."""
        if not 0 <= size <= self.bytes - start:
            raise DamageError(f"{self.path} is shorter than its header says")
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
                raise DamageError(f"{self.path} was cut while it was read")
            if digest is not None:
                digest.update(memory[done : done + count])
            done += count
        return memory

    def load(self, place: int) -> Document:
        """The document of `records[place]`; argmax in int64, aux in bf16 where stored as int8."""
        record, digest = self.records[place], xxhash.xxh3_64()
        values = {}
        for name, column in self.columns.items():
            start = self.starts[name] + int(self.rows_before[column.per][place]) * column.row_bytes
            rows = int(record[column.per])
            memory = torch.from_numpy(self.read(start, rows * column.row_bytes, digest))
            by_row = memory.view(rows, column.row_bytes).view(column.dtype)
            values[name] = by_row.view(rows, *column.shape)
        if digest.intdigest() != record["checksum"]:
            raise DamageError(f"its bytes in {self.path} do not match their checksum")
        if self.dtype == "int8":
            aux, scales = values["aux_hidden_states"], values["aux_scales"]
            values["aux_hidden_states"] = dequantise(aux, scales)
        values["argmax"] = values["argmax"].long()
        features = Features(*(values[field.name] for field in fields(Features)))
        return Document(int(record["key"]), values["input_ids"], values["loss_mask"], features)
