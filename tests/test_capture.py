"""The stage `capture`: the same store, whoever wrote it and however often killed."""

import errno
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import handle_of, hidden_states_section, in_another_process

from eagle3.batch import fill
from eagle3.data.prepare import INDEX, Prepared
from eagle3.errors import RunError
from eagle3.hidden_states import capture as capturing
from eagle3.hidden_states import store
from eagle3.hidden_states.capture import capture, compute_features, locate_store, plan_shards
from eagle3.hidden_states.store import Store, is_complete, open_store, store_inputs
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import HFTarget


def documents(lengths, seed=0, repeated=0):
    """Random documents; the last `repeated` index entries are the first ones again."""
    randomly = np.random.default_rng(seed)
    index = np.zeros(len(lengths), INDEX)
    index["length"], index["start"] = lengths, np.cumsum(lengths) - lengths
    mask = randomly.random(sum(lengths)) < 0.6
    for place, (start, length) in enumerate(index[["start", "length"]].tolist()):
        own = mask[start : start + length]
        index["supervised"][place] = own.sum()
        index["teachers"][place] = (own | np.append(False, own[:-1])).sum()
    index = np.concatenate([index, index[:repeated]])
    ids = randomly.integers(0, 500, sum(lengths)).astype(np.int32)
    return Prepared(ids, mask, index, np.arange(300), [], facts={"digest": f"digest {seed}"})


@pytest.fixture(scope="module")
def target(target_folder):
    return handle_of(target_folder, batch_tokens=128)


@pytest.fixture(scope="module")
def prepared():
    return documents(np.random.default_rng(3).integers(8, 60, 40).tolist(), repeated=5)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(capturing, "POLL_SECONDS", 0.05)


def store_in(folder, prepared, target, **section) -> Store:
    section = hidden_states_section(folder, **section)
    capture(section, prepared, target, "unused", shown=False)
    return open_store(section, *locate_store(section, prepared, target, "unused"))


