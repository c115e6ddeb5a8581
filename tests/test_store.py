"""The store of hidden states: what comes back, damaged, cut and missing files, who may write."""

import errno
import io
import os
import time

import numpy as np
import pytest
import torch
from conftest import flip, hidden_states_section, in_another_process
from safetensors.numpy import load_file

from eagle3.batch import Document, Features, concatenate_features
from eagle3.errors import RunError
from eagle3.hidden_states import shards
from eagle3.hidden_states.int8 import GROUP, dequantise, quantise
from eagle3.hidden_states.shards import DTYPES, Shard, document_bytes, shard_path
from eagle3.hidden_states.store import HybridStore, Store, create_store, is_complete, open_store

INPUTS = {"model.aux_layer_ids": [1, 3, 4], "hidden_states.dtype": "bf16"}
HIDDEN = 48
SIZES = HIDDEN, 3 * HIDDEN  # A = 144: one whole group and a shorter one
FP32, BF16 = torch.float32, torch.bfloat16
FOUND = ("input_ids", "loss_mask", "argmax", "logsumexp")
STATES = ("aux_hidden_states", "last_hidden_states")


def document(key, length=0, kind=FP32) -> Document:
    """Random, the same for the same arguments; every fifth has no supervised token."""
    generator = torch.Generator().manual_seed(key)
    n = length or 3 + key % 11
    mask = (torch.rand(n, generator=generator) < 0.5) & (key % 5 != 4)
    u = int((mask | torch.cat([torch.tensor([False]), mask[:-1]])).sum())
    aux = (torch.randn(n, 3 * HIDDEN, generator=generator) * 10).to(kind)
    last = torch.randn(u, HIDDEN, generator=generator).to(kind)
    argmax = torch.randint(0, 1 << 17, (u,), generator=generator)
    features = Features(aux, last, argmax, torch.randn(u, generator=generator))
    ids = torch.randint(0, 1 << 17, (n,), generator=generator, dtype=torch.int32)
    return Document(key, ids, mask, features)


def equal(one, other, names=FOUND) -> bool:
    one, other = ({**vars(each), **vars(each.features)} for each in (one, other))
    pairs = [(one[name], other[name]) for name in names]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def begin(folder, dtype="bf16", **inputs) -> Store:
    create_store(folder, INPUTS | inputs | {"hidden_states.dtype": dtype})
    return Store(folder)


def make(folder, dtype="bf16", kind=BF16) -> list[Document]:
    """Three shards of six documents; keys are neither in order nor without gaps."""
    store, documents = begin(folder, dtype), [document(7 * i % 40, 0, kind) for i in range(18)]
    for number in range(3):
        store.write(number, documents[6 * number : 6 * number + 6])
    order, lengths = ([f(d) for d in documents] for f in (lambda d: d.key, length))
    supervised = [int(d.loss_mask.sum()) for d in documents]
    columns = {"order": order, "lengths": lengths, "supervised": supervised, "vocab": range(7)}
    store.complete(3, **{name: np.array(column) for name, column in columns.items()})
    return documents


def length(document) -> int:
    return len(document.input_ids)


def read(folder, on_damage="fail") -> Store:
    return open_store(hidden_states_section(on_damage=on_damage), folder, {})


def within_bound(found, wanted) -> bool:
    pairs = zip(found.double().split(GROUP, 1), wanted.double().split(GROUP, 1))
    return all(((a - b).abs() <= b.abs().amax(1, keepdim=True) / 126).all() for a, b in pairs)


WRITTEN = [("fp32", FP32), ("bf16", BF16), ("bf16", FP32), ("int8", FP32)]


