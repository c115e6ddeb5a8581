"""The plain forms of what `fused.py` does in fewer passes: what CPUs run, and the reference.

n rows, D hidden size, H query and G key/value heads of size d (R = H/G), T tokens, m pairs, u
teacher rows, Vd draft vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Weights(NamedTuple):
    """Those of a pass as `linear` of the same kernels takes them.

    `embedded` and `hidden` [(H+2G)d,D] are q, k and v for either half of the layer's input.
    """

    fc: Any
    embedded: Any
    hidden: Any
    o: Any
    gate_up: Any
    down: Any


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in the dtype of x; the gradient of the weight has the weight's own dtype."""
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads `x` [n, heads, head_dim] in at least fp32; returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def scatter(values: Tensor, rows: Tensor, length: int) -> Tensor:
    """Put `values` [N, ...] at `rows` of zeros [length, ...], no two at one."""
    make = values.new_empty if len(values) == length else values.new_zeros
    return make(length, *values.shape[1:]).index_copy_(0, rows, values)


class TakeRows(torch.autograd.Function):
    """x[rows], no row twice: its gradient then needs no sorting and no adding."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.length = len(x)
        return x[rows]

    @staticmethod
    def backward(ctx, grad):
        return scatter(grad, ctx.saved_tensors[0], ctx.length), None


class GatedDown(torch.autograd.Function):
    """(silu(gate) * up) @ down^T that keeps only gate and up for backward.

    Autograd would also keep silu(gate) and the product: [n, intermediate_size] each, at every step.
    """

    @staticmethod
    def forward(ctx, gate, up, down):
        ctx.save_for_backward(gate, up, down)
        return F.linear(F.silu(gate).mul_(up), down)

    @staticmethod
    def backward(ctx, grad):
        gate, up, down = ctx.saved_tensors
        activated = F.silu(gate)  # computed again: cheap beside the three products
        grad_down = grad.T @ (activated * up)
        grad_product = grad @ down
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return grad_gate, grad_product.mul_(activated), grad_down


def own_scores(q_NGRd: Tensor, key: Tensor) -> Tensor:
    """Scaled products of each row's queries with its own key [>= N,G,d] -> [N,H], >= fp32."""
    wide = torch.promote_types(key.dtype, torch.float32)
    products = (q_NGRd * key[: len(q_NGRd), :, None]).sum(-1, dtype=wide)
    return products.flatten(1) * key.shape[-1] ** -0.5


