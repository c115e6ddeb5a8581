"""What `eager.py` does, in one or two kernels each, for CUDA; written as operators of torch.

An operator `eagle3::name` reads its arguments once and writes its results once, so its price is
known without a GPU. Weights are copied once a pass into the dtype computed in, and their gradients
add up over the K steps in fp32 within the products.

Shapes as in `eager.py`; C columns of `projected`.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle3.errors import ConfigError
from eagle3.kernels.eager import Eager, Weights

NORM_ROWS = 16  # of one program of `norm_backward`


@functools.cache
def has_triton() -> bool:
    """Triton, and CUDA's torch: that of ROCm refuses products that add up in fp32."""
    return importlib.util.find_spec("triton") is not None and torch.version.hip is None


@functools.cache
def jit():
    """The Triton kernels, imported where they run: a CPU build of torch comes without Triton."""
    from eagle3.kernels import jit

    return jit


class Total:
    """A gradient that many backward functions add to, made when the first of them does."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.shape, self.device, self.dtype = like.shape, like.device, dtype
        self.tensor: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.tensor is None:
            self.tensor = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.tensor


class Anchor(torch.autograd.Function):
    """Ties tensors that many functions read to the `total` of their gradients.

    These take the anchor as an input, whose gradient they leave out: autograd comes here behind
    the last of them. By itself it would make a gradient of full size at each, and add them up.
    """

    @staticmethod
    def forward(ctx, total, *tensors):
        ctx.total, ctx.lengths = total, [len(x) for x in tensors]
        ctx.set_materialize_grads(False)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        total, ctx.total.tensor = ctx.total(), None
        return None, *total.split(ctx.lengths)


@dataclass
class Shared:
    """Tensors one below the other that many functions read; of their values those at `place`."""

    anchor: Tensor
    values: Tensor
    total: Total
    place: tuple[slice, slice] = (slice(None), slice(None))

    def __getitem__(self, rows: slice) -> "Shared":
        return replace(self, place=(rows, self.place[1]))

    def read(self) -> Tensor:
        return self.values[self.place]

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b to the gradient."""
        total, whole = self.total, self.place == (slice(None), slice(None))
        given = None if whole and total.tensor is None else total()[self.place]
        result = Fused.add_product(given, a, b, total.dtype)
        if given is None:
            total.tensor = result


def share_weights(weights: list[Tensor], dtype: torch.dtype) -> Shared:
    lengths, first = [len(weight) for weight in weights], weights[0]
    values = torch.empty(sum(lengths), *first.shape[1:], dtype=dtype, device=first.device)
    for part, weight in zip(values.split(lengths), weights, strict=True):
        part.copy_(weight.detach())
    total = Total(values, first.dtype)
    return Shared(Anchor.apply(total, *weights), values, total)


class Norm(torch.autograd.Function):
    """x, x[:count] and rms_norm(x[:count]): their gradients meet in one pass."""

    @staticmethod
    def forward(ctx, x, weight, eps, count):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        first = x[:count]
        return x, first, torch.nn.functional.rms_norm(first, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad_x, grad_first, grad_normed):
        grads = grad_x, grad_first.contiguous(), grad_normed.contiguous()
        grad, parts = norm_backward(*grads, *ctx.saved_tensors, ctx.eps)
        return grad, parts.sum(0).to(ctx.saved_tensors[1].dtype), None, None


class Linear(torch.autograd.Function):
    """x @ weight^T + residual."""

    @staticmethod
    def forward(ctx, x, anchor, weight, residual):
        ctx.save_for_backward(x)
        ctx.weight = weight
        values = weight.read()
        if residual is None:
            return torch.nn.functional.linear(x, values)
        return torch.addmm(residual, x, values.T)

    @staticmethod
    def backward(ctx, grad):
        ctx.weight.add_product(grad.T, ctx.saved_tensors[0])
        grad_x = grad @ ctx.weight.read() if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad if ctx.needs_input_grad[3] else None


class GatedDown(torch.autograd.Function):
    """residual + (silu(gate) * up) @ down^T of gate_up [n,2I]."""

    @staticmethod
    def forward(ctx, gate_up, anchor, down, residual):
        ctx.save_for_backward(gate_up)
        ctx.down = down
        return torch.addmm(residual, swiglu(gate_up), down.read().T)

    @staticmethod
    def backward(ctx, grad):
        (gate_up,) = ctx.saved_tensors
        grad_gate_up, activated = swiglu_backward(grad @ ctx.down.read(), gate_up)
        ctx.down.add_product(grad.T, activated)
        return grad_gate_up, None, None, grad


class Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, anchor, tokens, places, cos, sin, counts):
        ctx.save_for_backward(places, cos, sin)
        ctx.tokens, ctx.width = tokens, projected.shape[1]
        return heads(projected, tokens.values, places, cos, sin, list(counts))

    @staticmethod
    def backward(ctx, *grads):
        (places, cos, sin), tokens = ctx.saved_tensors, ctx.tokens
        total = tokens.total()
        grads = [grad.contiguous() for grad in grads]
        grad = heads_backward(*grads, places, cos, sin, total)
        # Those who read what follows the end of a document read the last row together.
        last = len(total) - 1
        first = total.shape[1] - ctx.width if grads[0].shape[1] == 0 else 0
        beyond = (places == last).to(grad.dtype)[None]
        tokens.total()[last:, first : first + ctx.width].addmm_(beyond, grad)
        return grad, None, None, None, None, None, None


class Rotate(torch.autograd.Function):
    """Heads x [n,H,d]; backward turns the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By the kernel that adds tokens: zeros."""
    n, count, size = x.shape
    nothing, places = x.new_zeros(1, count * size), torch.zeros_like(cos[:, 0, 0], dtype=torch.long)
    return heads(x.reshape(n, -1), nothing, places, cos, sin, [count, 0, 0])[0]


class Fused:
    """Half precision and fp32, on CUDA (or in Triton's interpreter)."""

    scales_first = True

    def __init__(self):
        """Raises ConfigError."""
        if not has_triton():
            needed = "Triton, which comes with torch for CUDA; use draft/kernels=auto"
            raise ConfigError(f"draft/kernels=fused needs {needed}")

    @classmethod
    def pick(cls, x: Tensor) -> type["Fused"]:
        if not (x.is_cuda or os.environ.get("TRITON_INTERPRET")):
            raise ConfigError("draft/kernels=fused needs a CUDA device; use draft/kernels=auto")
        return cls

    @staticmethod
    def weights(fc, qkv, o, gate, up, down, dtype) -> Weights:
        joined = share_weights(qkv, dtype)
        size = qkv[0].shape[1] // 2
        embedded = replace(joined, place=(slice(None), slice(size)))
        hidden = replace(joined, place=(slice(None), slice(size, None)))
        rest = (share_weights(weights, dtype) for weights in ([o], [gate, up], [down]))
        return Weights(share_weights([fc], dtype), embedded, hidden, *rest)

    @staticmethod
    def layer_weights(qkv, o, gate, up, down, dtype) -> Weights:
        parts = (share_weights(weights, dtype) for weights in (qkv, [o], [gate, up], [down]))
        return Weights(None, None, *parts)

    @staticmethod
    def share(x):
        total = Total(x, x.dtype)
        return Shared(Anchor.apply(total, x), x.detach(), total)

    @staticmethod
    def anchors(shared):
        return [each.anchor for each in shared]

    @staticmethod
    def norm(norm, x, count):
        return Norm.apply(x, norm.weight.to(x.dtype), norm.eps, count)

    @staticmethod
    def linear(x, weight, residual=None):
        return Linear.apply(x, weight.anchor, weight, residual)

    @staticmethod
    def feed_forward(x, weights, residual):
        gate_up = Fused.linear(x, weights.gate_up)
        return GatedDown.apply(gate_up, weights.down.anchor, weights.down, residual)

    @staticmethod
    def heads(projected, tokens, places, cos, sin, counts):
        return Heads.apply(projected, tokens.anchor, tokens, places, cos, sin, counts)

    @staticmethod
    def rotate(x, cos, sin):
        return Rotate.apply(x, cos, sin)

    @staticmethod
    def merge(q, out, lse, later):
        values = [each.values for each in later]
        return merge(q.contiguous(), out.contiguous(), lse.contiguous(), values)

    @staticmethod
    def merge_backward(grad_out, q, out, lse, later, grad_q):
        values, totals = [each.values for each in later], [each.total() for each in later]
        inputs = grad_out.contiguous(), q.contiguous(), out, lse
        merge_backward(*inputs, values, grad_q, totals)
        return [None] * len(later)

    @staticmethod
    def loss_chunk(pointwise, logits, teacher, rows, weights):
        given, terms = (logits, teacher, rows, weights), terms_of(pointwise)
        return loss_terms(*given, *terms) if terms else loss_chunk(*given, number_of(pointwise))

    @staticmethod
    def add_product(total, a, b, dtype):
        if a.dtype == dtype or not a.is_cuda:  # as in Triton's interpreter
            a, b = a.to(dtype), b.to(dtype)
            return a @ b if total is None else total.addmm_(a, b)
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)


class Auto:
    """Fused on CUDA where there is Triton, else eager."""

    @staticmethod
    def pick(x: Tensor) -> type[Eager] | type[Fused]:
        if not x.is_cuda or x.dtype == torch.float64:
            return Eager
        return Fused if has_triton() else without_triton()


@functools.cache
def without_triton() -> type[Eager]:
    print("train: there is no Triton for CUDA, so the plain kernels run, which are slower")
    return Eager


