"""Attention of packed documents for transformers models, registered under the name `packed`.

transformers' own choices either build a [T,T] mask (sdpa) or need a package (flash-attn). This one
gives each document to a flash kernel; with a cache, or with padding, it is torch's SDPA under
transformers' mask.
"""

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NEIGHBOURS = 8  # rows that attend together

# Windows (or chunks) that masks were asked for, and those that attention was told of: a layer that
# is told of none sees too much of what is longer, as it gets no mask.
asked_windows: set[int | None] = set()
applied_windows: set[int | None] = set()


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs
):
    """query [B,H,T,d], key and value [B,G,S,d] -> [B,T,H,d], None, as transformers calls it.

    Among the decoder's keywords, `documents` are the DocumentSpans of a packed batch.
    """
    documents = kwargs.get("documents")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("soft caps and sinks")
    if documents is None:
        out = attend(query, key, value, attention_mask, sliding_window, scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None:
        raise NotImplementedError("a mask that knows nothing of documents")
    applied_windows.add(sliding_window)
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        # One kernel for all documents; it exists for these devices and types only.
        from torch.nn.attention.varlen import varlen_attn

        spans = [documents.cu_seqlens] * 2 + [max(documents.lengths)] * 2
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        packed = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        out = varlen_attn(*packed, *spans, scale=scaling, window_size=window, enable_gqa=True)
        return out[None], None
    # Document by document, the work is that of the documents and not of T x T.
    split = [x.split(documents.lengths, dim=2) for x in (query, key, value)]
    outs = [attend(*document, None, sliding_window, scaling) for document in zip(*split)]
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


def attend(query, key, value, mask, window: int | None, scale: float | None) -> torch.Tensor:
    """Of one sequence: under `mask` where there is one, else causal and within the window."""
    length = query.shape[2]
    whole = length == key.shape[2]  # else a token that continues a cache sees all of it
    if mask is None and whole and window is not None and length > window:
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < window)
    if length == 1:
        return attend_newest(query, key, value, mask, scale)
    options = {"is_causal": mask is None, "enable_gqa": True}
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, **options)


def attend_newest(query, key, value, mask, scale: float | None) -> torch.Tensor:
    """One token [B,H,1,d] of each text, which sees what `mask` shows of the S slots, or all."""
    # Heads that share keys become the tokens of one head: no key is copied for each of them.
    shared = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]
    if mask is None or query.is_cuda:
        out = F.scaled_dot_product_attention(shared, key, value, mask, scale=scale)
        return out.flatten(1, 2)[:, :, None]
    # On a CPU reading keys is what takes the time. Texts of about one length are neighbours, so a
    # few rows at a time read the slots that one of them has, and not those of the longest of all.
    outs, mask = [], mask.expand(len(query), -1, -1, -1)
    for q, k, v, seen in zip(*(x.split(NEIGHBOURS) for x in (shared, key, value, mask))):
        shown = seen if seen.dtype == torch.bool else seen == 0
        slots = 1 + int(shown.flatten(0, 2).any(0).nonzero()[-1])
        k, v, seen = k[:, :, :slots], v[:, :, :slots], seen[..., :slots]
        outs.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale))
    return torch.cat(outs).flatten(1, 2)[:, :, None]


def packed_mask(
    *args, q_length=None, kv_length=None, attention_mask=None, local_size=None, **kwargs
):
    """No mask for a whole sequence without padding, which `attend` knows by itself (and a [T,T]
    mask of a packed batch would be gigabytes); else transformers' own.
    """
    if attention_mask is None and q_length == kv_length:
        asked_windows.add(local_size)
        return None
    kwargs["local_size"] = local_size
    lengths = {"q_length": q_length, "kv_length": kv_length}
    return sdpa_mask(*args, **lengths, attention_mask=attention_mask, **kwargs)


AttentionInterface.register("packed", packed_attention)
AttentionInterface.register("documents", packed_attention)  # which is asked for no masks
AttentionMaskInterface.register("packed", packed_mask)
