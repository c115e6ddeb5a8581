"""Where a run computes."""

import ctypes
import logging
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError, RunError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: returning and zeroing them again costs a sixth of a CPU step's time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, another allocator
    for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 26), (M_MMAP_THRESHOLD, 1 << 25)):
        mallopt(option, value)


@dataclass
class Ranks:
    """Where this process stands: its `rank` among `world_size`, and its target's group of `tp_size` ranks.

    One rank of each group leads it: the others do what it says (`share`).
    """

    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    group: torch.distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def leads(self) -> bool:
        return self.rank % self.tp_size == 0

    def share(self, value: Any) -> Any:
        """What the leader of the group says, on every rank of it."""
        if self.tp_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=self.rank - self.rank % self.tp_size, group=self.group)
        return box[0]


def join(tp_size: int) -> Ranks:
    """This process among those that its launcher started; alone where there is none. Raises ConfigError."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size % tp_size:
        raise ConfigError(
            f"target.tp_size={tp_size} must divide launch.nproc_per_node x launch.nnodes={world_size}; "
            f"set launch.nproc_per_node={tp_size}"
        )
    if world_size == 1:
        return Ranks()
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    groups = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
    # For words, not for tensors: those who follow wait for the next one as long as it takes.
    made = [torch.distributed.new_group(members, timeout=timedelta(days=30), backend="gloo") for members in groups]
    return Ranks(rank, world_size, tp_size, made[rank // tp_size])


def prepare_process(config: RunConfig) -> None:
    """Threads, memory and determinism of the process that computes."""
    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)


def work(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """What every process does; those beside the first are silent. Returns the acceptance length."""
    from eagle3.pipeline import execute

    prepare_process(config)
    ranks = join(1 if config.plan else config.target.get("tp_size", 1))
    if torch.cuda.is_available() and ranks.world_size > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        return execute(config, run_dir, overrides, ranks)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@record
def worker(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """`work` in a process of its own, whose error is handed to the launcher."""
    return work(config, run_dir, overrides)


def launch(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the pipeline, in this process or in `launch.nproc_per_node` of them; returns the acceptance length."""
    if config.launch.nproc_per_node == 1 or config.plan:
        return work(config, run_dir, overrides)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.launch.nproc_per_node,
        run_id=run_dir.name,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        start_method="spawn",
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `failed` says it in one sentence
    try:
        return elastic_launch(settings, worker)(config, run_dir, overrides)[0]
    except SignalException as signal:
        print(f"stopped; go on with: python run.py {shlex.join(overrides)}", file=sys.stderr)
        raise SystemExit(128 + signal.sigval) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise failed(rank, failure.message) from error


def failed(rank: int, message: Any) -> Exception:
    """What the first process that failed has to say, as one of our errors."""
    told = message["message"] if isinstance(message, dict) else str(message)
    kind, _, sentence = told.partition(": ")
    if kind == "ConfigError":
        return ConfigError(sentence)
    return RunError(sentence if kind == "RunError" else f"process {rank} failed: {told}")