@pytest.mark.parametrize("dtype, kind", WRITTEN)
def test_what_was_written_comes_back(tmp_path, dtype, kind):
    documents = make(tmp_path, dtype, kind)
    store = read(tmp_path)
    found = store.load([d.key for d in documents])
    assert list(found) == [d.key for d in documents] == store.order.tolist()
    assert store.lengths.tolist() == [length(d) for d in documents]
    assert store.supervised.tolist() == [int(d.loss_mask.sum()) for d in documents]
    assert store.lengths.dtype == store.supervised.dtype == np.int64
    assert store.vocab(3).tolist() == list(range(7))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    tokens, rows = int(store.lengths.sum()), sum(len(d.features.argmax) for d in documents)
    facts = {"shards": 3, "documents": 18, "bytes": size, "tokens": tokens, "teacher_rows": rows}
    assert store.facts == facts | {"bytes_per_token": round(size / tokens, 1)}
    if dtype == "fp32":  # safetensors reads it too
        tensors = load_file(shard_path(tmp_path, 0))
        assert tensors["documents"][:, 0].tolist() == [d.key for d in documents[:6]]
        aux = torch.cat([d.features.aux_hidden_states for d in documents[:6]])
        assert np.array_equal(tensors["aux_hidden_states"], aux)
    for wanted in documents:
        got, kept = found[wanted.key], FP32 if dtype == "fp32" else BF16
        if dtype == "int8":
            aux = got.features.aux_hidden_states
            assert within_bound(aux, wanted.features.aux_hidden_states)
            wanted.features.aux_hidden_states = aux
        for name in STATES:
            setattr(wanted.features, name, getattr(wanted.features, name).to(kept))
        assert got.key == wanted.key and equal(got, wanted, FOUND + STATES)


