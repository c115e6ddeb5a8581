"""Auxiliary hidden states in int8: of A columns G = ceil(A / GROUP) groups, with a scale each."""

import math

import torch
from torch.nn import functional as F

GROUP = 128  # one scale a token is too coarse: some channels are a hundred times the others
CHUNK = 256  # rows; a chunk's copies stay in the cache


def quantise(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States [n,A] -> int8 [n,A], bf16 scales [n,G]."""
    # A scale is the largest |state| of its group / 127, rounded up so that nothing clips. What is
    # dequantised to bf16 is off by at most 1/126 of that largest: half a scale, which is up to
    # (1 + 2^-7)/127 of it, and the rounding of the product, 2^-8 of that.
    width = states.shape[1]
    groups = math.ceil(width / GROUP)
    values = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    scales = torch.empty(len(states), groups, dtype=torch.bfloat16, device=states.device)
    for place in range(0, len(states), CHUNK):
        rows = slice(place, place + CHUNK)
        chunk = F.pad(states[rows], (0, -width % GROUP)).unflatten(1, (groups, GROUP))
        exact = chunk.abs().amax(-1).float() / 127
        rounded_up = ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        # The bits of some NaNs, CUDA's among them, would wrap to 0: those stay as they are.
        scale = torch.where(exact.isfinite(), rounded_up, exact)
        scales[rows] = scale.bfloat16()
        divisor = torch.where(scale == 0, 1, scale)[..., None]
        integers = chunk.float().div_(divisor).round_().to(torch.int8)
        values[rows] = integers.flatten(1)[:, :width]
    return values, scales


def dequantise(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """int8 [n,A], bf16 scales [n,G] -> `out` bf16 [n,A]."""
    for place in range(0, len(values), CHUNK):
        rows = slice(place, place + CHUNK)
        wide = scales[rows].repeat_interleave(GROUP, 1)[:, : values.shape[1]]
        # int8 values and their scales are exact in bf16, so the product is rounded once.
        torch.mul(values[rows], wide, out=out[rows])
