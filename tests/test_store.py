"""The store of hidden states: what comes back, what happens to damaged, cut and missing files, and
who may write.
"""

import errno
import json
import multiprocessing
import os
import re
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from eagle3.hidden_states.growing import Growing
from safetensors.numpy import load_file

from eagle3.batch import Document, Features
from eagle3.batch import concatenate_features as concatenate
from eagle3.errors import RunError
from eagle3.hidden_states import growing as growing_module
from eagle3.hidden_states import shards as shard_module
from eagle3.hidden_states import store as store_module
from eagle3.hidden_states.int8 import GROUP, dequantise, finite, quantise
from eagle3.hidden_states.store import (
    DTYPES,
    Store,
    check_inputs,
    document_bytes,
    finish,
    shard_is_complete,
    write_shard,
)

INPUTS = {"model": {"path": "tiny", "aux_layer_ids": [1, 3, 4]}, "hidden_states": {"dtype": "bf16"}}
HIDDEN = 48  # A = 144: one whole group and a shorter one
HIDDEN_STATES = ("aux_hidden_states", "last_hidden_states")


def document(
    key: int, length: int = 0, hidden_size: int = HIDDEN, kind: torch.dtype = torch.float32
) -> Document:
    """Random, the same for the same arguments; every fifth has no supervised token."""
    generator = torch.Generator().manual_seed(key)
    n = length or 3 + key % 11
    mask = (torch.rand(n, generator=generator) < 0.5) & (key % 5 != 4)
    before = mask.roll(1)
    before[0] = False
    u = int((mask | before).sum())
    features = Features(
        (torch.randn(n, 3 * hidden_size, generator=generator) * 10).to(kind),
        torch.randn(u, hidden_size, generator=generator).to(kind),
        torch.randint(0, 1 << 17, (u,), generator=generator),
        torch.randn(u, generator=generator),
    )
    return Document(
        key, torch.randint(0, 1 << 17, (n,), generator=generator, dtype=torch.int32), mask, features
    )


def equal(one: Document, other: Document, states: bool = True) -> bool:
    names = ("argmax", "logsumexp", *(HIDDEN_STATES if states else ()))
    pairs = [(getattr(one.features, name), getattr(other.features, name)) for name in names]
    pairs += [(one.input_ids, other.input_ids), (one.loss_mask, other.loss_mask)]
    return one.key == other.key and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:06d}.safetensors"


def make(folder: Path, dtype: str = "bf16", kind: torch.dtype = torch.bfloat16) -> list[Document]:
    """Three shards of six documents; keys are neither in order nor without gaps."""
    folder.mkdir(exist_ok=True)
    documents = [document(7 * i % 40, kind=kind) for i in range(18)]
    for number in range(3):
        write_shard(folder, number, documents[6 * number : 6 * number + 6], dtype)
    finish(folder, INPUTS, 3)
    return documents


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 16]))


def layout(path: Path) -> tuple[int, dict]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length, json.loads(content[8 : 8 + length])


