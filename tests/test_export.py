"""A draft on disk: exactly the names, shapes and config that engines expect; what others write is
read; every defect is found and its engines named; a sound draft has none.
"""

import json
import re
import shutil
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import block_draft, edit_model, make_config, spec_of
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from eagle3.checks import check
from eagle3.config import Export
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import EAGLE3
from eagle3.errors import ConfigError, RunError
from eagle3.export import write
from eagle3.export.card import check_push, push, write_card
from eagle3.export.read import locate, read_any
from eagle3.export.rules import ALL, find_all, read_draft
from eagle3.export.serve import serve_text
from eagle3.export.write import export_draft, portable_config, write_draft

LAYERS, EVERY = [1, 3, 4], set(ALL)
SHAPES = {
    "fc": [64, 192], "midlayer.self_attn.q_proj": [64, 128], "midlayer.self_attn.k_proj": [32, 128],
    "midlayer.self_attn.v_proj": [32, 128], "midlayer.self_attn.o_proj": [64, 64],
    "midlayer.mlp.gate_proj": [128, 64], "midlayer.mlp.up_proj": [128, 64],
    "midlayer.mlp.down_proj": [64, 128], "midlayer.input_layernorm": [64],
    "midlayer.hidden_norm": [64], "midlayer.post_attention_layernorm": [64], "norm": [64],
    "lm_head": [300, 64],
}  # fmt: skip


@pytest.fixture(scope="module")
def target(target_folder):
    return spec_of(target_folder)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "drafts")


def make_draft(target, ids):
    torch.manual_seed(1)
    maps = vocab_tensors(ids.numpy(), 2048)
    return EAGLE3(derive_config(target.config, len(ids)), Auto, *maps)


def found(draft, target, severity=None):
    findings = find_all(read_any(draft), target)
    return [f for f in findings if severity is None or f.severity == severity]


def test_both_forms(exported, target_folder):
    """The speculators form has what vLLM's reader needs, and the same tensors, one renamed."""
    tensors = load_file(exported / "portable" / "model.safetensors")
    expected = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == expected | {"d2t": [300], "t2d": [2048]}
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert all(tensor.dtype == kinds.get(name, torch.bfloat16) for name, tensor in tensors.items())
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], tensors["d2t"] + torch.arange(300))
    config = json.loads((exported / "portable" / "config.json").read_text())
    values = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    values |= {"rope_scaling": None, "vocab_size": 2048, "draft_vocab_size": 300}
    values |= {IDS: [2, 4, 5], "max_position_embeddings": 512}
    assert values.items() <= config.items() and "target_hidden_size" not in config
    assert config["eagle_config"][IDS] == LAYERS
    assert LlamaConfig.from_pretrained(exported / "portable").made_for["draft_length"] == 3
    other = json.loads((exported / "speculators" / "config.json").read_text())
    values = {"speculators_model_type": "eagle3", "norm_before_residual": False}
    assert (values | {IDS: [2, 4, 5], "draft_vocab_size": 300}).items() <= other.items()
    section, layer = other["speculators_config"], other["transformer_layer_config"]
    assert section["algorithm"] == "eagle3"
    assert section["proposal_methods"][0]["speculative_tokens"] == 3
    verifier = {"name_or_path": str(target_folder), "architectures": ["LlamaForCausalLM"]}
    assert section["verifier"] == verifier
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 1
    assert layer.items() <= config.items()
    theirs = load_file(exported / "speculators" / "model.safetensors")
    assert len(theirs) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name.replace("midlayer.", "layers.0.")], tensor)


def test_what_is_written_is_read(target, tmp_path, exported):
    """With and without t2d; the whole vocabulary ships no maps; both forms are the same draft."""
    for ids in (torch.randperm(2048)[:300].sort().values, torch.arange(2048)):
        draft, path = make_draft(target, ids), tmp_path / f"{len(ids)}"
        write_draft(draft, path, portable_config(draft.config, target, "a/target", 3))
        maps = {"t2d", "d2t"} & load_file(path / "model.safetensors").keys()
        assert maps == (set() if len(ids) == 2048 else {"t2d", "d2t"})
        if maps:
            edit_model(path, tensors=lambda t: t.pop("t2d") is None)
        loaded = read_draft(path, Auto, target)
        for name, parameter in draft.named_parameters():
            assert torch.equal(loaded.state_dict()[name], parameter.bfloat16().float())
        assert torch.equal(loaded.target_ids, ids) and loaded.config == draft.config
        assert torch.equal(loaded.t2d, draft.t2d)
    forms = [read_draft(exported / name, Auto, target) for name in ("portable", "speculators")]
    assert forms[0].config == forms[1].config
    for name, tensor in forms[0].state_dict().items():
        assert torch.equal(tensor, forms[1].state_dict()[name])