def operator(schema: str, fake: Callable) -> Callable:
    """`eagle3::name` by its schema, which runs the function of that name in `jit.py`; `fake` gives
    what it returns on tensors without data.
    """
    name, _, signature = schema.partition("(")

    def launch(*tensors):
        return getattr(jit(), name)(*tensors)

    changed = re.findall(r"!\)\S* (\w+)", schema)
    given = {"mutates_args": changed, "schema": f"({signature}"}
    made = torch.library.custom_op(f"eagle3::{name}", launch, **given)
    made.register_fake(fake)
    return made


swiglu = operator(
    "swiglu(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
)
# Gradient of gate_up, and silu(gate) * up, which the gradient of the weight needs.
swiglu_backward = operator(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> (Tensor, Tensor)",
    lambda grad, gate_up: (torch.empty_like(gate_up), torch.empty_like(grad)),
)


def heads_of(projected, tokens, places, cos, sin, counts):
    size = projected.shape[1] // sum(counts)
    return tuple(projected.new_empty(len(projected), count, size) for count in counts)


heads = operator(
    "heads(Tensor projected, Tensor tokens, Tensor places, Tensor cos, Tensor sin, SymInt[] counts)"
    " -> (Tensor, Tensor, Tensor)",
    heads_of,
)
# Gradient of `projected`, added also to `total` [T+1,*] at its places but the last.
heads_backward = operator(
    "heads_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor places, Tensor cos,"
    " Tensor sin, Tensor(a!) total) -> Tensor",
    lambda *given: torch.cat([grad.flatten(1) for grad in given[:3]], 1),
)
merge = operator(
    "merge(Tensor q, Tensor out, Tensor lse, Tensor[] later) -> (Tensor, Tensor)",
    lambda q, out, lse, later: (torch.empty_like(out), torch.empty_like(lse)),
)
# Adds to the gradient of q and to those of the later keys and values, `totals`.
merge_backward = operator(
    "merge_backward(Tensor grad_out, Tensor q, Tensor out, Tensor lse, Tensor[] later,"
    " Tensor(a!) grad_q, Tensor(b!)[] totals) -> ()",
    lambda *given: None,
)
# Gradient of x, and of the weight in parts [*,D] fp32 to be added up; see `Norm`.
norm_backward = operator(
    "norm_backward(Tensor? grad_x, Tensor grad_first, Tensor grad_normed, Tensor x, Tensor weight,"
    " float eps) -> (Tensor, Tensor)",
    lambda grad_x, grad_first, grad_normed, x, weight, eps: (
        torch.empty_like(x),
        x.new_empty(-(-len(x) // NORM_ROWS), x.shape[1], dtype=torch.float32),
    ),
)
loss_terms = operator(
    "loss_terms(Tensor logits, Tensor teacher, Tensor rows, Tensor weights, float kl, float tv,"
    " float nla, float? eta) -> (Tensor, Tensor, Tensor)",
    lambda *given: tuple(torch.empty_like(given[place]) for place in (3, 2, 0)),
)
# Shares of cross-entropy, 1 - acceptance and -log(acceptance), and eta of LK, as `loss_terms` takes
# them: by a loss's function in eagle3/loss.py and its keywords. torch.compile makes the others.
TERMS = {
    "kl": lambda: (1.0, 0.0, 0.0, None),
    "lk": lambda eta: (0.0, 0.0, 0.0, eta),
    "tv": lambda: (0.0, 1.0, 0.0, None),
    "nla": lambda: (0.0, 0.0, 1.0, None),
    "mix": lambda kl, tv, nla, reverse_kl, jsd: None if reverse_kl or jsd else (kl, tv, nla, None),
}


def terms_of(pointwise) -> tuple | None:
    function = getattr(pointwise, "func", pointwise)
    made = TERMS.get(function.__name__) if function.__module__ == "eagle3.loss" else None
    return made and made(**getattr(pointwise, "keywords", {}))


# By itself Inductor writes out what several sums read: [m,Vd] in fp32, once or more.
INDUCTOR = {
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
    "realize_opcount_threshold": 1 << 20,
}
POINTWISE: list = []  # by number, because an operator takes no function


def number_of(pointwise) -> int:
    if pointwise not in POINTWISE:
        POINTWISE.append(pointwise)
    return POINTWISE.index(pointwise)


@functools.cache
def compiled_loss_chunk(number: int):
    """Two kernels whatever the loss: the statistics of the teacher's rows, then the rest."""
    region = functools.partial(Eager.loss_chunk, POINTWISE[number])
    return torch.compile(region, options=INDUCTOR)


@torch.library.custom_op("eagle3::loss_chunk", mutates_args=())
def loss_chunk(
    logits: Tensor, teacher: Tensor, rows: Tensor, weights: Tensor, pointwise: int
) -> tuple[Tensor, Tensor, Tensor]:
    for x in (logits, teacher, rows, weights):
        torch._dynamo.maybe_mark_dynamic(x, 0)  # chunks vary in size
    return compiled_loss_chunk(pointwise)(logits, teacher, rows, weights)


@loss_chunk.register_fake
def _(logits, teacher, rows, weights, pointwise):
    return torch.empty_like(weights), torch.empty_like(rows), torch.empty_like(logits)