def in_another_process(function, *arguments) -> multiprocessing.Process:
    """Forked, as importing torch takes seconds; on one thread, as OpenMP's do not survive that."""

    def run():
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("dtype, kind", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_round_trip_is_exact(tmp_path, dtype, kind):
    documents = make(tmp_path, dtype, kind)
    store = Store(tmp_path)
    assert (store.hidden_size, store.dtype, store.inputs, len(store)) == (HIDDEN, dtype, INPUTS, 18)
    for one, other in zip(store.load([d.key for d in documents]), documents, strict=True):
        assert equal(one, other)
        key, ids, mask = store.document(one.key)
        assert (key, ids.dtype, mask.dtype) == (one.key, torch.int32, torch.bool)
        assert torch.equal(ids, other.input_ids) and torch.equal(mask, other.loss_mask)
    by_key = sorted(documents, key=lambda d: d.key)
    assert store.keys.tolist() == [d.key for d in by_key]
    assert (
        store.lengths.tolist() == [len(d.input_ids) for d in by_key]
        and store.lengths.dtype == np.int64
    )
    assert store.supervised.tolist() == [int(d.loss_mask.sum()) for d in by_key]
    assert store.verify() == []


def test_bf16_rounds_and_int8_is_bounded(tmp_path):
    for dtype in ("bf16", "int8"):
        documents = make(tmp_path / dtype, dtype, torch.float32)
        for one, other in zip(
            Store(tmp_path / dtype).load([d.key for d in documents]), documents, strict=True
        ):
            assert equal(one, other, states=False)
            assert torch.equal(
                one.features.last_hidden_states, other.features.last_hidden_states.bfloat16()
            )
            assert one.features.aux_hidden_states.dtype == torch.bfloat16
            if dtype == "bf16":
                assert torch.equal(
                    one.features.aux_hidden_states, other.features.aux_hidden_states.bfloat16()
                )
            else:
                within_bound(one.features.aux_hidden_states, other.features.aux_hidden_states)


def within_bound(found: torch.Tensor, wanted: torch.Tensor) -> None:
    for first in range(0, wanted.shape[1], GROUP):
        a, b = found[:, first : first + GROUP].double(), wanted[:, first : first + GROUP].double()
        assert ((a - b).abs() <= b.abs().amax(1, keepdim=True) / 126).all()


@pytest.mark.parametrize("width", [12, 128, 144, 384, 3000])
def test_int8_bound_holds_for_any_states(width):
    torch.manual_seed(0)
    states = (
        torch.randn(300, width) * torch.logspace(-30, 30, 300)[:, None] * torch.rand(width).pow(8)
    )
    states[5], states[6, width // 2 :] = 0, 0
    states[7] = torch.arange(width) % 255 - 127.0
    for wanted in (states, states.bfloat16()):
        values, scales = quantise(wanted)
        assert values.dtype == torch.int8 and scales.shape == (300, -(-width // GROUP))
        within_bound(dequantise(values, scales), wanted)
        largest = torch.stack([g.abs().amax(1) for g in wanted.float().split(GROUP, 1)], 1)
        assert (
            scales.double() * 127 >= largest.double() * (1 - 1e-7)
        ).all() and values.abs().max() <= 127


def test_sizes_are_exact_and_int8_is_small(tmp_path):
    sizes = {dtype: document_bytes(1000, 600, 4096, dtype) for dtype in DTYPES}
    assert sizes == {"fp32": 58_992_248, "bf16": 29_501_048, "int8": 17_405_048}
    for dtype in DTYPES:
        documents = make(tmp_path / dtype, dtype)
        for number in range(3):
            part = documents[6 * number : 6 * number + 6]
            start, header = layout(shard(tmp_path / dtype, number))
            fixed = (
                start
                + header["head_checksum"]["data_offsets"][1]
                - header["head_checksum"]["data_offsets"][0]
            )
            lengths = np.array([len(d.input_ids) for d in part], np.int32)
            rows = np.array([len(d.features.argmax) for d in part], np.int32)
            sizes = document_bytes(lengths, rows, HIDDEN, dtype)
            assert sizes.dtype == np.int64
            assert shard(tmp_path / dtype, number).stat().st_size == fixed + sizes.sum()
            assert sizes.tolist() == [
                document_bytes(int(n), int(u), HIDDEN, dtype) for n, u in zip(lengths, rows)
            ]
    assert document_bytes(1000, 620, 4096, "int8") / 1000 <= 20_000
    assert (
        document_bytes(np.array([1 << 20], np.int32), np.array([1 << 20], np.int32), 4096, "fp32")[
            0
        ]
        > 1 << 32
    )


def test_safetensors_reads_a_shard(tmp_path):
    documents = make(tmp_path, "fp32", torch.float32)[:6]
    tensors = load_file(shard(tmp_path, 0))
    assert tensors["keys"].tolist() == [d.key for d in documents]
    assert np.array_equal(
        tensors["aux_hidden_states"], torch.cat([d.features.aux_hidden_states for d in documents])
    )
    assert np.array_equal(tensors["loss_mask"], torch.cat([d.loss_mask for d in documents]))
    for name in tensors:
        start, header = layout(shard(tmp_path, 0))
        assert (start + header[name]["data_offsets"][0]) % tensors[name].itemsize == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*HIDDEN_STATES, "logsumexp"])
def test_non_finite_states_are_refused(tmp_path, bad, dtype, name):
    documents = [document(3, 40), document(5, 40)]
    getattr(documents[1].features, name).view(-1)[11] = bad
    with pytest.raises(RunError, match=r"^document 5: its .* not finite") as caught:
        write_shard(tmp_path, 0, documents, dtype)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_nan_of_any_bits_is_refused(tmp_path):
    made = document(5, 40)
    for bits in (0x7FFFFFFF, 0x7FC00000, -1):
        made.features.aux_hidden_states.view(torch.int32)[1, 2] = bits
        for dtype in DTYPES:
            with pytest.raises(RunError, match="not finite"):
                write_shard(tmp_path, 0, [made], dtype)


def test_shards_of_another_format_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "VERSION", 2)
    monkeypatch.setattr(shard_module, "VERSION", 2)
    make(tmp_path)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"has format 2, and this version reads 1; .* capture again"):
        Store(tmp_path)
    with pytest.raises(RunError, match=r"has format 2, and this version reads 1; .* capture again"):
        finish(tmp_path, INPUTS, 3)


