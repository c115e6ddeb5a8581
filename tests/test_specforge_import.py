"""SpecForge's hidden-state files, as SpecForge 0.2.0 and its earlier scripts write them, become
our store: layout, padding, norms, numbers, damage, safety, resuming.
"""

import gzip
import json
import os
import pickle
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import cut, flip, hidden_states_section, read_jsonl, run, spec_of
from safetensors.torch import save_file
from specforge_case import FOLDER, TTT_STEPS, Fixture, bf16
from torch.nn.functional import rms_norm
from transformers import LlamaConfig

import eagle3.hidden_states.import_specforge as specforge
from eagle3.data.vocab import choose_vocab
from eagle3.errors import RunError
from eagle3.export.write import portable_config, write_draft
from eagle3.hidden_states.import_specforge import choose_dtype, import_specforge, is_specforge
from eagle3.hidden_states.store import create_store, open_store
from eagle3.runs.artefact import read_facts
from eagle3.target.hf import head_statistics
from eagle3.target.weights import TargetWeights

H, V = 32, 50
STATES = ("hidden_state", "aux_hidden_state")


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, H, generator=generator).bfloat16()
    norm = 1 + 0.3 * torch.randn(H, generator=generator).bfloat16()
    config = SimpleNamespace(hidden_size=H, rms_norm_eps=1e-5, model_type="llama")
    return TargetWeights(config, head, head, norm, {1})


