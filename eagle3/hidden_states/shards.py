"""The format of a shard: a safetensors file in which each document can be read alone.

The tensor `documents` int64 [N,5] has a `RECORD` of each; the other tensors are the documents'
rows, one behind the other, without padding. The metadata names the shard's store and has a checksum
of both, so that a folder of shards needs no index. N documents of n tokens and u teacher rows.
"""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from eagle3.batch import Document, Features, empty_on_host
from eagle3.errors import DamageError, RunError
from eagle3.hidden_states.int8 import GROUP, dequantise, quantise

VERSION = 4
SHARD_BYTES = 256 << 20
HEADER_BYTES = 2048  # at most, of a shard; about 1000 in fact
DTYPES = ("fp32", "bf16", "int8")
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.int8: "I8"}
NAMES[torch.bool] = "BOOL"
COUNTS = ("key", "tokens", "teacher_rows", "supervised")
RECORD = np.dtype([(name, "<i8") for name in COUNTS] + [("checksum", "<u8")])


class Column(NamedTuple):
    """A tensor of a shard: one row of `shape` for each of what the record's field `per` counts."""

    per: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def columns(sizes: tuple[int, int], dtype: str) -> dict[str, Column]:
    """What is stored of documents; wide numbers first, so that all are aligned. `sizes`: of a
    token's last hidden state and of its auxiliary ones together.
    """
    hidden = torch.float32 if dtype == "fp32" else torch.bfloat16
    (hidden_size, width), aux, scales = sizes, hidden, {}
    if dtype == "int8":
        aux = torch.int8
        scales["aux_scales"] = Column("tokens", torch.bfloat16, (math.ceil(width / GROUP),))
    return {
        "logsumexp": Column("teacher_rows", torch.float32, ()),
        "argmax": Column("teacher_rows", torch.int32, ()),
        "input_ids": Column("tokens", torch.int32, ()),
        "last_hidden_states": Column("teacher_rows", hidden, (hidden_size,)),
        **scales,
        "aux_hidden_states": Column("tokens", aux, (width,)),
        "loss_mask": Column("tokens", torch.bool, ()),
    }


def document_bytes(length, teacher_rows, sizes: tuple, dtype: str) -> np.int64 | np.ndarray:
    """Bytes of documents in a shard, its header apart: int64, of the shape of `length`."""
    # In int64, as a long document has more bytes than the int32 lengths of the data can count.
    rows = {"tokens": np.int64(length), "teacher_rows": np.int64(teacher_rows)}
    stored = columns(sizes, dtype).values()
    return RECORD.itemsize + sum(rows[each.per] * each.row_bytes for each in stored)


def encode(document: Document, dtype: str) -> dict[str, np.ndarray]:
    """A document's bytes uint8 of each column. Raises RunError where a state is not finite."""
    values, encoded = vars(document) | vars(document.features), {}
    if dtype == "int8":
        values["aux_hidden_states"], values["aux_scales"] = quantise(values["aux_hidden_states"])
    for name, column in columns(sizes_of(document), dtype).items():
        value = values[name].to("cpu", column.dtype).contiguous()
        if value.is_floating_point() and not is_finite(value):
            why = "are not finite: the target is broken, or hidden_states.dtype too narrow"
            raise RunError(f"document {document.key}: its {name} in {dtype} {why}")
        encoded[name] = value.flatten().view(torch.uint8).numpy()
    return encoded


def sizes_of(document: Document) -> tuple[int, int]:
    """As `columns` takes them."""
    features = document.features
    return features.last_hidden_states.shape[1], features.aux_hidden_states.shape[1]


def is_finite(value: torch.Tensor) -> bool:
    """By the extremes, because a mask of the tensor's size would cost as much as the tensor."""
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())


def serialise(documents: list[Document], dtype: str, store: str) -> list[np.ndarray]:
    """A shard of the store with fingerprint `store`, in pieces. Raises RunError."""
    # Pieces of the documents' own memory: safetensors' writer would copy a shard twice or more.
    sizes = sizes_of(documents[0])
    records, encoded = np.empty(len(documents), RECORD), []
    for place, document in enumerate(documents):
        encoded.append(encode(document, dtype))
        digest = xxhash.xxh3_64()
        for piece in encoded[-1].values():
            digest.update(piece)
        counts = len(document.input_ids), len(document.features.argmax), document.loss_mask.sum()
        # A checksum for each document, so that a flipped bit costs one and not the whole shard.
        records[place] = document.key, *map(int, counts), digest.intdigest()
    # Where the columns begin has no checksum: read elsewhere, a document does not match its own.
    text = json.dumps({"store": store, "dtype": dtype, "hidden_size": sizes[0]})
    header: dict[str, Any] = {"__metadata__": {"eagle3": f"{checksum_head(text, records)} {text}"}}
    pieces, end = [records.view(np.uint8)], records.nbytes
    shape = [len(records), len(RECORD)]
    header["documents"] = {"dtype": "I64", "shape": shape, "data_offsets": [0, end]}
    for name, column in columns(sizes, dtype).items():
        rows, start = int(records[column.per].sum()), end
        end += rows * column.row_bytes
        shape, span = [rows, *column.shape], [start, end]
        header[name] = {"dtype": NAMES[column.dtype], "shape": shape, "data_offsets": span}
        pieces += [tensors[name] for tensors in encoded]
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns what follows, as the format asks
    return [np.frombuffer(len(head).to_bytes(8, "little") + head, np.uint8), *pieces]