def test_finite():
    for kind in (torch.float32, torch.bfloat16):
        for place in (0, 1, 77, 4095):
            for bad in (float("nan"), float("inf"), -float("inf")):
                states = torch.randn(4096).to(kind)
                assert finite(states)
                states[place] = bad
                assert not finite(states)
    assert not finite(torch.full((1,), 3.4e38).bfloat16()) and finite(torch.empty(0))


def damaged_by(folder: Path, on_damage: str = "skip") -> set[int]:
    store = Store(folder, on_damage)
    found = {d.key for d in store.load(store.keys.tolist())}
    assert found | set(store.damaged) == set(store.keys.tolist()) and not found & set(store.damaged)
    assert len(store.verify()) > 0 if store.damaged else store.verify() == []
    return set(store.damaged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flipped_byte_damages_one_document(tmp_path, dtype):
    documents = make(tmp_path, dtype)[6:12]
    path = shard(tmp_path, 1)
    start, header = layout(path)
    for name in (
        "input_ids",
        "loss_mask",
        *HIDDEN_STATES,
        "argmax",
        "logsumexp",
        *["aux_scales"] * (dtype == "int8"),
    ):
        first, end = header[name]["data_offsets"]
        rows = [
            len(
                d.input_ids
                if header[name]["shape"][0] == header["input_ids"]["shape"][0]
                else d.features.argmax
            )
            for d in documents
        ]
        for victim in (i for i in range(6) if rows[i]):
            row_bytes = (end - first) // header[name]["shape"][0]
            places = (
                start + first + row_bytes * sum(rows[:victim]),
                start + first + row_bytes * sum(rows[: victim + 1]) - 1,
            )
            for place in places:
                flip(path, place)
                assert damaged_by(tmp_path) == {documents[victim].key}
                flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_a_damaged_document_fails_by_default(tmp_path):
    documents = make(tmp_path)
    start, header = layout(shard(tmp_path, 1))
    flip(shard(tmp_path, 1), start + header["input_ids"]["data_offsets"][0])
    store, key = Store(tmp_path), documents[6].key
    for read in (lambda: store.load([documents[0].key, key]), lambda: store.document(key)):
        with pytest.raises(
            RunError,
            match=rf"^document {key} cannot be read: .*shard_000001.*on_damage=skip.*again$",
        ):
            read()
    (wrong,) = store.verify()
    assert wrong.startswith(f"document {key} cannot be read: ")
    skipping = Store(tmp_path, "skip")
    assert [d.key for d in skipping.load([documents[6].key, documents[7].key])] == [
        documents[7].key
    ]
    assert list(skipping.damaged) == [key] and "checksum" in skipping.damaged[key]
    assert skipping.load([key]) == []


def test_a_flipped_byte_in_the_head_damages_the_shard(tmp_path):
    documents = make(tmp_path)
    path, lost = shard(tmp_path, 1), {d.key for d in documents[6:12]}
    start, header = layout(path)
    for place in range(start + header["head_checksum"]["data_offsets"][1]):
        flip(path, place)
        if place % 37 == 0:
            assert damaged_by(tmp_path) == lost
        with pytest.raises(RunError, match=r"shard_000001"):
            Store(tmp_path).load([documents[6].key])
        flip(path, place)
    assert damaged_by(tmp_path) == set()


def test_missing_cut_and_exchanged_shards(tmp_path):
    documents = make(tmp_path)
    path, lost = shard(tmp_path, 2), {d.key for d in documents[12:]}
    content = path.read_bytes()

    def check(sentence: str) -> None:
        with pytest.raises(RunError, match=sentence):
            Store(tmp_path).load(sorted(lost))
        assert damaged_by(tmp_path) == lost
        (wrong,) = Store(tmp_path, "skip").verify()
        assert re.search(sentence.replace("document .*", "6 documents"), wrong)

    path.unlink()
    check("6 documents cannot be read: .*shard_000002.safetensors is missing")
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(
            RunError, match=f"6 documents cannot be read: .* has {size} bytes, not {len(content)}"
        ):
            Store(tmp_path)
        assert damaged_by(tmp_path) == lost
    path.write_bytes(content + b"x")
    assert damaged_by(tmp_path) == lost
    write_shard(
        tmp_path, 2, [document(d.key + 1000, len(d.input_ids)) for d in documents[12:]], "bf16"
    )
    assert damaged_by(tmp_path) == lost
    path.write_bytes(content)
    store = Store(tmp_path, "skip")
    os.truncate(path, len(content) // 2)
    assert {d.key for d in store.load(store.keys.tolist())} | set(store.damaged) == set(
        store.keys.tolist()
    )
    assert set(store.damaged) == lost


def test_a_failing_disk_is_damage_and_too_many_files_are_not(tmp_path, monkeypatch):
    documents = make(tmp_path)
    store, read, error = (
        Store(tmp_path, "skip"),
        os.preadv,
        OSError(errno.EIO, "Input/output error"),
    )

    def preadv(descriptor, buffers, start):
        if start > 3000:
            raise error
        return read(descriptor, buffers, start)

    store.load([documents[0].key])
    monkeypatch.setattr(os, "preadv", preadv)
    assert (
        store.load([documents[0].key]) == []
        and "Input/output error" in store.damaged[documents[0].key]
    )
    error = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OSError, match="Too many"):
        store.load([documents[1].key])


@pytest.mark.parametrize("name", ["index.json", "index.npy"])
def test_damaged_index(tmp_path, name):
    make(tmp_path)
    path = tmp_path / name
    for place in range(0, path.stat().st_size, 13):
        flip(path, place)
        for on_damage in ("fail", "skip"):
            with pytest.raises(
                RunError, match=r"^the index of the store in .* is damaged; .* capture again$"
            ):
                Store(tmp_path, on_damage)
        flip(path, place)
    Store(tmp_path)
    path.unlink()
    with pytest.raises(
        RunError, match=rf"{name} is missing: the store was not finished; capture again"
    ):
        Store(tmp_path)


def test_finish_names_what_is_missing_or_doubled(tmp_path):
    write_shard(tmp_path, 0, [document(1), document(2)], "fp32")
    with pytest.raises(
        RunError, match=r"shard_000001.safetensors is missing; delete it and capture again"
    ):
        finish(tmp_path, INPUTS, 2)
    write_shard(tmp_path, 1, [document(2)], "fp32")
    with pytest.raises(RunError, match=r"document 2 is in several shards"):
        finish(tmp_path, INPUTS, 2)
    with pytest.raises(RunError, match=r"has no document 3"):
        write_shard(tmp_path, 1, [document(4)], "fp32")
        facts = finish(tmp_path, INPUTS, 2)
        Store(tmp_path).load([3])
    size = sum(shard(tmp_path, number).stat().st_size for number in range(2))
    assert facts["documents"] == 3 and facts["bytes"] == size and facts["shards"] == 2
    assert facts["tokens"] == 4 + 5 + 7 and facts["bytes_per_token"] == round(size / 16, 1)


def write_every_other(folder: Path, first: int) -> None:
    for number in range(first, 6, 2):
        write_shard(
            folder, number, [document(i, 50) for i in range(10 * number, 10 * number + 10)], "int8"
        )


def test_two_processes_write_what_one_does(tmp_path):
    (tmp_path / "two").mkdir()
    writers = [in_another_process(write_every_other, tmp_path / "two", first) for first in (0, 1)]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    (tmp_path / "one").mkdir()
    assert not shard_is_complete(tmp_path / "one", 5) and shard_is_complete(tmp_path / "two", 5)
    write_every_other(tmp_path / "one", 0)
    write_every_other(tmp_path / "one", 1)
    (tmp_path / "two" / "shard_000003.safetensors.0123abcd.tmp").write_bytes(
        b"left by a killed writer"
    )
    assert finish(tmp_path / "one", INPUTS, 6) == finish(tmp_path / "two", INPUTS, 6)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir()) and len(names) == 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_threads_may_read_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "OPEN_SHARDS", 2)
    documents = {i: document(i) for i in range(40)}
    for number in range(20):
        write_shard(tmp_path, number, [documents[2 * number], documents[2 * number + 1]], "fp32")
    finish(tmp_path, INPUTS, 20)
    store, before = Store(tmp_path), len(os.listdir("/proc/self/fd"))

    def read(seed: int) -> None:
        for key in np.random.default_rng(seed).integers(0, 40, 300).tolist():
            assert equal(store.load([key])[0], documents[key])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux to count what is read")
