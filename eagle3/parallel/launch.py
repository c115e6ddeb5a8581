"""Where a run's stages compute: the launcher, and the ranks that it has started for some of them.

Two ways lead to the same ranks: our own launcher spawns `launch.nproc_per_node` processes of this
machine for each stage that needs them; or torchrun started all processes, on any number of nodes,
of which the first runs the pipeline and the others wait in `serve_tasks`: on a store, not in a
collective, so that it may take as long as it takes while collectives keep a timeout.
"""

import ctypes
import logging
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError, RunError
from eagle3.parallel.ranks import Ranks, init_ranks, set_up_process
from eagle3.parallel.watch import redirect_output
from eagle3.runs.resume import command_to_resume
from eagle3.target.handle import TargetHandle

PR_SET_PDEATHSIG = 1  # of sys/prctl.h
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
BETWEEN_TASKS = timedelta(days=30)  # prepare and generate may take days, and the others wait
CULPRIT_SECONDS = 3.0

Task = Callable[..., Any]  # task(ranks, config, run_dir, target, given), which must be picklable


def is_torchrun() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def spawns_ranks(config: RunConfig) -> bool:
    """Whether stages that need ranks compute in other processes than this one."""
    return config.launch.nproc_per_node * config.launch.nnodes > 1 and not is_torchrun()


def run_on_ranks(task: Task, config: RunConfig, run_dir: Path, target: TargetHandle, given) -> Any:
    """Run a task on every rank; returns what the first rank's did.

    Raises what the first process that failed has to say, as ConfigError or RunError.
    """
    call = task, config, run_dir, target, given
    if spawns_ranks(config):
        return spawn_ranks(*call)
    if is_torchrun():
        post_task(call)
        return run_task(torchrun_store(), *call)
    return task(Ranks(), *call[1:])


def spawn_ranks(task: Task, config: RunConfig, run_dir: Path, *given: Any) -> Any:
    """This machine's processes for one task; returns what the first rank did."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.launch.nproc_per_node,
        run_id="eagle3",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",  # a machine's name need not be known to itself
        max_restarts=0,
        shutdown_timeout=config.launch.shutdown_timeout,
    )
    # torch's launcher takes the handlers of signals and does not give them back.
    before = {number: signal.getsignal(number) for number in HANDLED}
    logging.disable(logging.ERROR)  # what failed is said below, in one sentence
    try:
        results = elastic_launch(settings, run_spawned)(task, config, run_dir, *given)
    except SignalException as stopped:
        raise KeyboardInterrupt(stopped.sigval) from None
    except ChildFailedError as failed:
        raise explain_failure(failed, run_dir) from failed
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
    return results[0]


@record
def run_spawned(task: Task, config: RunConfig, run_dir: Path, target: TargetHandle, given) -> Any:
    """What a spawned process does; its error is handed to the launcher."""
    with suppress(OSError, AttributeError):  # where the C library has it
        # a launcher that is killed leaves nobody behind
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        result = run_task(None, task, config, run_dir, target, given)
    finally:
        target.close()
    dist.destroy_process_group()  # or nccl complains
    return result


def run_task(store, task: Task, config: RunConfig, run_dir: Path, *given: Any) -> Any:
    """A task as one of several ranks, met at `store`; those beside the first write to logs/."""
    set_up_process(config, int(os.environ["LOCAL_WORLD_SIZE"]))
    # Before a collective gives up the watch, at `launch.timeout`, names who hangs.
    ranks = init_ranks(timedelta(seconds=2 * config.launch.timeout + 60), store)
    log = redirect_output(run_dir, ranks.rank)
    try:
        return task(ranks, config, run_dir, *given)
    except Exception as error:
        traceback.print_exc(file=log)
        if not isinstance(error, ConfigError | RunError):
            # It may only miss a rank that died, which the launcher should see first.
            time.sleep(CULPRIT_SECONDS)
        raise


def explain_failure(ended: ChildFailedError, run_dir: Path) -> Exception:
    """What the first process that failed has to say, as one of our errors."""
    rank, failure = ended.get_first_failure()
    message = failure.message
    text = message["message"] if isinstance(message, dict) else str(message)
    kind, _, sentence = text.partition(": ")
    if kind == "ConfigError":
        return ConfigError(sentence)
    if failure.exitcode < 0:
        killed = f"process {rank} was killed by {failure.signal_name()}"
        reason = "the system does that when memory runs out"
        return RunError(f"{killed} ({reason}); go on with: {command_to_resume(run_dir)}")
    if kind in ("RunError", "DamageError"):
        return RunError(sentence)
    log = f"logs/rank_{rank}.log of the run"
    return RunError(f"process {rank} failed: {text.splitlines()[0]}; more in {log}")


def post_task(call: Any) -> None:
    """Under torchrun: give the other processes a task, None where there are no more."""
    store = torchrun_store()
    store.set(f"task/{store.add('tasks', 1)}", pickle.dumps(call))


@cache
def torchrun_store() -> dist.Store:
    """The store that torchrun serves to its processes."""
    store, _, _ = next(dist.rendezvous("env://", timeout=BETWEEN_TASKS))
    return dist.PrefixStore("eagle3", store)


@record
def serve_tasks() -> None:
    """Under torchrun, beside the first process: take part in its tasks, until it has no more."""
    store = torchrun_store()
    store.set_timeout(BETWEEN_TASKS)
    for number in count(1):
        call = pickle.loads(store.get(f"task/{number}"))  # waits until it has been posted
        if call is None:
            break
        run_task(store, *call)
        *_, target, _ = call
        target.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_tasks() -> None:
    """Under torchrun, in the first process: there are no more jobs."""
    post_task(None)
    if dist.is_initialized():
        dist.destroy_process_group()


def read_torchrun(config: RunConfig) -> None:
    """Put torchrun's numbers into the config. Raises ConfigError if others were asked for."""
    if not is_torchrun():
        return
    given = config.launch.nproc_per_node * config.launch.nnodes
    world_size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if given not in (1, world_size):
        asked = f"launch.nproc_per_node x launch.nnodes = {given}"
        raise ConfigError(f"{asked}, but torchrun started {world_size}; leave them out")
    config.launch.nproc_per_node, config.launch.nnodes = local, world_size // local