@pytest.mark.parametrize("width", [12, 128, 144, 3000])
def test_int8_bound_holds_for_any_states(width):
    torch.manual_seed(0)
    states = torch.randn(300, width) * torch.logspace(-30, 30, 300)[:, None]
    states *= torch.rand(width).pow(8)
    states[5], states[6, width // 2 :] = 0, 0
    states[7] = torch.arange(width) % 255 - 127.0
    for wanted in (states, states.bfloat16()):
        values, scales = quantise(wanted)
        assert values.dtype == torch.int8 and scales.shape == (300, -(-width // GROUP))
        dequantise(values, scales, out=(found := torch.empty(values.shape, dtype=torch.bfloat16)))
        assert within_bound(found, wanted) and values.abs().max() <= 127
        largest = torch.stack([g.abs().amax(1) for g in wanted.float().split(GROUP, 1)], 1)
        assert (scales.double() * 127 >= largest.double() * (1 - 1e-7)).all()


def test_sizes_are_exact_and_int8_is_small(tmp_path):
    sizes = {dtype: document_bytes(1000, 600, (4096, 3 * 4096), dtype) for dtype in DTYPES}
    assert sizes == {"fp32": 58_992_240, "bf16": 29_501_040, "int8": 17_405_040}
    for dtype in DTYPES:
        documents, path = make(tmp_path / dtype, dtype)[:6], shard_path(tmp_path / dtype, 0)
        lengths, rows = zip(*((length(d), len(d.features.argmax)) for d in documents))
        sizes = document_bytes(np.array(lengths, np.int32), np.array(rows), SIZES, dtype)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == header + sizes.sum()
    long = np.array([1 << 20], np.int32)
    assert document_bytes(long, long, (4096, 3 * 4096), "fp32")[0] > 1 << 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*STATES, "logsumexp"])
def test_non_finite_states_are_refused(tmp_path, dtype, name):
    store = begin(tmp_path, dtype)
    for bits in (0x7F800000, -0x00800000, 0x7FC00000, 0x7FFFFFFF, -1):  # infinite, and NaNs
        documents = [document(3, 40), document(5, 40)]
        getattr(documents[1].features, name).view(-1).view(torch.int32)[11] = bits
        with pytest.raises(RunError, match=r"^document 5: its .* not finite"):
            store.write(0, documents)
    assert not list(tmp_path.glob("shard*"))


def damaged_by(folder) -> set[int]:
    """Keys of the documents that are lost; every other one must be whole."""
    store = read(folder, "skip")
    found = store.load(store.order.tolist())
    assert sorted([*found, *store.damaged]) == sorted(store.order)
    assert all(equal(found[key], document(key, kind=BF16)) for key in found)
    return set(store.damaged)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.runs
def test_a_flipped_byte_damages_one_document(tmp_path, dtype):
    documents, path = make(tmp_path, dtype)[6:12], shard_path(tmp_path, 1)
    opened = Shard(path, Store(tmp_path).fingerprint)
    for name, column in opened.columns.items():
        by_rows = column.per != "tokens"
        rows = [len(d.features.argmax) if by_rows else length(d) for d in documents]
        for victim in (i for i in range(6) if rows[i]):
            first = opened.starts[name] + column.row_bytes * sum(rows[:victim])
            for place in (first, first + column.row_bytes * rows[victim] - 1):
                flip(path, place)
                assert damaged_by(tmp_path) == {documents[victim].key}, name
                flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_a_damaged_document_fails_by_default(tmp_path):
    documents, path = make(tmp_path), shard_path(tmp_path, 1)
    key, other = documents[11].key, documents[7].key  # the last in it ends with the last byte
    flip(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=rf"^document {key} cannot be read: .*_00000001.*=skip"):
        read(tmp_path).load([other, key])
    skipping = read(tmp_path, "skip")
    assert list(skipping.load([key, other])) == [other]
    assert list(skipping.damaged) == [key] and skipping.load([key]) == {}


def test_a_flipped_byte_in_the_head_loses_nothing_silently(tmp_path):
    """All documents of the shard are lost, or the byte did not matter; the others are whole."""
    lost, path = {d.key for d in make(tmp_path)[6:12]}, shard_path(tmp_path, 1)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for place in [*range(0, header, 11), *range(header, header + 6 * 40, 7)]:
        flip(path, place)
        damaged = damaged_by(tmp_path)
        assert damaged <= lost and (place < header or damaged == lost)
        flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_missing_cut_and_exchanged_shards(tmp_path):
    documents, path = make(tmp_path), shard_path(tmp_path, 2)
    content, lost = path.read_bytes(), {d.key for d in documents[12:]}
    path.unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(RunError, match=r"_00000002.safetensors is missing; .*on_damage=skip"):
        read(tmp_path)
    assert damaged_by(tmp_path) == lost
    begin(tmp_path / "other", model="x").write(2, documents[12:])
    others = shard_path(tmp_path / "other", 2).read_bytes()
    for wrong in (b"", content[:5], content[:100], content[:-1], content + b"x", others):
        path.write_bytes(wrong)
        with pytest.raises(RunError, match=r"_00000002.safetensors .*on_damage=skip"):
            read(tmp_path)
        assert damaged_by(tmp_path) == lost
    path.write_bytes(content)
    store, keys = read(tmp_path, "skip"), {d.key for d in documents}
    os.truncate(path, 3000)
    assert set(store.load(list(keys))) | set(store.damaged) == keys
    assert set() < set(store.damaged) <= lost


def test_documents_of_a_batch_lie_side_by_side(tmp_path):
    """They are joined without a copy, unless one between them could not be read."""
    documents = make(tmp_path)
    keys = [d.key for d in documents[1:9]]
    for store in (read(tmp_path), read(tmp_path, "skip")):
        found = [d.features for d in store.load(keys).values()]
        joined, lost = concatenate_features(found), store.on_damage == "skip"
        wanted = Features(*map(torch.cat, zip(*(vars(f).values() for f in found), strict=True)))
        assert all(map(torch.equal, vars(joined).values(), vars(wanted).values()))
        first = found[0].aux_hidden_states
        assert (joined.aux_hidden_states.data_ptr() == first.data_ptr()) == (not lost)
        before = length(documents[0]) + length(documents[1])
        flip(shard_path(tmp_path, 0), store.open(0).starts["input_ids"] + 4 * before)


def test_what_is_read_and_a_disk_that_fails(tmp_path, monkeypatch):
    """One document's bytes; a short read is damage, too many open files are not."""
    one, two, three = make(tmp_path)[3:6]
    store, sizes = read(tmp_path, "skip"), []

    def patched(function):
        monkeypatch.setattr(shards, "open", function, raising=False)

    class File(io.FileIO):
        cut = 0

        def readinto(self, memory):
            sizes.append(len(memory))
            return super().readinto(memory[: len(memory) - self.cut])

    patched(File)
    store.load([one.key])
    stored = document_bytes(length(one), len(one.features.argmax), SIZES, "bf16")
    assert sum(sizes) == stored - 40
    File.cut = 1
    assert store.load([two.key]) == {} and "its disk fails" in store.damaged[two.key]

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    patched(refuse)
    with pytest.raises(OSError, match="Too many"):
        store.load([three.key])


def test_damaged_index(tmp_path):
    make(tmp_path)
    path, order = tmp_path / "index.npz", Store(tmp_path).order.tolist()
    for place in range(0, path.stat().st_size, 13):
        flip(path, place)
        try:
            assert read(tmp_path).order.tolist() == order
        except RunError as error:
            assert "index.npz is damaged" in str(error)
        flip(path, place)
    for damaged in (b"{", b"[]", b"[" * 100_000):
        (tmp_path / "store.json").write_bytes(damaged)
        with pytest.raises(
            RunError, match=r"store\.json is damaged .*; delete .*, to make it anew"
        ):
            read(tmp_path)
    with pytest.raises(RunError, match="holds no complete store"):
        read(tmp_path / "no")


def test_another_store_is_refused(tmp_path):
    begin(tmp_path)
    begin(tmp_path, documents="not known there")
    for layers, now in (([0, 1, 2], r"\[0, 1, 2\]"), (None, "null")):
        with pytest.raises(RunError, match=rf"_ids=\[1, 3, 4\], this run has model.*_ids={now}"):
            create_store(tmp_path, INPUTS | {"model.aux_layer_ids": layers})


def hybrid(folder, rank=0, world_size=1, on_damage="fail", max_disk="1GB") -> HybridStore:
    section = hidden_states_section(folder, max_disk=max_disk, on_damage=on_damage)
    return HybridStore(section, INPUTS, "unused", rank, world_size)


def test_a_store_that_is_used_again_or_that_is_near_is_named(tmp_path, capsys):
    stores = [hidden_states_section(tmp_path / name) for name in "ab"]
    for section, layers in zip([stores[0], *stores], (1, 1, 2)):
        inputs = INPUTS | {"model.aux_layer_ids": [layers, 3, 4]}
        HybridStore(section, inputs, "unused", 0, 1).close()
    HybridStore(stores[1], inputs, "unused", 1, 2).close()  # another rank
    changed = "model.aux_layer_ids [1, 3, 4] -> [2, 3, 4]"
    said = [f"train: reused {stores[0].path}", f"train: not the one of {stores[0].path}: {changed}"]
    assert capsys.readouterr().out.splitlines() == said


def test_what_was_added_is_found_again(tmp_path):
    documents = [document(i, 30, BF16) for i in range(30)]
    first = hybrid(tmp_path)
    assert first.load([0, 1]) == {}
    for i in range(0, 30, 3):
        first.add([documents[j] for j in (i, i + 1, i + 2, i)])
        assert sorted(first.load(list(range(30))))[:i] == list(range(i)), "waits for the one before"
    first.sync()
    assert first.facts["documents"] == 30 and first.facts["shards"] == 10
    other = hybrid(tmp_path, 1, 2)
    for store in (first, other):
        found = store.load([5, 5000, 2, *range(30)])
        assert sorted(found) == list(range(30))
        assert all(equal(found[i], documents[i], FOUND + STATES) for i in found)
    other.add([documents[3], document(2000, kind=BF16)])
    other.close()
    first.scan()
    assert first.facts["documents"] == 31 and list(first.load([2000])) == [2000]
    assert len(list(tmp_path.glob("*.safetensors"))) == 11
    first.close()


def test_damaged_shards_and_documents_are_added_again(tmp_path):
    documents = [document(i, 30) for i in range(30)]
    first = hybrid(tmp_path)
    for i in range(0, 30, 6):
        first.add(documents[i : i + 6])
    first.close()
    paths = sorted(tmp_path.glob("*.safetensors"))
    flip(paths[0], 200)
    os.truncate(paths[1], 5000)
    flip(paths[2], paths[2].stat().st_size - 1)
    for number in (0, 10_000_000 * 3):  # of this rank, and of one that is no more
        (tmp_path / f"{shard_path(tmp_path, number).name}.0123abcd.tmp").write_bytes(b"x")
    numbers = first.places[:30] >> 24
    lost, last = set(np.flatnonzero(numbers < 2)), max(np.flatnonzero(numbers == 2))
    with pytest.raises(RunError, match=r"hidden_states\.on_damage=skip"):
        hybrid(tmp_path)
    again = hybrid(tmp_path, on_damage="skip")
    assert set(again.load(list(range(30)))) == set(range(30)) - lost - {last}
    assert list(again.damaged) == [last] and all(path.exists() for path in paths)
    assert not list(tmp_path.glob("*.tmp"))
    again.add(documents)
    again.close()
    assert set(again.load(list(range(30)))) == set(range(30))


@pytest.mark.parametrize("budget", [300, 400, 50_000, 400_001])
def test_the_budget_is_never_exceeded(tmp_path, budget):
    def used():
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    def add_to(stores, keys):
        for i in keys:
            stores[i % len(stores)].add([document(i, 30)])
            stores[i % len(stores)].sync()
            assert used() <= budget
        for store in stores:
            store.close()

    def hybrids(count):
        return [hybrid(tmp_path, rank, count, max_disk=f"{budget}B") for rank in range(count)]

    add_to(hybrids(1), range(3))
    add_to(hybrids(2), range(3, 100))
    assert used() > budget - 2 * (15_000 + 2048)
    last = hybrids(3)
    assert budget < 50_000 or last[0].load(list(range(100)))
    assert last[0].full and last[1].full, "what was refused once stays refused"
    add_to(last, range(100, 130))
    assert not hybrid(tmp_path, max_disk="2MB").full


def test_the_share_of_a_rank_does_not_depend_on_the_others(tmp_path):
    """So that a resumed run keeps what an uninterrupted one does."""
    kept = []
    for name, order in (("one", (0, 1)), ("two", (1, 0))):
        for rank in order:
            store = hybrid(tmp_path / name, rank, 2, max_disk="200KB")
            for i in range(rank, 100, 10):
                store.add([document(j, 30) for j in range(i, i + 10, 2)])
            store.close()
        kept.append(sorted(hybrid(tmp_path / name).load(list(range(100)))))
    assert kept[0] == kept[1] and {key % 2 for key in kept[0]} == {0, 1}


def test_what_writing_ran_into_is_raised(tmp_path, monkeypatch):
    store, fsync = hybrid(tmp_path / "full"), os.fsync
    store.add([document(0)])
    store.sync()

    def full(descriptor):
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    store.add([document(1)])
    for act in (store.sync, store.close):
        with pytest.raises(RunError, match=r"No space left on device.*hidden_states\.max_disk"):
            act()
    assert sorted(store.load([0, 1, 2])) == [0]
    assert len(list((tmp_path / "full").glob("shard_*"))) == 1
    monkeypatch.undo()
    store, broken = hybrid(tmp_path / "broken"), document(7, 20)
    broken.features.aux_hidden_states[3, 4] = float("nan")
    store.add([broken])
    with pytest.raises(RunError, match=r"document 7: .* not finite"):
        store.close()


def add_for_ever(folder):
    store = hybrid(folder)
    for i in range(0, 1 << 30, 4):
        store.add([document(j, 400) for j in range(i, i + 4)])


@pytest.mark.runs
def test_a_killed_writer_leaves_whole_shards(tmp_path):
    writer = in_another_process(add_for_ever, tmp_path)
    while len(list(tmp_path.glob("*.safetensors"))) < 2:
        assert writer.is_alive()
        time.sleep(0.005)
    writer.kill()
    writer.join()
    store = hybrid(tmp_path)
    assert store.damaged == {} and not list(tmp_path.glob("*.tmp"))
    keys = list(range(store.facts["documents"]))
    found = store.load(keys)
    assert list(found) == keys and found[1].input_ids.equal(document(1, 400).input_ids)
    store.close()


def test_one_run_at_a_time_and_one_kind_in_a_folder(tmp_path):
    first = hybrid(tmp_path)
    with pytest.raises(RunError, match=r"another run writes .*hidden_states\.path"):
        hybrid(tmp_path)
    hybrid(tmp_path, rank=1, world_size=2).close()
    first.close()
    with pytest.raises(RunError, match=r'made with kind="hybrid", this run has kind="capture"'):
        create_store(tmp_path, INPUTS | {"kind": "capture"})
    for max_disk, least in (("3MB", 3_000_000), (None, 10_000_000)):
        store = HybridStore(hidden_states_section(max_disk=max_disk), INPUTS, str(tmp_path), 0, 1)
        assert store.folder.parent == tmp_path / "hybrid" and store.max_bytes >= least
        store.close()