def test_a_document_is_read_alone(tmp_path):
    documents = [document(i, 200, 512) for i in range(40)]
    write_shard(tmp_path, 0, documents, "fp32")
    finish(tmp_path, INPUTS, 1)
    store = Store(tmp_path)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    store.load([0])
    before = bytes_read()
    store.load([17])
    size = document_bytes(200, len(documents[17].features.argmax), 512, "fp32")
    assert size - 100 <= bytes_read() - before <= size + 1000
    before = bytes_read()
    store.document(17)
    assert bytes_read() - before <= 200 * 5 + 1000


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        write_shard(tmp_path, 0, [document(1)], "bf16")
    assert list(tmp_path.iterdir()) == []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(OSError) as caught:
            write_shard(tmp_path, 0, [document(1, 200)], "bf16")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and list(tmp_path.iterdir()) == []


def test_check_inputs():
    check_inputs(
        INPUTS,
        {"model": {"aux_layer_ids": (1, 3, 4), "path": "tiny"}, "hidden_states": {"dtype": "bf16"}},
        "x",
    )
    other = {
        "model": {"path": "tiny", "aux_layer_ids": [0, 1, 2]},
        "hidden_states": {"dtype": "int8"},
    }
    with pytest.raises(RunError) as caught:
        check_inputs(INPUTS, other, Path("/data/store"))
    assert str(caught.value) == (
        "the store in /data/store was made with model.aux_layer_ids=[1, 3, 4], this run has "
        "model.aux_layer_ids=[0, 1, 2]; make them agree or set hidden_states.path to another folder"
    )
    with pytest.raises(
        RunError, match=r"was made with no revision, this run has revision=\"main\";"
    ):
        check_inputs({}, {"revision": "main"}, Path("x"))
    with pytest.raises(RunError, match=r"was made with a\.b=null, this run has no a\.b;"):
        check_inputs({"a": {"b": None}}, {}, Path("x"))