def document(n, weights, seed=0, layers=3) -> dict:
    """What `prepare_hidden_states.py` saves of a conversation."""
    generator = torch.Generator().manual_seed(seed)
    scale = 3 * (1 + torch.rand(n, 1, generator=generator))
    residual = (scale * torch.randn(n, H, generator=generator)).bfloat16()
    normed = rms_norm(residual.float(), (H,), weights.norm.float(), 1e-5)
    return {
        "input_ids": torch.randint(1, V, (n,), generator=generator),
        "loss_mask": (torch.arange(n) >= n // 3).long(),
        "hidden_state": normed.bfloat16()[None],
        "aux_hidden_state": torch.randn(1, n, layers * H, generator=generator).bfloat16(),
    }


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        torch.save(content, stream)
    return path


@pytest.fixture
def source(tmp_path):
    return tmp_path / "S" / "rows_0-2000"


@pytest.fixture
def imported(source, weights, tmp_path, monkeypatch):
    """Imports `source`; returns the facts, and the documents by key."""

    def run_import(dtype="fp32", max_length=4096, on_damage="fail", layers=3, **changed):
        made = TargetWeights(**vars(weights) | changed)
        monkeypatch.setattr(specforge, "load_weights", lambda spec, device: made)
        spec = SimpleNamespace(identity={"path": "x"}, aux_size=layers * H)
        target = SimpleNamespace(spec=spec, device="cpu")
        section = hidden_states_section(source.parent, dtype, on_damage=on_damage)
        folder = import_specforge(section, target, max_length, str(tmp_path / "cache"))
        store = open_store(section, folder, {"hidden_states.dtype": dtype, "documents": "any"})
        assert store.facts.items() <= read_facts(folder).items()
        found = store.load(store.order.tolist())
        ids = torch.cat([d.input_ids[d.loss_mask] for d in found.values()])
        counts = ids.bincount(minlength=V).numpy()
        assert store.vocab(9).tolist() == choose_vocab(counts, 9, set()).tolist()
        return read_facts(folder), found

    return run_import


def test_what_a_folder_of_specforge_is(tmp_path):
    assert not is_specforge(tmp_path) and not is_specforge(tmp_path / "none")
    save({}, tmp_path / "a" / "last.ckpt")
    assert not is_specforge(tmp_path)
    save({}, tmp_path / "b" / "rows_0-2000" / "data_0.ckpt.gz")
    assert is_specforge(tmp_path / "b") and is_specforge(tmp_path)


def test_documents_come_in_the_order_of_their_numbers(source, weights, imported):
    for number in (10, 9, 1):
        save(document(10 + number, weights), source / f"data_{number}.ckpt")
    found = imported()[1]
    assert [len(found[key].input_ids) for key in range(3)] == [11, 19, 20]


@pytest.mark.parametrize("suffix, batched, layers", [("ckpt", False, 5), ("ckpt.gz", True, 3)])
def test_a_document_arrives_whole(source, weights, imported, suffix, batched, layers):
    written = document(20, weights, layers=layers)
    if not batched:  # [n,H], else [1,n,H]
        written |= {name: written[name][0] for name in STATES}
    save(written, source / f"data_0.{suffix}")
    with pytest.raises(RunError, match=f"does not fit hidden size 32 and {layers - 1} auxiliary"):
        imported(layers=layers - 1)
    facts, found = imported(layers=layers)
    got, features = found[0], found[0].features
    mask = written["loss_mask"].bool()
    mask[-1] = False  # SpecForge never supervises the last row it has
    last = written["hidden_state"].reshape(20, -1)[6:]
    argmax, logsumexp = head_statistics(last, weights.head)
    aux = written["aux_hidden_state"].reshape(20, -1).float()
    for one, other in (
        (got.input_ids.long(), written["input_ids"]),
        (got.loss_mask, mask),
        (features.aux_hidden_states, aux),
        (features.last_hidden_states, last.float()),
        (features.argmax, argmax),
        (features.logsumexp, logsumexp),
    ):
        assert torch.equal(one, other)
    counted = {"files": 1, "documents": 1, "tokens": 20, "teacher_rows": 14, "rejected": {}}
    assert counted.items() <= facts.items()


@pytest.mark.parametrize("states, rows", [("zero", 20), ("none", 20), ("computed", 27)])
def test_padding_stays_where_the_target_computed_it(source, weights, imported, states, rows):
    """As SpecForge's collator pads: id 0, not supervised, and these states, or none. What its
    SGLang capture makes of padding, it also trains on.
    """
    padded = document(20, weights)
    for name in ("input_ids", "loss_mask"):
        padded[name] = torch.cat([padded[name], torch.zeros(7).long()])
    for name in STATES if states != "none" else ():
        tail = padded[name][:, :7] * (states == "computed")
        padded[name] = torch.cat([padded[name], tail], 1)
    save(padded, source / "data_0.ckpt")
    found = imported()[1][0]
    assert len(found.input_ids) == rows and len(found.features.argmax) == min(rows, 21) - 6
    assert found.loss_mask[19]  # the last row as SpecForge counts is a padded one


def test_longer_documents_are_cut_as_specforge_cuts(source, weights, imported):
    save(document(20, weights), source / "data_0.ckpt")
    found = imported(max_length=12)[1][0]
    assert found.loss_mask.tolist() == [False] * 6 + [True] * 5 + [False]
    assert len(found.features.aux_hidden_states) == 12


def test_a_norm_may_scale_by_one_more_than_its_weight(source, weights, imported):
    save(document(40, weights), source / "data_0.ckpt")
    assert imported(norm=weights.norm - 1)[0]["files"] == 1


def write_fixture(name, folder):
    """SpecForge's fixed inputs as its files; returns its numbers, the inputs, head and norm."""
    expected = json.loads((FOLDER / "expected.json").read_text())[name]
    fixture = Fixture(name, expected["lengths"])
    arrays, norm = fixture.arrays, bf16(fixture.arrays["target_norm"])
    last = rms_norm(bf16(arrays["last_hidden_prenorm"]), (256,), norm, 1e-5)
    for i, n in enumerate(expected["lengths"]):
        written = {
            "input_ids": torch.from_numpy(arrays["input_ids"])[i, :n].long(),
            "loss_mask": torch.from_numpy(arrays[f"{name}.loss_mask"])[i, :n].long(),
            "hidden_state": last[i, :n][None],
            "aux_hidden_state": bf16(arrays["aux_hidden_states"])[i, :n][None],
        }
        save(written, folder / "rows_0-2000" / f"data_{i}.ckpt")
    # The fixture has the head's rows of the draft vocabulary alone; each of the others that is an
    # argmax somewhere is made to point there.
    last, argmax = fixture.features.last_hidden_states, fixture.features.argmax
    head = torch.zeros(4096, 256)
    head[fixture.draft.t2d] = fixture.draft_head
    outside = ~fixture.draft.t2d[argmax]
    best = (last @ fixture.draft_head.T).amax()
    size = last[outside].square().sum(1, keepdim=True)
    head.index_add_(0, argmax[outside], 1.3 * best * last[outside] / size)
    return expected, fixture, head, norm


@pytest.mark.runs
@pytest.mark.parametrize("name", ["full", "padded"])
def test_a_run_on_its_files_gives_its_losses(tmp_path, name):
    """SpecForge's own numbers on fixed inputs (data/specforge/make.py), by the command a user
    types, with no tokenizer and no more of a target than embedding, norm and head.
    """
    expected, fixture, head, norm = write_fixture(name, tmp_path / "S")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "T")
    tensors = {"model.embed_tokens.weight": fixture.embedding, "lm_head.weight": head}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors | {"model.norm.weight": norm}, tmp_path / "T" / "model.safetensors")
    spec = spec_of(tmp_path / "T", [1, 3, 4])
    portable = portable_config(fixture.draft.config, spec, spec.path, 3)
    write_draft(fixture.draft, tmp_path / "D", portable)
    overrides = [
        "stages=[train]", "mode=offline", "model=hf", f"model.path={tmp_path / 'T'}",
        f"hidden_states.path={tmp_path / 'S'}", f"draft.init_from={tmp_path / 'D'}",
        "loss/mask=shifted", "draft.vocab_size=1024",
        "train.max_steps=1", "train.log_every=1", "train.documents_per_update=2",
        f"cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    run([*overrides, "stages=[import]"], tmp_path / "imported")
    run(overrides, tmp_path / "run")
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [row[f"loss/step_{k}"] for k in range(TTT_STEPS)]
    assert steps == pytest.approx(expected["step_loss"], rel=1e-5)
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


class Evil:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path):
        self.mark = path.parent / "executed"

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def flip_states(path, written):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flip(path, largest.header_offset + 1000)


