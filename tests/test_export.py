"""The portable folder: exactly the names, shapes and config that engines expect; nothing else is
read.
"""

import json

import pytest
import torch
from conftest import spec_of
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from eagle3.data.vocab import vocab_tensors
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.errors import RunError
from eagle3.export.write import MadeFor, read_draft, write_draft, write_speculators

NAMES = {
    "fc.weight": [64, 192],
    "midlayer.input_layernorm.weight": [64],
    "midlayer.hidden_norm.weight": [64],
    "midlayer.post_attention_layernorm.weight": [64],
    "midlayer.self_attn.q_proj.weight": [64, 128],
    "midlayer.self_attn.k_proj.weight": [32, 128],
    "midlayer.self_attn.v_proj.weight": [32, 128],
    "midlayer.self_attn.o_proj.weight": [64, 64],
    "midlayer.mlp.gate_proj.weight": [128, 64],
    "midlayer.mlp.up_proj.weight": [128, 64],
    "midlayer.mlp.down_proj.weight": [64, 128],
    "norm.weight": [64],
    "lm_head.weight": [300, 64],
    "d2t": [300],
    "t2d": [2048],
}


@pytest.fixture
def target(target_folder):
    return spec_of(target_folder).config


@pytest.fixture
def draft(target):
    torch.manual_seed(0)
    t2d, d2t = vocab_tensors(torch.randperm(2048)[:300].sort().values.numpy(), 2048)
    return Draft(derive_config(target, 300), Auto, t2d, d2t)


@pytest.fixture
def folder(draft, target, tmp_path):
    write_draft(draft, tmp_path / "draft", target, [1, 3, 4])
    return tmp_path / "draft"


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_names_shapes_and_dtypes(folder):
    tensors = load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == NAMES
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(tensor.dtype == kinds.get(name, torch.bfloat16) for name, tensor in tensors.items())
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], tensors["d2t"] + torch.arange(300))


def test_config(folder):
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForCausalLMEagle3"] and config["num_hidden_layers"] == 1
    )
    assert config["max_position_embeddings"] == 512 and config["rope_scaling"] is None
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["draft_vocab_size"] == 300 and config["vocab_size"] == 2048
    assert "target_hidden_size" not in config


def test_round_trip(folder, draft, target):
    loaded = read_draft(folder, Auto, target, [1, 3, 4])
    for name, parameter in draft.named_parameters():
        assert torch.equal(loaded.state_dict()[name], parameter.bfloat16().float())
    assert torch.equal(loaded.target_ids, draft.target_ids) and loaded.config == draft.config


def test_whole_vocabulary_ships_no_maps(target, tmp_path):
    t2d, d2t = vocab_tensors(torch.arange(2048).numpy(), 2048)
    write_draft(
        Draft(derive_config(target, 2048), Auto, t2d, d2t), tmp_path / "draft", target, [1, 3, 4]
    )
    assert not {"t2d", "d2t"} & load_file(tmp_path / "draft" / "model.safetensors").keys()
    assert torch.equal(
        read_draft(tmp_path / "draft", Auto, target, [1, 3, 4]).target_ids, torch.arange(2048)
    )


def test_engines_pass_over_what_it_was_made_for(draft, target, tmp_path):
    write_draft(draft, tmp_path / "draft", target, [1, 3, 4], MadeFor("owner/target", 5))
    config = LlamaConfig.from_pretrained(tmp_path / "draft")
    assert (
        config.made_for == {"target": "owner/target", "draft_length": 5}
        and config.draft_vocab_size == 300
    )
    assert read_draft(tmp_path / "draft", Auto, target, [1, 3, 4]).config == draft.config


def test_speculators_form(draft, folder, target, tmp_path):
    """What vLLM's reader of that form needs, and the portable tensors with the layer's name
    changed.
    """
    write_speculators(
        draft, tmp_path / "speculators", target, [1, 3, 4], MadeFor("owner/target", 5)
    )
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["norm_before_residual"] is False
    assert (
        config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
        and config["draft_vocab_size"] == 300
    )
    section = config["speculators_config"]
    assert (
        section["algorithm"] == "eagle3"
        and section["proposal_methods"][0]["speculative_tokens"] == 5
    )
    assert section["verifier"] == {
        "name_or_path": "owner/target",
        "architectures": ["LlamaForCausalLM"],
    }
    portable = json.loads((folder / "config.json").read_text())
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1
    assert {name: portable[name] for name in layer} == layer
    tensors = load_file(tmp_path / "speculators" / "model.safetensors")
    names = {name.replace("midlayer.", "layers.0."): shape for name, shape in NAMES.items()}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == names
    ours = load_file(folder / "model.safetensors")
    assert all(
        torch.equal(tensors[n.replace("midlayer.", "layers.0.")], tensor)
        for n, tensor in ours.items()
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("norm.weight"), r"lacks tensor norm\.weight"),
        (
            lambda t: t.update({"embed_tokens.weight": torch.zeros(2, 2)}),
            "unknown tensor embed_tokens",
        ),
        (
            lambda t: t.update({"fc.weight": torch.zeros(64, 64)}),
            r"fc\.weight has shape \[64, 64\]",
        ),
        (lambda t: t.update({"d2t": t["d2t"] + 1}), "t2d and d2t"),
        (lambda t: t.pop("t2d"), "t2d and d2t"),
    ],
)
def test_damaged_drafts_are_refused(folder, target, edit, message):
    change(folder, edit)
    with pytest.raises(RunError, match=message):
        read_draft(folder, Auto, target, [1, 3, 4])


def test_another_target_and_no_draft(folder, target, tmp_path):
    with pytest.raises(RunError, match=r"reads layers \[1, 3, 4\], not \[0, 3, 4\]"):
        read_draft(folder, Auto, target, [0, 3, 4])
    target.vocab_size = 99
    with pytest.raises(RunError, match="vocab_size=2048, not 99"):
        read_draft(folder, Auto, target, [1, 3, 4])
    with pytest.raises(RunError, match="cannot be read"):
        read_draft(tmp_path / "nothing", Auto, target, [1, 3, 4])


def test_non_finite_weights_are_not_exported(draft, target, tmp_path):
    draft.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"fc\.weight is not finite"):
        write_draft(draft, tmp_path / "draft", target, [1, 3, 4])
    assert not (tmp_path / "draft").exists()
