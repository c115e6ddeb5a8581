"""Attention of training-time test: causal over step 0, plus each row's own later keys.

A backend computes the causal part and its backward for a given total (out, lse); `attend` merges the later keys by
log-sum-exp. Passing the merged out and lse to a flash kernel's backward makes every probability come out normalised
over all keys, so gradients are exact, as in ring attention.

Shapes: T packed tokens, N query rows, H query heads, G key/value heads (H a multiple of G), d head size.
"""

from typing import NamedTuple, Protocol

import torch


class Documents(NamedTuple):
    """Where the packed documents lie: `cu_seqlens` int32 [B+1] on the device, `lengths` on the host.

    A single document may have queries only from its token `first` on.
    """

    cu_seqlens: torch.Tensor
    lengths: list[int]
    first: int = 0


class Backend(Protocol):
    """The causal part. `rows` int64 [N] are the query rows' places among the T tokens, in any order."""

    @staticmethod
    def forward(q, rows, k, v, documents: Documents, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """q [N,H,d], k and v [T,G,d] -> out [N,H,d] and lse [N,H] (at least fp32, natural logarithm)."""

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents: Documents, scale: float):
        """Gradients of q, k, v, where `out` and `lse` may cover more keys than these."""


class Dense:
    """Plain softmax over a [T, T] mask: any device, any dtype, any head size. The reference, and the last resort."""

    @staticmethod
    def scores(q, rows, k, documents, scale):
        document_ids = torch.repeat_interleave(torch.tensor(documents.lengths, device=q.device))
        places = torch.arange(len(document_ids), device=q.device)
        visible = (places[None] <= rows[:, None]) & (document_ids[None] == document_ids[rows][:, None])
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("nhd,thd->nht", q, keys).to(torch.promote_types(q.dtype, torch.float32)) * scale
        return scores.masked_fill(~visible[:, None], float("-inf"))

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        scores = Dense.scores(q, rows, k, documents, scale)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return torch.einsum("nht,thd->nhd", scores.softmax(-1).to(v.dtype), values), scores.logsumexp(-1)

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        groups = q.shape[1] // k.shape[1]
        p = (Dense.scores(q, rows, k, documents, scale) - lse[..., None]).exp().to(q.dtype)
        delta = (grad_out * out).sum(-1, keepdim=True)
        grad_p = torch.einsum("nhd,thd->nht", grad_out, v.repeat_interleave(groups, dim=1))
        grad_scores = p * (grad_p - delta) * scale
        grad_q = torch.einsum("nht,thd->nhd", grad_scores, k.repeat_interleave(groups, dim=1))
        grad_k = torch.einsum("nht,nhd->thd", grad_scores, q).unflatten(1, (-1, groups)).sum(2)
        grad_v = torch.einsum("nht,nhd->thd", p, grad_out).unflatten(1, (-1, groups)).sum(2)
        return grad_q, grad_k, grad_v


def scatter(values: torch.Tensor, rows: torch.Tensor, length: int) -> torch.Tensor:
    """Put `values` [N, ...] at `rows` of zeros [length, ...]: flash kernels know no gathered rows.

    A row left at q = 0, lse = 0, grad = 0 adds nothing to any gradient.
    """
    return values.new_zeros(length, *values.shape[1:]).index_copy_(0, rows, values)


class FlashCPU:
    """The flash kernel that torch ships for CPUs (fp32, fp64, bf16), one call a document."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        q = scatter(q, rows, len(k))
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        start = 0
        for length in documents.lengths:
            span = slice(start, start + length)
            heads = [x[span].transpose(0, 1)[None] for x in (q, k, v)]
            o, m = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
            out[span], lse[span] = o[0].transpose(0, 1), m[0].transpose(0, 1)
            start += length
        return out[rows], lse[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        grad_out, q, out, lse = (scatter(x, rows, len(k)) for x in (grad_out, q, out, lse))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        start = 0
        for length in documents.lengths:
            span = slice(start, start + length)
            heads = [x[span].transpose(0, 1)[None] for x in (grad_out, q, k, v, out, lse)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, 0.0, True, scale=scale)
            for grad, part in zip(grads, parts, strict=True):
                grad[span] = part[0].transpose(0, 1)
            start += length
        return grads[0][rows], grads[1], grads[2]


class FlashCUDA:
    """The varlen flash kernel inside torch (CUDA, fp16 and bf16, head size up to 256): nothing to install."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first  # the kernel aligns its causal mask bottom right
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            scatter(q, rows, len(k) - first), k, v, cu_q, cu, longest - first, longest, 0.0, True, False, scale=scale
        )
        return out[rows], lse.transpose(0, 1)[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        grad_out, q, out, lse = (scatter(x, rows, len(k) - first) for x in (grad_out, q, out, lse))
        lse = lse.transpose(0, 1).contiguous()
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, cu_q, cu, longest - first, longest, 0.0, True, unused, unused, scale=scale
        )
        return grads[0][rows], grads[1], grads[2]


