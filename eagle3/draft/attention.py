"""Attention of training-time test: causal over step 0, plus each row's own later keys.

A backend (a flash kernel) computes the causal part

    out_c = sum_j exp(s_j - lse_c) v_j,   lse_c = log sum_j exp(s_j),   s_j = scale q.k^0_j, j <= t

and `Attend` has kernels merge in the row's later keys, of score s^i = scale q.k^i, by log-sum-exp:

    lse = log(exp(lse_c) + sum_i exp(s^i))
    out = exp(lse_c - lse) out_c + sum_i exp(s^i - lse) v^i

In backward a flash kernel recomputes each probability as exp(s_j - lse) and subtracts the row sum
delta = grad_out.out. Given the merged lse and out, both are those of the softmax over all keys, so
the gradients are exact, as in ring attention, and d(lse) needs no term of its own.

T packed tokens, N query rows, H query heads, G key/value heads (H a multiple of G), R = H/G query
heads a key/value head, d head size.
"""

from typing import Protocol

import torch

from eagle3.batch import Batch, DocumentSpans


class Backend(Protocol):
    """The causal part. `rows` int64 [N]: the packed places of the query rows, in any order."""

    @staticmethod
    def forward(q, rows, k, v, documents: DocumentSpans) -> tuple[torch.Tensor, torch.Tensor]:
        """q [N,H,d], k and v [T,G,d] -> out [N,H,d] and lse [N,H] (natural, at least fp32)."""

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents: DocumentSpans):
        """Gradients of q, k and v, where `out` and `lse` may cover more keys than these."""


class Attend(torch.autograd.Function):
    """softmax over the causal step-0 keys and the row's own later keys, differentiable.

    `later` alternates k^1, v^1, k^2, v^2, ..., each [>= N,G,d], as the kernels share them. Rows are
    ordered by how many steps need them, so the first N rows of each are those of q. Backward keeps
    only references to these tensors, which the unroll has anyway: no score or probability is
    stored.
    """

    @staticmethod
    def forward(ctx, kernels, backend, documents, rows, later, q, k, v, *anchors):
        out, lse = backend.forward(q, rows, k, v, documents)
        if later:
            out, lse = kernels.merge(q, out, lse, later)
        ctx.save_for_backward(rows, q, k, v, out, lse)
        ctx.given = kernels, backend, documents, later
        return out

    @staticmethod
    def backward(ctx, grad_out):
        rows, q, k, v, out, lse = ctx.saved_tensors
        (kernels, backend, documents, later), ctx.given = ctx.given, None
        # The kernel sees k^0 and v^0 alone, but normalises by all keys, through out and lse.
        inputs = grad_out.contiguous(), q, rows, k, v, out, lse, documents
        grad_q, grad_k, grad_v = backend.backward(*inputs)
        grads = ()
        if later:
            grad_q = grad_q.contiguous()
            grads = kernels.merge_backward(grad_out, q, out, lse, later, grad_q)
        return None, None, None, None, None, grad_q, grad_k, grad_v, *grads


def scale_of(q: torch.Tensor) -> float:
    return q.shape[-1] ** -0.5


def empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for a backend's out [N,H,d] and lse [N,H]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide)


class KeysValues:
    """What a batch's rows attend to: k^0 (rotated), v^0 [T,G,d], and each row's own later ones."""

    def __init__(self, kernels, backend: Backend, batch: Batch, k0, v0):
        self.kernels, self.backend = kernels, backend
        self.documents, self.rows = batch.documents, batch.rows
        self.k0, self.v0 = k0, v0
        self.later: list = []

    def attend(self, q: torch.Tensor, *own: torch.Tensor, step: int = 0) -> torch.Tensor:
        """Attention [N,H,d] of the rows of a step: q [N,H,d]; own k, v [N,G,d], or none."""
        self.later += map(self.kernels.share, own)
        later, rows = list(self.later), self.rows[: len(q)]
        given = self.kernels, self.backend, self.documents, rows, later, q, self.k0, self.v0
        return Attend.apply(*given, *self.kernels.anchors(later))


class Dense:
    """Plain softmax over a [T,T] mask: any device, dtype and head size; the last resort."""

    @staticmethod
    def scores(q_NGRd, rows, k, documents):
        """[N,G,R,T], at least fp32; -inf where a row may not look."""
        lengths = torch.tensor(documents.lengths, device=k.device)
        document_of_token = torch.repeat_interleave(lengths)
        tokens = torch.arange(len(document_of_token), device=k.device)
        same_document = document_of_token[None] == document_of_token[rows][:, None]
        visible_NT = (tokens[None] <= rows[:, None]) & same_document
        scores = torch.einsum("ngrd,tgd->ngrt", q_NGRd, k)
        scores = scores.to(torch.promote_types(k.dtype, torch.float32)) * scale_of(k)
        return scores.masked_fill(~visible_NT[:, None, None], float("-inf"))

    @staticmethod
    def forward(q, rows, k, v, documents):
        scores = Dense.scores(q.unflatten(1, (k.shape[1], -1)), rows, k, documents)
        out = torch.einsum("ngrt,tgd->ngrd", scores.softmax(-1).to(v.dtype), v)
        return out.flatten(1, 2), scores.logsumexp(-1).flatten(1)

    @staticmethod
    def backward(grad_out, q, rows, k, v, out, lse, documents):
        grad_out, q, out, lse = (x.unflatten(1, (k.shape[1], -1)) for x in (grad_out, q, out, lse))
        p = (Dense.scores(q, rows, k, documents) - lse[..., None]).exp().to(q.dtype)
        grad_p = torch.einsum("ngrd,tgd->ngrt", grad_out, v)
        grad_scores = p * (grad_p - (grad_out * out).sum(-1, keepdim=True)) * scale_of(q)
        grad_q = torch.einsum("ngrt,tgd->ngrd", grad_scores, k).flatten(1, 2)
        grad_k = torch.einsum("ngrt,ngrd->tgd", grad_scores, q)
        return grad_q, grad_k, torch.einsum("ngrt,ngrd->tgd", p, grad_out)