def contents(folder):
    """Every file of a finished store."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared, target):
    folder = tmp_path_factory.mktemp("whole")
    return store_in(folder, prepared, target)


def test_plans_hold_every_document_once(prepared):
    shards = plan_shards(prepared, prepared.lengths * 400, 128, 100_000)
    flat = [number for shard in shards for batch in shard for number in batch]
    assert sorted(flat) == list(range(40)), "the five that repeat earlier ones come once"
    assert all(prepared.lengths[batch].sum() <= 128 for shard in shards for batch in shard)
    lengths = [prepared.lengths[n] for n in flat]
    assert len(shards) > 3 and lengths == sorted(lengths, reverse=True)
    lengths = [40, 20, 30, 90, 5, 6]
    assert fill(lengths, lengths, 64) == [[40, 20], [30], [90], [5, 6]]
    two = documents([500, 3])
    assert plan_shards(two, two.lengths * 400, 128, 100_000) == [[[0]], [[1]]]


def test_a_store_holds_what_the_target_computes(whole, prepared, target):
    assert whole.facts["documents"] == 40
    assert whole.order.tolist() == [*range(40), *range(5)]
    assert whole.lengths.tolist() == prepared.lengths.tolist()
    assert whole.supervised.tolist() == prepared.supervised.tolist()
    assert whole.vocab(9).tolist() == list(range(300))
    shards = plan_shards(prepared, prepared.lengths, 128, 100_000)
    for batch in (batch for shard in shards for batch in shard):
        found = whole.load(batch)
        for wanted in compute_features(target.load(), prepared.load(batch)):
            got = found[wanted.key]
            for name in ("input_ids", "loss_mask"):
                assert torch.equal(getattr(got, name), getattr(wanted, name)), name
            for name, value in vars(wanted.features).items():
                assert torch.equal(getattr(got.features, name), value), name


def test_a_complete_store_is_found_without_a_target(whole, prepared, target_folder, monkeypatch):
    monkeypatch.setattr(TargetHandle, "load", lambda self: pytest.fail("the target was loaded"))
    target, section = (
        handle_of(target_folder, batch_tokens=128),
        hidden_states_section(whole.folder),
    )
    folder, inputs = locate_store(section, prepared, target, "unused")
    assert is_complete(folder) and open_store(section, folder, inputs).facts == whole.facts
    alone = store_inputs(target, "fp32", None)
    assert open_store(section, whole.folder, alone).facts == whole.facts


def test_what_does_not_fit_is_refused(whole, prepared, target, target_folder, tmp_path):
    section = hidden_states_section(dtype="fp32")
    folder, inputs = locate_store(section, prepared, target, str(tmp_path))
    assert folder.parent == tmp_path / "hidden_states" and not is_complete(folder)
    with pytest.raises(RunError, match=f"^{folder}.*add capture to stages"):
        open_store(section, folder, inputs)
    layers = handle_of(target_folder, [0, 2, 4], batch_tokens=128)
    with pytest.raises(RunError, match=r"model.aux_layer_ids=\[1, 3, 4\], .*=\[0, 2, 4\]"):
        store_in(whole.folder, prepared, layers)
    with pytest.raises(RunError, match=r'documents="digest 0", this run has documents="digest 1"'):
        store_in(whole.folder, documents([20] * 5, seed=1), target)


def test_a_full_disk_ends_it_and_the_next_goes_on(tmp_path, whole, prepared, target, monkeypatch):
    written, write = [], store.write_atomically

    def limited(path, pieces):
        if path.suffix == ".safetensors":
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
        write(path, pieces)

    monkeypatch.setattr(store, "write_atomically", limited)
    with pytest.raises(RunError, match=r"No space left .* the same command goes on"):
        store_in(tmp_path, prepared, target)
    with pytest.raises(RunError, match="batch_tokens=128, this run has batch_tokens=64"):
        store_in(tmp_path, prepared, handle_of(target.spec.path, batch_tokens=64))
    left = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(store, "write_atomically", write)
    store_in(tmp_path, prepared, target)
    assert len(left) == 2 and left == {path: path.stat().st_mtime_ns for path in left}
    assert len(list(tmp_path.glob("shard_*"))) == whole.facts["shards"]
    assert contents(tmp_path) == contents(whole.folder)
    next(tmp_path.glob("shard_*")).unlink()  # and is captured again
    store_in(tmp_path, prepared, target)
    assert contents(tmp_path) == contents(whole.folder)


def test_a_disk_that_cannot_hold_it_is_refused_before(tmp_path, prepared, target, monkeypatch):
    with pytest.raises(RunError, match=r"hidden_states\.max_disk leaves"):
        store_in(tmp_path / "b", prepared, target, max_disk="100KB")
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"hidden_states\.dtype=int8"):
        store_in(tmp_path / "a", prepared, target)
    assert not list(tmp_path.glob("*/shard*"))


def test_states_that_are_not_finite_are_named(tmp_path, prepared, target, monkeypatch):
    def broken(self, batch):
        features = call(self, batch)
        features.aux_hidden_states[3, 5] = float("nan")
        return features

    call = HFTarget.__call__
    monkeypatch.setattr(HFTarget, "__call__", broken)
    with pytest.raises(RunError, match=r"^document \d+: .*not finite"):
        store_in(tmp_path, prepared, target)


@pytest.mark.parametrize("at", [3, 9])
def test_an_interruption_costs_the_batches_under_way(
    tmp_path, whole, prepared, target, monkeypatch, at
):
    """All of it would fit into one shard."""
    calls, original = [], capturing.compute_features

    def interrupted(*given):
        calls.append(given)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(capturing, "compute_features", interrupted)
    try:
        store_in(tmp_path, prepared, target)
    except KeyboardInterrupt as stopped:  # whose traceback would keep the last claim's lock
        said = stopped.kept
    written = list(tmp_path.glob("shard_*"))
    assert len(written) == at - 1 < whole.facts["shards"]
    kept = sum(len(documents) for _, documents in calls[:-1])
    assert said == f"capture keeps {kept} of 40 documents"
    store_in(tmp_path, prepared, target)
    assert len(calls) - at == whole.facts["shards"] - len(written)
    assert contents(tmp_path) == contents(whole.folder)


def capture_and_report(folder, prepared, target, written, stop_after=99):
    """In a process of its own: says which shards it wrote, and stands still after some."""
    write = Store.write

    def reporting(self, number, computed):
        write(self, number, computed)
        written.put(number)
        time.sleep(1000 if stop_after == 1 + number else 0.05)

    Store.write = reporting
    store_in(folder, prepared, target)


def next_of(queue, process):
    while queue.empty():
        assert process.is_alive()
        time.sleep(0.01)
    return queue.get()


@pytest.mark.runs
def test_killed_and_gone_on_with_by_two(tmp_path, whole, prepared, target):
    """SIGKILL in the middle, then two at once: each shard is written once, the store the same."""
    written = [multiprocessing.SimpleQueue() for _ in range(3)]
    given = tmp_path, prepared, target
    first = in_another_process(capture_and_report, *given, written[0], 2)
    done = {next_of(written[0], first), next_of(written[0], first)}
    first.kill()
    first.join()
    assert not (tmp_path / "index.npz").exists()
    both = [in_another_process(capture_and_report, *given, queue) for queue in written[1:]]
    for process in both:
        process.join()
        assert process.exitcode == 0
    rest = [{queue.get() for _ in iter(queue.empty, True)} for queue in written[1:]]
    assert not rest[0] & rest[1] and not done & (rest[0] | rest[1])
    assert done | rest[0] | rest[1] == set(range(whole.facts["shards"]))
    assert contents(tmp_path) == contents(whole.folder)