def checksum_head(text: str, records: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode() + records.tobytes())


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:08d}.safetensors"


def shard_number(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("shard_"))


def read(path: Path, start: int, memory: np.ndarray) -> np.ndarray:
    """Fill `memory` uint8 [n] with the bytes from `start` on. Raises DamageError."""
    # A memory map would save a copy, but a page that cannot be read kills the process with SIGBUS.
    if not path.exists():
        raise DamageError(f"{path} is missing")
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(memory) != len(memory):
            raise DamageError(f"{path} ends too early, or its disk fails")
    return memory


class Shard:
    """A shard of the store with fingerprint `store`; `records` RECORD [N]. Raises DamageError."""

    def __init__(self, path: Path, store: str):
        self.path = path
        try:
            start = 8 + int.from_bytes(read(path, 0, np.empty(8, np.uint8)), "little")
            self.bytes = path.stat().st_size
            header = json.loads(read(path, 8, np.empty(start - 8, np.uint8)).tobytes())
            checksum, _, text = header.pop("__metadata__")["eagle3"].partition(" ")
            spans = {name: entry["data_offsets"] for name, entry in header.items()}
            first, end = spans["documents"]
            records = np.empty(end - first, np.uint8)
            self.records = read(path, start + first, records).view(RECORD)
            head = json.loads(text)
            sizes = head["hidden_size"], header["aux_hidden_states"]["shape"][1]
            self.columns = columns(sizes, head["dtype"])
            self.starts = {name: start + spans[name][0] for name in self.columns}
            end = start + max(end for _, end in spans.values())
            whole = checksum_head(text, self.records) == checksum and end == self.bytes
            if not whole or head["store"] != store:
                raise ValueError
        # A flipped bit makes a number, a name or the length of the header anything.
        except (ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError):
            raise DamageError(f"{path} is cut, has a damaged head or is another store's") from None
        counts = {per: self.records[per] for per in ("tokens", "teacher_rows")}
        self.rows_before = {per: count.cumsum() - count for per, count in counts.items()}

    def empty_states(self, tokens: int, teacher_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the auxiliary and the last hidden states of documents."""
        last, aux = (self.columns[name] for name in ("last_hidden_states", "aux_hidden_states"))
        rooms = (tokens, aux.shape), (teacher_rows, last.shape)
        return tuple(empty_on_host(rows, shape, last.dtype) for rows, shape in rooms)

    def load(self, place: int, aux: torch.Tensor, last: torch.Tensor) -> Document:
        """The document of `records[place]`, whose hidden states are read into `aux` and `last`; aux
        in bf16 where it was int8. Raises DamageError.
        """
        record, digest = self.records[place], xxhash.xxh3_64()
        values = {"aux_hidden_states": aux, "last_hidden_states": last}
        if "aux_scales" in self.columns:
            values["aux_hidden_states"] = torch.empty(aux.shape, dtype=torch.int8)
        for name, column in self.columns.items():
            rows = int(record[column.per])
            if name not in values:
                values[name] = torch.empty(rows, *column.shape, dtype=column.dtype)
            start = self.starts[name]
            start += int(self.rows_before[column.per][place]) * column.row_bytes
            memory = values[name].flatten().view(torch.uint8).numpy()
            digest.update(read(self.path, start, memory))
        if digest.intdigest() != record["checksum"]:
            raise DamageError(f"its bytes in {self.path} do not match their checksum")
        if "aux_scales" in values:
            dequantise(values["aux_hidden_states"], values["aux_scales"], out=aux)
            values["aux_hidden_states"] = aux
        values["argmax"] = values["argmax"].long()
        features = Features(*(values[field.name] for field in fields(Features)))
        return Document(int(record["key"]), values["input_ids"], values["loss_mask"], features)
