"""Hidden states to disk and training from there: the same as online, whoever wrote them and however
often killed.
"""

import errno
import json
import signal
import subprocess
import sys
import time  # noqa: F401  the worker's script uses it
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, spec_of
from eagle3.job import Run
from rich.console import Console
from test_pipeline import SMALL, TRAIN_ONLY, losses, run, stop_after

from eagle3.data.prepare import INDEX, Prepared
from eagle3.errors import RunError
from eagle3.hidden_states import capture as capturing
from eagle3.hidden_states.capture import capture, plan_shards, see
from eagle3.hidden_states.store import Store
from eagle3.runs.artefact import read_facts
from eagle3.target.hf import HFTarget

quiet = Console(quiet=True)


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
    return Prepared(
        randomly.integers(0, 500, sum(lengths)).astype(np.int32), mask, index, np.arange(300), []
    )


@pytest.fixture(scope="module")
def target(target_folder):
    return HFTarget(spec_of(target_folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def prepared():
    return documents(np.random.default_rng(3).integers(8, 60, 40).tolist(), repeated=5)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(capturing, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(capturing, "POLL_SECONDS", 0.05)


def fill(folder, prepared, target, dtype="fp32", batch_tokens=128, inputs=None, max_disk=None):
    capture(
        folder, prepared, target, inputs or {"dtype": dtype}, dtype, batch_tokens, max_disk, quiet
    )
    return Store(folder)


def contents(folder):
    """Every file of a finished store."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.suffix in (".safetensors", ".json", ".npy") and p.is_file()
    }


def test_plans_hold_every_document_once(prepared):
    shards = plan_shards(prepared, 64, "bf16", 128)
    flat = [number for shard in shards for batch in shard for number in batch]
    assert sorted(flat) == list(range(40)), (
        "the five that repeat earlier ones are not captured again"
    )
    assert all(prepared.lengths[batch].sum() <= 128 for shard in shards for batch in shard)
    assert len(shards) > 3 and [prepared.lengths[n] for n in flat] == sorted(
        prepared.lengths[:40], reverse=True
    )
    assert shards == plan_shards(prepared, 64, "bf16", 128)
    assert plan_shards(documents([500, 3]), 64, "bf16", 128) == [[[0]], [[1]]], (
        "a batch holds at least one document"
    )


def test_a_store_holds_what_the_target_says(tmp_path, prepared, target):
    store = fill(tmp_path, prepared, target)
    assert len(store) == 40 and read_facts(tmp_path)["documents"] == 40
    assert store.lengths.tolist() == prepared.lengths[:40].tolist()
    assert np.load(tmp_path / "order.npy").tolist() == [*range(40), *range(5)]
    for batch in (batch for shard in plan_shards(prepared, 64, "fp32", 128) for batch in shard):
        for stored, seen in zip(store.load(batch), see(target, prepared.load(batch)), strict=True):
            for name in ("aux_hidden_states", "last_hidden_states", "argmax", "logsumexp"):
                assert torch.equal(getattr(stored.features, name), getattr(seen.features, name)), (
                    name
                )
            assert torch.equal(stored.input_ids, seen.input_ids) and torch.equal(
                stored.loss_mask, seen.loss_mask
            )


def test_a_full_disk_ends_it_and_the_next_call_goes_on(tmp_path, prepared, target, monkeypatch):
    whole = contents(Path(fill(tmp_path / "whole", prepared, target).folder))
    written = []

    def write(folder, number, seen, dtype):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(number)
        return write_shard(folder, number, seen, dtype)

    write_shard = capturing.write_shard
    monkeypatch.setattr(capturing, "write_shard", write)
    with pytest.raises(
        RunError,
        match=r"the disk is full: \d+ shards of .* are still missing.*the same command goes on",
    ):
        fill(tmp_path / "full", prepared, target)
    written.clear()
    monkeypatch.setattr(
        capturing, "write_shard", lambda *a: written.append(a[1]) or write_shard(*a)
    )
    fill(tmp_path / "full", prepared, target)
    assert len(written) == len(plan_shards(prepared, 64, "fp32", 128)) - 2
    assert contents(tmp_path / "full") == whole


def test_a_disk_that_cannot_hold_it_is_refused_before(tmp_path, prepared, target, monkeypatch):
    import shutil

    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    )
    with pytest.raises(RunError, match=r"hidden_states\.dtype=int8"):
        fill(tmp_path / "a", prepared, target)
    assert not list((tmp_path / "a").glob("*.safetensors"))
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"hidden_states\.max_disk leaves 100 kB"):
        fill(tmp_path / "b", prepared, target, max_disk=100_000)


def test_states_that_are_not_finite_are_named(tmp_path, prepared, target, monkeypatch):
    def broken(self, batch):
        features = call(self, batch)
        features.aux_hidden_states[3, 5] = float("nan")
        return features

    call = HFTarget.__call__
    monkeypatch.setattr(HFTarget, "__call__", broken)
    with pytest.raises(RunError, match=r"document \d+"):
        fill(tmp_path, prepared, target)


def test_a_folder_of_another_store_is_refused(tmp_path, prepared, target):
    fill(tmp_path, prepared, target, inputs={"aux_layer_ids": [1, 3, 4], "dtype": "fp32"})
    with pytest.raises(RunError, match=r"aux_layer_ids.*\[1, 3, 4\].*\[1, 2, 4\]"):
        fill(tmp_path, prepared, target, inputs={"aux_layer_ids": [1, 2, 4], "dtype": "fp32"})
    (tmp_path / "artefact.json").unlink()
    with pytest.raises(RunError, match=r"batch_tokens=128, this run has batch_tokens=64"):
        fill(
            tmp_path,
            prepared,
            target,
            inputs={"aux_layer_ids": [1, 3, 4], "dtype": "fp32"},
            batch_tokens=64,
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="name an empty folder"):
        fill(tmp_path / "other", prepared, target)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
from test_capture import *
capturing.SHARD_BYTES, capturing.POLL_SECONDS = 100_000, 0.05
write_shard = capturing.write_shard
def slowly(folder, number, seen, dtype):
    write_shard(folder, number, seen, dtype)
    print(number, flush=True)
    time.sleep({pause})
capturing.write_shard = slowly
torch.set_num_threads(1)
lengths = np.random.default_rng(3).integers(8, 60, 40).tolist()
fill(Path({folder!r}), documents(lengths, repeated=5), HFTarget(spec_of({target!r}), torch.device("cpu")))
"""


def worker(folder, target_folder, pause):
    script = WORKER.format(
        tests=str(ROOT / "tests"), folder=str(folder), target=str(target_folder), pause=pause
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_killed_and_gone_on_with_by_two(tmp_path, prepared, target, target_folder):
    """SIGKILL in the middle, then two processes at once: each shard is written once, and the store
    is the same.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = contents(Path(fill(tmp_path / "whole", prepared, target).folder))
    finally:
        torch.set_num_threads(before)
    folder = tmp_path / "killed"
    first = worker(folder, target_folder, 0.3)
    done = [int(first.stdout.readline()) for _ in range(2)]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "artefact.json").exists()
    both = [worker(folder, target_folder, 0.05) for _ in range(2)]
    written = [[int(line) for line in process.communicate()[0].split()] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert not set(written[0]) & set(written[1]) and not set(done) & {*written[0], *written[1]}
    assert contents(folder) == whole


def mode(settings, name, *more):
    return [*settings, f"mode={name}", "hidden_states.dtype=fp32", *more]


@pytest.fixture(scope="module")
def settings(target_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture")
    words = ("alpha", "beta", "gamma", "delta", "open", "file", "return", "value", "list", "path")
    rows = [
        {
            "question": f"Say {words[i % 10]} {i}.",
            "answer": " ".join(words[(i * j) % 10] for j in range(3, 25)),
        }
        for i in range(24)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [
        f"model.path={target_folder}",
        f"data.path={folder / 'chat.jsonl'}",
        f"cache_dir={folder / 'cache'}",
    ]
    return [*SMALL, *paths, "target.batch_tokens=200", "data.num_proc=1"]


ALL = "stages=[prepare,generate,capture,train]"
ALONE = ["train.documents_per_update=1", "train.tokens_per_step=96", "target.batch_tokens=4"]


def test_training_from_disk_equals_training_online(settings, tmp_path):
    """With documents packed alike an fp32 store gives the same losses, bit for bit; else to kernel
    rounding.
    """
    run([*settings, TRAIN_ONLY, *ALONE], tmp_path / "online")
    run(mode(settings, "offline", ALL, *ALONE), tmp_path / "offline")
    assert losses(tmp_path / "offline") == losses(tmp_path / "online")
    run([*settings, TRAIN_ONLY], tmp_path / "packed")
    run(mode(settings, "offline", ALL), tmp_path / "read")
    assert losses(tmp_path / "read") == pytest.approx(losses(tmp_path / "packed"), rel=1e-5)
    rows = [
        json.loads(line) for line in (tmp_path / "read" / "metrics.jsonl").read_text().splitlines()
    ]
    assert any("eval/acceptance_length" in row for row in rows)


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 5e-3), ("int8", 2e-2)])
def test_shorter_stores_are_near(settings, tmp_path, dtype, near):
    run([*settings, TRAIN_ONLY, *ALONE], tmp_path / "online")
    run(mode(settings, "offline", ALL, *ALONE, f"hidden_states.dtype={dtype}"), tmp_path / dtype)
    assert losses(tmp_path / dtype) == pytest.approx(losses(tmp_path / "online"), rel=near)


def test_a_bf16_store_of_a_bf16_target_is_exact(settings, tmp_path):
    run([*settings, TRAIN_ONLY, *ALONE, "model.dtype=bfloat16"], tmp_path / "online")
    run(
        mode(settings, "offline", ALL, *ALONE, "model.dtype=bfloat16", "hidden_states.dtype=bf16"),
        tmp_path / "offline",
    )
    assert losses(tmp_path / "offline") == losses(tmp_path / "online")


def test_training_from_disk_never_loads_the_target(settings, tmp_path, monkeypatch):
    path = tmp_path / "store"
    run(
        mode(
            settings, "offline", "stages=[prepare,generate,capture]", f"hidden_states.path={path}"
        ),
        tmp_path / "one",
    )
    assert (path / "artefact.json").exists()
    monkeypatch.setattr(Run, "part", property(lambda run: pytest.fail("the target was loaded")))
    again = mode(settings, "offline", "stages=[train,export]", f"hidden_states.path={path}")
    run(again, tmp_path / "two")
    assert (
        len(losses(tmp_path / "two")) == 6 and (tmp_path / "two" / "draft" / "config.json").exists()
    )
    with pytest.raises(RunError, match=r"dtype.*fp32.*int8"):
        run([*again, "hidden_states.dtype=int8"], tmp_path / "three")
    with pytest.raises(RunError, match=r"holds no complete store.*put capture before train"):
        run(
            mode(
                settings,
                "offline",
                "stages=[train]",
                "target.batch_tokens=100",
                "data.num_samples=20",
            ),
            tmp_path / "four",
        )


def damage(store):
    """Flip a byte in the middle of the first shard."""
    shard = sorted(Path(store).glob("shard_*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)


def test_damaged_documents_fail_or_are_skipped_by_name(settings, tmp_path, capsys):
    path = tmp_path / "store"
    everything = mode(
        settings, "offline", ALL, f"hidden_states.path={path}", "train.documents_per_update=100"
    )
    run(everything, tmp_path / "one")
    damage(path)
    with pytest.raises(RunError, match=r"document \d+.*hidden_states\.on_damage=skip"):
        run(everything, tmp_path / "two")
    run([*everything, "hidden_states.on_damage=skip"], tmp_path / "three")
    assert len(losses(tmp_path / "three")) == 6
    assert "1 damaged documents were left out" in capsys.readouterr().out


def calls_of(monkeypatch):
    seen = []
    call = HFTarget.__call__
    monkeypatch.setattr(
        HFTarget,
        "__call__",
        lambda self, batch: seen.append(batch.document_keys) or call(self, batch),
    )
    return seen


def test_hybrid_computes_once_and_reads_afterwards(settings, tmp_path, monkeypatch):
    seen = calls_of(monkeypatch)
    online = [*settings, TRAIN_ONLY, "train.max_steps=16"]
    run(online, tmp_path / "online")
    epochs = 16 / 5
    online_calls = len(seen)
    seen.clear()
    run(mode(settings, "hybrid", TRAIN_ONLY, "train.max_steps=16"), tmp_path / "hybrid")
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)
    assert epochs > 3 and 0 < len(seen) < online_calls


def test_hybrid_stays_within_its_disk(settings, tmp_path):
    path = tmp_path / "kept"
    run(
        mode(
            settings,
            "hybrid",
            TRAIN_ONLY,
            f"hidden_states.path={path}",
            "hidden_states.max_disk=300KB",
            "train.max_steps=16",
        ),
        tmp_path / "hybrid",
    )
    assert 0 < sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) < 330_000
    run([*settings, TRAIN_ONLY, "train.max_steps=16"], tmp_path / "online")
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "stages", "stop"),
    [("offline", ALL, 9), ("hybrid", TRAIN_ONLY, 3), ("hybrid", TRAIN_ONLY, 9)],
)
def test_stopped_runs_go_on_bit_for_bit(settings, tmp_path, monkeypatch, name, stages, stop):
    """In bf16, so that it shows whether a document was read or computed: in epoch 0 and in a later
    one.
    """
    again = mode(
        settings,
        name,
        stages,
        "hidden_states.dtype=bf16",
        "train.max_steps=14",
        "train.save_every=4",
    )
    run([*again, f"hidden_states.path={tmp_path / 'one'}"], tmp_path / "whole")
    given = [*again, f"hidden_states.path={tmp_path / 'two'}"]
    with monkeypatch.context() as patch:
        stop_after(stop, patch)
        with pytest.raises(SystemExit):
            run(given, tmp_path / "stopped")
    run(given, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_deleted_shard_is_captured_again(settings, tmp_path):
    path = tmp_path / "store"
    everything = mode(settings, "offline", ALL, f"hidden_states.path={path}")
    run(everything, tmp_path / "one")
    whole = contents(path)
    next(path.glob("shard_*.safetensors")).unlink()
    run(everything, tmp_path / "two")
    assert contents(path) == whole and losses(tmp_path / "two") == losses(tmp_path / "one")
    (path / "order.npy").write_bytes(b"")
    with pytest.raises(RunError, match=r"order\.npy is missing or damaged"):
        run(everything, tmp_path / "three")


def test_what_a_store_is_not_for_is_refused(settings, tmp_path):
    path = tmp_path / "store"
    given = f"hidden_states.path={path}"
    run(mode(settings, "offline", "stages=[prepare,capture]", given), tmp_path / "one")
    with pytest.raises(
        RunError, match=r"aux_layer_ids=\[1, 3, 4\], this run has aux_layer_ids=\[0, 2, 4\]"
    ):
        run(
            mode(
                settings,
                "offline",
                "stages=[prepare,capture]",
                given,
                "model.aux_layer_ids=[0,2,4]",
            ),
            tmp_path / "two",
        )
    with pytest.raises(RunError, match=r"kind=\"capture\", this run has kind=\"hybrid\""):
        run(mode(settings, "hybrid", TRAIN_ONLY, given), tmp_path / "three")
    kept = f"hidden_states.path={tmp_path / 'kept'}"
    run(mode(settings, "hybrid", TRAIN_ONLY, kept), tmp_path / "four")
    with pytest.raises(RunError, match="documents="):
        run(
            mode(settings, "hybrid", "stages=[train]", kept, "data.num_samples=20"),
            tmp_path / "five",
        )


def test_an_update_of_damaged_documents_changes_nothing(settings, tmp_path):
    path = tmp_path / "store"
    everything = mode(
        settings, "offline", ALL, f"hidden_states.path={path}", *ALONE, "train.max_steps=21"
    )
    run([*everything, "stages=[prepare,generate,capture]"], tmp_path / "one")
    damage(path)
    run([*everything, "hidden_states.on_damage=skip", "train.epochs=1"], tmp_path / "two")
    assert len(losses(tmp_path / "two")) == 21


def test_hybrid_keeps_a_repeated_document_once(settings, tmp_path):
    path = next(o.removeprefix("data.path=") for o in settings if o.startswith("data.path="))
    mixed = [o for o in settings if not o.startswith("data.path=")] + [
        "data.path=null", f"+data.sources={{one:{{path:{path},weight:3}}}}", "train.max_steps=30",
    ]  # fmt: skip
    kept = tmp_path / "kept"
    run(mode(mixed, "hybrid", TRAIN_ONLY, f"hidden_states.path={kept}"), tmp_path / "hybrid")
    run([*mixed, TRAIN_ONLY], tmp_path / "online")
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)
    run(
        mode(
            settings,
            "offline",
            "stages=[prepare,capture]",
            f"hidden_states.path={tmp_path / 'whole'}",
        ),
        tmp_path / "c",
    )
    size = [
        sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (kept, tmp_path / "whole")
    ]
    assert size[0] < 1.2 * size[1]


def test_plans_take_any_number_of_processes(settings, tmp_path, capsys):
    more = ["plan=true", "launch.nproc_per_node=8", "target.tp_size=4"]
    assert run(mode(settings, "offline", *more), tmp_path / "plan") is None
    assert "hidden states, int8" in capsys.readouterr().out
