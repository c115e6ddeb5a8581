"""Embedding, head and final norm read from safetensors are the loaded model's, bit for bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import SHAPE, edit_model, spec_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from eagle3.errors import ConfigError, RunError
from eagle3.target import weights
from eagle3.target.hf import HFTarget

ENDING = SHAPE | {"eos_token_id": 5}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": LlamaConfig(**ENDING),
    "llama-tied": LlamaConfig(**ENDING, tie_word_embeddings=True),
    "qwen3-tied": Qwen3Config(**ENDING, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**ENDING, **MOE),
    "gpt2-tied": GPT2Config(vocab_size=96, n_embd=64, n_head=4, n_layer=8, eos_token_id=5),
}
CPU = torch.device("cpu")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WANTED = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


def load(folder, dtype="auto", **model):
    return weights.load_weights(spec_of(folder, dtype=dtype, **model), CPU)


def save(folder, family="llama", dtype=None, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # or the norm would be ones
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def save_sharded(folder):
    """Returns which file has which tensor."""
    save(folder, max_shard_size="60KB")
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rename(folder, names):
    """Rename or (with an empty name) drop tensors of a single-file checkpoint."""
    dropped = {name for name, new in names.items() if not new}
    edit_model(
        folder, tensors=lambda t: {names.get(name, name): t[name] for name in t.keys() - dropped}
    )


def same(one, other):
    return torch.equal(one.embedding, other.embedding) and torch.equal(one.head, other.head)


def assert_loaded_alike(folder, dtype="auto"):
    ours, target = load(folder, dtype), HFTarget(spec_of(folder, dtype=dtype), CPU)
    norm = target.decoder.norm if hasattr(target.decoder, "norm") else target.decoder.ln_f
    torch.testing.assert_close(ours.norm, norm.weight, rtol=0, atol=0)
    for name in ("embedding", "head"):
        torch.testing.assert_close(getattr(ours, name), getattr(target, name), rtol=0, atol=0)
    assert ours.eos_token_ids == target.eos_token_ids
    assert ours.config.to_dict() == target.config.to_dict()
    return ours


@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "60KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loaded_models_own(tmp_path, family, shard):
    save(tmp_path, family, **shard)
    assert (tmp_path / INDEX).exists() == bool(shard)
    ours = assert_loaded_alike(tmp_path)
    assert (ours.head is ours.embedding) == family.endswith("tied")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_numbers_are_converted_as_the_model_converts_them(tmp_path, stored, dtype):
    ours = assert_loaded_alike(save(tmp_path, dtype=stored), dtype)
    assert ours.head.dtype == (stored if dtype == "auto" else getattr(torch, dtype))


def test_ends_of_answers_from_the_generation_config(tmp_path):
    assert load(save(tmp_path)).eos_token_ids == {5}
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert assert_loaded_alike(tmp_path).eos_token_ids == {7, 9}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes_are_found(tmp_path, prefix):
    plain = load(save(tmp_path))
    new = (f"{prefix}embed_tokens.weight", "language_model.lm_head.weight", f"{prefix}norm.weight")
    rename(tmp_path, dict(zip(WANTED, new, strict=True)))
    prefixed = load(tmp_path)
    assert same(prefixed, plain) and torch.equal(prefixed.norm, plain.norm)


def test_names_from_the_config(tmp_path):
    plain = load(save(tmp_path))
    rename(tmp_path, {WANTED[0]: "words.table", WANTED[1]: "words.back"})
    assert same(load(tmp_path, embedding_key="words.table", lm_head_key="words.back"), plain)
    shared = load(tmp_path, embedding_key="words.table", lm_head_key="words.table")
    assert torch.equal(shared.head, shared.embedding)


def test_a_head_that_is_stored_wins_over_a_config_that_ties(tmp_path):
    edit_model(save(tmp_path), {"tie_word_embeddings": True})
    assert_loaded_alike(tmp_path)
    edit_model(tmp_path, tensors=lambda t: t.update({WANTED[1]: t[WANTED[0]].clone()}))
    equal = load(tmp_path)
    assert equal.head is equal.embedding


def save_phi(folder):
    config = PhiConfig(**ENDING | {"num_key_value_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


SPOILT = [
    (None, {"lm_head_key": "lm_haed.weight"},
     r"model\.lm_head_key=lm_haed\.weight finds no tensor .* nearest are lm_head\.weight"),
    (lambda folder: rename(folder, {"lm_head.weight": ""}), {},
     r"model\.lm_head_key=null finds no tensor in "),
    (None, {"lm_head_key": "model.norm.weight"},
     r"model\.norm\.weight .* is F32 \[64\], not of floats \[96, 64\]"),
    (lambda folder: (folder / SINGLE).unlink(), {},
     r"model\.path=.* model\.safetensors.*; give a folder"),
    (lambda folder: (folder / save_sharded(folder)[WANTED[1]]).write_bytes(b"no header"), {},
     "model-.* does not open .*; get it again"),
    (lambda folder: (folder / save_sharded(folder)[WANTED[1]]).unlink(), {},
     "model-.*; give a folder"),
    (lambda folder: save_sharded(folder) and (folder / INDEX).write_text("{}"), {},
     rf"{INDEX} .* names no tensors; get it again"),
    (save_phi, {}, r"changes its logits behind the head \(a bias\)"),
    (lambda folder: edit_model(folder, {"final_logit_softcapping": 30.0}), {}, "logit_softcapping"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "keys", "sentence"), SPOILT)
def test_what_cannot_be_read(tmp_path, spoil, keys, sentence):
    """A file that is broken ends a run, all else is a mistake of the config."""
    save(tmp_path)
    if spoil:
        spoil(tmp_path)
    error = RunError if "get it again" in sentence else ConfigError
    with pytest.raises(error, match=sentence):
        load(tmp_path, **keys)


def test_only_what_is_needed_is_downloaded_and_read(tmp_path, monkeypatch):
    index, fetched = save_sharded(tmp_path / "hub"), []
    needed = {index[name] for name in WANTED}
    for file in set(index.values()) - needed:
        (tmp_path / "hub" / file).unlink()

    def download(repo, name, revision):
        assert (repo, revision) == ("some/model", "main")
        fetched.append(name)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)

    spec, local = spec_of(tmp_path / "hub", dtype="auto"), load(tmp_path / "hub")
    config = AutoConfig.from_pretrained(tmp_path / "hub")
    generation = tmp_path / "hub" / "generation_config.json"
    monkeypatch.setattr(weights, "cached_file", download)
    monkeypatch.setattr(weights, "whole_config", lambda *_: config)
    monkeypatch.setattr("eagle3.target.spec.cached_file", lambda *_, **__: generation)
    ours = weights.load_weights(replace(spec, path="some/model", revision="main"), CPU)
    assert same(ours, local) and set(fetched) == {INDEX} | needed
    assert needed < set(index.values())
