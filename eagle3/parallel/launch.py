"""Where a run's stages compute: the launcher, and the ranks that it has started for some of them.

Three ways lead to the same ranks: our own launcher spawns `launch.nproc_per_node` processes for
each stage that needs them; torchrun started all processes, of which the first runs the pipeline and
the others wait in `serve_tasks`; with `launch.nnodes` launchers, the first does, and the others
wait there too and spawn their own processes. Whoever waits does so on a store, not in a collective,
so that it may take as long as it takes while collectives keep a timeout.
"""

import ctypes
import logging
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError, RunError
from eagle3.parallel.ranks import Ranks, collective_timeout, init_ranks, set_up_process
from eagle3.parallel.watch import redirect_output
from eagle3.runs.resume import command_to_resume, read_overrides
from eagle3.target.handle import TargetHandle

PR_SET_PDEATHSIG = 1  # of sys/prctl.h
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
BETWEEN_TASKS = timedelta(days=30)  # prepare and generate may take days, and the others wait
CULPRIT_SECONDS = 3.0

Task = Callable[..., Any]  # task(ranks, config, run_dir, *arguments), which must be picklable


def is_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def spawns_ranks(config: RunConfig) -> bool:
    """Whether stages that need ranks compute in other processes than this one."""
    return config.launch.nproc_per_node * config.launch.nnodes > 1 and not is_torchrun()


def launch(
    pipeline: Callable[..., float | None], config: RunConfig, run_dir: Path, overrides: list[str]
) -> float | None:
    """Run the pipeline in this process; on further nodes, serve its tasks."""
    set_up_process(config)
    if config.launch.nnodes == 1 or is_torchrun() or config.plan:
        return pipeline(config, run_dir, overrides)
    store, node = meet_nodes(config.launch.rdzv_endpoint)
    if node > 0:
        try:
            serve_node_tasks(store, node)
        except DistError as error:
            raise RunError("the first node's launcher has ended: see its output") from error
        return None
    try:
        return pipeline(config, run_dir, overrides)
    finally:
        post_task(store, None)
        # The store ends with this process, and the others are still to read this from it.
        ends, give_up = store.add("ends", 1), time.monotonic() + 60
        others = ends * (config.launch.nnodes - 1)
        while store.add("ended", 0) < others and time.monotonic() < give_up:
            time.sleep(0.1)


def run_on_ranks(task: Task, config: RunConfig, run_dir: Path, *arguments: Any) -> Any:
    """`task(ranks, config, run_dir, *arguments)` on every rank; returns what the first rank's did.

    Raises what the first process that failed has to say, as ConfigError or RunError.
    """
    if config.launch.nproc_per_node * config.launch.nnodes == 1:
        return task(Ranks(), config, run_dir, *arguments)
    call = (task, config, run_dir, arguments)
    if is_torchrun():
        post_task(torchrun_store(), call)
        return run_task(torchrun_store(), *call)
    endpoint = "127.0.0.1:0"
    if config.launch.nnodes > 1:
        host = config.launch.rdzv_endpoint.rpartition(":")[0]
        with socket.create_server(("", 0)) as server:  # finds a free port
            endpoint = f"{host}:{server.getsockname()[1]}"
        post_task(meet_nodes(config.launch.rdzv_endpoint)[0], (endpoint, call))
    return spawn_ranks(endpoint, 0, *call)


def spawn_ranks(
    endpoint: str, node: int, task: Task, config: RunConfig, run_dir: Path, arguments: tuple
) -> Any:
    """This node's processes for one task; returns what the first rank did, elsewhere None."""
    nnodes = config.launch.nnodes
    settings = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=config.launch.nproc_per_node,
        run_id="eagle3",
        rdzv_backend="c10d" if nnodes == 1 else "static",
        rdzv_endpoint=endpoint,
        rdzv_configs={} if nnodes == 1 else {"rank": node},
        # a machine's name need not be known to itself
        local_addr="127.0.0.1" if nnodes == 1 else None,
        max_restarts=0,
        start_method="spawn",
        shutdown_timeout=config.launch.shutdown_timeout,
    )
    # torch's launcher takes the handlers of signals and does not give them back.
    before = {number: signal.getsignal(number) for number in HANDLED}
    logging.disable(logging.ERROR)  # what failed is said below, in one sentence
    try:
        results = elastic_launch(settings, run_spawned)(task, config, run_dir, arguments)
    except (SignalException, ChildFailedError) as ended:
        resume = command_to_resume(run_dir, read_overrides(run_dir))
        if isinstance(ended, ChildFailedError):
            raise explain_failure(ended, resume) from ended
        print(f"stopped; go on with: {resume}", file=sys.stderr)
        raise SystemExit(128 + ended.sigval) from None
    except (RendezvousError, DistError) as error:
        why = str(error).splitlines()[0]
        raise RunError(f"the processes cannot meet at {endpoint}: {why}; start again") from error
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
    return results.get(0)


