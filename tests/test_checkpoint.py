"""Checkpoints that cannot be written, and what stays; what a rank writes of a state that all have."""

import errno
import os

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from eagle3.errors import RunError
from eagle3.parallel.ranks import Ranks
from eagle3.runs.checkpoint import Checkpoints, State, load, share_of


def state(number: float) -> State:
    tensors = {"draft/a": torch.full((3, 2), number), "optimizer/a/step": torch.tensor(number)}
    return State(
        tensors,
        {"rank_0/rng": torch.get_rng_state()},
        {"update": int(number), "best": -float("inf")},
    )


def test_a_state_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, ranks=Ranks())
    given = state(1)
    checkpoints.save(1, given, best=True)
    given.tensors["draft/a"].zero_()  # training goes on while it is written
    for update in (2, 3, 4):
        checkpoints.save(update, state(update))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_1", "step_3", "step_4"]
    assert (os.readlink(tmp_path / "best"), os.readlink(tmp_path / "last")) == ("step_1", "step_4")
    best = load(tmp_path / "best")
    assert (
        torch.equal(best.tensors["draft/a"], torch.ones(3, 2))
        and best.tensors["optimizer/a/step"] == 1
    )
    assert torch.equal(best.own["rank_0/rng"], torch.get_rng_state()) and best.plain[
        "best"
    ] == -float("inf")
    assert load(tmp_path / "last", "draft/").tensors.keys() == {"draft/a"}


@pytest.mark.parametrize("tensor", [True, False])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, tensor):
    checkpoints = Checkpoints(tmp_path, keep_last=1, ranks=Ranks())
    checkpoints.save(1, state(1))
    checkpoints.wait()

    def full(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            *((HuggingFaceStorageWriter, "write_data") if tensor else (os, "replace")), full
        )
        checkpoints.save(2, state(2))
        with pytest.raises(
            RunError, match=r"update 2 cannot be written .*No space left.*; make room and go on"
        ) as error:
            checkpoints.wait()
    assert "\n" not in str(error.value)
    assert (
        os.readlink(tmp_path / "last") == "step_1" and load(tmp_path / "last").plain["update"] == 1
    )
    checkpoints.save(2, state(2))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2"], (
        "what was left is pruned"
    )


def test_what_a_killed_run_left_is_in_no_later_checkpoint(tmp_path):
    """It had more ranks, and the last of them was killed while it wrote."""
    left = tmp_path / "step_1.partial" / "shard-00004-model-00001-of-00001.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half a file")
    checkpoints = Checkpoints(tmp_path, keep_last=1, ranks=Ranks())
    checkpoints.save(1, state(1))
    checkpoints.wait()
    assert load(tmp_path / "last").plain["update"] == 1 and not list(tmp_path.rglob(left.name))


def test_ranks_share_the_writing():
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate([100, 60, 50, 30, 10, 1])}
    shares = [share_of(tensors, Ranks(rank, 3)) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    assert max(sum(t.nbytes for t in share.values()) for share in shares) == 100 * 4