def test_the_stage(target, target_folder, tmp_path, monkeypatch):
    draft, asked = (
        make_draft(target, torch.arange(300)),
        (Export(True, None, None), target, 4, tmp_path),
    )
    with pytest.raises(RunError, match="put train before export in stages"):
        export_draft(tmp_path / "nothing", *asked)
    checkpoint = asdict(draft.config), draft.state_dict()
    monkeypatch.setattr(write, "load_draft", lambda path: checkpoint)
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
        ({"eagle_config": "x"}, "eagle_config='x' must be an object"),
        ({"rope_parameters": 3}, "rope_parameters=3 must be an object"),
        ({"speculators_model_type": "eagle3", "speculators_config": "x"}, "cannot be read: "),
    ],
)
def test_what_is_no_config_is_refused(folder, config, words):
    edit_model(folder / "portable", config)
    with pytest.raises(RunError, match=re.escape(words)):
        read_any(folder / "portable")
    (folder / "portable").rename(folder / "draft")
    with pytest.raises(RunError, match="the draft is its folder draft/"):
        read_any(folder)


def drop(name):
    return lambda t: t.pop(name) is None


def put(name, value):
    """A value, or what makes one of the tensor that is there."""
    return lambda t: t.update({name: value(t[name]) if callable(value) else value})


def rename(old, new):
    return lambda t: {name.replace(old, new, 1): tensor for name, tensor in t.items()}


def absolute(d2t):
    return d2t + torch.arange(300)


def ids(ours, theirs):
    return {"eagle_config": {IDS: ours}, IDS: theirs}


