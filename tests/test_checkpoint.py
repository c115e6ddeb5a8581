"""Checkpoints: what comes back, what stays when one cannot be written, which rank writes what."""

import errno
import os
from concurrent.futures import wait
from datetime import timedelta

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from eagle3.errors import RunError
from eagle3.runs import checkpoint
from eagle3.runs.checkpoint import load_checkpoint


def state(number):
    tensors = {"draft/a": torch.full((3, 2), number), "optimizer/a/step": torch.tensor(number)}
    tensors["rank_0/rng"] = torch.get_rng_state()
    plain = {"draft": {}, "update": int(number), "best": -float("inf")}
    return checkpoint.CheckpointState(tensors, plain)


def save(folder, *updates, keep_last=1, **options):
    timeout = timedelta(minutes=10)
    writer = checkpoint.CheckpointWriter(folder, keep_last, rank=0, world_size=1, timeout=timeout)
    for update in updates:
        given = state(update)
        writer.save(update, given, **options if update == updates[0] else {})
        given.tensors["draft/a"].zero_()  # training goes on while it is written
    writer.wait()
    return writer


def kept(folder):
    return sorted(path.name for path in folder.glob("step_*"))


def test_a_state_comes_back(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep_last=2, best=True)
    assert kept(tmp_path) == ["step_1", "step_3", "step_4"]
    assert (os.readlink(tmp_path / "best"), os.readlink(tmp_path / "last")) == ("step_1", "step_4")
    best = load_checkpoint(tmp_path / "best")
    assert torch.equal(best.tensors["draft/a"], torch.ones(3, 2))
    assert best.tensors["optimizer/a/step"] == 1 and best.plain["best"] == -float("inf")
    assert torch.equal(best.tensors["rank_0/rng"], torch.get_rng_state())
    weights = checkpoint.load_draft(tmp_path / "last")[1]
    assert weights.keys() == {"a"} and torch.equal(weights["a"], torch.full((3, 2), 4.0))


@pytest.mark.parametrize("broken", [(HuggingFaceStorageWriter, "write_data"), (os, "replace")])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, broken):
    checkpoints = save(tmp_path, 1)

    def full(*unused):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*broken, full)
        checkpoints.save(2, state(2))
        wait([checkpoints.writing])
        with pytest.raises(
            RunError, match=r"step_2 .*No space left.*; earlier ones are whole"
        ) as error:
            checkpoints.raise_if_failed()
    assert "\n" not in str(error.value)
    assert os.readlink(tmp_path / "last") == "step_1"
    assert load_checkpoint(tmp_path / "last").plain["update"] == 1
    checkpoints.save(2, state(2))
    checkpoints.wait()
    assert kept(tmp_path) == ["step_2"], "what was left is pruned"


def test_what_a_killed_run_left_is_in_no_later_checkpoint(tmp_path):
    """It had more ranks, and the last of them was killed while it wrote."""
    left = tmp_path / "step_1.partial" / "shard-00004-model-00001-of-00001.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half a file")
    save(tmp_path, 1)
    assert load_checkpoint(tmp_path / "last").plain["update"] == 1
    assert not list(tmp_path.rglob(left.name))


@pytest.mark.parametrize("others", [True, False])
def test_a_damaged_one_is_refused_with_a_remedy(tmp_path, others):
    save(tmp_path, *[1, 2] if others else [2], keep_last=2)
    (tensors,) = (tmp_path / "step_2").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(RunError, match="last is damaged") as error:
        load_checkpoint(tmp_path / "last")
    remedy = f"ln -sfn step_1 {tmp_path}/last" if others else "start a new run"
    assert str(error.value).endswith(remedy) and "\n" not in str(error.value)


def test_ranks_write_about_as_many_bytes_each():
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate([100, 60, 50, 30, 10, 1])}
    own = [{f"rank_{rank}/rng": torch.zeros(0)} for rank in range(3)]
    parts = [checkpoint.partition_tensors(tensors | own[rank], rank, 3) for rank in range(3)]
    written = sorted(name for part in parts for name in part)
    assert written == sorted([*tensors, "rank_0/rng", "rank_1/rng", "rank_2/rng"])
    assert all(own[rank].keys() <= parts[rank].keys() for rank in range(3))
    assert max(sum(t.nbytes for t in part.values()) for part in parts) == 100 * 4
