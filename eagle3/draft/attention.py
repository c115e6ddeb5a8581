"""Attention of training-time test: causal over step 0, plus each row's own later keys.

A backend computes the causal part and its backward for a given total (out, lse); `Attend` merges
the later keys by log-sum-exp. A flash kernel's backward recomputes each probability as exp(score -
lse), so with the merged lse (and the merged out, which its row sum `delta` is made from) every
probability comes out normalised over all keys: the gradients are exact, as in ring attention.

Shapes: T packed tokens, N query rows, H query heads, G key/value heads (H a multiple of G), d head
size.
"""

from typing import Protocol

import torch

from eagle3.batch import Batch, DocumentSpans


class Backend(Protocol):
    """The causal part. `rows` int64 [N] are the query rows' places among the T tokens, in any
    order.
    """

    @staticmethod
    def forward(
        q, rows, k, v, documents: DocumentSpans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [N,H,d], k and v [T,G,d] -> out [N,H,d] and lse [N,H] (at least fp32, natural
        logarithm).
        """

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents: DocumentSpans, scale: float):
        """Gradients of q, k, v, where `out` and `lse` may cover more keys than these."""


class Attend(torch.autograd.Function):
    """softmax over the causal step-0 keys and the row's own later keys, in one differentiable
    piece.

    `later` alternates k^1, v^1, k^2, v^2, ..., each [>= N, G, d]; the first N rows are those of q,
    because rows are ordered by how many steps need them. Nothing but references to these tensors is
    kept for backward.
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


class KeysValues:
    """What the rows of a batch attend to: all tokens' k^0, v^0, and each row's own later ones."""

    def __init__(self, backend: Backend, batch: Batch, k0: torch.Tensor, v0: torch.Tensor):
        """k0, v0 [T,G,d], rotated."""
        self.backend, self.documents, self.rows = backend, batch.documents, batch.rows
        self.k0, self.v0 = k0, v0
        self.later: list[torch.Tensor] = []

    def attend(
        self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None
    ) -> torch.Tensor:
        """q [N,H,d] of the first N rows, and their k, v [N,G,d] of this step (None at step 0) ->
        [N,H,d].
        """
        if k is not None:
            self.later += [k, v]
        rows = self.rows[: len(q)]
        return Attend.apply(self.backend, self.documents, rows, q, self.k0, self.v0, *self.later)


class Dense:
    """Plain softmax over a [T, T] mask: any device, any dtype, any head size. The reference, and
    the last resort.
    """

    @staticmethod
    def scores(q, rows, k, documents, scale):
        document_ids = torch.repeat_interleave(torch.tensor(documents.lengths, device=q.device))
        places = torch.arange(len(document_ids), device=q.device)
        visible = (places[None] <= rows[:, None]) & (
            document_ids[None] == document_ids[rows][:, None]
        )
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (
            torch.einsum("nhd,thd->nht", q, keys).to(torch.promote_types(q.dtype, torch.float32))
            * scale
        )
        return scores.masked_fill(~visible[:, None], float("-inf"))

    @staticmethod
    def forward(q, rows, k, v, documents, scale):
        scores = Dense.scores(q, rows, k, documents, scale)
        values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return torch.einsum(
            "nht,thd->nhd", scores.softmax(-1).to(v.dtype), values
        ), scores.logsumexp(-1)

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
