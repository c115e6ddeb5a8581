"""Numbers of the training loop, summed on the device and read only when they are logged. K steps of
the unroll.
"""

import re
import resource
import sys
import time
from collections.abc import Callable

import torch

# Dense bf16 FLOP/s of one GPU, by the words of its name; of several entries that fit the longest
# counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "B200": 2250e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L40S": 362e12,
}


COUNTED = ("counts", "normaliser", "tokens", "supervised_tokens", "flops")


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU of that name; None for one that is not in the table or is a slice
    of one (MIG).
    """
    words = set(re.split(r"[\s-]+", name))
    fitting = [known for known in PEAK_FLOPS if words.issuperset(known.split())]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting and "MIG" not in words else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held at once: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def local(sums: torch.Tensor) -> torch.Tensor:
    """The sums of this process alone."""
    return sums


class Meter:
    """Sums of micro-steps since the last `read`; `add` never waits for the device."""

    def __init__(
        self,
        ttt_steps: int,
        gamma: float,
        device: torch.device | str = "cpu",
    ):
        """`gamma` weights the loss of step k by gamma^k."""
        self.gamma, self.device = gamma, torch.device(device)
        self.device_sums = torch.zeros(2, ttt_steps, dtype=torch.float64, device=self.device)
        self.counts = [0] * ttt_steps
        self.restart()

    def restart(self) -> None:
        """Forgets the sums and sets the clock anew."""
        self.device_sums.zero_()
        self.counts = [0] * len(self.counts)
        self.normaliser = self.tokens = self.supervised_tokens = self.flops = 0
        self.data_wait_seconds = self.left_out_seconds = 0.0
        self.began = time.perf_counter()

    def state(self) -> dict:
        """What a resumed run needs for its first window to hold what an uninterrupted one's would;
        plain numbers.
        """
        return {"device_sums": self.device_sums.tolist()} | {
            name: getattr(self, name) for name in COUNTED
        }

    def restore(self, states: list[dict], rank: int, world_size: int) -> None:
        """Takes up its own of the `states` of all ranks; where their number has changed, the first
        takes them all.
        """
        self.restart()
        mine = [states[rank]] if len(states) == world_size else states if rank == 0 else []
        for state in mine:
            self.device_sums += torch.tensor(
                state["device_sums"], dtype=torch.float64, device=self.device
            )
            self.counts = [
                total + count for total, count in zip(self.counts, state["counts"], strict=True)
            ]
            for name in COUNTED[1:]:
                setattr(self, name, getattr(self, name) + state[name])

    def leave_out(self, seconds: float) -> None:
        """Keeps time that was not training (an evaluation, a checkpoint) out of the rates."""
        self.left_out_seconds += seconds

    def add(
        self,
        loss_sums: torch.Tensor,
        correct: torch.Tensor,
        counts: list[int],
        normaliser: float,
        tokens: int,
        supervised_tokens: int,
        data_wait_seconds: float,
        flops: float = 0.0,
    ) -> None:
        """One micro-step of this process: sums [K] over the pairs of each step on the device, the
        rest on the host.

        `loss_sums` is unweighted, `counts` are the pairs that `correct` is out of, `normaliser` is
        this process' share.
        """
        self.device_sums[0] += loss_sums.detach()
        self.device_sums[1] += correct.detach()
        self.counts = [total + count for total, count in zip(self.counts, counts, strict=True)]
        self.normaliser += normaliser
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens
        self.data_wait_seconds += data_wait_seconds
        self.flops += flops

    def read(self, all_reduce: Callable[[torch.Tensor], torch.Tensor] = local) -> dict[str, float]:
        """The metrics since the last read, which begins the next window; this waits for the device.

        `all_reduce` returns the sum of a float64 tensor over the processes, so that every number
        but `peak_memory_bytes` is of all of them; `supervised_tokens` counts the window. What no
        pair supports is NaN.
        """
        self.device_sums.cpu()
        seconds = max(time.perf_counter() - self.began - self.left_out_seconds, 1e-9)
        host = [
            self.normaliser,
            self.tokens,
            self.supervised_tokens,
            self.data_wait_seconds,
            seconds,
            self.flops,
            1.0,
        ]
        host = torch.tensor([*self.counts, *host], dtype=torch.float64).to(self.device)
        sums = all_reduce(torch.cat([self.device_sums.flatten(), host])).tolist()
        ttt_steps = len(self.counts)
        step_loss, correct, counts = (sums[i * ttt_steps : (i + 1) * ttt_steps] for i in range(3))
        normaliser, tokens, supervised_tokens, waited, seconds, flops, processes = sums[
            3 * ttt_steps :
        ]

        step_loss = [ratio(value, normaliser) for value in step_loss]
        metrics = {"loss": sum(self.gamma**k * value for k, value in enumerate(step_loss))}
        metrics |= {f"loss/step_{k}": value for k, value in enumerate(step_loss)}
        metrics |= {
            f"accuracy/step_{k}": ratio(*pair) for k, pair in enumerate(zip(correct, counts))
        }
        metrics["tokens_per_second"] = tokens * processes / seconds
        metrics["supervised_tokens"] = int(supervised_tokens)
        metrics["data_wait_fraction"] = waited / seconds
        metrics["peak_memory_bytes"] = peak_memory_bytes(self.device)
        peak = (
            peak_flops(torch.cuda.get_device_name(self.device))
            if self.device.type == "cuda"
            else None
        )
        if peak and flops:
            metrics["mfu"] = flops / (seconds * peak)
        self.restart()
        return metrics


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
