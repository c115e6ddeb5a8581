"""Learning-rate schedules, and the optimiser step that a non-finite gradient can't spoil."""

import math
from typing import Annotated, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from eagle3.config import Within

Share = Annotated[float, Within(0, 1)]


def adamw(
    parameters, lr: Annotated[float, Within(1e-12, 1e3)], betas: list[Share],
    eps: float, weight_decay: Annotated[float, Within(0, 1e3)], fused: bool,
) -> Optimizer:  # fmt: skip
    """torch's AdamW."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=fused
    )


def cosine(
    optimizer: Optimizer, total_steps: int, warmup_ratio: Share, min_ratio: Share
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `min_ratio` of the rate at `total_steps`."""
    warmup_steps = round(warmup_ratio * total_steps)

    def scale(step: int) -> float:
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        share = min(1.0, max(0.0, done))
        decay = min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
        return min(1.0, (step + 1) / (warmup_steps + 1)) * decay

    return LambdaLR(optimizer, scale)


def constant(optimizer: Optimizer, total_steps: int, warmup_ratio: Share) -> LambdaLR:
    """Linear warm-up, then constant."""
    return cosine(optimizer, total_steps, warmup_ratio, min_ratio=1.0)


def step_if_finite(
    optimizer: Optimizer, parameters: list[torch.Tensor], max_grad_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip by the global norm and step; a non-finite norm leaves weights and states as they are.

    Returns the norm before clipping and whether the step was skipped, both tensors: with a fused
    optimiser the decision is made on the device and the host never waits.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    skipped = ~norm.isfinite()
    fused, scale = optimizer.defaults.get("fused"), None
    if fused and norm.is_cuda:
        # The kernel divides by it, where clipping would be a pass of its own.
        scale = ((norm + 1e-6) / max_grad_norm).clamp(min=1)
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    if fused:
        # The kernel reads `found_inf`, as a GradScaler sets it, and then changes nothing.
        optimizer.grad_scale, optimizer.found_inf = scale, skipped.float()
        optimizer.step()
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


class GuardedOptimizer:
    """An optimiser with its schedule, and counts of the steps it skipped (int64, on the device)."""

    def __init__(
        self, optimizer: Optimizer, scheduler: LRScheduler, max_grad_norm: float, reduce_dtype: str
    ):
        """Gradients are exchanged between ranks in `reduce_dtype`, fp32 or bf16."""
        self.optimizer, self.scheduler, self.max_grad_norm = optimizer, scheduler, max_grad_norm
        self.reduce_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[reduce_dtype]
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def step(self) -> torch.Tensor:
        """One step on the gradients that have accumulated; returns their norm, on the device."""
        norm, skipped = step_if_finite(self.optimizer, self.parameters, self.max_grad_norm)
        self.scheduler.step()
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        return norm

    def state(self, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors as `optimizer/<parameter>/<moment>`, and what JSON can hold; `names` in order."""
        state, tensors = self.optimizer.state_dict(), {}
        for place, moments in state["state"].items():
            for key, tensor in moments.items():
                tensors[f"optimizer/{names[place]}/{key}"] = tensor
        plain = {
            "skipped": int(self.skipped),
            "skipped_in_a_row": int(self.skipped_in_a_row),
            "scheduler": self.scheduler.state_dict(),
            "param_groups": state["param_groups"],
        }
        return tensors, plain

    def restore(
        self, names: list[str], tensors: dict[str, torch.Tensor], plain: dict[str, Any]
    ) -> None:
        """Take up what `state` gave."""
        moments = {
            place: with_prefix(tensors, f"optimizer/{name}/") for place, name in enumerate(names)
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": plain["param_groups"]})
        self.scheduler.load_state_dict(plain["scheduler"])
        self.skipped.fill_(plain["skipped"])
        self.skipped_in_a_row.fill_(plain["skipped_in_a_row"])


def with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
