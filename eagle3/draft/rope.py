"""Rotary position embedding with tables in fp32, whatever the model computes in."""

from typing import Any

import torch


class Rope(torch.nn.Module):
    """cos and sin of positions, grown on demand; never cast and never saved.

    Rotates halves, as Llama and Qwen do: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).
    """

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        # A plain attribute: a buffer would follow .to(bfloat16) and appear in the state dict.
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, positions: torch.Tensor, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, fp32 [n, 1, head_dim / 2], of `positions` [n], all of them below `bound`,
        which is passed because reading it off the device would make the host wait.
        """
        device = positions.device
        if self.tables is None or len(self.tables[0]) < bound or self.tables[0].device != device:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
            angles = torch.arange(max(bound, 2048))[:, None] * self.theta**-exponents
            self.tables = (angles.cos().float().to(device), angles.sin().float().to(device))
        cos, sin = self.tables
        return cos[positions][:, None], sin[positions][:, None]


def max_positions(longest: int, rope: dict[str, Any]) -> int:
    """Tokens that a model reads: `longest`, its max_position_embeddings, scaled as `rope` says.

    Of llama3, and where layers differ in their scaling, that is the scaled number already.
    """
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1
    if kind in ("linear", "dynamic"):
        return int(longest * factor)
    if kind in ("yarn", "longrope"):  # some have scaled the number, some have not
        return max(longest, int(factor * rope.get("original_max_position_embeddings", longest)))
    return longest
