"""How much data there is: counted where it is prepared, else estimated from some rows of every
file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eagle3.config import Data
from eagle3.data.chat import Chat
from eagle3.data.encoder import Encoder
from eagle3.data.prepare import Prepared
from eagle3.data.sources import DataFile, SourceFiles, raw_rows
from eagle3.errors import RunError

SAMPLE_ROWS = 300
SCAN_BYTES = 1 << 26
FEWEST_PACKED, MOST_PACKED = 100, 2000


@dataclass
class Sample:
    """n documents that stand for all; all of them where that is known (`exact`).

    `weights` [n]: how many documents of an epoch each stands for; `distinct` [n]: how many of those
    differ. `standard_error`: of the tokens of an epoch. `document(i)` -> (i, input_ids [n],
    loss_mask [n]).
    """

    exact: bool
    lengths: np.ndarray
    supervised: np.ndarray
    teachers: np.ndarray
    weights: np.ndarray
    distinct: np.ndarray
    standard_error: float
    document: Callable[[int], tuple[int, torch.Tensor, torch.Tensor]]

    def evenly(self, count: int) -> np.ndarray:
        """`count` places in proportion to the weights, evenly spread over the documents' order."""
        upto = np.cumsum(self.weights)
        return np.searchsorted(upto, (np.arange(count) + 0.5) / count * upto[-1])

    def typical(self, tokens: int) -> list[int]:
        """Places of documents with about `tokens` tokens between them, `FEWEST_PACKED` at least."""
        mean = float(self.lengths @ self.weights / self.weights.sum())
        return self.evenly(int(np.clip(tokens / mean, FEWEST_PACKED, MOST_PACKED))).tolist()


def count(prepared: Prepared) -> Sample:
    """The prepared data itself."""
    _, places, times = np.unique(prepared.index["start"], return_inverse=True, return_counts=True)
    ones = np.ones(len(prepared))
    return Sample(
        exact=True,
        lengths=prepared.lengths,
        supervised=prepared.supervised,
        teachers=prepared.teachers,
        weights=ones,
        distinct=ones / times[places],
        standard_error=0.0,
        document=prepared.document,
    )


def scan(
    file: DataFile, num_bytes: float, most_rows: float, keep: int
) -> tuple[float, list[tuple]]:
    """(rows of the file, some of them): `keep` or up to twice as many, evenly spread over its first
    `num_bytes`.

    Compressed files and JSON lists are read in blocks, so rows are counted against the share of the
    file only where that share has just moved on.
    """
    kept: list[tuple] = []
    stride, rows, read = 1, 0, 0.0
    for line, raw, share in raw_rows(file):
        if share > read:
            if rows >= keep and read * file_bytes(file) >= num_bytes:
                return min(rows / read, most_rows), kept
            read = share
        if rows >= most_rows:
            break
        if rows % stride == 0:
            kept.append((line, raw))
        if len(kept) == 2 * keep:
            kept, stride = kept[::2], 2 * stride
        rows += 1
    return float(rows), kept


def file_bytes(file: DataFile) -> int:
    return Path(file.path).stat().st_size


def estimate(sources: SourceFiles, chat: Chat, data: Data, held_out: int) -> Sample:
    """What `prepare` will make of the sources, from some rows of every file; `held_out` documents
    are left out.

    Duplicates are not known here. The standard error is that of a stratified sample without
    replacement, whose rows are as good as drawn at random (Cochran, Sampling Techniques, 5.6): sum
    over rows of w (w - 1) (tokens - mean)^2.
    """
    encoder, parts, variance = Encoder(chat, data), [], 0.0
    for number, (source, files) in enumerate(sources):
        rows, stands_for = [], []
        remaining = data.num_samples or float("inf")
        for place, file in enumerate(files):
            if remaining <= 0:
                break
            keep = max(8, -(-SAMPLE_ROWS // len(files)))
            total, kept = scan(file, SCAN_BYTES / len(files), remaining, keep)
            remaining -= total
            rows += [(number, place, *row, 0.0) for row in kept]
            stands_for += [total / max(1, len(kept))] * len(kept)
        chunk = encoder[rows, 0]
        weight = np.array(stands_for)
        tokens = chunk.records["tokens"]
        spread = weight * (weight - 1) * (tokens - np.average(tokens, weights=weight)) ** 2
        variance += source.weight**2 * float(spread.sum())
        parts.append((chunk, weight, source.weight))
    return joined(parts, variance**0.5, held_out)


def joined(parts: list[tuple], standard_error: float, held_out: int) -> Sample:
    """One sample of the usable rows of all sources: (chunk, weights of its rows, weight of the
    source).

    Raises RunError when there are none.
    """
    records = np.concatenate([chunk.records for chunk, _, _ in parts])
    ids = torch.from_numpy(np.concatenate([chunk.ids for chunk, _, _ in parts]))
    mask = torch.from_numpy(np.concatenate([chunk.mask for chunk, _, _ in parts]))
    starts = np.cumsum(records["tokens"], dtype=np.int64) - records["tokens"]
    weights = np.concatenate([rows * passes for _, rows, passes in parts])
    distinct = np.concatenate([rows * min(1.0, passes) for _, rows, passes in parts])
    usable = np.flatnonzero(records["outcome"] == 0)
    if not len(usable):
        reasons = (
            ", ".join(sorted({reason for chunk, _, _ in parts for reason in chunk.reasons}))
            or "no rows"
        )
        raise RunError(
            f"data.path: none of {len(records)} rows looked at can be trained on ({reasons})"
        )
    kept = max(0.0, 1 - held_out / max(1.0, distinct[usable].sum()))
    lengths = records["tokens"][usable].astype(np.int64)

    def document(i: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        span = slice(int(starts[usable[i]]), int(starts[usable[i]] + lengths[i]))
        return i, ids[span], mask[span]

    return Sample(
        exact=False,
        lengths=lengths,
        supervised=records["supervised"][usable].astype(np.int64),
        teachers=records["teachers"][usable].astype(np.int64),
        weights=weights[usable] * kept,
        distinct=distinct[usable] * kept,
        standard_error=standard_error * kept,
        document=document,
    )
