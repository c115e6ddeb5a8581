"""Numbers of the training loop, summed on the device and read only when they are logged."""

import operator
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eagle3.batch import Batch

# Dense bf16 FLOP/s of one GPU, by the words of its name; of several that fit the longest counts.
PEAK_FLOPS = {
    "A100": 312e12, "B200": 2250e12, "H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H200": 989e12, "H200 NVL": 835e12, "L40S": 362e12,
}  # fmt: skip


def peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU of that name; None for one not in the table or a slice (MIG)."""
    words = set(re.split(r"[\s-]+", name))
    fitting = [known for known in PEAK_FLOPS if words.issuperset(known.split())]
    return PEAK_FLOPS[max(fitting, key=len)] if fitting and "MIG" not in words else None


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held at once: allocated on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Meter:
    """Sums of micro-steps since the last `read`; `weights` gives those of the steps' losses [K]."""

    def __init__(self, ttt_steps: int, weights: Callable, device: torch.device | str = "cpu"):
        self.ttt_steps, self.weights, self.device = ttt_steps, weights, torch.device(device)
        # float64, because a window adds up thousands of float32 sums.
        self.device_sums = torch.zeros(2, ttt_steps, dtype=torch.float64, device=self.device)
        self.restart()

    def restart(self) -> None:
        self.device_sums.zero_()
        # K counts of pairs, then normaliser, tokens, flops
        self.host_sums = torch.zeros(self.ttt_steps + 3, dtype=torch.float64)
        self.data_wait_seconds = self.target_seconds = 0.0
        self.target_events: list[tuple] = []  # of a GPU, which does not tell the host when
        # Whoever does other things than training adds them up here; checkpoints are among them.
        self.excluded_seconds = self.checkpoint_seconds = 0.0
        self.began = time.perf_counter()

    def state(self) -> dict[str, list]:
        """What a resumed run's first window must begin with: plain numbers, no seconds."""
        return {"device": self.device_sums.tolist(), "host": self.host_sums.tolist()}

    def restore(self, states: list[dict[str, list]], rank: int, world_size: int) -> None:
        """Take up this rank's one of the `states` of all ranks."""
        self.restart()
        same = len(states) == world_size  # else rank 0 takes all, as only their sum is read
        for number, state in enumerate(states):
            if rank == (number if same else 0):
                self.device_sums += self.device_sums.new_tensor(state["device"])
                self.host_sums += self.host_sums.new_tensor(state["host"])

    def add(self, losses: Tensor, correct: Tensor, batch: Batch, waited: float, flops: float):
        """Add a micro-step whose batch took `waited` seconds to come: sums [K] over the pairs."""
        self.device_sums[0] += losses.detach()
        self.device_sums[1] += correct.detach()
        numbers = [*batch.pair_counts, batch.normaliser, batch.tokens, flops]
        # Nothing here waits for the device, which would stall every update.
        self.host_sums += torch.tensor(numbers, dtype=torch.float64)
        self.data_wait_seconds += waited

    @contextmanager
    def target(self) -> Iterator[None]:
        """What the block takes is the target's part of the time."""
        if self.device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            yield
            ended.record()
            self.target_events.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self.target_seconds += time.perf_counter() - start

    def read(self, all_reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict:
        """The metrics since the last read, of all processes, whose tensors `all_reduce` sums."""
        # The copy waits for the device, so that the clock is read after its work.
        self.device_sums.cpu()
        seconds = max(time.perf_counter() - self.began - self.excluded_seconds, 1e-9)
        events = sum(began.elapsed_time(ended) for began, ended in self.target_events) / 1000
        numbers = [self.data_wait_seconds, self.target_seconds + events, seconds, 1.0]
        # The 1.0 counts the processes: one exchange carries everything.
        clock = torch.tensor(numbers, dtype=torch.float64)
        host_sums = torch.cat([self.host_sums, clock]).to(self.device)
        sums = all_reduce(torch.cat([self.device_sums.flatten(), host_sums]))
        steps = self.ttt_steps
        loss_sums, correct, counts, numbers = sums.cpu().split([steps, steps, steps, 7])
        normaliser, tokens, flops, waited, target, seconds, processes = numbers.tolist()
        step_losses = (loss_sums / normaliser).tolist()
        weights = self.weights(steps).tolist()
        metrics = {"loss": sum(map(operator.mul, weights, step_losses))}
        metrics |= {f"loss/step_{k}": loss for k, loss in enumerate(step_losses)}
        accuracies = enumerate((correct / counts).tolist())
        metrics |= {f"accuracy/step_{k}": accuracy for k, accuracy in accuracies}
        # `seconds` is summed too: divided by the processes it is the window's length.
        metrics["tokens_per_second"] = tokens * processes / seconds
        metrics |= {"tokens": int(tokens), "seconds": seconds / processes}
        metrics |= {"supervised_tokens": int(counts[0]), "data_wait_fraction": waited / seconds}
        metrics["peak_memory_bytes"] = peak_memory_bytes(self.device)
        parts = {"data": waited, "target": target, "draft": seconds - waited - target}
        metrics |= {f"seconds/{name}": spent / processes for name, spent in parts.items()}
        metrics["seconds/checkpoint"] = self.checkpoint_seconds
        peak = self.device.type == "cuda" and peak_flops(torch.cuda.get_device_name(self.device))
        if peak:
            metrics["mfu"] = flops / (seconds * peak)
        self.restart()
        return metrics
