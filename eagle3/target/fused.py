"""One kernel for what lies between the products of a transformers model: norms, rotation, gates and
the statistics of its logits.

A region is a plain function, compiled by torch behind an operator `eagle3::name`, so that its price
(all arguments read once, all results written once) is known without a GPU. It rounds at its end
alone, where the models' own code rounds several times. n rows, D hidden size, V vocabulary.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
ACTIVATIONS["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")
ROTATION = "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)"


@functools.cache
def region(name: str, schema: str, function: Callable) -> Callable:
    """`function` as an operator, compiled when it is called first."""
    compiled = torch.compile(function, dynamic=True)  # batches differ in length
    name = "eagle3::" + re.sub(r"\W", "_", name)
    operator = torch.library.custom_op(name, compiled, mutates_args=(), schema=schema)
    operator.register_fake(function)
    return operator


@functools.cache
def rms_norm(eps: float, offset: float) -> Callable:
    """x [n,D], weight [D] -> x / its root mean square * (offset + weight)."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        return (wide * scale * (offset + weight.float())).to(x.dtype)

    return normed


@functools.cache
def gated(activation: str) -> Callable:
    """gate and up [n,I] -> activation(gate) * up."""

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return (ACTIVATIONS[activation](gate.float()) * up.float()).to(gate.dtype)

    return product


def statistics(logits: Tensor) -> tuple[Tensor, Tensor]:
    """argmax int64 [n] and logsumexp [n] (at least fp32) of logits [n,V]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Written out, as torch.compile then knows it and reads the logits once.
    top = wide.amax(-1, keepdim=True)
    total = (wide - top).exp_().sum(-1, keepdim=True)
    return wide.argmax(-1), (total.log() + top)[:, 0]


def distance(found: Tensor, right: Tensor) -> float:
    """Relative, in norm."""
    return float((found.double() - right.double()).norm() / right.double().norm())


class Fused:
    """Within it, the norms, rotation and gated MLPs of a model are regions.

    Modules are known by their names and parameters, and by what they make of numbers: those that
    make something else keep their own code.
    """

    def __init__(self, model: nn.Module):
        self.on = False
        self.statistics = region("statistics", "(Tensor logits) -> (Tensor, Tensor)", statistics)
        for module in list(model.modules()):
            if (forward := norm(module) or feed_forward(module)) is not None:
                module.forward = self.either(forward, module.forward, 1)
        for source in {sys.modules[type(module).__module__] for module in model.modules()}:
            own = getattr(source, "apply_rotary_pos_emb", None)
            own = getattr(own, "own", own)  # of a target that was here before
            if own and [*inspect.signature(own).parameters][:4] == ["q", "k", "cos", "sin"]:
                operator = region(f"rotate_{source.__name__}", ROTATION, own)
                source.apply_rotary_pos_emb = self.either(operator, own, 4)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *error) -> None:
        self.on = False

    def either(self, fused: Callable, own: Callable, arguments: int) -> Callable:
        """`fused` within this, for calls with so many arguments and no keywords; else `own`."""

        @functools.wraps(own)
        def forward(*args, **kwargs):
            if self.on and len(args) == arguments and not kwargs:
                return fused(*args)
            return own(*args, **kwargs)

        forward.own = own
        return forward


def norm(module: nn.Module) -> Callable | None:
    """A forward for an RMSNorm, whose weights some families count from 1."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = [name for name, _ in module.named_parameters()] == ["weight"]
    if not type(module).__name__.endswith("RMSNorm") or not alone or not isinstance(eps, float):
        return None
    weight = module.weight
    # In fp32, as a large weight and one more are the same in bf16.
    x = torch.linspace(-3, 3, 8 * len(weight), device=weight.device).view(8, -1)
    for offset in (0.0, 1.0):
        function = rms_norm(eps, offset)
        if distance(function(x, weight), module(x)) < 1e-4:
            name = f"rms_norm_{eps}_{offset}"
            operator = region(name, "(Tensor x, Tensor weight) -> Tensor", function)
            return lambda x: operator(x.reshape(-1, len(weight)), weight).view(x.shape)
    return None


def feed_forward(module: nn.Module) -> Callable | None:
    """A forward for a gated MLP, whose gate and up some families make by one product."""
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if isinstance(child, nn.Linear)}
    if linear not in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}):
        return None
    if module.down_proj.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None  # quantised: what its products take is their own affair
    activation = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    down, together = module.down_proj, children.get("gate_up_proj")
    points = torch.linspace(-9, 9, 999, device=down.weight.device)
    x = torch.linspace(-3, 3, 8 * down.out_features, device=points.device)
    x = x.view(8, -1).to(down.weight.dtype)

    def forward(x: Tensor, product: Callable) -> Tensor:
        halves = together(x).chunk(2, -1) if together else (module.gate_proj(x), module.up_proj(x))
        flat = product(*(half.reshape(-1, half.shape[-1]) for half in halves))
        return down(flat.view(*x.shape[:-1], -1))

    for name, function in ACTIVATIONS.items():
        if activation is not None and distance(function(points), activation(points)) < 1e-6:
            rounding = 4 * torch.finfo(x.dtype).eps
            if distance(forward(x, gated(name)), module(x)) < max(1e-5, rounding):
                schema = "(Tensor gate, Tensor up) -> Tensor"
                product = region(f"gated_{name}", schema, gated(name))
                return functools.partial(forward, product=product)
    return None
