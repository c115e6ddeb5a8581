"""Where hidden states come from: what each mode computes, stores and reads, and whole runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAIN_ONLY, flip, hidden_states_section, losses, run, stop_after

from eagle3.batch import Features, pack, serving
from eagle3.data.prepare import INDEX, Prepared
from eagle3.errors import RunError
from eagle3.hidden_states.store import HybridStore
from eagle3.hidden_states.supply import Hybrid, Offline, Online
from eagle3.target.handle import TargetHandle

ALL = "stages=[prepare,generate,capture,train]"
MODES = Online, Offline, Hybrid
BLOCK = ["draft.layers=2", "draft.block=4", "draft.anchors=3", "loss=mix"]
ALONE = ["train.documents_per_update=1", "train.tokens_per_step=96", "target.batch_tokens=4"]


class FakeTarget:
    """Features that are a function of the tokens alone; remembers the keys it was asked for."""

    def __init__(self):
        self.config, self.device = SimpleNamespace(vocab_size=99), torch.device("cpu")
        self.asked: list[list[int]] = []

    def load(self):
        return self

    def __call__(self, batch) -> Features:
        self.asked.append(batch.document_keys)
        ids = batch.input_ids.float()[:, None]
        last = ids[batch.teacher_rows]
        return Features(ids.repeat(1, 12), last.repeat(1, 4), last[:, 0].long(), last[:, 0])


@pytest.fixture
def prepared():
    """Four documents, of which an epoch passes over the first one twice."""
    index = np.zeros(5, INDEX)
    index["start"], index["length"], index["supervised"] = [0, 5, 10, 15, 0], 5, 5
    ids, mask = np.arange(20, dtype=np.int32), np.ones(20, bool)
    return Prepared(ids, mask, index, np.arange(9), [], facts={"digest": "x"})


def batch_of(documents):
    batch = pack(documents, torch.ones(99, dtype=torch.bool), 2, serving)
    return replace(batch, loaded=documents)


def hybrid(prepared, target, folder, barrier=lambda: None, **section):
    given = hidden_states_section(folder, **section)
    store = HybridStore(given, {"hidden_states.dtype": "fp32"}, "unused", 0, 1)
    return Hybrid(prepared, store, target, barrier)


def test_what_modes_mean_for_the_pipeline():
    facts = [(mode.captures, mode.keeps, mode.needs_target) for mode in MODES]
    assert facts == [(False, False, True), (True, False, False), (False, True, True)]


def test_online_computes_every_batch(prepared):
    target = FakeTarget()
    supply = Online(prepared, None, target)
    documents = supply.load([1, 4])
    assert supply.lengths.tolist() == [5] * 5
    features = supply.features(batch_of(documents))
    assert features.aux_hidden_states[:, 0].tolist() == [*range(5, 10), *range(5)]
    assert target.asked == [[1, 4]]


def test_hybrid_computes_once_and_reads_from_the_second_epoch_on(tmp_path, prepared):
    target, met = FakeTarget(), []
    supply = hybrid(prepared, target, tmp_path, lambda: met.append(1))
    supply.begin(0)
    first = {}
    for numbers in ([0, 1], [4, 2]):
        batch = batch_of(supply.load(numbers))
        first |= dict(zip(batch.document_keys, supply.features(batch).aux_hidden_states.split(5)))
    assert target.asked == [[0, 1], [0, 2]], "nothing is read in the epoch that keeps it"
    supply.begin(1)
    assert met == [1]
    documents = supply.load([4, 3, 2])
    assert [document.features is None for document in documents] == [False, True, False]
    features = supply.features(batch_of(documents))
    assert target.asked[2:] == [[3]], "what is not kept is computed beside what is"
    assert features.aux_hidden_states[:, 0].tolist() == [*range(5), *range(15, 20), *range(10, 15)]
    assert torch.equal(features.aux_hidden_states[:5], first[0])
    supply.sync()
    assert [document.features is None for document in supply.load([0, 1, 2, 3])] == [False] * 4
    assert supply.store.facts["documents"] == 4, "a repeated document is kept once"
    supply.close()


def test_hybrid_goes_on_without_disk_and_after_damage(tmp_path, prepared):
    supply = hybrid(prepared, FakeTarget(), tmp_path / "full", max_disk="1KB")
    for epoch in (0, 1):
        supply.begin(epoch)
        documents = supply.load([0, 1, 2, 3])
        assert supply.features(batch_of(documents)).argmax.tolist() == list(range(20))
        supply.sync()
        assert supply.store.full and all(document.features is None for document in documents)
    supply.close()
    supply = hybrid(prepared, FakeTarget(), tmp_path / "kept")
    supply.features(batch_of(supply.load([0, 1, 2, 3])))
    supply.close()
    damage(tmp_path / "kept")
    supply = hybrid(prepared, FakeTarget(), tmp_path / "kept", on_damage="skip")
    supply.begin(1)
    lost = [d for d in supply.load([0, 1, 2, 3]) if d.features is None]
    assert len(lost) == 1 and list(supply.store.damaged) == [lost[0].key]
    supply.features(batch_of(lost))
    supply.sync()
    assert supply.load([lost[0].key])[0].features is not None
    supply.close()


def damage(folder):
    """Flip a byte of the first shard's states."""
    flip(min(folder.glob("shard_*.safetensors")), 0.67)