def cut_gzip(path, written):
    path.unlink()
    cut(save(written, path.with_name("data_1.ckpt.gz")), 100)


def with_nan(states):
    states[0, 8, 3] = float("nan")
    return states


def put(name, value):
    """Replace one of the file's tensors by what `value` makes of it; None removes it."""

    def damage(path, written):
        written[name] = value(written.get(name))
        save({key: each for key, each in written.items() if each is not None}, path)

    return damage


IDS, MASK, LAST, AUX = "input_ids", "loss_mask", *STATES
DAMAGES = {  # by what is told; each kind is one way to damage a file
    "truncated or damaged": [
        lambda path, written: path.write_bytes(b""),
        lambda path, written: path.write_bytes(b"hidden states"),
        lambda path, written: cut(path, 3000),
        lambda path, written: path.write_bytes(pickle.dumps({IDS: Evil(path)})),
        cut_gzip,
    ],
    "is not loaded because it may run code": [
        lambda path, written: save(written | {IDS: Evil(path)}, path)
    ],
    "does not match its checksum": [flip_states],
    "lacks tensors": [lambda path, written: save([1], path)],
    r"lacks tensors \(aux_hidden_state\)": [put(AUX, lambda aux: None)],
    r"lacks tensors \(input_ids\)": [put(IDS, lambda ids: None)],
    "does not fit hidden size 32": [
        put(LAST, lambda last: torch.tensor(1.0)),
        put(LAST, lambda last: last[:, :-1]),
        put(LAST, lambda last: torch.ones(1, 20, H // 2)),
        put(LAST, lambda last: last.int()),
        put(MASK, lambda mask: torch.ones(2, 20).long()),
        put(AUX, lambda aux: torch.ones(1, 20, 2 * H)),
        put(IDS, lambda ids: torch.ones(20)),
    ],
    "supervised tokens without hidden states": [
        lambda path, written: save(written | {name: written[name][:, :-5] for name in STATES}, path)
    ],
    "ids outside the target's vocabulary": [
        put(IDS, lambda ids: torch.full((20,), V)),
        put(IDS, lambda ids: torch.full((20,), -1)),
    ],
    "not 0 and 1": [put(MASK, lambda mask: mask * 2)],
    "attention_mask": [put("attention_mask", lambda mask: torch.ones(20))],
    "final norm": [put(LAST, lambda last: 3 * last)],
    "NaN or infinite": [put(LAST, with_nan), put(AUX, with_nan)],
}
CASES = [(sentence, damage) for sentence, kinds in DAMAGES.items() for damage in kinds]


@pytest.mark.parametrize("sentence, damage", CASES)
def test_damage_fails_or_is_skipped(source, weights, imported, sentence, damage):
    for i in range(3):
        save(document(20, weights, i), source / f"data_{i}.ckpt")
    damage(source / "data_1.ckpt", document(20, weights, 1))
    with pytest.raises(RunError, match=rf"data_1.ckpt\S* .*{sentence}.*on_damage=skip") as raised:
        imported()
    assert "\n" not in str(raised.value)
    facts, found = imported(on_damage="skip")
    assert list(found) == [0, 2] and sum(facts["rejected"].values()) == 1
    (listed,) = read_jsonl(next((source.parents[1] / "cache").rglob("rejects.jsonl")))
    assert listed["file"].startswith(str(source / "data_1.ckpt"))
    assert not (source / "executed").exists()


def test_documents_without_a_supervised_token_are_counted(source, weights, imported):
    save(document(20, weights) | {MASK: torch.arange(20) // 19}, source / "data_0.ckpt")
    words = r"none of 1 files gives a document; .*data_0.ckpt, for one, has no sup"
    with pytest.raises(RunError, match=words):
        imported()
    save(document(20, weights), source / "data_1.ckpt")
    facts, found = imported()
    assert list(found) == [1] and facts["rejected"] == {"has no supervised token": 1}


def test_a_killed_import_goes_on(source, weights, imported, monkeypatch):
    """Killed in the third of four shards, between files that give no document."""
    for i in range(10):
        save(document(20, weights, i), source / f"data_{i}.ckpt")
    for i in (2, 3, 6, 9):
        (source / f"data_{i}.ckpt").write_bytes(b"PK" + bytes(9000))
    monkeypatch.setattr(specforge, "SHARD_BYTES", 16_000)  # two documents
    cache = source.parents[1] / "cache"

    def contents():
        (folder,) = (cache / "imported").glob("*/")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    facts, _ = imported(on_damage="skip")
    assert (facts["shards"], facts["documents"], sum(facts["rejected"].values())) == (3, 6, 4)
    whole = contents()
    shutil.rmtree(cache)
    read, load = [], specforge.load

    def killed(path):
        read.append(int(path.name[5:-5]))
        if read[-1] == 5 and read.count(5) == 1:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(specforge, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        imported(on_damage="skip")
    assert imported(on_damage="skip")[0] == facts
    assert read == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8, 9]
    assert contents() == whole


def test_head_and_states_of_different_precision(source, weights, imported):
    written = document(20, weights)
    written[LAST] = written[LAST].float()
    save(written, source / "data_0.ckpt")
    features = imported(dtype="bf16")[1][0].features
    assert features.last_hidden_states.dtype == torch.bfloat16
    logits = written[LAST][0, 6:] @ weights.head.float().T
    assert torch.equal(features.argmax, logits.argmax(-1))
    assert torch.allclose(features.logsumexp, logits.logsumexp(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "asked", "kept", "rounded"),
    [
        ("float32", None, "fp32", 0),
        ("float16", None, "fp32", 0),
        ("bfloat16", None, "bf16", 0),
        ("float32", "bf16", "bf16", 2),
        ("float16", "bf16", "bf16", 2),
        ("bfloat16", "int8", "int8", 2),
        ("bfloat16", "fp32", "fp32", 0),
    ],
)
def test_precision_is_that_of_the_files_and_rounding_is_said(
    source, weights, imported, capsys, stored, asked, kept, rounded
):
    given = [document(20, weights, seed) for seed in range(2)]
    for i, content in enumerate(given):
        for name in STATES:
            # More digits than bf16 has, as a target in fp32 gives them.
            content[name] = (content[name].float() * 1.001).to(getattr(torch, stored))
        save(content, source / f"data_{i}.ckpt")
    # What is damaged says nothing about the others.
    (source / "data_00.ckpt").write_bytes(b"PK")
    dtype = choose_dtype(hidden_states_section(source.parent, asked))
    assert dtype == kept
    facts, found = imported(dtype=dtype, on_damage="skip")
    said = " ".join(capsys.readouterr().out.split())
    assert facts["rounded"] == rounded
    assert ("states of 2 documents were rounded" in said) == (rounded > 0)
    for content, one in zip(given, found.values(), strict=True):
        states = one.features.aux_hidden_states.float()
        assert torch.equal(content[AUX][0].float(), states) == (rounded == 0)


def test_a_store_of_ones_own_is_read_as_it_is(tmp_path):
    """And what lies nowhere yet is captured in bf16."""
    create_store(tmp_path / "store", {"hidden_states.dtype": "int8"})
    assert choose_dtype(hidden_states_section(tmp_path / "store", None)) == "int8"
    assert choose_dtype(hidden_states_section(tmp_path / "store", "fp32")) == "fp32"
    for path in (None, tmp_path / "new"):
        assert choose_dtype(hidden_states_section(path, None)) == "bf16"
