"""What both scripts of this folder need, in the engines' environments: without our package.

They say what an engine's own classes make of a block draft where no server of it runs on a CPU:
python in_ENGINE.py TARGET DRAFT METHOD IN OUT. IN has a text, `ids` [n] and `aux` [n,A], and `rows`
[N] of it. OUT gets `logits` [N,B,V] of all slots, and of DSpark `confidence` [N,B], where the
text's own tokens are those before the drafted ones.
"""

from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class PlainAttention(nn.Module):
    """In place of attention over a paged cache, a kernel for GPUs: every slot sees the first `seen`
    of the context's `keys` and `values` [n,G,d], which the engine's code stores here, and all slots
    of its block.
    """

    k_scale = v_scale = kv_cache = None

    def __init__(self, size: int, scale: float):
        super().__init__()
        self.size, self.scale, self.seen, self.impl = size, scale, 0, self

    def forward(self, q: Tensor, keys: Tensor, values: Tensor, *of_the_engine) -> Tensor:
        q, keys, values = (x.unflatten(-1, (-1, self.size)) for x in (q, keys, values))
        keys = torch.cat([self.keys[: self.seen], keys])
        values = torch.cat([self.values[: self.seen], values])
        heads = (x.transpose(0, 1)[None] for x in (q, keys, values))
        out = scaled_dot_product_attention(*heads, scale=self.scale, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def replace_attention(layers, size: int, scale: float) -> list[PlainAttention]:
    for layer in layers:
        layer.self_attn.attn = PlainAttention(size, scale)
    return [layer.self_attn.attn for layer in layers]


def draft_blocks(
    text: dict[str, Tensor], attentions: list[PlainAttention], size: int, mask_token_id: int,
    draft: Callable[..., dict[str, Tensor]], out: str,
) -> None:  # fmt: skip
    """Write what `draft(ids, positions, before, drafted)`, [B] each, gives behind every row."""
    ids, found = text["ids"].long(), []
    for row in text["rows"].tolist():
        for attention in attentions:
            attention.seen = row + 1
        block = torch.full((size,), mask_token_id)
        block[0] = ids[row + 1]
        before, drafted = (ids[first : first + size] for first in (row + 1, row + 2))
        found.append(draft(block, torch.arange(row + 1, row + 1 + size), before, drafted))
    save_file({name: torch.stack([each[name] for each in found]) for name in found[0]}, out)