class Eager:
    """Any device and dtype."""

    scales_first = False  # whether the loss is scaled before its gradients, not these behind it

    @classmethod
    def pick(cls, x: Tensor) -> type["Eager"]:
        """The kernels for tensors like `x`."""
        return cls

    @staticmethod
    def weights(fc, qkv: list[Tensor], o, gate, up, down, dtype: torch.dtype) -> Weights:
        """The parameters of a layer for a pass in `dtype`; `qkv` [*,2D] each."""
        size = qkv[0].shape[1] // 2
        halves = (torch.cat([w[:, half] for w in qkv]) for half in (slice(size), slice(size, None)))
        return Weights(fc, *halves, o, (gate, up), down)

    @staticmethod
    def layer_weights(qkv: list[Tensor], o, gate, up, down, dtype: torch.dtype) -> Weights:
        """Those of a layer that reads one thing alone: `hidden` is q, k and v [(H+2G)d,D]."""
        return Weights(None, None, torch.cat(qkv), o, (gate, up), down)

    @staticmethod
    def share(x: Tensor) -> Any:
        """`x` as `heads` and `merge` take it, which may add up the gradient of many reads."""
        return x

    @staticmethod
    def anchors(shared: list) -> list[Tensor]:
        """What an autograd function takes, besides what is shared, to have its gradient."""
        return shared

    @staticmethod
    def norm(norm: torch.nn.RMSNorm, x: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """x [n,D] itself, its first `count` rows, and these normed."""
        first = x[:count]
        return x, first, norm(first)

    @staticmethod
    def linear(x: Tensor, weight: Any, residual: Tensor | None = None) -> Tensor:
        """x @ weight^T, plus `residual`."""
        product = linear(x, weight)
        return product if residual is None else residual + product

    @staticmethod
    def feed_forward(x: Tensor, weights: Weights, residual: Tensor) -> Tensor:
        """residual + (silu(x @ gate^T) * (x @ up^T)) @ down^T."""
        gate, up = (linear(x, weight) for weight in weights.gate_up)
        return residual + GatedDown.apply(gate, up, weights.down.to(x.dtype))

    rotate = staticmethod(rotate)

    @staticmethod
    def heads(
        projected: Tensor, tokens: Any, places: Tensor, cos: Tensor, sin: Tensor,
        counts: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """projected + tokens[places] as heads q [n,H,d], k and v [n,G,d], q and k rotated.

        `counts` are those of q, k and v in `projected` [n,*]; where q has none, `tokens` [T+1,*]
        has it in front. `places` may name T often, any other token once; cos, sin fp32 [n,1,d/2].
        """
        read = tokens[places][:, tokens.shape[1] - projected.shape[1] if counts[0] == 0 else 0 :]
        x = projected + read[:, : projected.shape[1]]
        q, k, v = x.unflatten(-1, (-1, 2 * cos.shape[-1])).split(counts, dim=-2)
        # A view of v would keep q, k and v for backward.
        return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()

    @staticmethod
    def merge(q: Tensor, out: Tensor, lse: Tensor, later: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(out, lse) of attention [n,H,d], [n,H], with the rows' later keys and values added."""
        groups = (later[0].shape[1], -1)
        q_NGRd = q.unflatten(1, groups)
        scores = [own_scores(q_NGRd, key) for key in later[::2]]
        total = torch.logsumexp(torch.stack([lse, *scores]), dim=0)
        out = out * (lse - total).exp()[..., None].to(out.dtype)
        for score, value in zip(scores, later[1::2], strict=True):
            p_NGR = (score - total).exp().to(out.dtype).unflatten(1, groups)
            out += (p_NGR[..., None] * value[: len(q), :, None]).flatten(1, 2)
        return out, total

    @staticmethod
    def merge_backward(grad_out, q, out, lse, later, grad_q: Tensor) -> list[Tensor]:
        """Gradients of the anchors of later keys and values; that of q is added to `grad_q`."""
        groups = (later[0].shape[1], -1)
        q_NGRd, grad_out_NGRd = q.unflatten(1, groups), grad_out.unflatten(1, groups)
        delta_NGR = (grad_out * out).sum(-1, dtype=lse.dtype).unflatten(1, groups)
        grads, scale = [], q.shape[-1] ** -0.5
        for key, value in zip(later[::2], later[1::2], strict=True):
            p_NGR = (own_scores(q_NGRd, key) - lse).exp().unflatten(1, groups)
            grad_p_NGR = (grad_out_NGRd * value[: len(q), :, None]).sum(-1, dtype=lse.dtype)
            grad_score = (p_NGR * (grad_p_NGR - delta_NGR) * scale).to(q.dtype)
            grad_q += (grad_score[..., None] * key[: len(q), :, None]).flatten(1, 2)
            # Rows behind the first N have no query at this step, and zero gradient.
            grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
            grad_key[: len(q)] = (grad_score[..., None] * q_NGRd).sum(2)
            grad_value[: len(q)] = (p_NGR.to(q.dtype)[..., None] * grad_out_NGRd).sum(2)
            grads += [grad_key, grad_value]
        return grads

    @staticmethod
    def loss_chunk(pointwise, logits, teacher, rows, weights) -> tuple[Tensor, Tensor, Tensor]:
        """Of logits [m,Vd]: the pointwise loss [m], argmax [m], and the gradient of the loss times
        `weights` [m], in the dtype of the logits.

        `teacher` [u,Vd] are logits too, of which pair i has row `rows[i]`.
        """
        probabilities = teacher.to(weights.dtype).softmax(-1)
        logits, dtype = logits.to(weights.dtype), logits.dtype
        value, grad = pointwise(logits, probabilities[rows])
        return value, logits.argmax(-1), grad.mul_(weights[:, None]).to(dtype)

    @staticmethod
    def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """total + a @ b, in place where there is a total; in `dtype`."""
        return (a @ b).to(dtype) if total is None else total.add_(a @ b)