IDS, ONES = "eagle_aux_hidden_state_layer_ids", torch.ones(64)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 2048}
NORMS = {f"fc_norm.{number}.weight": ONES.clone() for number in range(3)}
LOADERS, SERVING = {"sglang", "vllm", "trtllm"}, EVERY - {"ours"}
DEFECTS = [
    ({}, drop("norm.weight"), EVERY, "norm.weight is missing"),
    ({}, drop("lm_head.weight"), EVERY, "lm_head.weight is missing"),
    ({}, put("x.weight", ONES), EVERY, "x.weight is no tensor"),
    ({}, put("fc.weight", torch.ones(6, 4)), EVERY, r"has shape \[6, 4\]"),
    ({}, put("norm.weight", lambda x: x * float("nan")), EVERY, "finite"),
    ({}, put("fc.weight", torch.zeros(64, 192)), SERVING, "all zeros"),
    ({}, put("embed_tokens.weight", torch.ones(2, 2)), {"ours"}, "target's"),
    ({}, rename("", "model."), {"vllm", "trtllm", "official"}, "begin with model"),
    ({}, rename("midlayer", "layers.0"), {"official"}, r"begin with layers\.0"),
    ({}, put("d2t", absolute), EVERY, "d2t holds the target's ids themselves"),
    ({}, lambda t: t.update(d2t=absolute(t["d2t"])) or t.pop("t2d") is None, EVERY, "ids themselv"),
    ({}, put("d2t", lambda d2t: d2t + 1000), EVERY, "ids outside 0..2047"),
    ({}, put("d2t", -torch.arange(300)), EVERY, "299 ids twice"),
    ({}, put("d2t", torch.Tensor.float), EVERY, "d2t is torch.float32"),
    ({}, put("d2t", lambda d2t: d2t[:9]), EVERY, r"d2t is torch.int64 \[9\]"),
    ({}, drop("d2t"), EVERY, "d2t is missing"),
    ({}, put("t2d", lambda t2d: t2d.roll(1)), EVERY, "t2d marks other tokens"),
    ({"draft_vocab_size": 2048}, None, {"vllm"}, "the vocabularies are the same"),
    ({"draft_vocab_size": 4096}, None, EVERY, "draft_vocab_size=4096 is more"),
    ({"draft_vocab_size": None}, None, EVERY - {"vllm"}, "draft_vocab_size"),
    ({"vocab_size": 999}, None, EVERY, "vocab_size is 999, the target's 2048"),
    ({"target_hidden_size": 32}, None, EVERY, "hidden states of 32 numbers"),
    ({"hidden_size": 32, "target_hidden_size": 64}, None, {"ours"}, "not the target's"),
    ({"target_hidden_size": "null"}, None, LOADERS, "target_hidden_size is null"),
    ({"head_dim": 32}, None, {"official"}, "head_dim is 32"),
    ({"num_hidden_layers": 2}, None, {"official", "ours"}, "know one layer"),
    ({"hidden_act": "gelu"}, None, LOADERS | {"ours"}, "hidden_act is gelu"),
    ({"architectures": None}, None, LOADERS, r"architectures is \[None\]"),
    ({"architectures": ["LlamaForCausalLM"]}, None, {"sglang"}, "architectures is"),
    ({"model_type": "qwen3"}, None, LOADERS, "model_type is not llama"),
    ({IDS: None}, None, {"vllm"}, r"gets \[0, 2, 3\]"),
    ({"eagle_config": None, IDS: [1, 4, 6]}, None, {"sglang"}, r"gets \[1, 3, 4\]: SGLang"),
    ({"eagle_config": {IDS: [2, 4, 5]}}, None, {"sglang", "vllm"}, r"of \[1, 3, 4\]: one of them"),
    (ids([0, 3, 5], [1, 4, 6]), None, {"official"}, "built in"),
    (ids([0, 3, 5], [1, 4, 6]), None, {"ours"}, "set model.aux_layer_id"),
    ({"eagle_config": {IDS: [3]}}, None, EVERY, "must be 3 of 0..7"),
    ({"eagle_config": {IDS: [1, 3, 8]}}, None, EVERY, "must be 3 of 0..7"),
    ({"num_aux_hidden_states": 2}, None, EVERY, "must be 2 of 0..7, low to high"),
    ({"num_aux_hidden_states": 2}, None, EVERY, r"not \[64, 128\]"),
    ({"num_aux_hidden_states": 2} | ids(None, None), None, {"ours"}, "it reads 2 layers; set"),
    ({"num_aux_hidden_states": 1} | ids([3], [4]), None, {"sglang"}, "fc is skipped"),
    ({"max_position_embeddings": 256}, None, {"sglang"}, "_embeddings is 256"),
    ({"rope_scaling": {"rope_type": "llama3"}}, None, {"ours"}, "rope_scaling="),
    ({"norm_before_residual": True}, None, EVERY - {"vllm"}, "_residual is true"),
    ({"fc_norm": True}, None, EVERY, "fc_norm.0.weight is missing"),
    ({"norm_before_fc": True}, None, LOADERS, "input_norm.weight is missing"),
    ({}, put("fc_norm.0.weight", ONES), EVERY, "does not say fc_norm"),
    ({}, put("fc_norm.weight", ONES), EVERY, "does not say fc_norm"),
    ({"use_aux_norm": True}, lambda t: t.update(NORMS), {"vllm"}, "use_aux_norm is true"),
    ({"tie_word_embeddings": True}, None, {"sglang"}, "tie_word_embeddings is true"),
]


@pytest.mark.parametrize(("config", "tensors", "engines", "words"), DEFECTS)
def test_every_defect_is_found_and_refused_where_it_is_ours(
    folder, target, config, tensors, engines, words
):
    edit_model(folder / "portable", config, tensors)
    named = [f for f in found(folder / "portable", target, "wrong") if re.search(words, f.sentence)]
    assert named and set(named[0].engines) == engines
    if "ours" in engines:
        with pytest.raises(RunError, match=r"^draft at "):
            read_draft(folder / "portable", Auto, target)


@pytest.mark.parametrize(
    ("form", "config", "severity", "words"),
    [
        ("portable", {}, None, None),
        ("portable", {"rope_theta": 5e5}, "warning", "rope_theta is 500000, the target's 10000"),
        ("portable", {"target_hidden_size": 64}, "warning", "target_hidden_size must be left out"),
        ("portable", {"norm_output": True}, "warning", "norm_output is true, which they do not"),
        ("portable", {"eagle_config": None, IDS: None}, "note", r"their default, \[1, 3, 4\]"),
        ("speculators", {}, "note", ""),
        ("speculators", {"norm_before_residual": True}, "wrong", "which they do not compute"),
        ("speculators", {"norm_before_residual": None}, "warning", "vLLM takes for true"),
        ("speculators", {"norm_before_residual": None}, "wrong", "vLLM takes for true"),
        ("speculators", {"speculators_config": None}, "wrong", "names no draft_length"),
        ("speculators", {"draft_vocab_size": None}, "wrong", "lacks draft_vocab_size"),
        ("speculators", {"speculators_model_type": "eagle"}, "wrong", "is no EAGLE3"),
        ("speculators", {IDS: LAYERS}, "wrong", r"outputs of layers \[0, 2, 3\]"),
        (
            "speculators",
            {IDS: [2, 4], "transformer_layer_config": SIZES},
            "wrong",
            "which vLLM takes for 3",
        ),
    ],
)
def test_what_else_is_said_of_a_draft(folder, target, form, config, severity, words):
    edit_model(folder / form, config)
    findings = found(folder / form, target)
    named = [f for f in findings if f.severity == severity and re.search(words, f.sentence)]
    assert bool(named) == (severity is not None)
    if form == "portable":
        assert len(findings) == len(named)
        read_draft(folder / form, Auto, target)
    if not config:
        assert len(findings) == len(named) and all("vllm" not in f.engines for f in findings)


