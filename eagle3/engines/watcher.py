"""Runs a command and ends it, with all that it started, on a signal or when its parent is gone.

Usage: python watcher.py PARENT_PID GRACE_SECONDS COMMAND...; exits as the command does. Standard
library only, because it runs outside our package (`eagle3.engines.server` starts it).
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of sys/prctl.h
libc = ctypes.CDLL(None)


def main(parent: int, grace: float, command: list[str]) -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    # Engines start processes in sessions of their own, which no signal to a process group reaches:
    # as their subreaper we inherit them when the process between us ends.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    # A parent that dies, whatever kills it, leaves us to another one.
    while child.poll() is None and not received and os.getppid() == parent:
        time.sleep(0.1)
    child.terminate()
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    while left := children():
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # unreaped, hence no other process can have the number
        os.waitpid(-1, 0)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def children() -> list[int]:
    mine = []  # the adopted ones too
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text().rpartition(")")[2].split()[1]  # a name may hold spaces
        except OSError:
            continue  # ended meanwhile
        if int(parent) == os.getpid():
            mine.append(int(path.parent.name))
    return mine


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
