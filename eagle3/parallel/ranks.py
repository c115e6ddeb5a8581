"""Where a run computes: one launcher, its processes, and what they say to each other."""

import ctypes
import logging
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError, RunError
from eagle3.runs.resume import command_to_resume

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
PATIENCE = timedelta(
    days=30
)  # of collectives: who waits, waits as long as it takes; `eagle3.parallel.watch` finds who hangs
CULPRIT_SECONDS = 3.0


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda, but torch sees no CUDA device; use device=auto or device=cpu"
        )
    return torch.device(
        "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: returning and zeroing them again costs a sixth of a
    CPU step's time.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, another allocator
    for option, value in (
        (M_TRIM_THRESHOLD, 1 << 30),
        (M_TOP_PAD, 1 << 26),
        (M_MMAP_THRESHOLD, 1 << 25),
    ):
        mallopt(option, value)


@dataclass
class Ranks:
    """Where this process stands: its `rank` among `world_size`, and what it says to the others.

    `tp_size` ranks side by side share one target; `group` is that of this rank, `words` that of
    all, both for Python objects. `begun` counts the collectives that this rank came to: of ranks
    that stand still, the one that hangs has begun the fewest.
    """

    rank: int = 0
    world_size: int = 1
    words: dist.ProcessGroup | None = None
    begun: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def tell(self, value: Any = None) -> Any:
        """What the first rank says, on every rank."""
        self.begun += 1
        return value if self.world_size == 1 else said(value, 0, self.words)

    def collect(self, value: Any) -> list[Any]:
        """What every rank says, on each of them."""
        self.begun += 1
        everyone = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, value, group=self.words)
        return everyone

    def total(self, number: int) -> int:
        """The sum of a number on the host over all ranks."""
        return self.reduce(number, dist.ReduceOp.SUM)

    def most(self, number: int) -> int:
        """The largest of a number on the host over all ranks."""
        return self.reduce(number, dist.ReduceOp.MAX)

    def reduce(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        self.begun += 1
        if self.world_size == 1:
            return number
        box = torch.tensor(number)
        dist.all_reduce(box, operation, group=self.words)
        return int(box)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds a tensor up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Adds gradients up over all ranks, exchanged in `dtype`; a rank without a gradient has
        zeros.
        """
        self.begun += 1
        if self.world_size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sent = [parameter.grad.to(dtype) for parameter in parameters]
        for work_in_flight in [dist.all_reduce(tensor, async_op=True) for tensor in sent]:
            work_in_flight.wait()
        for parameter, tensor in zip(parameters, sent, strict=True):
            parameter.grad = tensor.to(parameter.dtype)

    def agree(self, tensors: list[torch.Tensor]) -> None:
        """Makes tensors those of the first rank."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.broadcast(tensor, src=0)

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.tell()


def said(value: Any, source: int, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def is_started() -> bool:
    """Whether a launcher (ours or torchrun) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def note_processes(config: RunConfig) -> None:
    """Under torchrun, its numbers stand in the config. Raises ConfigError where the config asks for
    others.
    """
    if not is_started():
        return
    given = config.launch.nproc_per_node * config.launch.nnodes
    world_size, local = int(os.environ["WORLD_SIZE"]), local_world_size()
    if given not in (1, world_size):
        raise ConfigError(
            f"launch.nproc_per_node x launch.nnodes = {given}, but torchrun started {world_size}; leave them out"
        )
    config.launch.nproc_per_node, config.launch.nnodes = local, world_size // local


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_started() else 1


def connect() -> None:
    """Make this process one of those that its launcher started; again and again is harmless."""
    if not is_started() or dist.is_initialized():
        return
    if torch.cuda.is_available():  # with device=cpu there may be more processes than GPUs
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE
    )


def join() -> Ranks:
    """This process among those that its launcher started; alone where there is none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    words = dist.new_group(timeout=PATIENCE, backend="gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), words)


def prepare_process(config: RunConfig) -> None:
    """Threads, memory and determinism of the process that computes."""
    threads, processes = config.launch.threads, local_world_size()
    if threads is not None or processes > 1:
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // processes))
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)


def work(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """What every process does; those beside the first write to logs/. Returns the acceptance
    length.
    """
    from eagle3.parallel.watch import keep_log
    from eagle3.pipeline import execute

    prepare_process(config)
    if config.plan:
        ranks = Ranks()
    else:
        connect()
        ranks = join()
    run_dir, overrides = ranks.tell(
        (run_dir, overrides)
    )  # each node's launcher has named a folder after its own time
    log = keep_log(run_dir, ranks.rank) if ranks.world_size > 1 else None
    try:
        return execute(config, run_dir, overrides, ranks)
    except Exception as error:
        if log is not None:
            traceback.print_exc(file=log)
        if ranks.world_size > 1 and not isinstance(error, ConfigError | RunError):
            time.sleep(
                CULPRIT_SECONDS
            )  # it may only miss a rank that died, which the launcher should see first
        raise


@record
def worker(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """`work` in a process of its own, whose error is handed to the launcher."""
    with suppress(OSError, AttributeError):  # where the C library has it
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGTERM
        )  # a launcher that is killed leaves nobody behind
    length = work(config, run_dir, overrides)
    dist.destroy_process_group()  # or nccl complains
    return length


@cache
def company() -> Ranks:
    """All processes of torchrun, which the first one tells its jobs."""
    connect()
    return join()


@record
def attend() -> None:
    """Under torchrun: take part in the jobs that the first rank composes, until it has no more."""
    while (job := company().tell()) is not None:
        work(*job)
    dist.destroy_process_group()


def dismiss() -> None:
    """Under torchrun: the first rank has no more jobs, or had none but to show a plan."""
    if is_started():
        company().tell(None)
        dist.destroy_process_group()


def launch(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the pipeline in this process, in `launch.nproc_per_node` of its own, or in those of
    torchrun.

    Returns the acceptance length. Raises RunError with what the first process that failed has to
    say.
    """
    if config.plan or (config.launch.nproc_per_node * config.launch.nnodes == 1):
        return work(config, run_dir, overrides)
    if is_started():
        return work(*company().tell((config, run_dir, overrides)))
    settings = LaunchConfig(
        min_nodes=config.launch.nnodes,
        max_nodes=config.launch.nnodes,
        nproc_per_node=config.launch.nproc_per_node,
        run_id="eagle3",  # launchers of several nodes only meet under the same
        rdzv_backend="c10d",
        rdzv_endpoint=config.launch.rdzv_endpoint or "127.0.0.1:0",
        local_addr="127.0.0.1"
        if config.launch.nnodes == 1
        else None,  # a machine's name need not be known to itself
        max_restarts=0,
        start_method="spawn",
        shutdown_timeout=config.launch.shutdown_timeout,
    )
    logging.disable(logging.ERROR)  # `failed` says it in one sentence
    try:
        if config.launch.nnodes == 1 and config.launch.rdzv_endpoint:
            host, _, port = config.launch.rdzv_endpoint.rpartition(":")
            socket.create_server(
                (host, int(port))
            ).close()  # or it would be waited for as if another node had it
        return elastic_launch(settings, worker)(config, run_dir, overrides).get(0)
    except SignalException as stopped:
        print(f"stopped; go on with: {command_to_resume(run_dir, overrides)}", file=sys.stderr)
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as error:
        raise failed(*error.get_first_failure(), command_to_resume(run_dir, overrides)) from error
    except (RendezvousError, DistError, ValueError, OSError) as error:
        where, why = settings.rdzv_endpoint, str(error).splitlines()[0]
        raise RunError(
            f"the processes cannot meet at launch.rdzv_endpoint={where}: {why}; name a port that is free there"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def failed(rank: int, failure: ProcessFailure, go_on: str) -> Exception:
    """What the first process that failed has to say, as one of our errors."""
    told = failure.message["message"] if isinstance(failure.message, dict) else str(failure.message)
    kind, _, sentence = told.partition(": ")
    if kind == "ConfigError":
        return ConfigError(sentence)
    if failure.exitcode < 0:
        return RunError(
            f"process {rank} was killed by {failure.signal_name()} (the system does that when memory runs out); go on "
            f"with: {go_on}"
        )
    if kind == "RunError":
        return RunError(sentence)
    return RunError(
        f"process {rank} failed: {told.splitlines()[0]}; logs/rank_{rank}.log in the run's folder has more"
    )