BLOCK_SHAPES = {"fc": [64, 192], "hidden_norm": [64], "norm": [64]} | {
    f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in {
        "input_layernorm": [64], "post_attention_layernorm": [64], "self_attn.q_norm": [16],
        "self_attn.k_norm": [16], "self_attn.q_proj": [64, 64], "self_attn.k_proj": [32, 64],
        "self_attn.v_proj": [32, 64], "self_attn.o_proj": [64, 64], "mlp.gate_proj": [128, 64],
        "mlp.up_proj": [128, 64], "mlp.down_proj": [64, 128],
    }.items()
}  # fmt: skip
SPARK_SHAPES = BLOCK_SHAPES | {
    "markov_head.markov_w1": [2048, 8], "markov_head.markov_w2": [2048, 8],
    "confidence_head.proj": [1, 72],
}  # fmt: skip
NESTED = {"mask_token_id": 7, "target_layer_ids": LAYERS}
MARKOV = {"markov_rank": 8, "markov_head_type": "vanilla", "enable_confidence_head": True}
MARKOV |= {"confidence_head_with_markov": True, "sample_from_anchor": True}
# The kind, its fields, its tensors, and what its config.json must have: names of both engines.
BLOCKS = {
    "dflash": (DFlashConfig, {}, BLOCK_SHAPES, {
        "architectures": ["DFlashDraftModel"], "dflash_config": NESTED, "made_for": 3}),
    "dspark": (DSparkConfig, {"markov_rank": 8}, SPARK_SHAPES, {
        "architectures": ["Qwen3DSparkModel"], "made_for": 4} | NESTED | MARKOV),
}  # fmt: skip


@pytest.fixture(scope="module")
def blocks(target, tmp_path_factory):
    """Block drafters on disk, by kind."""
    asked, folders = (Export(False, None, None), target, 2), {}
    for name, (kind, changed, *_) in BLOCKS.items():
        draft, folder = block_draft(kind, target, **changed), tmp_path_factory.mktemp(name)
        shape = asdict(draft.config) | {"architecture": kind.architecture}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write, "load_draft", lambda path: (shape, draft.state_dict()))  # noqa: B023
            export_draft(folder, *asked, folder)
        folders[name] = folder / "draft"
    return folders


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_drafter_is_written_as_both_engines_read_it(blocks, target, name):
    """Its weights, no map and nothing of the target's; `made_for` is its whole block."""
    kind, changed, shapes, config = BLOCKS[name]
    tensors = load_file(blocks[name] / "model.safetensors")
    expected = {f"{name}.weight": shape for name, shape in shapes.items()}
    expected |= {"confidence_head.proj.bias": [1]} if name == "dspark" else {}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    for tensor_name, tensor in tensors.items():
        precise = tensor_name.startswith("confidence_head.")
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16)
    written = json.loads((blocks[name] / "config.json").read_text())
    common = {"model_type": "qwen3", "block_size": 4, "num_hidden_layers": 2, "head_dim": 16}
    common |= {"num_target_layers": 8, "vocab_size": 2048, "rope_scaling": None}
    made_for = {"made_for": {"target": target.path, "draft_length": config["made_for"]}}
    assert (common | config | made_for).items() <= written.items()
    assert written.keys().isdisjoint({"eagle_config", IDS, "target_hidden_size"})
    draft = block_draft(kind, target, **changed)
    loaded = read_draft(blocks[name], Auto, target)
    assert loaded.config == draft.config and torch.equal(loaded.target_ids, torch.arange(2048))
    for tensor_name, tensor in tensors.items():
        assert torch.equal(loaded.state_dict()[tensor_name], tensor.float())


