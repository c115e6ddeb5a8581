"""SpecForge's hidden-state files become our store: layout, padding, norms, numbers, damage, safety,
resuming.

The files are written as SpecForge 0.2.0 and its earlier `scripts/prepare_hidden_states.py` write
them.
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
from conftest import hidden_states_section, run, spec_of
from safetensors.torch import save_file
from specforge_case import FOLDER, TTT_STEPS, Fixture, bf16
from transformers import LlamaConfig

import eagle3.hidden_states.import_specforge as specforge
from eagle3.batch import Features, concatenate_features, pack, shifted
from eagle3.data.vocab import choose_vocab
from eagle3.errors import RunError
from eagle3.export.write import portable_config, write_draft
from eagle3.hidden_states.import_specforge import choose_dtype, import_specforge, is_specforge
from eagle3.hidden_states.store import create_store, open_store
from eagle3.runs.artefact import read_facts
from eagle3.target.hf import head_statistics
from eagle3.target.weights import TargetWeights

H, V = 32, 50


def weights_of(head, norm):
    config = SimpleNamespace(hidden_size=head.shape[1], rms_norm_eps=1e-5, model_type="llama")
    return TargetWeights(config, head, head, norm, {1})


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return weights_of(
        torch.randn(V, H, generator=generator).bfloat16(),
        1 + 0.3 * torch.randn(H, generator=generator).bfloat16(),
    )


def normed(residual, weights):
    return torch.nn.functional.rms_norm(residual.float(), (H,), weights.norm.float(), 1e-5).to(
        residual.dtype
    )


def document(n: int, weights, seed: int = 0) -> dict:
    """What `prepare_hidden_states.py` saves of a conversation."""
    generator = torch.Generator().manual_seed(seed)
    scale = 3 * (1 + torch.rand(n, 1, generator=generator))
    residual = scale * torch.randn(n, H, generator=generator)
    return {
        "input_ids": torch.randint(1, V, (n,), generator=generator),
        "loss_mask": (torch.arange(n) >= n // 3).long(),
        "hidden_state": normed(residual.bfloat16(), weights)[None],
        "aux_hidden_state": torch.randn(1, n, 3 * H, generator=generator).bfloat16(),
    }


def save(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        with gzip.open(path, "wb") as stream:
            torch.save(content, stream)
    else:
        torch.save(content, path)
    return path


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Imports `source` with these weights; returns the facts, and the documents by key."""

    def run_import(source, weights, dtype="fp32", max_length=4096, on_damage="fail"):
        monkeypatch.setattr(specforge, "load_weights", lambda spec, device: weights)
        target = SimpleNamespace(spec=SimpleNamespace(identity={"path": "x"}), device="cpu")
        section = hidden_states_section(source, dtype, on_damage=on_damage)
        folder = import_specforge(section, target, max_length, str(tmp_path / "cache"))
        store = open_store(section, folder, {"hidden_states.dtype": dtype, "documents": "any"})
        assert store.facts.items() <= read_facts(folder).items()
        found = store.load(store.order.tolist())
        ids = torch.cat([d.input_ids[d.loss_mask] for d in found.values()])
        counts = ids.bincount(minlength=len(weights.head)).numpy()
        assert store.vocab(9).tolist() == choose_vocab(counts, 9, set()).tolist()
        return read_facts(folder), found

    return run_import


def test_what_a_folder_of_specforge_is(tmp_path):
    assert not is_specforge(tmp_path) and not is_specforge(tmp_path / "none")
    save({}, tmp_path / "a" / "last.ckpt")
    assert not is_specforge(tmp_path)
    save({}, tmp_path / "b" / "rows_0-2000" / "data_0.ckpt.gz")
    assert is_specforge(tmp_path / "b") and is_specforge(tmp_path)


def test_documents_come_in_the_order_of_their_numbers(tmp_path, weights, imported):
    for number in (10, 9, 1):
        save(document(10 + number, weights), tmp_path / "S" / f"data_{number}.ckpt")
    found = imported(tmp_path / "S", weights)[1]
    assert [len(found[key].input_ids) for key in range(3)] == [11, 19, 20]


