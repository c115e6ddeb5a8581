"""A process that hangs is named, with its stack, by itself or by those who wait for it."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from conftest import free_port

from eagle3.parallel.ranks import init_ranks
from eagle3.parallel.watch import Watch, redirect_output

pytestmark = pytest.mark.runs
TIMEOUT = 4.0


def dawdle():
    time.sleep(600)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def in_process(rank: int, port: int, folder: str, hang) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    ranks = init_ranks(timedelta(minutes=10))
    log = redirect_output(Path(folder), rank)
    if rank == 0:
        os.dup2(log.fileno(), 2)
    with Watch(Path(folder), ranks, TIMEOUT):
        for _ in range(3):
            assert ranks.all_reduce(1) == 2
            time.sleep(TIMEOUT / 4)  # slow is not hanging
        if rank == 1:
            hang()
        ranks.all_reduce(1)


@pytest.mark.parametrize(
    ("hang", "named_by", "said"),
    [
        (dawdle, 1, "error: process 1 hangs, in "),
        (stop, 0, "error: process 1 does not respond (pid "),
    ],
)
def test_the_process_that_hangs_is_named(tmp_path, hang, named_by, said):
    context = mp.spawn(in_process, (free_port(), str(tmp_path), hang), nprocs=2, join=False)
    try:
        context.processes[named_by].join(300)
        assert context.processes[named_by].exitcode == 1
    finally:
        # A stopped child hears of no SIGTERM, and pytest would wait for it at its end.
        for process in context.processes:
            process.kill()
            process.join()
    log = (tmp_path / "logs" / f"rank_{named_by}.log").read_text()
    if hang is dawdle:
        assert "in dawdle" in log.replace('"', ""), log
    assert said in log and f"train.resume={tmp_path}" in log, log