def mode(settings, name, *more):
    return [*settings, f"mode={name}", "hidden_states.dtype=fp32", *more]


@pytest.mark.runs
def test_training_from_disk_is_near_training_online(settings, tmp_path):
    """With documents packed alike an fp32 store gives the same losses bit for bit, here of five
    layers.
    """
    settings = [*settings, "draft=eagle31", "model.aux_layer_ids=[0,1,3,4,6]"]
    run([*settings, TRAIN_ONLY, *ALONE], tmp_path / "online")
    online = losses(tmp_path / "online")
    for dtype, near in {"fp32": 0, "bf16": 5e-3, "int8": 2e-2}.items():
        run(
            mode(settings, "offline", ALL, *ALONE, f"hidden_states.dtype={dtype}"), tmp_path / dtype
        )
        assert losses(tmp_path / dtype) == pytest.approx(online, rel=near, abs=0)
    assert "eval/acceptance_length" in (tmp_path / "int8" / "metrics.jsonl").read_text()


@pytest.mark.runs
def test_a_store_is_enough_to_train(settings, tmp_path, monkeypatch, capsys):
    path = tmp_path / "store"
    given = f"hidden_states.path={path}", "train.documents_per_update=100"
    run(mode(settings, "offline", "stages=[prepare,generate,capture]", *given), tmp_path / "one")
    monkeypatch.setattr(TargetHandle, "load", lambda self: pytest.fail("the target was loaded"))
    again = mode(settings, "offline", "stages=[train,export]", *given)
    run(again, tmp_path / "two")
    assert len(losses(tmp_path / "two")) == 6
    # Hidden states know nothing of the draft, nor of its vocabulary.
    other = mode(settings, "offline", "stages=[prepare,train]", *given, "draft=dflash", *BLOCK)
    run(other, tmp_path / "dflash")
    assert len(losses(tmp_path / "dflash")) == 6
    with pytest.raises(RunError, match=r"dtype.*fp32.*int8"):
        run([*again, "hidden_states.dtype=int8"], tmp_path / "three")
    damage(path)
    with pytest.raises(RunError, match=r"document \d+.*hidden_states\.on_damage=skip"):
        run(again, tmp_path / "four")
    run([*again, "hidden_states.on_damage=skip"], tmp_path / "five")
    assert len(losses(tmp_path / "five")) == 6
    said = capsys.readouterr().out
    assert "1 damaged document" in said and said.count(f"capture: reused {path}\n") == 4
    assert (
        said.count("a block drafter has the target's vocabulary and drafts 3 tokens; draft.") == 1
    )


@pytest.mark.runs
def test_hybrid_is_near_online(settings, tmp_path):
    given, kept = [TRAIN_ONLY, "train.max_steps=16", "train.eval_every=16"], tmp_path / "kept"
    run([*settings, *given], tmp_path / "online")
    limits = f"hidden_states.path={kept}", "hidden_states.max_disk=300KB"
    run(mode(settings, "hybrid", *given, *limits), tmp_path / "hybrid")
    assert losses(tmp_path / "hybrid") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)
    assert 100_000 < sum(path.stat().st_size for path in kept.iterdir()) <= 300_000


@pytest.mark.runs
@pytest.mark.parametrize(
    ("name", "stages", "stops", "kind"),
    [
        ("offline", ALL, [9], []),
        ("hybrid", TRAIN_ONLY, [3, 9], []),
        ("hybrid", TRAIN_ONLY, [3, 9], ["draft=dspark", *BLOCK]),
    ],
)
def test_stopped_runs_go_on_bit_for_bit(settings, tmp_path, monkeypatch, name, stages, stops, kind):
    """In bf16, so that it shows whether a document was read or computed: in epoch 0 and in a later
    one. Anchors are those of the epoch.
    """
    more = "hidden_states.dtype=bf16", "train.max_steps=14", "train.save_every=4"
    weights = "powers" if name == "offline" else "reached"  # whose running means go on too
    more += "train.eval_every=14", *kind, f"loss/weights={weights}"
    again = mode(settings, name, stages, *more)
    run([*again, f"hidden_states.path={tmp_path / 'one'}"], tmp_path / "whole")
    given = [*again, f"hidden_states.path={tmp_path / 'two'}"]
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_after(stop, patch)
            with pytest.raises(SystemExit):
                run(given, tmp_path / "stopped")
    run(given, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