@pytest.mark.parametrize("suffix", ["ckpt", "ckpt.gz"])
@pytest.mark.parametrize("batched", [True, False], ids=["[1,n,H]", "[n,H]"])
def test_a_document_arrives_whole(tmp_path, weights, imported, suffix, batched):
    written = document(20, weights)
    if not batched:
        written |= {name: written[name][0] for name in ("hidden_state", "aux_hidden_state")}
    save(written, tmp_path / "rows_0-2000" / f"data_0.{suffix}")
    facts, found = imported(tmp_path, weights)
    got, features = found[0], found[0].features
    mask = written["loss_mask"].bool()
    mask[-1] = False  # SpecForge never supervises the last row it has
    teachers = torch.arange(6, 20)
    assert torch.equal(got.input_ids.long(), written["input_ids"]) and torch.equal(
        got.loss_mask, mask
    )
    assert torch.equal(
        features.aux_hidden_states, written["aux_hidden_state"].reshape(20, -1).float()
    )
    last = written["hidden_state"].reshape(20, -1)[teachers]
    assert torch.equal(features.last_hidden_states, last.float())
    argmax, logsumexp = head_statistics(last, weights.head)
    assert torch.equal(features.argmax, argmax) and torch.equal(features.logsumexp, logsumexp)
    counted = facts["files"], facts["documents"], facts["tokens"], facts["teacher_rows"]
    assert counted == (1, 1, 20, 14)
    assert facts["rejected"] == {}


def pad(written, rows, states):
    """As SpecForge's collator does: id 0, not supervised, and these states, or none."""
    padded = dict(written)
    for name in ("input_ids", "loss_mask"):
        padded[name] = torch.cat([written[name], torch.zeros(rows).long()])
    if states != "none":
        for name in ("hidden_state", "aux_hidden_state"):
            tail = written[name][:, :rows] * (states == "computed")
            padded[name] = torch.cat([written[name], tail], 1)
    return padded


@pytest.mark.parametrize("states", ["zero", "none"])
def test_rows_that_the_target_never_computed_are_trimmed(tmp_path, weights, imported, states):
    padded = pad(document(20, weights), 7, states)
    save(padded, tmp_path / "rows_0-2000" / "data_0.ckpt")
    _, found = imported(tmp_path, weights)
    assert len(found[0].input_ids) == 20
    assert found[0].loss_mask[-1]  # the last row as SpecForge counts is a padded one


def test_rows_that_the_target_computed_stay(tmp_path, weights, imported):
    """What SpecForge's SGLang capture makes of padding, it also trains on."""
    save(pad(document(20, weights), 7, "computed"), tmp_path / "rows_0-2000" / "data_0.ckpt")
    _, found = imported(tmp_path, weights)
    assert len(found[0].input_ids) == 27 and found[0].features.argmax.shape == (15,)


def test_longer_documents_are_cut_as_specforge_cuts(tmp_path, weights, imported):
    save(document(20, weights), tmp_path / "rows_0-2000" / "data_0.ckpt")
    _, found = imported(tmp_path, weights, max_length=12)
    assert found[0].loss_mask.tolist() == [False] * 6 + [True] * 5 + [False]
    assert len(found[0].features.aux_hidden_states) == 12


@pytest.mark.parametrize("offset", [0, 1])
def test_a_norm_may_scale_by_one_more_than_its_weight(tmp_path, weights, imported, offset):
    save(document(40, weights), tmp_path / "rows_0-2000" / "data_0.ckpt")
    assert imported(tmp_path, weights_of(weights.head, weights.norm - offset))[0]["files"] == 1


def head_with(fixture, last, argmax):
    """A head [4096,H] with the fixture's rows of the draft vocabulary, whose argmax for `last` is
    as stored there.

    The fixture leaves out the head's other rows; each that is an argmax somewhere is made to point
    there.
    """
    head = torch.zeros(4096, last.shape[1])
    head[fixture.draft.t2d] = fixture.draft_head
    outside = ~fixture.draft.t2d[argmax]
    best = (last @ fixture.draft_head.T).amax()
    head.index_add_(
        0, argmax[outside], 1.3 * best * last[outside] / last[outside].square().sum(1, keepdim=True)
    )
    return head


