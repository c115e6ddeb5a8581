"""What a document's tensors are on disk: dtypes, sizes, int8 in groups, checksums.

n tokens, u teacher rows, H hidden size, A = 3H, G groups of `GROUP` along A (the last may be
shorter).
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch.nn import functional as F

from eagle3.batch import Document, Features, empty_on_host
from eagle3.errors import RunError

DTYPES = ("fp32", "bf16", "int8")
GROUP = 128
CHUNK = 256  # rows; a quantised chunk's fp32 copy stays in the cache
TOKENS = ("input_ids", "loss_mask")
RECORD_BYTES = (
    48  # what a shard holds for a document beside its tensors: four int64 and two checksums
)


class Stored(NamedTuple):
    """A flat tensor of a shard: one row for each of what `per` counts, of `columns`."""

    per: str
    dtype: torch.dtype
    columns: tuple[int, ...]

    def bytes(self, rows):
        return rows * self.dtype.itemsize * math.prod(self.columns)

    def view(self, memory: np.ndarray) -> torch.Tensor:
        """Bytes uint8 -> [rows,*columns]."""
        row = self.bytes(1)
        return (
            torch.from_numpy(memory)
            .view(-1, row)
            .view(self.dtype)
            .view(len(memory) // row, *self.columns)
        )


def tensors(hidden_size: int, dtype: str) -> dict[str, Stored]:
    """What is stored of documents, in a shard's order: wide elements first, so that all are
    aligned.
    """
    hidden = torch.float32 if dtype == "fp32" else torch.bfloat16
    aux = {"aux_hidden_states": Stored("tokens", hidden, (3 * hidden_size,))}
    if dtype == "int8":
        groups = math.ceil(3 * hidden_size / GROUP)
        aux = {
            "aux_scales": Stored("tokens", torch.bfloat16, (groups,)),
            "aux_hidden_states": Stored("tokens", torch.int8, (3 * hidden_size,)),
        }
    return {
        "logsumexp": Stored("teacher_rows", torch.float32, ()),
        "argmax": Stored("teacher_rows", torch.int32, ()),
        "input_ids": Stored("tokens", torch.int32, ()),
        "last_hidden_states": Stored("teacher_rows", hidden, (hidden_size,)),
        **aux,
        "loss_mask": Stored("tokens", torch.bool, ()),
    }


def document_bytes(length, teacher_rows, hidden_size: int, dtype: str):
    """Bytes of documents in a shard, beside its header; int for ints, int64 array for arrays."""
    rows = {
        "tokens": np.asarray(length, np.int64),
        "teacher_rows": np.asarray(teacher_rows, np.int64),
    }
    size = RECORD_BYTES + sum(
        stored.bytes(rows[stored.per]) for stored in tensors(hidden_size, dtype).values()
    )
    return size if np.ndim(size) else int(size)


def quantise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [n,A] -> int8 [n,A], bf16 scales [n,G]: a group's largest |state| / 127, rounded up so
    that nothing clips.

    Dequantised to bf16, a state is off by at most 1/126 of the largest |state| of its group: half a
    scale, which is up to (1 + 2^-7)/127 of it, and the rounding of the product, 2^-8 of that.
    """
    width = states.shape[1]
    groups = math.ceil(width / GROUP)
    values = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    scales = torch.empty(len(states), groups, dtype=torch.bfloat16, device=states.device)
    for place in range(0, len(states), CHUNK):
        rows = slice(place, place + CHUNK)
        chunk = F.pad(states[rows], (0, -width % GROUP)).unflatten(1, (groups, GROUP))
        exact = chunk.abs().amax(-1).float() / 127
        up = ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        scale = torch.where(
            exact.isfinite(), up, exact
        )  # the bits of some NaNs, CUDA's among them, would wrap to 0
        scales[rows] = scale.bfloat16()
        scale = torch.where(scale == 0, 1, scale)[..., None]
        values[rows] = chunk.float().div_(scale).round_().to(torch.int8).flatten(1)[:, :width]
    return values, scales


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 [n,A], bf16 scales [n,G] -> bf16 [n,A]."""
    n, width = values.shape
    states = empty_on_host(n, (width,), torch.bfloat16)
    full = width // GROUP
    whole = slice(0, full * GROUP)
    # int8 values and their scales are exact in bf16, so the product is rounded once.
    torch.mul(
        values[:, whole].unflatten(1, (full, GROUP)),
        scales[:, :full, None],
        out=states[:, whole].unflatten(1, (full, GROUP)),
    )
    if full < scales.shape[1]:
        torch.mul(values[:, full * GROUP :], scales[:, full:], out=states[:, full * GROUP :])
    return states


def encode(document: Document, dtype: str) -> dict[str, np.ndarray]:
    """The bytes uint8 of each stored tensor; raises RunError where a hidden state is not finite."""
    features = document.features
    hidden_size = features.last_hidden_states.shape[1]
    n, u = len(document.input_ids), len(features.last_hidden_states)
    values = vars(features) | {"input_ids": document.input_ids, "loss_mask": document.loss_mask}
    if dtype == "int8":
        values["aux_hidden_states"], values["aux_scales"] = quantise(features.aux_hidden_states)
    encoded = {}
    for name, stored in tensors(hidden_size, dtype).items():
        value = values[name].to("cpu", stored.dtype).contiguous()
        assert value.shape == ({"tokens": n, "teacher_rows": u}[stored.per], *stored.columns), name
        if value.is_floating_point() and not finite(value):
            raise RunError(
                f"document {document.key}: its {name.replace('_', ' ')} in {dtype} are not finite, so the target is "
                "broken or its dtype too narrow; nothing of its shard was written"
            )
        encoded[name] = value.flatten().view(torch.uint8).numpy()
    return encoded


def finite(value: torch.Tensor) -> bool:
    """Without a mask of the tensor's size: the largest and the smallest are finite, and neither is
    NaN.
    """
    return value.numel() == 0 or bool(torch.stack(value.aminmax()).isfinite().all())


def checksums(encoded: dict[str, np.ndarray]) -> tuple[int, int]:
    """64 bits over the ids and mask, which are also read alone, and 64 over everything else."""
    names = [name for name in encoded if name not in TOKENS]
    return checksum(encoded[name] for name in TOKENS), checksum(encoded[name] for name in names)


def checksum(pieces: Iterable[bytes | np.ndarray]) -> int:
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def decode(key: int, encoded: dict[str, np.ndarray], hidden_size: int, dtype: str) -> Document:
    """The inverse of `encode`, as the trainer wants it: argmax int64, aux in bf16 where it was
    int8.
    """
    values = {
        name: stored.view(encoded[name]) for name, stored in tensors(hidden_size, dtype).items()
    }
    if dtype == "int8":
        values["aux_hidden_states"] = dequantise(values["aux_hidden_states"], values["aux_scales"])
    values["argmax"] = values["argmax"].long()
    features = Features(*(values[field.name] for field in fields(Features)))
    return Document(key, values["input_ids"], values["loss_mask"], features)
