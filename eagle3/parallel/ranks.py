"""The ranks of a run and their collectives; the process that a rank computes in.

`parallel/launch.py` starts ranks for the stages that need them (`capture`, `train`). They are equal
there: each knows its number and takes part in the same collectives in the same order.
"""

import ctypes
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eagle3.config import RunConfig
from eagle3.errors import ConfigError
from eagle3.target.handle import TargetHandle

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


@dataclass
class Ranks:
    """This process among those of a run: `rank` of `world_size`, `local_rank` on its machine.

    `host_group` (gloo) carries numbers and Python objects, so that they never wait for a device;
    tensors go through the default group; a collective that waits for `timeout` ends its process.
    `begun` counts those this rank came to: of ranks that stand still, the one that hangs has begun
    the fewest (`parallel/watch.py`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host_group: dist.ProcessGroup | None = None
    timeout: timedelta | None = None
    begun: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """A Python object of the first rank, on every rank."""
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's Python object, on each of them."""
        self.begun += 1
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def all_reduce(self, number: int, operation: str = "sum") -> int:
        """The `sum` or `max` of a number on the host."""
        self.begun += 1
        if self.world_size == 1:
            return number
        box = torch.tensor(number)
        dist.all_reduce(box, getattr(dist.ReduceOp, operation.upper()), group=self.host_group)
        return int(box)

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, parameters: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Add gradients up over all ranks, exchanged in `dtype`; a rank without one has zeros."""
        self.begun += 1
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sent = [parameter.grad.to(dtype) for parameter in parameters]
        # One exchange an update, all in flight together: no bucketing hooks run during backward.
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in sent]:
            work.wait()
        for parameter, tensor in zip(parameters, sent, strict=True):
            parameter.grad = tensor.to(parameter.dtype)

    def broadcast_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Make tensors those of the first rank, in place."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.broadcast()


def init_ranks(timeout: timedelta, store: dist.Store | None = None) -> Ranks:
    """Join those that torchrun, or our launcher, started, at `store` or where the environment says;
    a process group is made once a process.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():  # with device=cpu there may be more processes than GPUs
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        meeting = None if store is None else dist.PrefixStore("ranks", store)
        dist.init_process_group(
            backend, store=meeting, rank=rank, world_size=world_size, timeout=timeout
        )
    host_group = dist.new_group(timeout=timeout, backend="gloo")
    return Ranks(rank, world_size, int(os.environ["LOCAL_RANK"]), host_group, timeout)


def load_target(target: TargetHandle, ranks: Ranks) -> None:
    """Load the target on every rank; of an engine, each machine's first rank starts one for all."""
    if target.in_process:
        target.load()
        return
    running = (socket.gethostname(), target.load().url) if ranks.local_rank == 0 else None
    everywhere = ranks.all_gather(running)
    if ranks.local_rank > 0:
        target.running = everywhere[ranks.rank - ranks.local_rank]
        target.load()


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device where there is one. Raises ConfigError."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        remedy = "use device=auto or device=cpu"
        raise ConfigError(f"device=cuda, but torch sees no CUDA device; {remedy}")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def set_up_process(config: RunConfig, processes: int = 1) -> None:
    """Threads, memory and determinism of a process, one of `processes` on its machine."""
    threads = config.launch.threads
    if threads is not None or processes > 1:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // processes))
    if choose_device(config.device).type == "cpu":
        # glibc keeps large freed blocks then: returning them costs a sixth of a CPU step.
        with suppress(OSError, AttributeError):  # another C library, another allocator
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(M_TRIM_THRESHOLD, 1 << 30)
            mallopt(M_TOP_PAD, 1 << 26)
            mallopt(M_MMAP_THRESHOLD, 1 << 25)
    elif not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # No two batches have equally many rows: blocks of fixed sizes would leave ever more holes.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