def write_fixture(name, folder):
    """SpecForge's fixed inputs as its files; returns its numbers, the inputs, head and norm."""
    expected = json.loads((FOLDER / "expected.json").read_text())[name]
    fixture = Fixture(name, expected["lengths"])
    arrays, norm = fixture.arrays, bf16(fixture.arrays["target_norm"])
    last = torch.nn.functional.rms_norm(bf16(arrays["last_hidden_prenorm"]), (256,), norm, 1e-5)
    for i, n in enumerate(expected["lengths"]):
        written = {
            "input_ids": torch.from_numpy(arrays["input_ids"])[i, :n].long(),
            "loss_mask": torch.from_numpy(arrays[f"{name}.loss_mask"])[i, :n].long(),
            "hidden_state": last[i, :n][None],
            "aux_hidden_state": bf16(arrays["aux_hidden_states"])[i, :n][None],
        }
        save(written, folder / "rows_0-2000" / f"data_{i}.ckpt")
    head = head_with(fixture, fixture.features.last_hidden_states, fixture.features.argmax)
    return expected, fixture, head, norm


@torch.no_grad()
def test_losses_are_those_of_specforge(tmp_path, imported):
    """Its own numbers on fixed inputs (data/specforge/make.py), through its files and the store."""
    expected, fixture, head, norm = write_fixture("padded", tmp_path)
    _, found = imported(tmp_path, weights_of(head, norm))
    documents = [found[0], found[1]]
    teachers = fixture.features.argmax
    fixture.batch = pack(documents, fixture.draft.t2d, TTT_STEPS, shifted)
    fixture.features = concatenate_features([document.features for document in documents])
    assert torch.equal(fixture.features.argmax, teachers)
    out, loss = fixture()
    steps = (out.step_loss / fixture.batch.normaliser).tolist()
    assert steps == pytest.approx(expected["step_loss"], rel=1e-5)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert out.step_correct.tolist() == expected["correct"]


@pytest.mark.runs
@pytest.mark.parametrize("name", ["full", "padded"])
def test_a_run_on_its_files_gives_its_losses(tmp_path, name):
    """The command a user types, with no tokenizer and no more of a target than embedding, norm and
    head.
    """
    expected, fixture, head, norm = write_fixture(name, tmp_path / "S")
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        rms_norm_eps=1e-5, dtype="float32",
    )  # fmt: skip
    config.save_pretrained(tmp_path / "T")
    tensors = {
        "model.embed_tokens.weight": fixture.embedding,
        "lm_head.weight": head,
        "model.norm.weight": norm,
    }
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "T" / "model.safetensors")
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
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    steps = [row[f"loss/step_{k}"] for k in range(TTT_STEPS)]
    assert steps == pytest.approx(expected["step_loss"], rel=1e-5)
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def evil(path, mark, weights):
    save(document(20, weights) | {"input_ids": Evil(mark)}, path)


def evil_bare(path, mark, weights):
    path.write_bytes(pickle.dumps({"input_ids": Evil(mark)}))


@pytest.mark.parametrize(
    ("write", "reason"),
    [(evil, "is not loaded because it may run code"), (evil_bare, "is truncated or damaged")],
)
def test_a_pickle_that_runs_code_is_refused(tmp_path, weights, imported, write, reason):
    for i in range(2):
        save(document(20, weights), tmp_path / "rows_0-2000" / f"data_{i}.ckpt")
    write(tmp_path / "rows_0-2000" / "data_0.ckpt", tmp_path / "executed", weights)
    with pytest.raises(RunError, match=f"data_0.ckpt {reason}"):
        imported(tmp_path, weights)
    facts, found = imported(tmp_path, weights, on_damage="skip")
    assert list(found) == [1] and facts["rejected"] == {reason: 1}
    assert not (tmp_path / "executed").exists()


def truncate(path, written):
    path.write_bytes(path.read_bytes()[:-3000])


def flip(path, written):
    with zipfile.ZipFile(path) as archive:
        start = max(archive.infolist(), key=lambda entry: entry.file_size).header_offset
    data = bytearray(path.read_bytes())
    data[start + 1000] ^= 1
    path.write_bytes(data)


