"""Logs of ranks that have no terminal, and a watch that ends a run one of whose ranks hangs."""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from eagle3.errors import RunError
from eagle3.parallel.ranks import Ranks
from eagle3.runs.disk import write_atomically
from eagle3.runs.resume import command_to_resume

LOOKS = 10  # how often within `launch.timeout` a rank looks at the others and shows itself


def redirect_output(run_dir: Path, rank: int) -> TextIO:
    """Open logs/rank_N.log, for stacks, and for what ranks beside the first would print."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    # open as long as the process lives
    log = open(folder / f"rank_{rank}.log", "a", buffering=1)  # noqa: SIM115
    if rank > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    return log


class Watch(threading.Thread):
    """A thread in every rank that ends it, with one sentence, when it or one it waits for hangs.

    Each shows in logs/rank_N.json how many collectives it has begun. When that has not changed for
    `timeout` seconds, those who have begun the fewest are the ones that hang: such a rank writes
    its stack to its log and ends; where it can't (it was stopped), the others name it. It is a
    thread because a rank that waits is inside a collective and can't look at the clock.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, timeout: float):
        super().__init__(daemon=True)
        self.folder, self.ranks, self.timeout = run_dir / "logs", ranks, timeout
        self.watched, self.over = threading.get_ident(), threading.Event()

    def __enter__(self) -> None:
        if self.ranks.world_size > 1:
            self.write_state()
            # What an earlier run left in the folder is overwritten before anyone looks.
            self.ranks.barrier()
            self.start()

    def __exit__(self, *unused) -> None:
        self.over.set()

    def write_state(self) -> None:
        state = {"begun": self.ranks.begun, "pid": os.getpid(), "host": socket.gethostname()}
        shown = json.dumps(state).encode()
        write_atomically(self.folder / f"rank_{self.ranks.rank}.json", [shown])

    def run(self) -> None:
        begun, since = -1, time.monotonic()
        while not self.over.wait(self.timeout / LOOKS):
            self.write_state()
            if self.ranks.begun != begun:
                begun, since = self.ranks.begun, time.monotonic()
            waited = time.monotonic() - since
            if waited >= self.timeout:
                self.name_culprit(begun, waited)

    def name_culprit(self, begun: int, waited: float) -> None:
        """End this rank if it is the one that hangs, or if that one has not ended itself by now."""
        paths = [self.folder / f"rank_{rank}.json" for rank in range(self.ranks.world_size)]
        try:
            states = [json.loads(path.read_text()) for path in paths]
        except (OSError, ValueError) as error:
            reason = f"{error}; is the folder shared?"
            self.end(f"process {self.ranks.rank} waits and cannot see the others ({reason})")
        fewest = min(state["begun"] for state in states)
        if begun == fewest:
            self.end(f"process {self.ranks.rank} hangs, {self.where()}")
        elif waited > self.timeout * (1 + 3 / LOOKS):  # it had its time to end itself
            rank, state = next(pair for pair in enumerate(states) if pair[1]["begun"] == fewest)
            pid, host = state["pid"], state["host"]
            if host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1)  # its stack goes to its log, even from a C call
            self.end(f"process {rank} does not respond (pid {pid} on {host})")

    def where(self) -> str:
        """The innermost lines of this package that the main thread is in."""
        with open(self.folder / f"rank_{self.ranks.rank}.log", "a") as log:
            faulthandler.dump_traceback(log)
        frames = traceback.extract_stack(sys._current_frames()[self.watched])
        package = str(Path(__file__).parents[1])
        ours = [frame for frame in frames if frame.filename.startswith(package)] or frames
        places = [(f.name, Path(f.filename).name, f.lineno) for f in (ours[-1], frames[-1])]
        return "in {} ({}, line {}), innermost {} ({}, line {})".format(*places[0], *places[1])

    def end(self, what: str) -> None:
        error = RunError(
            f"{what}: no progress for launch.timeout={self.timeout:g} seconds; its stack is in "
            f"{self.folder}/rank_N.log; go on with: {command_to_resume(self.folder.parent)}"
        )
        get_error_handler().record_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
