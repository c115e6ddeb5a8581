"""Embedding, head and final norm read from safetensors are the loaded model's, bit for bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import spec_of
from safetensors.torch import load_file, save_file
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

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 5,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **MOE),
    "gpt2-tied": GPT2Config(vocab_size=96, n_embd=64, n_head=4, n_layer=8, eos_token_id=5),
}
CPU = torch.device("cpu")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
WANTED = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


def load(folder: Path, dtype="auto", **model) -> weights.TargetWeights:
    return weights.load_weights(spec_of(folder, dtype=dtype, **model), CPU)


def save(folder: Path, family: str = "llama", **options) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # or the norm would be ones
    model.save_pretrained(folder, **options)
    return folder


def save_sharded(folder: Path) -> dict[str, str]:
    """Returns which file has which tensor."""
    save(folder, max_shard_size="60KB")
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rename(folder: Path, names: dict[str, str]) -> None:
    """Rename or (with an empty name) drop tensors of a single-file checkpoint."""
    tensors = load_file(folder / SINGLE)
    for old, new in names.items():
        tensor = tensors.pop(old)
        if new:
            tensors[new] = tensor
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def edit_config(folder: Path, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def assert_loaded_alike(folder: Path, dtype="auto") -> weights.TargetWeights:
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
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).to(stored).save_pretrained(tmp_path)
    ours = assert_loaded_alike(tmp_path, dtype)
    assert ours.head.dtype == (stored if dtype == "auto" else getattr(torch, dtype))


def test_only_the_files_needed_are_read(tmp_path):
    index = save_sharded(tmp_path)
    for file in set(index.values()) - {index[name] for name in WANTED}:
        (tmp_path / file).unlink()
    load(tmp_path)


def test_ends_of_answers_from_the_generation_config(tmp_path):
    save(tmp_path)
    assert load(tmp_path).eos_token_ids == {5}
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert assert_loaded_alike(tmp_path).eos_token_ids == {7, 9}


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes_are_found(tmp_path, prefix):
    plain = load(save(tmp_path))
    new = (f"{prefix}embed_tokens.weight", "language_model.lm_head.weight", f"{prefix}norm.weight")
    rename(tmp_path, dict(zip(WANTED, new, strict=True)))
    prefixed = load(tmp_path)
    for name in ("embedding", "head", "norm"):
        assert torch.equal(getattr(prefixed, name), getattr(plain, name))


def test_names_from_the_config(tmp_path):
    plain = load(save(tmp_path))
    rename(tmp_path, {WANTED[0]: "words.table", WANTED[1]: "words.back"})
    named = load(tmp_path, embedding_key="words.table", lm_head_key="words.back")
    assert torch.equal(named.embedding, plain.embedding) and torch.equal(named.head, plain.head)
    shared = load(tmp_path, embedding_key="words.table", lm_head_key="words.table")
    assert torch.equal(shared.head, shared.embedding)


def test_a_head_that_is_stored_wins_over_a_config_that_ties(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    assert_loaded_alike(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    equal = load(tmp_path)
    assert equal.head is equal.embedding


def damage_shard(folder: Path) -> None:
    shard = folder / save_sharded(folder)["lm_head.weight"]
    shard.write_bytes(b"no header")


def lose_shard(folder: Path) -> None:
    (folder / save_sharded(folder)["lm_head.weight"]).unlink()


def empty_index(folder: Path) -> None:
    save_sharded(folder)
    (folder / INDEX).write_text("{}")


PHI = PhiConfig(**SHAPE | {"num_key_value_heads": 4})


@pytest.mark.parametrize(
    ("spoil", "keys", "error", "sentence"),
    [
        (
            lambda folder: None,
            {"lm_head_key": "lm_haed.weight"},
            ConfigError,
            r"model\.lm_head_key=lm_haed\.weight finds no tensor .* nearest are lm_head\.weight",
        ),
        (
            lambda folder: rename(folder, {"lm_head.weight": ""}),
            {},
            ConfigError,
            r"model\.lm_head_key=null finds no tensor in ",
        ),
        (
            lambda folder: None,
            {"lm_head_key": "model.norm.weight"},
            ConfigError,
            r"model\.norm\.weight .* is F32 \[64\], not of floats \[96, 64\]",
        ),
        (
            lambda folder: (folder / SINGLE).unlink(),
            {},
            ConfigError,
            r"model\.path=.* model\.safetensors.*; give a folder",
        ),
        (damage_shard, {}, RunError, "model-.* does not open .*; get it again"),
        (lose_shard, {}, ConfigError, "model-.*; give a folder"),
        (empty_index, {}, RunError, rf"{INDEX} .* names no tensors; get it again"),
        (
            lambda folder: AutoModelForCausalLM.from_config(PHI).save_pretrained(folder),
            {},
            ConfigError,
            r"changes its logits behind the head \(a bias\)",
        ),
        (
            lambda folder: edit_config(folder, final_logit_softcapping=30.0),
            {},
            ConfigError,
            "final_logit_softcapping",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path, spoil, keys, error, sentence):
    save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=sentence):
        load(tmp_path, **keys)


def test_a_hub_id_downloads_only_what_is_needed(tmp_path, monkeypatch):
    index = save_sharded(tmp_path / "hub")
    fetched = []

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
    assert torch.equal(ours.head, local.head) and torch.equal(ours.embedding, local.embedding)
    needed = {index[name] for name in WANTED}
    assert set(fetched) == {INDEX} | needed
    assert needed < set(index.values())
