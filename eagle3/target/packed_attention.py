"""Attention of packed documents for transformers models, registered under the name `packed`.

transformers' own choices either build a [T, T] mask (sdpa) or need a package (flash-attn). This one
gives each document to a flash kernel; with a cache, or with padding, it is torch's SDPA under
transformers' mask.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    documents=None,
    **kwargs,
):
    """query [B,H,T,d], key and value [B,G,S,d] -> out [B,T,H,d], None; `documents` is a `Documents`
    when packed.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError(
            "packed attention knows neither soft caps nor sinks; set target.attention=eager"
        )
    if documents is None or attention_mask is not None:
        whole = attention_mask is None and query.shape[2] == key.shape[2]
        if whole and sliding_window is not None and query.shape[2] > sliding_window:
            attention_mask = sliding_band(query.shape[2], sliding_window, query.device)[None, None]
        causal = attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=True,
        )
        return out.transpose(1, 2), None
    longest = max(documents.lengths)
    windowed = sliding_window is not None and longest > sliding_window
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        heads = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        window = (sliding_window - 1, 0) if windowed else (-1, 0)
        cu = documents.cu_seqlens
        return varlen_attn(
            *heads, cu, cu, longest, longest, scale=scaling, window_size=window, enable_gqa=True
        )[None], None  # fmt: skip
    parts = []
    for q, k, v in zip(
        *(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True
    ):
        band = sliding_band(q.shape[2], sliding_window, q.device) if windowed else None
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=band, is_causal=band is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def sliding_band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: keys at distance 0 .. window - 1 before the query."""
    distance = (
        torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    )
    return (distance >= 0) & (distance < window)


def packed_mask(*args, q_length=None, kv_length=None, attention_mask=None, **kwargs):
    """No mask for a whole sequence without padding (the attention is causal by itself); else
    transformers' own.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(
        *args, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs
    )


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", packed_mask)
