"""A draft on disk: exactly the names, shapes and config that engines expect; what others write is
read; every defect is found and its engines named; a sound draft has none.
"""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from conftest import edit_draft, spec_of
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from eagle3.config import Export
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.errors import RunError
from eagle3.export import write
from eagle3.export.read import locate, read_any
from eagle3.export.rules import ALL, find_all, read_draft
from eagle3.export.write import export_draft, portable_config, write_draft

LAYERS = [1, 3, 4]
EVERY = set(ALL)
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


@pytest.fixture(scope="module")
def target(target_folder):
    return spec_of(target_folder)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "drafts")


@pytest.fixture
def draft(target):
    torch.manual_seed(1)
    t2d, d2t = vocab_tensors(torch.randperm(2048)[:300].sort().values.numpy(), 2048)
    return Draft(derive_config(target.config, 300), Auto, t2d, d2t)


def write_portable(draft, target, folder):
    write_draft(draft, folder, portable_config(draft.config, target, "a/target", 3))


def found(draft, target, severity=None):
    findings = find_all(read_any(draft), target)
    return [f for f in findings if severity is None or f.severity == severity]


def test_portable_form(exported):
    tensors = load_file(exported / "portable" / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == NAMES
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(tensor.dtype == kinds.get(name, torch.bfloat16) for name, tensor in tensors.items())
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], tensors["d2t"] + torch.arange(300))
    config = json.loads((exported / "portable" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["num_hidden_layers"] == 1 and config["rope_scaling"] is None
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == LAYERS
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert (config["vocab_size"], config["draft_vocab_size"]) == (2048, 300)
    assert config["max_position_embeddings"] == 512 and "target_hidden_size" not in config
    assert LlamaConfig.from_pretrained(exported / "portable").made_for["draft_length"] == 3


def test_speculators_form(exported, target_folder):
    """What vLLM's reader of that form needs, and the portable tensors with the layer's name
    changed.
    """
    config = json.loads((exported / "speculators" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["norm_before_residual"] is False
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["draft_vocab_size"] == 300
    section = config["speculators_config"]
    assert section["algorithm"] == "eagle3"
    assert section["proposal_methods"][0]["speculative_tokens"] == 3
    architectures = ["LlamaForCausalLM"]
    named = {"name_or_path": str(target_folder), "architectures": architectures}
    assert section["verifier"] == named
    portable = json.loads((exported / "portable" / "config.json").read_text())
    layer = config["transformer_layer_config"]
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1
    assert {name: portable[name] for name in layer} == layer
    tensors = load_file(exported / "speculators" / "model.safetensors")
    ours = load_file(exported / "portable" / "model.safetensors")
    assert len(tensors) == len(ours)
    for name, tensor in ours.items():
        assert torch.equal(tensors[name.replace("midlayer.", "layers.0.")], tensor)


def test_round_trip(draft, target, tmp_path):
    write_portable(draft, target, tmp_path / "draft")
    loaded = read_draft(tmp_path / "draft", Auto, target)
    for name, parameter in draft.named_parameters():
        assert torch.equal(loaded.state_dict()[name], parameter.bfloat16().float())
    assert torch.equal(loaded.target_ids, draft.target_ids) and loaded.config == draft.config
    edit_draft(tmp_path / "draft", tensors=lambda t: t.pop("t2d") is None)
    assert torch.equal(read_draft(tmp_path / "draft", Auto, target).t2d, draft.t2d)


def test_whole_vocabulary_ships_no_maps(target, tmp_path):
    maps = vocab_tensors(torch.arange(2048).numpy(), 2048)
    draft = Draft(derive_config(target.config, 2048), Auto, *maps)
    write_portable(draft, target, tmp_path / "draft")
    assert not {"t2d", "d2t"} & load_file(tmp_path / "draft" / "model.safetensors").keys()
    loaded = read_draft(tmp_path / "draft", Auto, target)
    assert torch.equal(loaded.target_ids, torch.arange(2048)) and loaded.t2d.all()


def test_the_stage(draft, target, target_folder, tmp_path, monkeypatch, capsys):
    asked = (Export(True, None), target, 4, tmp_path)
    with pytest.raises(RunError, match="put train before export in stages"):
        export_draft(tmp_path / "nothing", *asked)
    monkeypatch.setattr(
        write, "load_draft", lambda path: (asdict(draft.config), draft.state_dict())
    )
    export_draft(tmp_path, *asked)
    assert read_draft(tmp_path / "draft", Auto, target).config == draft.config
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["made_for"] == {"target": str(target_folder), "draft_length": 4}
    assert (tmp_path / "draft-speculators" / "config.json").is_file()
    draft.fc.weight.data[0, 0] = float("nan")
    shutil.rmtree(tmp_path / "draft")
    with pytest.raises(RunError, match=r"fc\.weight is not finite"):
        export_draft(tmp_path, *asked)
    assert not (tmp_path / "draft").exists()


def test_every_form_reads_as_the_same_draft(folder, target):
    portable = read_draft(folder / "portable", Auto, target)
    other = read_draft(folder / "speculators", Auto, target)
    assert other.config == portable.config
    for name, tensor in portable.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_sharded_weights_and_a_pickle_that_is_read_without_running_it(folder, target):
    draft = folder / "portable"
    tensors = load_file(draft / "model.safetensors")
    (draft / "model.safetensors").unlink()
    halves = {"a.safetensors": sorted(tensors)[:5], "b.safetensors": sorted(tensors)[5:]}
    for shard, names in halves.items():
        save_file({name: tensors[name] for name in names}, draft / shard)
    assert found(draft, target) == []
    for shard in halves:
        (draft / shard).unlink()
    torch.save(tensors, draft / "pytorch_model.bin")
    (note,) = found(draft, target)
    assert note.severity == "note" and "pickle" in note.sentence

    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    torch.save({"fc.weight": Evil()}, draft / "pytorch_model.bin")
    with pytest.raises(RunError, match="would run code"):
        read_any(draft)


def test_hub_ids(tmp_path, monkeypatch):
    """A local folder wins; what is not there and cannot be fetched is one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "some" / "draft").mkdir(parents=True)
    assert str(locate("some/draft")) == "some/draft"
    with pytest.raises(RunError, match=r"^draft_path=nobody/nothing is no folder and the hub"):
        locate("nobody/nothing")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "layer_ids=3 must be a list"),
    ],
)
def test_what_is_no_config_is_refused(folder, config, words):
    edit_draft(folder / "portable", config)
    with pytest.raises(RunError, match=re.escape(words)):
        read_any(folder / "portable")
    (folder / "portable").rename(folder / "draft")
    with pytest.raises(RunError, match="the draft is its folder draft/"):
        read_any(folder)


def test_a_sound_draft_gives_no_finding(exported, target):
    assert found(exported / "portable", target) == []
    (note,) = found(exported / "speculators", target)
    assert note.severity == "note" and "vllm" not in note.engines


def drop(name):
    return lambda t: t.pop(name) is None


def put(name, value):
    return lambda t: t.update({name: value(t)})


def rename(old, new):
    return lambda t: {name.replace(old, new, 1): tensor for name, tensor in t.items()}


def absolute(t):
    return t["d2t"] + torch.arange(300)


IDS = "eagle_aux_hidden_state_layer_ids"
LOADERS, SERVING = {"sglang", "vllm", "trtllm"}, EVERY - {"ours"}
DEFECTS = {
    "missing": ({}, drop("norm.weight"), EVERY, "norm.weight is missing"),
    "missing head": ({}, drop("lm_head.weight"), EVERY, "lm_head.weight is missing"),
    "unknown": ({}, put("x.weight", lambda t: torch.zeros(2)), EVERY, "x.weight is no tensor"),
    "misshapen": ({}, put("fc.weight", lambda t: torch.ones(6, 4)), EVERY, r"has shape \[6, 4\]"),
    "nan": ({}, put("norm.weight", lambda t: t["norm.weight"] * float("nan")), EVERY, "finite"),
    "zeros": ({}, put("fc.weight", lambda t: torch.zeros(64, 192)), SERVING, "all zeros"),
    "embedding": ({}, put("embed_tokens.weight", lambda t: torch.ones(2, 2)), {"ours"}, "target's"),
    "prefix": ({}, rename("", "model."), {"vllm", "trtllm", "official"}, "begin with model"),
    "layers.0": ({}, rename("midlayer", "layers.0"), {"official"}, r"begin with layers\.0"),
    "absolute": ({}, put("d2t", absolute), EVERY, "d2t holds the target's ids themselves"),
    "absolute, no t2d": (
        {}, lambda t: t.update(d2t=absolute(t)) or t.pop("t2d") is None, EVERY, "ids themselves"
    ),
    "d2t out of range": ({}, put("d2t", lambda t: t["d2t"] + 1000), EVERY, "ids outside 0..2047"),
    "d2t twice": ({}, put("d2t", lambda t: -torch.arange(300)), EVERY, "299 ids twice"),
    "d2t of floats": ({}, put("d2t", lambda t: t["d2t"].float()), EVERY, "d2t is torch.float32"),
    "d2t too short": ({}, put("d2t", lambda t: t["d2t"][:9]), EVERY, r"d2t is torch.int64 \[9\]"),
    "no d2t": ({}, drop("d2t"), EVERY, "d2t is missing"),
    "t2d of another": ({}, put("t2d", lambda t: t["t2d"].roll(1)), EVERY, "t2d marks other tokens"),
    "no need of d2t": ({"draft_vocab_size": 2048}, None, {"vllm"}, "the vocabularies are the same"),
    "too large": ({"draft_vocab_size": 4096}, None, EVERY, "draft_vocab_size=4096 is more"),
    "no draft vocabulary": ({"draft_vocab_size": None}, None, EVERY - {"vllm"}, "draft_vocab_size"),
    "vocabulary": ({"vocab_size": 999}, None, EVERY, "vocab_size is 999, the target's 2048"),
    "another target": ({"target_hidden_size": 32}, None, EVERY, "hidden states of 32 numbers"),
    "own size": ({"hidden_size": 32, "target_hidden_size": 64}, None, {"ours"}, "not the target's"),
    "null": ({"target_hidden_size": "null"}, None, LOADERS, "target_hidden_size is null"),
    "head_dim": ({"head_dim": 32}, None, {"official"}, "head_dim is 32"),
    "more layers": ({"num_hidden_layers": 2}, None, {"official", "ours"}, "know one layer"),
    "activation": ({"hidden_act": "gelu"}, None, LOADERS | {"ours"}, "hidden_act is gelu"),
    "no architecture": ({"architectures": None}, None, LOADERS, r"architectures is \[None\]"),
    "llama": ({"architectures": ["LlamaForCausalLM"]}, None, {"sglang"}, "architectures is"),
    "model_type": ({"model_type": "qwen3"}, None, LOADERS, "model_type is not llama"),
    "SGLang's ids only": ({IDS: None}, None, {"vllm"}, r"gets \[0, 2, 3\]"),
    "vLLM's ids only": (
        {"eagle_config": None, IDS: [1, 4, 6]}, None, {"sglang"},
        r"outputs of layers \[0, 3, 5\], it gets \[1, 3, 4\]: SGLang",
    ),
    "for neither": ({"eagle_config": {IDS: [2, 4, 5]}}, None, {"vllm"}, r"gets \[1, 3, 4\]: vLLM"),
    "built-in ids": (
        {"eagle_config": {IDS: [0, 3, 5]}, IDS: [1, 4, 6]}, None, {"official"}, "built in"
    ),
    "not the target's ids": (
        {"eagle_config": {IDS: [0, 3, 5]}, IDS: [1, 4, 6]}, None, {"ours"}, "set model.aux_layer_id"
    ),
    "too few ids": ({"eagle_config": {IDS: [3]}}, None, EVERY, "must be three of 0..7"),
    "too high ids": ({"eagle_config": {IDS: [1, 3, 8]}}, None, EVERY, "must be three of 0..7"),
    "positions": ({"max_position_embeddings": 256}, None, {"sglang"}, "_embeddings is 256"),
    "scaled": ({"rope_scaling": {"rope_type": "llama3"}}, None, {"ours"}, "rope_scaling="),
    "residual": ({"norm_before_residual": True}, None, EVERY - {"vllm"}, "_residual is true"),
    "fc_norm flag": ({"fc_norm": True}, None, LOADERS, "fc_norm.0.weight is missing"),
    "fc_norm tensor": (
        {}, put("fc_norm.0.weight", lambda t: torch.ones(64)), EVERY, "does not say fc_norm"
    ),
    "fc_norm": (
        {"fc_norm": True}, put("fc_norm.0.weight", lambda t: torch.ones(64)),
        {"official", "ours"}, "not compute",
    ),
    "norm_output": ({"norm_output": True}, None, {"official", "ours"}, "norm_output is true"),
    "tied": ({"tie_word_embeddings": True}, None, {"sglang"}, "tie_word_embeddings is true"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_every_defect_is_found_and_refused_where_it_is_ours(folder, target, name):
    config, tensors, engines, words = DEFECTS[name]
    edit_draft(folder / "portable", config, tensors)
    named = [f for f in found(folder / "portable", target, "wrong") if re.search(words, f.sentence)]
    assert named and set(named[0].engines) == engines
    if "ours" in engines:
        with pytest.raises(RunError, match=r"^draft at "):
            read_draft(folder / "portable", Auto, target)


@pytest.mark.parametrize(
    ("config", "tensors", "severity", "words"),
    [
        ({"rope_theta": 5e5}, None, "warning", "rope_theta is 500000, the target's 10000"),
        ({"target_hidden_size": 64}, None, "warning", "target_hidden_size must be left out"),
        ({"eagle_config": None, IDS: None}, None, "note", r"their default, \[1, 3, 4\]"),
    ],
)
def test_what_is_only_worth_a_word(folder, target, config, tensors, severity, words):
    edit_draft(folder / "portable", config, tensors)
    (finding,) = found(folder / "portable", target)
    assert finding.severity == severity and re.search(words, finding.sentence)
    read_draft(folder / "portable", Auto, target)


@pytest.mark.parametrize(
    ("config", "severity", "words"),
    [
        ({"norm_before_residual": True}, "wrong", "which they do not compute"),
        ({"norm_before_residual": None}, "warning", "vLLM takes for true"),
        ({"norm_before_residual": None}, "wrong", "vLLM takes for true"),
        ({"speculators_config": None}, "wrong", "speculators_config names no draft_length"),
        ({"draft_vocab_size": None}, "wrong", "lacks draft_vocab_size"),
        ({"speculators_model_type": "eagle"}, "wrong", "is no EAGLE3"),
        ({IDS: LAYERS}, "wrong", r"outputs of layers \[0, 2, 3\]"),
    ],
)
def test_defects_of_the_speculators_form(folder, target, config, severity, words):
    edit_draft(folder / "speculators", config)
    named = found(folder / "speculators", target, severity)
    assert any(re.search(words, finding.sentence) for finding in named)


def test_another_target_and_no_draft(exported, target, tmp_path):
    with pytest.raises(RunError, match=r"model\.aux_layer_ids="):
        read_draft(exported / "portable", Auto, target.with_layers([0, 3, 4]))
    other = LlamaConfig(**target.config.to_diff_dict() | {"vocab_size": 99})
    with pytest.raises(RunError, match="vocab_size is 2048, the target's 99"):
        read_draft(exported / "portable", Auto, replace(target, config=other))
    with pytest.raises(RunError, match="cannot be read"):
        read_draft(tmp_path / "nothing", Auto, target)
