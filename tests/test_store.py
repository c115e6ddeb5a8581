"""The store of hidden states: what comes back, what happens to damaged, cut and missing files, and
who may write.
"""

import errno
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hidden_states_section, in_another_process
from safetensors.numpy import load_file

from eagle3.batch import Document, Features
from eagle3.errors import RunError
from eagle3.hidden_states import shards as shard_module
from eagle3.hidden_states.int8 import GROUP, dequantise, quantise
from eagle3.hidden_states.shards import DTYPES, document_bytes
from eagle3.hidden_states.store import HybridStore, Store, create_store, is_complete, open_store

INPUTS = {"model.aux_layer_ids": [1, 3, 4], "hidden_states.dtype": "bf16"}
HIDDEN = 48  # A = 144: one whole group and a shorter one
HIDDEN_STATES = ("aux_hidden_states", "last_hidden_states")
VOCAB = np.arange(7)


def document(key: int, length: int = 0, hidden_size: int = HIDDEN, kind=torch.float32) -> Document:
    """Random, the same for the same arguments; every fifth has no supervised token."""
    generator = torch.Generator().manual_seed(key)
    n = length or 3 + key % 11
    mask = (torch.rand(n, generator=generator) < 0.5) & (key % 5 != 4)
    u = int((mask | torch.cat([torch.tensor([False]), mask[:-1]])).sum())
    aux = (torch.randn(n, 3 * hidden_size, generator=generator) * 10).to(kind)
    last = torch.randn(u, hidden_size, generator=generator).to(kind)
    argmax = torch.randint(0, 1 << 17, (u,), generator=generator)
    features = Features(aux, last, argmax, torch.randn(u, generator=generator))
    ids = torch.randint(0, 1 << 17, (n,), generator=generator, dtype=torch.int32)
    return Document(key, ids, mask, features)


def equal(one: Document, other: Document, states: bool = True) -> bool:
    names = ("argmax", "logsumexp", *(HIDDEN_STATES if states else ()))
    pairs = [(getattr(one.features, name), getattr(other.features, name)) for name in names]
    pairs += [(one.input_ids, other.input_ids), (one.loss_mask, other.loss_mask)]
    return one.key == other.key and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:08d}.safetensors"


def begin(folder: Path, dtype: str = "bf16", inputs: dict = INPUTS) -> Store:
    create_store(folder, inputs | {"hidden_states.dtype": dtype})
    return Store(folder)


def make(folder: Path, dtype: str = "bf16", kind: torch.dtype = torch.bfloat16) -> list[Document]:
    """Three shards of six documents; keys are neither in order nor without gaps."""
    store = begin(folder, dtype)
    documents = [document(7 * i % 40, kind=kind) for i in range(18)]
    for number in range(3):
        store.write(number, documents[6 * number : 6 * number + 6])
    finish(store, 3, documents)
    return documents


def finish(store: Store, num_shards: int, documents: list[Document]) -> None:
    order = np.array([d.key for d in documents])
    lengths = np.array([len(d.input_ids) for d in documents])
    supervised = np.array([int(d.loss_mask.sum()) for d in documents])
    store.complete(num_shards, order=order, lengths=lengths, supervised=supervised, vocab=VOCAB)