@record
def run_spawned(task: Task, config: RunConfig, run_dir: Path, arguments: tuple) -> Any:
    """What a spawned process does; its error is handed to the launcher."""
    with suppress(OSError, AttributeError):  # where the C library has it
        # a launcher that is killed leaves nobody behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        result = run_task(None, task, config, run_dir, arguments)
    finally:
        close_targets(arguments)
    dist.destroy_process_group()  # or nccl complains
    return result


def close_targets(arguments: tuple) -> None:
    """Free what a task has loaded into this process, or end the engine that it has started."""
    for argument in arguments:
        if isinstance(argument, TargetHandle):
            argument.close()


def run_task(
    store: dist.Store | None, task: Task, config: RunConfig, run_dir: Path, arguments: tuple
) -> Any:
    """A task as one of several ranks; those beside the first write to logs/."""
    set_up_process(config, int(os.environ["LOCAL_WORLD_SIZE"]))
    ranks = init_ranks(collective_timeout(config.launch.timeout), store)
    log = redirect_output(run_dir, ranks.rank)
    try:
        return task(ranks, config, run_dir, *arguments)
    except Exception as error:
        traceback.print_exc(file=log)
        if not isinstance(error, ConfigError | RunError):
            # It may only miss a rank that died, which the launcher should see first.
            time.sleep(CULPRIT_SECONDS)
        raise


def explain_failure(ended: ChildFailedError, resume: str) -> Exception:
    """What the first process that failed has to say, as one of our errors."""
    rank, failure = ended.get_first_failure()
    message = failure.message
    text = message["message"] if isinstance(message, dict) else str(message)
    kind, _, sentence = text.partition(": ")
    if kind == "ConfigError":
        return ConfigError(sentence)
    if failure.exitcode < 0:
        return RunError(
            f"process {rank} was killed by {failure.signal_name()} (the system does that when "
            f"memory runs out); go on with: {resume}"
        )
    if kind in ("RunError", "DamageError"):
        return RunError(sentence)
    return RunError(
        f"process {rank} failed: {text.splitlines()[0]}; more in logs/rank_{rank}.log of the run"
    )


# Tasks are posted on a store under their number; None is posted when there are no more.


def post_task(store: dist.Store, call: Any) -> None:
    store.set(f"task/{store.add('tasks', 1)}", pickle.dumps(call))


def read_task(store: dist.Store, number: int) -> Any:
    """The task with that number, from 1; waits until it has been posted."""
    store.set_timeout(BETWEEN_TASKS)
    return pickle.loads(store.get(f"task/{number}"))


@cache
def torchrun_store() -> dist.Store:
    """The store that torchrun serves to its processes."""
    store, _, _ = next(dist.rendezvous("env://", timeout=BETWEEN_TASKS))
    return dist.PrefixStore("eagle3", store)


@record
def serve_tasks() -> None:
    """Under torchrun, beside the first process: take part in its tasks, until it has no more."""
    number = 1
    while (call := read_task(torchrun_store(), number)) is not None:
        run_task(torchrun_store(), *call)
        close_targets(call[-1])
        number += 1
    if dist.is_initialized():
        dist.destroy_process_group()


def end_tasks() -> None:
    """Under torchrun, in the first process: there are no more jobs."""
    if is_torchrun():
        post_task(torchrun_store(), None)
        if dist.is_initialized():
            dist.destroy_process_group()


def serve_node_tasks(store: dist.Store, node: int) -> None:
    """On further nodes: spawn processes for the first node's tasks, until it has no more."""
    # Counted on the store, because a sweep comes here again.
    while (posted := read_task(store, store.add(f"served/{node}", 1))) is not None:
        endpoint, call = posted
        spawn_ranks(endpoint, node, *call)
    store.add("ended", 1)


@cache
def meet_nodes(endpoint: str) -> tuple[dist.Store, int]:
    """The store at host:port that the launchers of all nodes share, and this node's number.

    Raises RunError where the launchers cannot meet there.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        # A socket can be bound to the host's address on that machine alone, and by one launcher.
        with suppress(OSError, DistError):
            socket.create_server((host, int(port))).close()
            return dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False), 0
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(minutes=15))
        return store, store.add("nodes", 1)
    except (DistError, ValueError, OSError) as error:
        why = str(error).splitlines()[0]
        raise RunError(
            f"the processes cannot meet at launch.rdzv_endpoint={endpoint}: {why}; name a port "
            "that is free there"
        ) from error


def read_torchrun(config: RunConfig) -> None:
    """Put torchrun's numbers into the config. Raises ConfigError if others were asked for."""
    if not is_torchrun():
        return
    given = config.launch.nproc_per_node * config.launch.nnodes
    world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if given not in (1, world_size):
        raise ConfigError(
            f"launch.nproc_per_node x launch.nnodes = {given}, but torchrun started {world_size}; "
            "leave them out"
        )
    config.launch.nproc_per_node, config.launch.nnodes = local, world_size // local