NOTHING = {"dflash_config": None, "mask_token_id": None, "target_layer_ids": None}
SAME = [
    ("dflash", NOTHING | NESTED, {}),
    ("dflash", {"head_dim": None}, {"head_dim": 128}),  # what Qwen3's config takes then
    ("dspark", NOTHING | {"dflash_config": NESTED}, {}),
    ("dspark", {"architectures": ["DSparkDraftModel"]}, {}),
    ("dspark", {"draft_vocab_size": None}, {}),
]


@pytest.mark.parametrize(("name", "config", "other"), SAME)
def test_published_forms_of_a_block_drafter_are_read(blocks, target, tmp_path, name, config, other):
    """Keys in a section or outside of it, names with a prefix, and what stands for nothing."""
    folder = shutil.copytree(blocks[name], tmp_path / "draft")
    edit_model(folder, config, rename("", "model."))
    files = read_any(folder)
    assert files.config["target_layer_ids"] == LAYERS
    assert files.shape == replace(read_any(blocks[name]).shape, **other)
    if not other:
        (finding,) = [f for f in find_all(files, target) if f.severity == "wrong"]
        assert finding.engines == ("vllm",) and "begin with model." in finding.sentence
        read_draft(folder, Auto, target)


@pytest.mark.parametrize(("config", "words"), [
    ({"dflash_config": NESTED | {"target_layer_ids": 3}}, "target_layer_ids=3 must be a list"),
    ({"dflash_config": {"mask_token_id": 7}}, "config.json lacks target_layer_ids"),
    ({"dflash_config": "x"}, "cannot be read: "),
    ({"block_size": None}, "config.json lacks block_size"),
    ({"block_size": 4.5}, "block_size=4.5 must be a whole number above 0"),
])  # fmt: skip
def test_what_is_no_config_of_a_block_drafter_is_refused(blocks, tmp_path, config, words):
    folder = shutil.copytree(blocks["dflash"], tmp_path / "draft")
    edit_model(folder, config)
    with pytest.raises(RunError, match=re.escape(words)):
        read_any(folder)


