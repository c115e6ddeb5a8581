"""A complete store of hidden states: the index over its shards, and documents read at random."""

import io
import json
from pathlib import Path

import numpy as np
import torch

from eagle3.batch import Document
from eagle3.errors import RunError
from eagle3.hidden_states.int8 import DTYPES, checksum, document_bytes
from eagle3.hidden_states.shards import (
    REMEDY,
    VERSION,
    DamageError,
    Shard,
    ShardDamageError,
    Shards,
    check_inputs,
    shard_is_complete,
    shard_path,
    write_atomically,
    write_shard,
)

__all__ = [
    "DTYPES",
    "Document",
    "Store",
    "check_inputs",
    "document_bytes",
    "finish",
    "shard_is_complete",
    "shard_path",
    "write_shard",
]


def finish(folder: Path, inputs: dict, num_shards: int) -> dict:
    """Write the index over shards 0..num_shards-1; returns the facts. Raises RunError where a shard
    is damaged.
    """
    records, described, kinds = [], [], set()
    for number in range(num_shards):
        try:
            shard = Shard(shard_path(folder, number))
        except ShardDamageError as damage:
            raise RunError(f"{damage}; delete it and capture again") from damage
        records.append(shard.records)
        kinds.add((shard.dtype, shard.hidden_size))
        described.append(
            {
                "name": shard.path.name,
                "bytes": shard.bytes,
                "documents": len(shard.records),
                "tokens": int(shard.records["tokens"].sum()),
                "head": shard.head,
            }
        )
    assert len(kinds) == 1, f"shards of one store in {kinds}"
    index = np.concatenate(records)
    index = index[np.argsort(index["key"], kind="stable")]
    twice = index["key"][1:][index["key"][1:] == index["key"][:-1]]
    if len(twice):
        raise RunError(
            f"document {twice[0]} is in several shards of {folder}; delete the folder and capture again"
        )
    dtype, hidden_size = kinds.pop()
    size, tokens = (
        sum(shard["bytes"] for shard in described),
        int(index["tokens"].sum(dtype=np.int64)),
    )
    facts = {
        "documents": len(index),
        "tokens": tokens,
        "teacher_rows": int(index["teacher_rows"].sum(dtype=np.int64)),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 1),
        "shards": num_shards,
    }
    for partial in folder.glob("*.tmp"):
        partial.unlink()
    table = io.BytesIO()
    np.save(table, index, allow_pickle=False)
    write_atomically(folder / "index.npy", table.getvalue())
    content = {
        "version": VERSION,
        "dtype": dtype,
        "hidden_size": hidden_size,
        "facts": facts,
        "inputs": inputs,
    }
    content |= {"index": hex_of(table.getvalue()), "shards": described}
    content["checksum"] = hex_of(json.dumps(content, sort_keys=True, default=str).encode())
    write_atomically(folder / "index.json", json.dumps(content, indent=1, default=str).encode())
    return facts


def hex_of(content: bytes) -> str:
    return f"{checksum([content]):016x}"


def read_index(folder: Path) -> tuple[dict, np.ndarray]:
    """What `finish` wrote: index.json, and the records in order of their keys. Raises RunError."""
    try:
        content = json.loads((folder / "index.json").read_text())
        table = (folder / "index.npy").read_bytes()
        written = content.pop("checksum")
        intact = (
            hex_of(json.dumps(content, sort_keys=True).encode()) == written
            and hex_of(table) == content["index"]
        )
    except FileNotFoundError as error:
        raise RunError(
            f"{error.filename} is missing: the store was not finished; capture again"
        ) from error
    except (ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        raise RunError(
            f"the index of the store in {folder} is damaged; delete that folder and capture again"
        )
    if content["version"] != VERSION:
        raise RunError(
            f"the store in {folder} has format {content['version']}, and this version reads {VERSION}; "
            "delete that folder and capture again"
        )
    return content, np.load(io.BytesIO(table), allow_pickle=False)


class Store:
    """A finished store: `keys` int64 of its documents, ascending, and in that order `lengths` and
    `supervised`.

    `on_damage` is "fail" (RunError) or "skip": damaged documents are left out and remembered in
    `damaged`, by key. Any thread may read.
    """

    def __init__(self, folder: Path, on_damage: str = "fail"):
        assert on_damage in ("fail", "skip")
        self.folder, self.on_damage = Path(folder), on_damage
        self.content, self.index = read_index(self.folder)
        self.inputs, self.facts = self.content["inputs"], self.content["facts"]
        self.hidden_size, self.dtype = self.content["hidden_size"], self.content["dtype"]
        self.keys, self.lengths, self.supervised = (
            self.index[name].astype(np.int64) for name in ("key", "tokens", "supervised")
        )
        self.shards = Shards(self.folder)
        self.damaged: dict[int, str] = {}
        for number, described in enumerate(self.content["shards"]):
            path = shard_path(self.folder, number)
            if not path.exists():
                self.remember(ShardDamageError(f"{path} is missing"), number)
            elif (size := path.stat().st_size) != described["bytes"]:
                self.remember(
                    ShardDamageError(f"{path} has {size} bytes, not {described['bytes']}"), number
                )

    def __len__(self) -> int:
        return len(self.index)

    def load(self, keys: list[int]) -> list[Document]:
        """Documents in order, every byte checked; those that are damaged fail or are left out."""
        found = []
        for key in keys:
            record = self.record(key)
            if key in self.damaged:
                continue
            try:
                found.append(self.shard(int(record["shard"])).document(record))
            except DamageError as damage:
                self.remember(damage, int(record["shard"]), key)
        return found

    def document(self, key: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(key, input_ids int32 [n], loss_mask bool [n]), without the states; RunError where they
        are damaged.
        """
        record = self.record(key)
        try:
            return key, *self.shard(int(record["shard"])).ids_and_mask(record)
        except DamageError as damage:
            raise RunError(f"document {key} cannot be read: {damage}; {REMEDY}") from damage

    def record(self, key: int) -> np.void:
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise RunError(f"the store in {self.folder} has no document {key}")
        return self.index[place]

    def shard(self, number: int) -> Shard:
        shard = self.shards[number]
        if shard.head != self.content["shards"][number]["head"]:
            raise ShardDamageError(f"{shard.path}: its head is not the one that the index knows")
        return shard

    def remember(self, damage: DamageError, number: int, key: int | None = None) -> None:
        """Damage of a document, or of its whole shard `number`; raises RunError unless damage is
        skipped.
        """
        lost = (
            self.keys[self.index["shard"] == number].tolist()
            if isinstance(damage, ShardDamageError)
            else [key]
        )
        if self.on_damage == "fail":
            what = f"{len(lost)} documents" if key is None else f"document {key}"
            raise RunError(f"{what} cannot be read: {damage}; {REMEDY}") from damage
        self.damaged.update(dict.fromkeys(lost, str(damage)))

    def verify(self) -> list[str]:
        """Read everything once; sentences for what is wrong."""
        wrong = []
        for number, described in enumerate(self.content["shards"]):
            self.shards.open.pop(number, None)
            try:
                shard = self.shard(number)
            except ShardDamageError as damage:
                wrong.append(f"{described['documents']} documents cannot be read: {damage}")
                continue
            for record in shard.records:
                try:
                    shard.encoded(record, shard.tensors)
                except DamageError as damage:
                    wrong.append(f"document {record['key']} cannot be read: {damage}")
        return wrong