def change(edit):
    """Replace what `edit` returns for the file's tensors; None removes one."""

    def damage(path, written):
        changed = written | edit(written)
        save({name: value for name, value in changed.items() if value is not None}, path)

    return damage


def with_nan(name):
    def damage(path, written):
        written[name][0, 8, 3] = float("nan")
        save(written, path)

    return damage


STATES = ("hidden_state", "aux_hidden_state")
SHAPES = "does not fit hidden size 32"
IDS, ARCHIVE = "ids outside the target's vocabulary", "truncated or damaged"
DAMAGES = {
    "empty": (lambda path, written: path.write_bytes(b""), ARCHIVE),
    "truncated": (truncate, ARCHIVE),
    "flipped bit": (flip, "does not match its checksum"),
    "no archive": (lambda path, written: path.write_bytes(b"hidden states"), ARCHIVE),
    "no dict": (lambda path, written: save([1], path), "lacks tensors"),
    "no aux": (change(lambda w: {"aux_hidden_state": None}), r"lacks tensors \(aux_hidden_state\)"),
    "no ids": (change(lambda w: {"input_ids": None}), r"lacks tensors \(input_ids\)"),
    "scalar": (change(lambda w: {"hidden_state": torch.tensor(1.0)}), SHAPES),
    "short states": (change(lambda w: {STATES[0]: w[STATES[0]][:, :-1]}), SHAPES),
    "tokens without states": (
        change(lambda w: {name: w[name][:, :-5] for name in STATES}),
        "supervised tokens without hidden states",
    ),
    "two documents": (change(lambda w: {"loss_mask": torch.ones(2, 20).long()}), SHAPES),
    "other target": (change(lambda w: {STATES[0]: torch.ones(1, 20, H // 2)}), SHAPES),
    "two aux layers": (change(lambda w: {STATES[1]: torch.ones(1, 20, 2 * H)}), SHAPES),
    "ids too high": (change(lambda w: {"input_ids": torch.full((20,), V)}), IDS),
    "ids negative": (change(lambda w: {"input_ids": torch.full((20,), -1)}), IDS),
    "float ids": (change(lambda w: {"input_ids": torch.ones(20)}), SHAPES),
    "integer states": (change(lambda w: {STATES[0]: w[STATES[0]].int()}), SHAPES),
    "odd mask": (change(lambda w: {"loss_mask": torch.full((20,), 2)}), "not 0 and 1"),
    "attention mask": (change(lambda w: {"attention_mask": torch.ones(20)}), "attention_mask"),
    "before the norm": (change(lambda w: {STATES[0]: 3 * w[STATES[0]]}), "final norm"),
    "NaN": (with_nan("hidden_state"), "NaN or infinite"),
    "NaN in aux": (with_nan("aux_hidden_state"), "NaN or infinite"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_fails_or_is_skipped(tmp_path, weights, imported, kind):
    damage, sentence = DAMAGES[kind]
    source = tmp_path / "rows_0-2000"
    for i in range(3):
        save(document(20, weights, i), source / f"data_{i}.ckpt")
    damage(source / "data_1.ckpt", document(20, weights, 1))
    with pytest.raises(RunError, match=rf"data_1.ckpt .*{sentence}.*on_damage=skip") as raised:
        imported(tmp_path, weights)
    assert "\n" not in str(raised.value)
    facts, found = imported(tmp_path, weights, on_damage="skip")
    assert list(found) == [0, 2] and sum(facts["rejected"].values()) == 1
    (listed,) = next((tmp_path / "cache").rglob("rejects.jsonl")).read_text().splitlines()
    assert json.loads(listed)["file"] == str(source / "data_1.ckpt")


def test_damaged_gzip(tmp_path, weights, imported):
    save(document(20, weights), tmp_path / "rows_0-2000" / "data_1.ckpt")
    path = save(document(20, weights), tmp_path / "rows_0-2000" / "data_0.ckpt.gz")
    path.write_bytes(path.read_bytes()[:-100])
    assert list(imported(tmp_path, weights, on_damage="skip")[1]) == [1]


def test_documents_without_a_supervised_token_are_counted(tmp_path, weights, imported):
    save(
        document(20, weights) | {"loss_mask": torch.arange(20) // 19},
        tmp_path / "rows_0-2000" / "data_0.ckpt",
    )
    with pytest.raises(
        RunError, match=r"none of 1 files gives a document; .*data_0.ckpt, for one, has no sup"
    ):
        imported(tmp_path, weights)
    save(document(20, weights), tmp_path / "rows_0-2000" / "data_1.ckpt")
    facts, found = imported(tmp_path, weights)
    assert list(found) == [1] and facts["rejected"] == {"has no supervised token": 1}


def test_a_killed_import_goes_on(tmp_path, weights, imported, monkeypatch):
    """Killed in the third of four shards, between files that give no document."""
    for i in range(10):
        save(document(20, weights, i), tmp_path / "rows_0-2000" / f"data_{i}.ckpt")
    for i in (2, 3, 6, 9):
        (tmp_path / "rows_0-2000" / f"data_{i}.ckpt").write_bytes(b"PK" + bytes(9000))
    monkeypatch.setattr(specforge, "SHARD_BYTES", 16_000)  # two documents

    def contents():
        (folder,) = (tmp_path / "cache" / "imported").glob("*/")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    facts, _ = imported(tmp_path / "rows_0-2000", weights, on_damage="skip")
    assert (facts["shards"], facts["documents"], sum(facts["rejected"].values())) == (3, 6, 4)
    whole = contents()
    shutil.rmtree(tmp_path / "cache")
    read, load = [], specforge.load

    def killed(path):
        read.append(int(path.name[5:-5]))
        if read[-1] == 5 and read.count(5) == 1:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(specforge, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        imported(tmp_path / "rows_0-2000", weights, on_damage="skip")
    assert imported(tmp_path / "rows_0-2000", weights, on_damage="skip")[0] == facts
    assert read == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8, 9]
    assert contents() == whole


def test_head_and_states_of_different_precision(tmp_path, weights, imported):
    written = document(20, weights)
    written["hidden_state"] = written["hidden_state"].float()
    save(written, tmp_path / "rows_0-2000" / "data_0.ckpt")
    features = imported(tmp_path, weights, dtype="bf16")[1][0].features
    assert isinstance(features, Features) and features.last_hidden_states.dtype == torch.bfloat16
    logits = written["hidden_state"][0, 6:] @ weights.head.float().T
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
    tmp_path, weights, imported, capsys, stored, asked, kept, rounded
):
    given = [document(20, weights, seed) for seed in range(2)]
    for i, content in enumerate(given):
        for name in ("aux_hidden_state", "hidden_state"):
            # More digits than bf16 has, as a target in fp32 gives them.
            content[name] = (content[name].float() * 1.001).to(getattr(torch, stored))
        save(content, tmp_path / "rows_0-2000" / f"data_{i}.ckpt")
    # What is damaged says nothing about the others.
    (tmp_path / "rows_0-2000" / "data_00.ckpt").write_bytes(b"PK")
    dtype = choose_dtype(hidden_states_section(tmp_path, asked))
    assert dtype == kept
    facts, found = imported(tmp_path, weights, dtype=dtype, on_damage="skip")
    said = " ".join(capsys.readouterr().out.split())
    assert facts["rounded"] == rounded
    assert ("states of 2 documents were rounded" in said) == (rounded > 0)
    for content, one in zip(given, found.values(), strict=True):
        states = one.features.aux_hidden_states.float()
        assert torch.equal(content["aux_hidden_state"][0].float(), states) == (rounded == 0)


def test_a_store_of_ones_own_is_read_as_it_is(tmp_path):
    """And what lies nowhere yet is captured in bf16."""
    create_store(tmp_path / "store", {"hidden_states.dtype": "int8"})
    assert choose_dtype(hidden_states_section(tmp_path / "store", None)) == "int8"
    assert choose_dtype(hidden_states_section(tmp_path / "store", "fp32")) == "fp32"
    for path in (None, tmp_path / "new"):
        assert choose_dtype(hidden_states_section(path, None)) == "bf16"
