"""Learning-rate schedules and the guarded optimiser step."""

import math
from collections.abc import Iterable
from typing import Annotated

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eagle3.config import Within

Ratio = Annotated[float, Within(0, 1)]


def adamw(
    parameters: Iterable[torch.nn.Parameter],
    lr: Annotated[float, Within(1e-12, 1e3)],
    betas: Annotated[list[float], Within(0, 1)],
    eps: float,
    weight_decay: Annotated[float, Within(0, 1e3)],
    fused: bool,
) -> Optimizer:
    """torch's AdamW, with bounds on its parameters."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
    )


def warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(
    optimizer: Optimizer, total_steps: int, warmup_ratio: Ratio, min_ratio: Ratio
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `min_ratio` of the rate at `total_steps`."""
    warmup_steps = round(warmup_ratio * total_steps)

    def scale(step: int) -> float:
        share = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
        return warmup(step, warmup_steps) * (
            min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
        )

    return LambdaLR(optimizer, scale)


def constant(optimizer: Optimizer, total_steps: int, warmup_ratio: Ratio) -> LambdaLR:
    """Linear warm-up, then constant."""
    warmup_steps = round(warmup_ratio * total_steps)
    return LambdaLR(optimizer, lambda step: warmup(step, warmup_steps))


def step_if_finite(optimizer: Optimizer, parameters: list[torch.Tensor], max_grad_norm: float):
    """Clip by the global norm and step; a non-finite norm leaves weights and states as they are.

    Returns the norm before clipping and whether the step was skipped, both tensors: with a fused
    optimiser the decision is made on the device and the host never waits.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    skipped = ~norm.isfinite()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped
