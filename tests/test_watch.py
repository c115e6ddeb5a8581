"""A process that hangs is named, with its stack, by itself or by those who wait for it."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from test_sequence import free_port

from eagle3.parallel.ranks import join
from eagle3.parallel.watch import Watch, keep_log

TIMEOUT = 2.0


def dawdle():
    time.sleep(600)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def in_process(rank: int, port: int, folder: str, hang) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ranks = join(1)
    log = keep_log(Path(folder), rank)
    if rank == 0:
        os.dup2(log.fileno(), 2)
    with Watch(Path(folder), ranks, TIMEOUT):
        for _ in range(3):
            assert ranks.total(1) == 2
            time.sleep(TIMEOUT / 2)  # slow is not hanging
        if rank == 1:
            hang()
        ranks.total(1)


@pytest.mark.parametrize(
    ("hang", "named_by", "said"),
    [
        (dawdle, 1, "error: process 1 hangs, in in_process (test_watch.py, line"),
        (stop, 0, "error: process 1 does not respond (pid "),
    ],
)
def test_the_process_that_hangs_is_named(tmp_path, hang, named_by, said):
    context = mp.spawn(in_process, (free_port(), str(tmp_path), hang), nprocs=2, join=False)
    context.processes[named_by].join(60)
    assert context.processes[named_by].exitcode == 1
    for process in context.processes:
        process.kill()
    log = (tmp_path / "logs" / f"rank_{named_by}.log").read_text()
    if hang is dawdle:
        said = "error: process 1 hangs, in "
        assert "in dawdle" in log.replace('"', ""), log
    assert (
        said in log and "launch.timeout=2 seconds" in log and f"train.resume={tmp_path}" in log
    ), log