def test_concatenate():
    parts = [document(key).features for key in (1, 4, 7)]
    joined = concatenate(parts)
    for name in (*HIDDEN_STATES, "argmax", "logsumexp"):
        assert torch.equal(
            getattr(joined, name), torch.cat([getattr(part, name) for part in parts])
        )
    mixed = concatenate([document(1).features, document(2, kind=torch.bfloat16).features])
    assert mixed.aux_hidden_states.dtype == torch.float32 and mixed.argmax.dtype == torch.int64


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_growing_is_found_again(tmp_path):
    documents = {i: document(i, 30, kind=torch.bfloat16) for i in range(30)}
    growing = Growing(tmp_path, "bf16", 1 << 30, INPUTS, shard_bytes=60_000)
    assert growing.load([0, 1]) == {}
    for i in range(0, 30, 3):
        growing.add([documents[j] for j in (i, i + 1, i + 2, i)])
    growing.close()
    growing.close()
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 2 and len(growing) == 30
    other = Growing(tmp_path, "bf16", 1 << 30, INPUTS, rank=1, shard_bytes=60_000)
    for store in (growing, other):
        found = store.load([5, 999, 2, *range(30)])
        assert sorted(found) == list(range(30)) and all(
            equal(found[i], documents[i]) for i in found
        )
    other.add([documents[3], document(50, kind=torch.bfloat16)])
    other.close()
    again = Growing(tmp_path, "bf16", 1 << 30, INPUTS)
    assert len(again) == 31 and list(again.load([50])) == [50] and again.notes == []
    assert len(list(tmp_path.glob("*.safetensors"))) == shards + 1
    again.close()
    with pytest.raises(
        RunError,
        match=r"the store in .* was made with model.path=\"tiny\", this run has model.path=1;",
    ):
        Growing(tmp_path, "bf16", 1 << 30, {"model": {"path": 1}})


