"""A process that hangs is named, with its stack, by itself or by those who wait for it."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from conftest import as_sent, free_port

from eagle3.parallel.ranks import init_ranks
from eagle3.parallel.watch import Watch, redirect_output

pytestmark = pytest.mark.runs
TIMEOUT = 8.0  # under any load the others come to a collective sooner


def dawdle():
    time.sleep(600)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def in_process(rank, port, folder, hang):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    ranks = init_ranks(timedelta(minutes=10))
    log = redirect_output(Path(folder), rank)
    if rank == 0:
        os.dup2(log.fileno(), 2)
    sys.stderr = sys.__stderr__  # pytest had put its own there
    with Watch(Path(folder), ranks, TIMEOUT):
        for _ in range(3):
            assert ranks.all_reduce(1) == 2
            time.sleep(0.4 * TIMEOUT)  # slow is not hanging
        if rank == 1:
            hang()
        ranks.all_reduce(1)


def test_the_process_that_hangs_is_named(tmp_path):
    """One that can does it itself, for one that is stopped the other does; both cases at once."""
    cases = {
        dawdle: (1, "error: process 1 hangs, in "),
        stop: (0, "error: process 1 does not resp"),
    }
    folders = {hang: tmp_path / hang.__name__ for hang in cases}
    started = {}
    try:
        for hang, folder in folders.items():
            as_sent(folder, "model=hf", "model.path=x", "benchmark.execute_code=true")
            # Forked: no collective was begun here, and importing torch takes seconds.
            given = {"nprocs": 2, "join": False, "start_method": "fork"}
            started[hang] = mp.start_processes(
                in_process, (free_port(), str(folder), hang), **given
            ).processes
        for hang, (named_by, _) in cases.items():
            started[hang][named_by].join(300)
            assert started[hang][named_by].exitcode == 1
    finally:
        # A stopped child hears of no SIGTERM, and pytest would wait for it at its end.
        for process in [process for pair in started.values() for process in pair]:
            process.kill()
            process.join()
    for hang, (named_by, said) in cases.items():
        log = (folders[hang] / "logs" / f"rank_{named_by}.log").read_text()
        assert said in log and f"resume={folders[hang]} ++benchmark.exec" in log, log
        assert hang is stop or "in dawdle" in log.replace('"', ""), log
