"""Runs a command and ends it, with all that it started, on a signal or when its parent is gone.

Usage: python watcher.py PARENT_PID GRACE_SECONDS COMMAND...; exits as the command does. Standard
library only, because it runs outside our package (`eagle3.engines.server` starts it).
"""

import ctypes
import glob
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of sys/prctl.h
PAUSE = 0.1  # seconds

libc = ctypes.CDLL(None)


def main(parent: int, grace: float, command: list[str]) -> int:
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    # What the command leaves behind becomes our child, also from other process groups.
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
        time.sleep(PAUSE)
    end(child, grace)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(child: subprocess.Popen, grace: float) -> None:
    """SIGTERM for the command itself, SIGKILL for all that is left after `grace` seconds."""
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


def children() -> list[int]:
    """Pids of this process's children, the adopted ones too."""
    mine = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                after_name = file.read().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(after_name[1]) == os.getpid():
            mine.append(int(path.split("/")[2]))
    return mine


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
