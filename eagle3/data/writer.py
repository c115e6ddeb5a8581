"""The flat files that `prepare` appends to, and how far it came."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from eagle3.data.encoder import RECORD, Chunk, Preparation
from eagle3.errors import RunError


class Heldout:
    """The `size` conversations with the lowest opening hashes, the first of each, as they come by."""

    def __init__(self, size: int, candidates: list[dict]):
        self.size, self.kept = size, {candidate["hash"]: candidate for candidate in candidates}

    @property
    def below(self) -> int:
        """No hash from here on can be held out any more."""
        return 1 << 64 if len(self.kept) < self.size else max(self.kept) + 1 if self.size else 0

    def offer(self, candidates: list[dict]) -> None:
        for candidate in candidates:
            self.kept.setdefault(candidate["hash"], candidate)
            if len(self.kept) > self.size:
                del self.kept[max(self.kept)]


@dataclass
class State:
    """What a killed call goes on from; sizes are those of the flat files when a part was complete."""

    rows: int = 0
    tokens: int = 0
    reasons: list[str] = field(default_factory=list)
    candidates: list[dict] = field(default_factory=list)
    repaired: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    not_found: int = 0
    ends: list[int] = field(default_factory=list)
    example: str | None = None


class Writer:
    """Appends chunks to the flat files and remembers, after each part, how far it came."""

    def __init__(self, folder: Path, options: Preparation, num_sources: int):
        self.folder, self.options = folder, options
        self.state = State()
        self.counts = np.zeros((num_sources, options.vocab_size), np.int64)
        if (folder / "state.npz").exists():
            with np.load(folder / "state.npz") as saved:
                self.state, self.counts = State(**json.loads(str(saved["state"]))), saved["counts"]
        self.held = Heldout(options.num_heldout, self.state.candidates)
        sizes = {
            "input_ids.bin": 4 * self.state.tokens,
            "loss_mask.bin": self.state.tokens,
            "rows.bin": RECORD.itemsize * self.state.rows,
        }
        if any(size and (folder / name).stat().st_size < size for name, size in sizes.items()):
            raise RunError(f"{folder} was damaged after it was written; delete it and start again")
        self.files = [reopen(folder / name, size) for name, size in sizes.items()]

    def append(self, chunk: Chunk) -> None:
        state = self.state
        if len(chunk.ids) and chunk.ids.max() >= self.options.vocab_size:
            raise RunError(
                f"the tokenizer gives id {chunk.ids.max()}, but the target's vocabulary has {self.options.vocab_size} "
                "entries; this tokenizer does not belong to this target"
            )
        for reason in chunk.reasons:
            if reason not in state.reasons:
                state.reasons.append(reason)
        places = np.array([0, *(state.reasons.index(reason) + 1 for reason in chunk.reasons)])
        rejected = chunk.records["outcome"] > 0
        chunk.records["outcome"][rejected] = places[chunk.records["outcome"][rejected]]
        self.count(chunk)
        state.ends = sorted(
            {*state.ends, *chunk.ids[chunk.mask & ~np.append(chunk.mask[1:], False)].tolist()}
        )
        for stream, values in zip(self.files, (chunk.ids, chunk.mask, chunk.records), strict=True):
            stream.write(values.tobytes())
        state.rows += len(chunk.records)
        state.tokens += len(chunk.ids)
        state.cut += chunk.cut
        state.not_found += chunk.not_found
        self.held.offer(chunk.candidates)
        state.repaired = dict(Counter(state.repaired) + chunk.repaired)
        state.example = state.example or chunk.example

    def count(self, chunk: Chunk) -> None:
        """Supervised tokens by source; a chunk's rows may come from several."""
        sources = np.repeat(chunk.records["source"], chunk.records["tokens"])
        for source in np.unique(sources).tolist():
            supervised = chunk.ids[chunk.mask & (sources == source)]
            self.counts[source] += np.bincount(supervised, minlength=self.options.vocab_size)

    def save(self) -> None:
        for stream in self.files:
            stream.flush()
            os.fsync(stream.fileno())
        self.state.candidates = list(self.held.kept.values())
        np.savez(
            self.folder / "state.partial.npz",
            state=json.dumps(vars(self.state)),
            counts=self.counts,
        )
        os.replace(self.folder / "state.partial.npz", self.folder / "state.npz")

    def close(self) -> None:
        for stream in self.files:
            stream.close()

    def forget(self) -> None:
        """Remove what only an interrupted call needs; the state first, as it speaks of the rows."""
        (self.folder / "state.npz").unlink()
        (self.folder / "rows.bin").unlink()


def reopen(path: Path, size: int) -> BinaryIO:
    """The file cut to `size` bytes, what a complete part left, open at its end."""
    stream = path.open("r+b" if path.exists() else "w+b")
    stream.truncate(size)
    stream.seek(size)
    return stream