class FlashAttn:
    """The flash-attn package (2.8): the same kernel family, for those who built it for their card."""

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        out, lse, *_ = _flash_attn_varlen_forward(
            scatter(q, rows, len(k) - first), k, v, cu_q, cu, longest - first, longest, 0.0, scale, causal=True
        )
        return out[rows], lse.transpose(0, 1)[rows]

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents, scale):
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        cu, longest, first = documents.cu_seqlens, max(documents.lengths), documents.first
        cu_q, rows = (cu - first).clamp(min=0), rows - first
        grad_out, q, out, lse = (scatter(x, rows, len(k) - first) for x in (grad_out, q, out, lse))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        lse = lse.transpose(0, 1).contiguous()
        longest = (longest - first, longest)
        _flash_attn_varlen_backward(
            grad_out, q, k, v, out, lse, *grads, cu_q, cu, *longest, 0.0, scale, True, -1, -1, 0.0, None, False
        )
        return grads[0][rows], grads[1], grads[2]


class Auto:
    """The fastest of the above that runs on the tensors given."""

    @staticmethod
    def pick(q: torch.Tensor) -> type[Backend]:
        if q.device.type == "cpu":
            return FlashCPU
        half = q.dtype in (torch.float16, torch.bfloat16)
        return FlashCUDA if half and q.shape[-1] <= 256 and q.device.type == "cuda" else Dense

    @staticmethod
    def forward(q, *args):
        return Auto.pick(q).forward(q, *args)

    @staticmethod
    def backward(grad_out, q, *args):
        return Auto.pick(q).backward(grad_out, q, *args)


class Attend(torch.autograd.Function):
    """softmax over the causal step-0 keys and the row's own later keys, in one differentiable piece.

    `later` alternates k^1, v^1, k^2, v^2, ..., each [>= N, G, d]; the first N rows are those of q, because rows are
    ordered by how many steps need them. Nothing but references to these tensors is kept for backward.
    """

    @staticmethod
    def forward(ctx, backend, documents, rows, q, k, v, *later):
        scale = q.shape[-1] ** -0.5
        out, lse = backend.forward(q, rows, k, v, documents, scale)
        q_grouped = q.unflatten(1, (k.shape[1], -1))
        scores = [own_scores(q_grouped, key, scale) for key in later[::2]]
        if scores:
            total = torch.logsumexp(torch.stack([lse, *scores]), dim=0)
            out = out * (lse - total).exp()[..., None].to(out.dtype)
            for score, value in zip(scores, later[1::2], strict=True):
                p = (score - total).exp().to(out.dtype).unflatten(1, (k.shape[1], -1))
                out += (p[..., None] * value[: len(q), :, None]).flatten(1, 2)
            lse = total
        ctx.save_for_backward(rows, q, k, v, out, lse, *later)
        ctx.backend, ctx.documents, ctx.scale = backend, documents, scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        rows, q, k, v, out, lse, *later = ctx.saved_tensors
        grad_q, grad_k, grad_v = ctx.backend.backward(
            grad_out.contiguous(), q, rows, k, v, out, lse, ctx.documents, ctx.scale
        )
        grouped = (k.shape[1], -1)
        q_grouped, grad_grouped = q.unflatten(1, grouped), grad_out.unflatten(1, grouped)
        delta = (grad_out * out).sum(-1, dtype=lse.dtype).unflatten(1, grouped)
        grads = []
        for key, value in zip(later[::2], later[1::2], strict=True):
            p = (own_scores(q_grouped, key, ctx.scale) - lse).exp().unflatten(1, grouped)
            grad_p = (grad_grouped * value[: len(q), :, None]).sum(-1, dtype=lse.dtype)
            grad_score = (p * (grad_p - delta) * ctx.scale).to(q.dtype)
            grad_q += (grad_score[..., None] * key[: len(q), :, None]).flatten(1, 2)
            grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
            grad_key[: len(q)] = (grad_score[..., None] * q_grouped).sum(2)
            grad_value[: len(q)] = (p.to(q.dtype)[..., None] * grad_grouped).sum(2)
            grads += [grad_key, grad_value]
        return None, None, None, grad_q, grad_k, grad_v, *grads


def own_scores(q_grouped: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled products of each row's query heads [N,G,H/G,d] with its own key [>= N,G,d] -> [N,H]."""
    wide = torch.promote_types(key.dtype, torch.float32)
    return (q_grouped * key[: len(q_grouped), :, None]).sum(-1, dtype=wide).flatten(1) * scale


def attend(backend, documents, rows, q, k, v, later) -> torch.Tensor:
    """q [N,H,d], k, v [T,G,d], later a list of (k^i, v^i) -> out [N,H,d]."""
    return Attend.apply(backend, documents, rows, q, k, v, *(x for pair in later for x in pair))


class Alone:
    """All tokens of the batch are here: there is nothing to exchange with other ranks (`eagle3.sequence` has what
    there is else)."""

    def to(self, device: torch.device) -> "Alone":
        return self

    def steps(self, batch) -> list[int]:
        """How many rows are in work at each step."""
        return batch.row_counts

    def keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of step 0 of all tokens."""
        return k, v

    def attend(self, backend: Backend, batch, step: int, q, k0, v0, later, own) -> torch.Tensor:
        """Attention of the rows of a step; `own`, their k and v of this step (None at step 0), joins `later`."""
        if own is not None:
            later.append(own)
        return attend(backend, batch.documents, batch.rows[: len(q)], q, k0, v0, later)