def test_growing_drops_damaged_shards_and_documents(tmp_path):
    growing = Growing(tmp_path, "bf16", 1 << 30, INPUTS, shard_bytes=60_000)
    growing.add([document(i, 30) for i in range(30)])
    growing.close()
    paths = sorted(tmp_path.glob("*.safetensors"))
    flip(paths[0], 200)
    os.truncate(paths[1], 5000)
    flip(paths[2], paths[2].stat().st_size - 1)
    (tmp_path / f"{paths[0].name}.0123abcd.tmp").write_bytes(b"x")
    lost = {key for key, (number, _) in growing.places.items() if number < 2}
    last = max(key for key, (number, _) in growing.places.items() if number == 2)
    with pytest.raises(RunError, match=r"delete the shard, or set hidden_states\.on_damage=skip"):
        Growing(tmp_path, "bf16", 1 << 30, INPUTS)
    again = Growing(tmp_path, "bf16", 1 << 30, INPUTS, shard_bytes=60_000, on_damage="skip")
    assert len(again.notes) == 2 and all(path.exists() for path in paths)
    assert set(again.load(list(range(30)))) == set(range(30)) - lost - {last}
    assert len(again.notes) == 3 and again.notes[-1].startswith(f"document {last} cannot be read")
    again.add([document(i, 30) for i in range(30)])
    again.close()
    assert set(again.load(list(range(30)))) == set(range(30)) and len(again.notes) == 3
    assert not list(tmp_path.glob("*.tmp"))
    later = Growing(tmp_path, "bf16", 1 << 30, INPUTS, on_damage="skip")
    assert set(later.load(list(range(30)))) == set(range(30)) - {last} | set(later.load([last]))


