"""Embedding, head and final norm read from safetensors are those of the loaded model, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import spec_of
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
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
from eagle3.target.weights import load_weights

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
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-tied": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt2-tied": GPT2Config(vocab_size=96, n_embd=64, n_head=4, n_layer=8, eos_token_id=5),
}
CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def save(folder: Path, family: str = "llama", **options) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # or the norm would be ones
    model.save_pretrained(folder, **options)
    return str(folder)


def rename(folder: str, **names: str) -> None:
    """Rename or (with an empty name) drop tensors of a single-file checkpoint; dots are written
    `__`.
    """
    file = Path(folder, "model.safetensors")
    tensors = load_file(file)
    for old, new in names.items():
        tensor = tensors.pop(old.replace("__", "."))
        if new:
            tensors[new] = tensor
    save_file(tensors, file, {"format": "pt"})


def assert_equal(ours: weights.TargetWeights, target: HFTarget) -> None:
    for name in ("embedding", "head"):
        torch.testing.assert_close(getattr(ours, name), getattr(target, name), rtol=0, atol=0)
    norm = target.decoder.norm if hasattr(target.decoder, "norm") else target.decoder.ln_f
    torch.testing.assert_close(ours.norm, norm.weight, rtol=0, atol=0)
    for name in ("aux_layer_ids", "eos_token_ids", "device"):
        assert getattr(ours, name) == getattr(target, name)
    assert ours.config.to_dict() == target.config.to_dict()


@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "60KB"}], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loaded_models_own(tmp_path, family, shard):
    folder = save(tmp_path, family, **shard)
    assert (tmp_path / INDEX).exists() == bool(shard)
    ours = load_weights(spec_of(folder, dtype="auto"), CPU)
    assert_equal(ours, HFTarget(spec_of(folder, dtype="auto"), CPU))
    assert (ours.head is ours.embedding) == family.endswith("tied")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_numbers_are_converted_as_the_model_converts_them(tmp_path, stored, dtype):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).to(stored).save_pretrained(tmp_path)
    ours = load_weights(spec_of(tmp_path, dtype=dtype), CPU)
    assert_equal(ours, HFTarget(spec_of(tmp_path, dtype=dtype), CPU))
    assert ours.head.dtype == (stored if dtype == "auto" else getattr(torch, dtype))


def test_only_the_files_and_tensors_needed_are_read(tmp_path, monkeypatch):
    folder = save(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    wanted = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    for file in set(index.values()) - {index[name] for name in wanted}:
        (tmp_path / file).unlink()
    read = []

    class Watched:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

        def get_slice(self, name):
            return self.file.get_slice(name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    safe_open = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", Watched)
    load_weights(spec_of(folder, dtype="auto"), CPU)
    assert set(read) == wanted


def test_ends_of_answers_from_the_generation_config(tmp_path):
    folder = save(tmp_path)
    assert load_weights(spec_of(folder, dtype="auto"), CPU).eos_token_ids == {5}
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert (
        load_weights(spec_of(folder, dtype="auto"), CPU).eos_token_ids
        == HFTarget(spec_of(folder, dtype="auto"), CPU).eos_token_ids
        == {7, 9}
    )


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes_are_found(tmp_path, prefix):
    folder = save(tmp_path)
    plain = load_weights(spec_of(folder, dtype="auto"), CPU)
    rename(
        folder,
        model__embed_tokens__weight=f"{prefix}embed_tokens.weight",
        model__norm__weight=f"{prefix}norm.weight",
        lm_head__weight="language_model.lm_head.weight",
    )
    prefixed = load_weights(spec_of(folder, dtype="auto"), CPU)
    for name in ("embedding", "head", "norm"):
        assert torch.equal(getattr(prefixed, name), getattr(plain, name))


def test_names_from_the_config(tmp_path):
    folder = save(tmp_path)
    plain = load_weights(spec_of(folder, dtype="auto"), CPU)
    rename(folder, model__embed_tokens__weight="words.table", lm_head__weight="words.back")
    named = load_weights(
        spec_of(folder, embedding_key="words.table", lm_head_key="words.back", dtype="auto"), CPU
    )
    assert torch.equal(named.embedding, plain.embedding) and torch.equal(named.head, plain.head)


def test_missing_names_are_said_with_the_nearest(tmp_path):
    folder = save(tmp_path)
    sentence = r"model\.lm_head_key=lm_haed\.weight is no tensor of .*model\.safetensors; .* there are lm_head\.weight"
    with pytest.raises(ConfigError, match=sentence):
        load_weights(spec_of(folder, lm_head_key="lm_haed.weight", dtype="auto"), CPU)
    rename(folder, lm_head__weight="")
    with pytest.raises(
        ConfigError, match=r"model\.lm_head_key is needed, as no name ends with lm_head\.weight or "
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)
    shared = load_weights(
        spec_of(folder, lm_head_key="model.embed_tokens.weight", dtype="auto"), CPU
    )
    assert torch.equal(shared.head, shared.embedding)


def test_a_head_that_is_stored_wins_over_a_config_that_ties(tmp_path):
    folder = save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    assert_equal(
        load_weights(spec_of(folder, dtype="auto"), CPU),
        HFTarget(spec_of(folder, dtype="auto"), CPU),
    )
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    equal = load_weights(spec_of(folder, dtype="auto"), CPU)
    assert equal.head is equal.embedding


def test_shapes_must_fit_the_config(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"model\.norm\.weight .* is F32 \[64\], but must be a float tensor \[96, 6",
    ):
        load_weights(spec_of(folder, lm_head_key="model.norm.weight", dtype="auto"), CPU)


def test_files_without_safetensors(tmp_path):
    folder = save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors"
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        ConfigError, match=r"pytorch_model\.bin only, .*; convert it to safetensors"
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)


def test_damaged_and_missing_files(tmp_path):
    folder = save(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shard = tmp_path / index["lm_head.weight"]
    shard.write_bytes(b"no header")
    with pytest.raises(
        RunError, match=rf"{shard.name} of the target at .* does not open .*; get it again"
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)
    shard.unlink()
    with pytest.raises(
        RunError, match=rf"{shard.name} of the target at .* does not open .*; get it again"
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(
        RunError, match=rf"{INDEX} of the target at .* names no tensors; get it again"
    ):
        load_weights(spec_of(folder, dtype="auto"), CPU)


def test_heads_that_are_no_product_are_refused(tmp_path):
    config = PhiConfig(**SHAPE | {"num_key_value_heads": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"changes its logits behind the head \(a bias\)"):
        load_weights(spec_of(tmp_path, dtype="auto"), CPU)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"final_logit_softcapping": 30.0}))
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        load_weights(spec_of(tmp_path, dtype="auto"), CPU)


def test_a_hub_id_downloads_only_what_is_needed(tmp_path, monkeypatch):
    save(tmp_path / "hub", max_shard_size="60KB")
    fetched = []

    def download(repo, name, revision):
        assert (repo, revision) == ("some/model", "main")
        if not (tmp_path / "hub" / name).exists():
            raise EntryNotFoundError("404", response=None)
        fetched.append(name)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(tmp_path / "hub" / name, tmp_path / "cache" / name)

    class Local:
        def from_pretrained(self, path, **options):
            return self.kind.from_pretrained(tmp_path / "hub")

        def __init__(self, kind):
            self.kind = kind

    monkeypatch.setattr(weights, "hf_hub_download", download)
    for name in ("AutoConfig", "GenerationConfig"):
        monkeypatch.setattr(weights, name, Local(getattr(weights, name)))
    monkeypatch.setattr(
        weights, "text_config", lambda *_: weights.AutoConfig.from_pretrained("").get_text_config()
    )
    ours = load_weights(spec_of("some/model", revision="main", dtype="auto"), CPU)
    local = load_weights(spec_of(tmp_path / "hub", dtype="auto"), CPU)
    assert torch.equal(ours.head, local.head) and torch.equal(ours.embedding, local.embedding)
    index = json.loads((tmp_path / "hub" / INDEX).read_text())["weight_map"]
    needed = {
        index[name] for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    }
    assert set(fetched) == {INDEX} | needed
    assert needed < set(index.values())