def read(folder: Path, on_damage: str = "fail") -> Store:
    return open_store(hidden_states_section(on_damage=on_damage), folder, {})


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("dtype, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_round_trip_is_exact(tmp_path, dtype, kind):
    documents = make(tmp_path, dtype, kind)
    store = read(tmp_path)
    found = store.load([d.key for d in documents])
    assert list(found) == [d.key for d in documents] == store.order.tolist()
    assert all(equal(found[d.key], d) for d in documents)
    assert store.lengths.tolist() == [len(d.input_ids) for d in documents]
    assert store.supervised.tolist() == [int(d.loss_mask.sum()) for d in documents]
    assert store.lengths.dtype == store.supervised.dtype == np.int64
    assert store.vocab(3).tolist() == VOCAB.tolist()
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    tokens = int(store.lengths.sum())
    assert store.facts == {
        "shards": 3, "documents": 18, "bytes": size, "tokens": tokens,
        "teacher_rows": sum(len(d.features.argmax) for d in documents),
        "bytes_per_token": round(size / tokens, 1),
    }  # fmt: skip


def test_bf16_rounds_and_int8_is_bounded(tmp_path):
    for dtype in ("bf16", "int8"):
        documents = make(tmp_path / dtype, dtype, torch.float32)
        found = read(tmp_path / dtype).load([d.key for d in documents])
        for wanted in documents:
            one, other = found[wanted.key].features, wanted.features
            assert equal(found[wanted.key], wanted, states=False)
            assert torch.equal(one.last_hidden_states, other.last_hidden_states.bfloat16())
            assert one.aux_hidden_states.dtype == torch.bfloat16
            if dtype == "bf16":
                assert torch.equal(one.aux_hidden_states, other.aux_hidden_states.bfloat16())
            else:
                within_bound(one.aux_hidden_states, other.aux_hidden_states)


def within_bound(found: torch.Tensor, wanted: torch.Tensor) -> None:
    for first in range(0, wanted.shape[1], GROUP):
        a, b = found[:, first : first + GROUP].double(), wanted[:, first : first + GROUP].double()
        assert ((a - b).abs() <= b.abs().amax(1, keepdim=True) / 126).all()


@pytest.mark.parametrize("width", [12, 128, 144, 384, 3000])
def test_int8_bound_holds_for_any_states(width):
    torch.manual_seed(0)
    states = torch.randn(300, width) * torch.logspace(-30, 30, 300)[:, None]
    states *= torch.rand(width).pow(8)
    states[5], states[6, width // 2 :] = 0, 0
    states[7] = torch.arange(width) % 255 - 127.0
    for wanted in (states, states.bfloat16()):
        values, scales = quantise(wanted)
        assert values.dtype == torch.int8 and scales.shape == (300, -(-width // GROUP))
        within_bound(dequantise(values, scales), wanted)
        largest = torch.stack([g.abs().amax(1) for g in wanted.float().split(GROUP, 1)], 1)
        assert (scales.double() * 127 >= largest.double() * (1 - 1e-7)).all()
        assert values.abs().max() <= 127


def test_sizes_are_exact_and_int8_is_small(tmp_path):
    sizes = {dtype: document_bytes(1000, 600, 4096, dtype) for dtype in DTYPES}
    assert sizes == {"fp32": 58_992_240, "bf16": 29_501_040, "int8": 17_405_040}
    for dtype in DTYPES:
        documents = make(tmp_path / dtype, dtype)[:6]
        lengths = np.array([len(d.input_ids) for d in documents], np.int32)
        rows = np.array([len(d.features.argmax) for d in documents], np.int32)
        sizes = document_bytes(lengths, rows, HIDDEN, dtype)
        assert sizes.dtype == np.int64
        path = shard(tmp_path / dtype, 0)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == header + sizes.sum()
    long = np.array([1 << 20], np.int32)
    assert document_bytes(long, long, 4096, "fp32")[0] > 1 << 32


def test_safetensors_reads_a_shard(tmp_path):
    documents = make(tmp_path, "fp32", torch.float32)[:6]
    tensors = load_file(shard(tmp_path, 0))
    assert tensors["documents"][:, 0].tolist() == [d.key for d in documents]
    aux = torch.cat([d.features.aux_hidden_states for d in documents])
    assert np.array_equal(tensors["aux_hidden_states"], aux)
    assert np.array_equal(tensors["loss_mask"], torch.cat([d.loss_mask for d in documents]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*HIDDEN_STATES, "logsumexp"])
def test_non_finite_states_are_refused(tmp_path, dtype, name):
    store = begin(tmp_path, dtype)
    for bits in (0x7F800000, -0x00800000, 0x7FC00000, 0x7FFFFFFF, -1):  # infinite, and NaNs
        documents = [document(3, 40), document(5, 40)]
        getattr(documents[1].features, name).view(-1).view(torch.int32)[11] = bits
        with pytest.raises(RunError, match=r"^document 5: its .* not finite"):
            store.write(0, documents)
    assert not list(tmp_path.glob("shard*"))


def damaged_by(folder: Path) -> set[int]:
    """Keys of the documents that are lost; every other one must be whole."""
    store = read(folder, "skip")
    keys = store.order.tolist()
    found = store.load(keys)
    assert set(found) | set(store.damaged) == set(keys) and not set(found) & set(store.damaged)
    assert all(equal(found[key], document(key, kind=torch.bfloat16), False) for key in found)
    return set(store.damaged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_byte_damages_one_document(tmp_path, dtype):
    documents = make(tmp_path, dtype)[6:12]
    path = shard(tmp_path, 1)
    opened = shard_module.Shard(path, Store(tmp_path).fingerprint)
    for name, column in opened.columns.items():
        counted = "input_ids" if column.per == "tokens" else "argmax"
        rows = [len((vars(d) | vars(d.features))[counted]) for d in documents]
        for victim in (i for i in range(6) if rows[i]):
            first = opened.starts[name] + column.row_bytes * sum(rows[:victim])
            for place in (first, first + column.row_bytes * rows[victim] - 1):
                flip(path, place)
                assert damaged_by(tmp_path) == {documents[victim].key}, name
                flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_a_damaged_document_fails_by_default(tmp_path):
    documents = make(tmp_path)
    path = shard(tmp_path, 1)
    key = documents[11].key  # the last in it; the last column is one of bytes
    flip(path, path.stat().st_size - 1)
    with pytest.raises(RunError, match=rf"^document {key} cannot be read: .*_00000001.*=skip"):
        read(tmp_path).load([documents[0].key, key])
    skipping = read(tmp_path, "skip")
    assert list(skipping.load([key, documents[7].key])) == [documents[7].key]
    assert list(skipping.damaged) == [key] and skipping.load([key]) == {}


def test_a_flipped_byte_in_the_head_loses_nothing_silently(tmp_path):
    """All documents of the shard are lost, or the byte did not matter; the others are whole."""
    documents = make(tmp_path)
    path, lost = shard(tmp_path, 1), {d.key for d in documents[6:12]}
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(0, header, 11), *range(header, header + 6 * 40, 7)]:
        flip(path, place)
        damaged = damaged_by(tmp_path)
        assert damaged <= lost and (place < header or damaged == lost)
        flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_missing_cut_and_exchanged_shards(tmp_path):
    documents = make(tmp_path)
    path, lost = shard(tmp_path, 2), {d.key for d in documents[12:]}
    content = path.read_bytes()
    path.unlink()
    assert not is_complete(tmp_path)
    with pytest.raises(RunError, match=r"_00000002.safetensors is missing; .*on_damage=skip"):
        read(tmp_path)
    assert damaged_by(tmp_path) == lost
    begin(tmp_path / "other", inputs={"model": "x"}).write(2, documents[12:])
    others = shard(tmp_path / "other", 2).read_bytes()
    for wrong in (b"", content[:5], content[:100], content[:-1], content + b"x", others):
        path.write_bytes(wrong)
        with pytest.raises(RunError, match=r"_00000002.safetensors .*on_damage=skip"):
            read(tmp_path)
        assert damaged_by(tmp_path) == lost
    path.write_bytes(content)
    store = read(tmp_path, "skip")
    os.truncate(path, 3000)
    keys = store.order.tolist()
    assert set(store.load(keys)) | set(store.damaged) == set(keys)
    assert set() < set(store.damaged) <= lost


def test_a_failing_disk_is_damage_and_too_many_files_are_not(tmp_path, monkeypatch):
    documents = make(tmp_path)
    store, fromfile = read(tmp_path, "skip"), np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *a, **b: fromfile(*a, **b)[:-1])
    key = documents[0].key
    assert store.load([key]) == {} and "its disk fails" in store.damaged[key]

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(np, "fromfile", refuse)
    with pytest.raises(OSError, match="Too many"):
        store.load([documents[1].key])


def test_damaged_index(tmp_path):
    make(tmp_path)
    path = tmp_path / "index.npz"
    order = Store(tmp_path).order.tolist()
    for place in range(0, path.stat().st_size, 13):
        flip(path, place)
        try:
            assert read(tmp_path).order.tolist() == order
        except RunError as error:
            assert "index.npz is damaged" in str(error)
        flip(path, place)
    (tmp_path / "store.json").write_bytes(b"{")
    with pytest.raises(RunError, match=r"store.json is damaged"):
        read(tmp_path)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no complete store"):
        read(tmp_path / "none")


def test_a_document_is_read_alone(tmp_path, monkeypatch):
    documents = [document(i, 200, 512) for i in range(20)]
    store = begin(tmp_path, "fp32")
    store.write(0, documents)
    finish(store, 1, documents)
    store = read(tmp_path)
    sizes, fromfile = [], np.fromfile

    def count(path, dtype, size, offset):
        sizes.append(size)
        return fromfile(path, dtype, size, offset=offset)

    monkeypatch.setattr(np, "fromfile", count)
    store.load([17])
    stored = document_bytes(200, len(documents[17].features.argmax), 512, "fp32")
    assert sum(sizes) == stored - 40


def test_a_full_disk_leaves_nothing(tmp_path):
    store = begin(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError) as caught:
            store.write(0, [document(1, 200)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and not list(tmp_path.glob("shard*"))


def test_another_store_is_refused(tmp_path):
    create_store(tmp_path, INPUTS)
    create_store(tmp_path, INPUTS | {"documents": "not known there"})
    for layers, sentence in {
        (0, 1, 2): r"with model.aux_layer_ids=\[1, 3, 4\], this run has model.*=\[0, 1, 2\]",
        None: r"this run has model.aux_layer_ids=null",
    }.items():
        with pytest.raises(RunError, match=sentence):
            create_store(tmp_path, INPUTS | {"model.aux_layer_ids": layers and list(layers)})


def hybrid(folder: Path, rank=0, world_size=1, on_damage="fail", max_disk="1GB") -> HybridStore:
    section = hidden_states_section(folder, max_disk=max_disk, on_damage=on_damage)
    return HybridStore(section, INPUTS, "unused", rank, world_size)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_was_added_is_found_again(tmp_path):
    documents = [document(i, 30, kind=torch.bfloat16) for i in range(30)]
    first = hybrid(tmp_path)
    assert first.load([0, 1]) == {}
    for i in range(0, 30, 3):
        first.add([documents[j] for j in (i, i + 1, i + 2, i)])
    first.sync()
    first.sync()
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 2 and first.facts["documents"] == 30
    other = hybrid(tmp_path, 1, 2)
    for store in (first, other):
        found = store.load([5, 5000, 2, *range(30)])
        assert sorted(found) == list(range(30))
        assert all(equal(found[i], documents[i]) for i in found)
    other.add([documents[3], document(2000, kind=torch.bfloat16)])
    other.close()
    first.scan()
    assert first.facts["documents"] == 31 and list(first.load([2000])) == [2000]
    assert len(list(tmp_path.glob("*.safetensors"))) == shards + 1
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
        (tmp_path / f"{shard(tmp_path, number).name}.0123abcd.tmp").write_bytes(b"x")
    lost = {i for i in range(30) if first.places[i] >> 24 < 2}
    last = max(i for i in range(30) if first.places[i] >> 24 == 2)
    with pytest.raises(RunError, match=r"hidden_states\.on_damage=skip"):
        hybrid(tmp_path)
    again = hybrid(tmp_path, on_damage="skip")
    assert set(again.load(list(range(30)))) == set(range(30)) - lost - {last}
    assert list(again.damaged) == [last] and all(path.exists() for path in paths)
    assert not list(tmp_path.glob("*.tmp"))
    again.add(documents)
    again.close()
    assert set(again.load(list(range(30)))) == set(range(30))


@pytest.mark.parametrize("budget", [300, 400, 50_000, 100_000, 400_001])
def test_the_budget_is_never_exceeded(tmp_path, budget):
    def used() -> int:
        return sum(path.stat().st_size for path in tmp_path.iterdir())

    def add_to(stores: list[HybridStore], keys: range) -> None:
        for i in keys:
            stores[i % len(stores)].add([document(i, 30)])
            stores[i % len(stores)].sync()
            assert used() <= budget
        for store in stores:
            store.close()

    limit = f"{budget}B"
    add_to([hybrid(tmp_path, max_disk=limit)], range(3))
    add_to([hybrid(tmp_path, rank, 2, max_disk=limit) for rank in (0, 1)], range(3, 100))
    assert used() > budget - 2 * (15_000 + 2048)
    last = [hybrid(tmp_path, rank, 3, max_disk=limit) for rank in (0, 1, 2)]
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


def test_adding_waits_for_the_shard_before(tmp_path):
    store = hybrid(tmp_path)
    for i in range(10):
        store.add([document(i), document(i)])
        assert sorted(store.load(list(range(10))))[:i] == list(range(i))
    store.close()
    assert store.facts["documents"] == store.facts["shards"] == 10


def test_what_writing_ran_into_is_raised(tmp_path, monkeypatch):
    store = hybrid(tmp_path / "full")
    store.add([document(0)])
    store.sync()
    fsync = os.fsync

    def full(descriptor):
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    store.add([document(1)])
    with pytest.raises(RunError, match=r"No space left on device.*hidden_states\.max_disk"):
        store.sync()
    assert store.full and sorted(store.load([0, 1, 2])) == [0]
    with pytest.raises(RunError):
        store.close()
    assert len(list((tmp_path / "full").glob("shard_*"))) == 1
    monkeypatch.undo()
    store, broken = hybrid(tmp_path / "broken"), document(7, 20)
    broken.features.aux_hidden_states[3, 4] = float("nan")
    store.add([broken])
    with pytest.raises(RunError, match=r"document 7: .* not finite"):
        store.close()


def add_for_ever(folder: Path) -> None:
    store = hybrid(folder)
    for i in range(0, 1 << 30, 4):
        store.add([document(j, 400) for j in range(i, i + 4)])


@pytest.mark.runs
def test_a_killed_writer_leaves_whole_shards(tmp_path):
    writer = in_another_process(add_for_ever, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.safetensors"))) >= 2)
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


def test_the_folder_and_the_budget_of_hybrid(tmp_path):
    for max_disk, least in (("3MB", 3_000_000), (None, 10_000_000)):
        section = hidden_states_section(max_disk=max_disk)
        store = HybridStore(section, INPUTS, str(tmp_path), 0, 1)
        assert store.folder.parent == tmp_path / "hybrid" and store.max_bytes >= least
        store.close()