@pytest.mark.parametrize("budget", [0, 100, 20_000, 50_000, 200_001])
def test_growing_never_exceeds_its_budget(tmp_path, budget):
    def used() -> int:
        with own[0].disk:
            return sum(path.stat().st_size for path in tmp_path.iterdir())

    own = [
        Growing(tmp_path, "bf16", budget + 300, INPUTS, rank, shard_bytes=30_000) for rank in (0, 1)
    ]
    for i in range(100):
        own[i % 2].add([document(i, 30)])
        assert used() <= budget + 300
    for growing in own:
        growing.close()
    assert used() <= budget + 300 and all(growing.full for growing in own)
    assert used() > budget - 2 * 15_000 - 2000
    found = [growing.load(list(range(100))) for growing in own]
    assert budget < 50_000 or any(found)
    for growing in own:
        growing.add([document(1000)])
        growing.close()
        assert len(growing) == len(found[growing.next_number // growing_module.SHARDS_PER_RANK])


def test_growing_waits_when_writing_is_slow(tmp_path, monkeypatch):
    gate, fill = threading.Event(), growing_module.fill

    def slow(*arguments):
        assert gate.wait(20)
        fill(*arguments)

    monkeypatch.setattr(growing_module, "fill", slow)
    growing = Growing(tmp_path, "bf16", 1 << 30, INPUTS, shard_bytes=1)
    growing.add([document(0)])
    wait_for(growing.queue.empty)
    growing.add([document(1)])
    adding = threading.Thread(target=growing.add, args=([document(2)],))
    adding.start()
    time.sleep(0.1)
    assert adding.is_alive() and growing.load([0, 1, 2]) == {}
    gate.set()
    adding.join()
    growing.close()
    assert sorted(growing.load([0, 1, 2])) == [0, 1, 2]


def test_growing_reports_what_the_writer_ran_into(tmp_path, monkeypatch):
    growing = Growing(tmp_path / "full", "bf16", 1 << 30, INPUTS, shard_bytes=1)
    growing.add([document(0)])
    wait_for(lambda: len(growing) == 1)
    fsync = os.fsync

    def full(descriptor):
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    growing.add([document(1)])
    wait_for(lambda: growing.error)
    with pytest.raises(
        RunError,
        match=r"^hidden states cannot be written to .* \(No space left on device\); .*disk$",
    ):
        growing.add([document(2)])
    assert growing.full and sorted(growing.load([0, 1, 2])) == [0]
    growing.add([document(3)])
    growing.close()
    assert len(list((tmp_path / "full").glob("shard_*"))) == 1
    monkeypatch.undo()

    growing = Growing(tmp_path / "broken", "bf16", 1 << 30, INPUTS)
    broken = document(7, 20)
    broken.features.aux_hidden_states[3, 4] = float("nan")
    growing.add([broken])
    with pytest.raises(RunError, match=r"document 7: .* not finite"):
        growing.close()


def add_for_ever(folder: Path) -> None:
    growing = Growing(folder, "bf16", 1 << 30, INPUTS, shard_bytes=1 << 20)
    for i in range(1 << 30):
        growing.add([document(i, 400)])


def test_growing_after_a_kill(tmp_path):
    writer = in_another_process(add_for_ever, tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("*.safetensors"))) >= 4)
    writer.kill()
    writer.join()
    growing = Growing(tmp_path, "bf16", 1 << 30, INPUTS)
    assert growing.notes == [] and len(growing) >= 4 and not list(tmp_path.glob("*.tmp"))
    found = growing.load(list(range(len(growing))))
    assert all(found[i].input_ids.equal(document(i, 400).input_ids) for i in found) and len(
        found
    ) == len(growing)
    growing.close()


def test_one_run_at_a_time_keeps_into_a_folder(tmp_path):
    first = Growing(tmp_path, "bf16", 1 << 30, INPUTS)
    with pytest.raises(
        RunError, match=r"another run is keeping hidden states in .*hidden_states\.path"
    ):
        Growing(tmp_path, "bf16", 1 << 30, INPUTS)
    Growing(tmp_path, "bf16", 1 << 30, INPUTS, rank=1).close()
    first.close()
    Growing(tmp_path, "bf16", 1 << 30, INPUTS).close()