BOTH, OURS = {"sglang", "vllm", "ours"}, {"ours"}
BLOCK_DEFECTS = [
    ({"model_type": "llama"}, None, BOTH, "model_type is not qwen3"),
    ({"vocab_size": 999}, None, BOTH, "vocab_size is 999"),
    ({"hidden_size": 32, "target_hidden_size": 64}, None, BOTH, "hidden_size is 32, not the targ"),
    ({"hidden_act": "gelu"}, None, BOTH, "hidden_act is gelu"),
    ({"target_layer_ids": [1, 3, 8], "dflash_config": None}, None, BOTH, "must be 3 of 0..7"),
    ({"target_layer_ids": [3, 1, 4], "dflash_config": None}, None, BOTH, "low to high"),
    ({"target_layer_ids": [0, 3, 4], "dflash_config": None}, None, OURS, "set model.aux_layer_ids"),
    ({IDS: [1, 3, 4]}, None, {"sglang", "vllm"}, r"vLLM's key those of \[0, 2, 3\]"),
    ({"mask_token_id": 2048, "dflash_config": NESTED | {"mask_token_id": 2048}}, None, BOTH,
     "mask_token_id=2048 is no token of the target's 2048"),
    ({"mask_token_id": "x", "dflash_config": NESTED | {"mask_token_id": "x"}}, None, BOTH, "='x'"),
    ({"block_size": 1}, None, {"dflash": BOTH, "dspark": set()}, "block_size=1 drafts nothing"),
    ({"draft_vocab_size": 300}, None, {"sglang", "ours"}, "drafts 300 tokens by d2t; they draft"),
    ({}, lambda t: t.update(d2t=torch.zeros(2048).long()), {"sglang", "ours"}, "by d2t"),
    ({"attention_bias": True}, None, OURS, "attention_bias=True is not computed here"),
    ({"is_causal": True}, None, OURS, "is_causal=True"),
    ({"dflash_config": NESTED | {"causal": True}}, None, OURS, "causal=True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, None, OURS, "sliding_attention"),
    ({"rope_scaling": {"rope_type": "yarn"}}, None, OURS, "is not computed here"),
    ({"max_position_embeddings": 256}, None, {"sglang"}, "_embeddings is 256"),
    ({}, put("layers.1.mlp.up_proj.weight", torch.ones(2, 2)), BOTH, r"has shape \[2, 2\]"),
    ({}, put("norm.weight", lambda x: x * float("nan")), BOTH, "finite"),
    ({}, put("fc.weight", torch.zeros(64, 192)), {"sglang", "vllm"}, "all zeros"),
    ({}, drop("hidden_norm.weight"), BOTH, "hidden_norm.weight is missing"),
    ({}, rename("layers.0", "midlayer"), BOTH, r"layers\.0\.\S+ is missing"),
    ({}, put("layers.2.mlp.up_proj.weight", torch.ones(2, 2)), BOTH, "is no tensor of a draft of"),
    ({}, put("embed_tokens.weight", torch.ones(2, 2)), OURS, "embed_tokens.weight is there"),
    ({}, put("lm_head.weight", torch.ones(2, 2)), OURS, "lm_head.weight is there"),
]  # fmt: skip
SPARK_DEFECTS = [
    ({"markov_head_type": "gated"}, None, {"vllm", "ours"}, "they compute only vanilla"),
    ({"markov_head_type": None}, None, {"sglang"}, "lacks markov_head_type"),
    ({"sample_from_anchor": False}, None, OURS, "sample_from_anchor=False is not computed"),
    ({"confidence_head_with_markov": False}, None, OURS, "confidence_head_with_markov=False"),
    ({}, drop("confidence_head.proj.bias"), {"sglang", "ours"}, "proj.bias is missing"),
    ({}, drop("markov_head.markov_w2.weight"), BOTH, "markov_w2.weight is missing"),
]
OF_BLOCKS = [(name, *row) for row in BLOCK_DEFECTS for name in BLOCKS]
OF_BLOCKS += [("dspark", *row) for row in SPARK_DEFECTS]
OF_BLOCKS += [("dflash", {"sample_from_anchor": True}, None, OURS, "sample_from_anchor=True")]


@pytest.mark.parametrize(("name", "config", "tensors", "engines", "words"), OF_BLOCKS)
def test_every_defect_of_a_block_drafter_is_found(
    blocks, target, tmp_path, name, config, tensors, engines, words
):
    folder = shutil.copytree(blocks[name], tmp_path / "draft")
    edit_model(folder, config, tensors)
    engines = engines.get(name) if isinstance(engines, dict) else engines
    named = [f for f in found(folder, target, "wrong") if re.search(words, f.sentence)]
    assert {*(named[0].engines if named else ())} == engines
    if "ours" in engines:
        with pytest.raises(RunError, match=r"^draft at "):
            read_draft(folder, Auto, target)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_sound_block_drafter_has_a_note_alone(blocks, target, name):
    """Whoever asks after engines without block drafters is told that they have none."""
    (note,) = found(blocks[name], target)
    assert note.severity == "note" and note.engines == ("trtllm", "official")
    assert note.sentence.lower() == f"they read no {name} draft"


def test_another_target_and_no_draft(exported, target, tmp_path):
    other = LlamaConfig(**target.config.to_diff_dict() | {"vocab_size": 99})
    other = replace(target, config=other)
    for path, given, words in (
        (exported / "portable", target.with_layers([0, 3, 4]), r"model\.aux_layer_ids="),
        (exported / "portable", other, "vocab_size is 2048, the target's 99"),
        (tmp_path / "nothing", target, "cannot be read"),
    ):
        with pytest.raises(RunError, match=words):
            read_draft(path, Auto, given)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("longest", "scaling", "reach"),
    [
        (256, YARN, 1024),
        (1024, YARN, 1024),  # the number is scaled already
        (256, {"rope_type": "linear", "factor": 4.0}, 1024),
        (256, {"type": "dynamic", "factor": 2.0}, 512),
        (256, LONG | {"factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (1024, LLAMA3, 1024),
        (256, {"rope_type": "default"}, 256),
    ],
)
def test_a_draft_reaches_as_far_as_the_scaled_rope_of_its_target(
    target, target_folder, exported, tmp_path, longest, scaling, reach
):
    """Lengths up to there are trained; a draft exported so serves at them, a shorter one is named;
    a draft that is scaled as its target is compared by its scaled length.
    """
    path = shutil.copytree(target_folder, tmp_path / "target")
    rope = {"rope_theta": 10000.0} | scaling
    edit_model(path, {"max_position_embeddings": longest, "rope_parameters": rope})
    scaled = spec_of(path)
    asked = ["model=hf", f"model.path={path}", "stages=[train]", "mode=offline"]
    asked += ["draft.vocab_size=300", f"hidden_states.path={tmp_path}"]
    check(make_config([*asked, f"data.max_length={reach}"], tmp_path / "run"))
    with pytest.raises(ConfigError, match=f"at most the target's max_position_embeddings={reach}"):
        check(make_config([*asked, f"data.max_length={reach + 1}"], tmp_path / "run"))
    portable = portable_config(derive_config(scaled.config, 300), scaled, "x", 3)
    assert (portable["max_position_embeddings"], portable["rope_scaling"]) == (reach, None)
    files = read_any(exported / "portable")

    def too_short(**own):
        files.config |= portable | own
        files.shape.max_position_embeddings = files.config["max_position_embeddings"]
        findings = find_all(files, scaled)
        return [f.sentence for f in findings if f.sentence.startswith("max_position_embeddings")]

    assert not too_short()
    assert f"not {reach}: set" in too_short(max_position_embeddings=reach - 1)[0]
    assert not too_short(max_position_embeddings=longest, rope_scaling=scaling)


RUN = {
    "config": {
        "export": {"push_to_hub": None}, "data": {"path": "some/chats", "sources": {}},
        "model": {"revision": None, "aux_layer_ids": [0, 1]}, "eval": {"max_new_tokens": 96},
        "optimizer": {"_target_": "eagle3.optim.adamw", "lr": 1e-4}, "hub": {"token": "SESAME"},
        "loss": {"weights": {"_target_": "eagle3.loss.Reached"}}, "seed": 3,
    },
    "overrides": ["optimizer.lr=1e-4", "hub.token=SESAME"], "git": "abcdef",
    "inputs": {"prepared": {"documents": 12345}}, "versions": {"torch": "2.13.0"},
}  # fmt: skip
EVALUATION = {"acceptance_length": {"1": 1.5, "2": 2.25}, "answers": 64, "update": 40}
SAMPLED = EVALUATION | {"sampled": {"1": {"acceptance_length": {"1": 1.25, "2": 1.75}}}}
BENCHMARK = {
    "suites": {"mtbench": [{"config": [1, 2, 1, 3], "num_prompts": 80, "speedup": 1.5,
                            "acceptance_length": 2.4, "lossless": True}]},
    "protocol": {"temperature": 0.0, "max_new_tokens": 1024, "system_prompt": None},
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path, exported):
    shutil.copytree(exported / "portable", tmp_path / "draft")
    files = {"run": RUN, "evaluation": EVALUATION, "benchmark": BENCHMARK}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


CARDS = {"license: other": "licence of the target | named", "no": "not named in its folder"}


@pytest.mark.parametrize("licence", CARDS)
def test_the_card_of_a_draft(run_dir, tmp_path, target_folder, licence):
    target = tmp_path / "my-target"
    shutil.copytree(target_folder, target)
    (target / "README.md").write_text(f"---\n{licence}\nlicense_name: named\n---\n# A target\n")
    made_for = {"target": str(target), "draft_length": 3}
    edit_model(run_dir / "draft", {"made_for": made_for})
    text = write_card(run_dir).read_text()
    assert "EAGLE3 draft for my-target" in text and "some/chats, 12,345 conversations" in text
    assert "| 2 | 2.25 |" in text and "64 held-out prompts" in text and "at most\n96 new" in text
    assert "| mtbench | 1, 2, 1, 3 | 80 | 2.40 | – | 1.50× | yes |" in text
    assert "Protocol: temperature 0.00; max new tokens 1024." in text
    assert "| optimizer | adamw |" in text and "python run.py optimizer.lr=1e-4" in text
    assert "| loss.weights | Reached |" in text and "| model.aux_layer_ids | 0, 1 |" in text
    for engine in ("sglang", "vllm", "trtllm"):
        assert serve_text(engine, str(run_dir / "draft"), None, None, None, []) in text
    assert ("license: other\n" in text) == (licence == "license: other") and CARDS[licence] in text
    assert "SESAME" not in text and ModelCard(text).data.tags == ["eagle3", "speculative-decoding"]
    (run_dir / "evaluation.json").write_text(json.dumps(SAMPLED))
    text = write_card(run_dir).read_text()
    assert "|---|---|---|\n| 1 | 1.50 | 1.25 |\n| 2 | 2.25 | 1.75 |\n" in text
    assert "greedily and, for the other columns, by sampling with at most" in text
    config = RUN["config"] | {"data": {"path": None, "sources": {}}}
    (run_dir / "run.json").write_text(json.dumps(RUN | {"config": config}))
    for name in ("evaluation", "benchmark"):
        (run_dir / f"{name}.json").unlink()
    text = write_card(run_dir).read_text()
    assert "\nNot measured.\n" in text and "hidden states that were stored before" in text


def test_the_card_names_the_kind_of_the_draft(run_dir, blocks):
    kinds = {name: blocks[name] for name in BLOCKS} | {"eagle31": run_dir / "eagle31"}
    shutil.copytree(run_dir / "draft", kinds["eagle31"])
    edit_model(kinds["eagle31"], {"norm_output": True})
    titles = {"dflash": "DFlash", "dspark": "DSpark", "eagle31": "EAGLE-3.1"}
    sizes = {"layers": 2, "block": 4, "anchors": 512, "ttt_steps": 7}
    (run_dir / "run.json").write_text(
        json.dumps(RUN | {"config": RUN["config"] | {"draft": sizes}})
    )
    for name, folder in kinds.items():
        shutil.rmtree(run_dir / "draft")
        shutil.copytree(folder, run_dir / "draft")
        text = write_card(run_dir).read_text()
        assert f"\n# {titles[name]} draft for " in text
        is_block = name in BLOCKS
        assert ModelCard(text).data.tags[0] == (name if is_block else "eagle3")
        for words in ("the whole block |", "| draft.block | 4 |", "| draft.anchors | 512 |"):
            assert (words in text) == is_block
        assert ("| draft.ttt_steps | 7 |" in text) == ("trtllm:" in text) == (not is_block)


def test_the_card_of_a_draft_for_the_hub_names_no_folder(run_dir, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made_for = {"target": "some/target", "draft_length": 3}
    edit_model(run_dir / "draft", {"made_for": made_for})
    config = RUN["config"] | {"export": {"push_to_hub": "me/draft"}}
    (run_dir / "run.json").write_text(json.dumps(RUN | {"config": config}))
    text = write_card(run_dir).read_text()
    assert "--speculative-draft-model-path me/draft" in text and "base_model: some/target" in text
    assert str(run_dir) not in text


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub to create a repository and make a commit in it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        root, server = f"http://{self.headers['Host']}", self.server
        if self.headers["Authorization"] != "Bearer hf_SESAME" or server.refuses in self.path:
            return self.answer({"error": "no"}, 403)
        if self.path == "/api/repos/create":
            server.made.append(json.loads(body))
            return self.answer({"url": f"{root}/me/draft"})
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = [
                {"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes)
            ]
            return self.answer({"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{root}/lfs/{each['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        server.commits.append([json.loads(line) for line in body.splitlines()])
        self.answer({"commitUrl": f"{root}/me/draft/commit/a", "commitOid": "a", "success": True})

    def do_PUT(self):
        self.server.large.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({})

    def answer(self, content, status=200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *given):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.commits, server.large, server.refuses = [], [], [], "nothing"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in (
        ("ENDPOINT", address), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False),
    ):  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_SESAME")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_draft_goes_to_the_hub_with_its_card_and_the_report(run_dir, hub):
    write_card(run_dir)
    (run_dir / "report.html").write_text("<!doctype html>")
    push(run_dir, run_dir / "report.html", "me/draft", "python run.py again")
    assert hub.made[0]["name"] == "draft" and hub.made[0]["organization"] == "me"
    ((_, *files),) = hub.commits
    paths = {file["value"]["path"]: file["key"] for file in files}
    plain = dict.fromkeys(("README.md", "config.json", "report.html"), "file")
    assert paths == plain | {"model.safetensors": "lfsFile"}
    assert hub.large == [(run_dir / "draft" / "model.safetensors").read_bytes()]


@pytest.mark.parametrize("refused", ["/repos/create", "/lfs/", "/commit/"])
def test_a_failed_upload_names_the_draft_and_the_command(run_dir, hub, refused):
    hub.refuses = refused
    before = {path.name: path.read_bytes() for path in (run_dir / "draft").iterdir()}
    (run_dir / "report.html").write_text("<!doctype html>")
    said = rf"failed \(.+\); the draft is in {run_dir}/draft; go on with: python run.py again$"
    with pytest.raises(RunError, match=f"^export.push_to_hub=me/draft {said}"):
        push(run_dir, run_dir / "report.html", "me/draft", "python run.py again")
    assert before == {path.name: path.read_bytes() for path in (run_dir / "draft").iterdir()}


@pytest.mark.parametrize("repository, token, said", [
    ("a draft", "hf_x", "is no hub id; write it as name/draft"),
    ("me/draft", None, "needs a login: hf auth login, or set HF_TOKEN"),
])  # fmt: skip
def test_an_upload_that_cannot_begin_is_refused_at_once(monkeypatch, repository, token, said):
    monkeypatch.setattr("eagle3.export.card.get_token", lambda: token)
    with pytest.raises(ConfigError, match=said):
        check_push(repository)
