"""Logs of processes that have no terminal, and a watch that ends a run one of whose processes
hangs.
"""

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

LOOKS = 10  # how often within `launch.timeout` a process looks and shows itself


def keep_log(run_dir: Path, rank: int) -> TextIO:
    """Opens logs/rank_N.log, where all but the first rank write what they would print, and every
    one its stacks.
    """
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / f"rank_{rank}.log", "a", buffering=1)  # noqa: SIM115 (for the life of the process)
    if rank > 0:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    return log


class Watch:
    """A thread in every process that ends it, with one sentence, when it hangs or waits for one
    that does.

    Each shows in logs/rank_N.json how many collectives it has begun. When that has not changed for
    `timeout` seconds, those who have begun the fewest are the ones that hang: such a process writes
    its stack to its log and ends; where it can't (it was stopped), the others name it.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, timeout: float):
        self.folder, self.ranks, self.timeout = run_dir / "logs", ranks, timeout
        self.main_thread = threading.get_ident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look_on, daemon=True)

    def __enter__(self) -> "Watch":
        if self.ranks.world_size > 1:
            self.show()
            # what an earlier run left in the folder is overwritten before anyone looks
            self.ranks.meet()
            self.thread.start()
        return self

    def __exit__(self, *unused) -> None:
        self.over.set()

    def path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def show(self) -> None:
        shown = {"begun": self.ranks.begun, "pid": os.getpid(), "host": socket.gethostname()}
        partial = self.path(self.ranks.rank).with_suffix(".partial")
        partial.write_text(json.dumps(shown))
        os.replace(partial, self.path(self.ranks.rank))

    def look_on(self) -> None:
        begun, since = -1, time.monotonic()
        while not self.over.wait(self.timeout / LOOKS):
            self.show()
            if self.ranks.begun != begun:
                begun, since = self.ranks.begun, time.monotonic()
            waited = time.monotonic() - since
            if waited < self.timeout:
                continue
            try:
                everyone = [
                    json.loads(self.path(rank).read_text()) for rank in range(self.ranks.world_size)
                ]
            except (OSError, ValueError) as error:
                self.end(
                    f"process {self.ranks.rank} waits and cannot see the others ({error}; is the folder shared?)"
                )
            fewest = min(shown["begun"] for shown in everyone)
            if begun == fewest:
                self.end(f"process {self.ranks.rank} hangs, {self.where()}")
            elif waited > self.timeout * (1 + 3 / LOOKS):  # it had its time to say so itself
                rank = next(rank for rank, shown in enumerate(everyone) if shown["begun"] == fewest)
                pid, host = everyone[rank]["pid"], everyone[rank]["host"]
                if host == socket.gethostname():
                    with suppress(ProcessLookupError):
                        os.kill(
                            pid, signal.SIGUSR1
                        )  # its stack goes to its log, even from within a C call
                self.end(f"process {rank} does not respond (pid {pid} on {host})")

    def where(self) -> str:
        """The innermost lines of this package that the main thread is in."""
        with open(self.folder / f"rank_{self.ranks.rank}.log", "a") as log:
            faulthandler.dump_traceback(log)
        frames = traceback.extract_stack(sys._current_frames()[self.main_thread])
        package = str(Path(__file__).parent)
        ours = [f for f in frames if f.filename.startswith(package)] or frames
        last = frames[-1]
        return (
            f"in {ours[-1].name} ({Path(ours[-1].filename).name}, line {ours[-1].lineno}), innermost {last.name} "
            f"({Path(last.filename).name}, line {last.lineno})"
        )

    def end(self, what: str) -> None:
        error = RunError(
            f"{what}: no progress for launch.timeout={self.timeout:g} seconds; its stack is in "
            f"{self.folder}/rank_N.log; go on with: python run.py train.resume={self.folder.parent}"
        )
        get_error_handler().record_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)
