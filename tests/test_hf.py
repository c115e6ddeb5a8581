"""The transformers target: packed states equal each document's own, for the families the draft is
derived from.
"""

import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import SHAPE, handle_of, spec_of
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from eagle3.batch import Document, pack, serving
from eagle3.draft.initial import derive_config
from eagle3.errors import ConfigError
from eagle3.target import fused
from eagle3.target.generation import TextBatch
from eagle3.target.hf import HFTarget, gap
from eagle3.target.layers import engines_default

MOE = {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "qwen3-moe": Qwen3MoeConfig(**SHAPE, **MOE),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=8),
    "gemma3-window": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8),
}
CPU, CLOSE = torch.device("cpu"), {"rtol": 1e-4, "atol": 1e-5}


def save(config, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if isinstance(config, PhiConfig):
        model.lm_head.bias.data.normal_()
    model.save_pretrained(folder)
    return model


def packed(lengths, vocab_size=96):
    torch.manual_seed(1)
    ids = [torch.randint(0, vocab_size, (n,)) for n in lengths]
    documents = [Document(i, x, torch.arange(len(x)) >= len(x) // 2) for i, x in enumerate(ids)]
    return ids, pack(documents, torch.ones(vocab_size, dtype=torch.bool), 7, serving)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_features_equal_each_document_alone_and_go_on_from_a_cache(family, tmp_path):
    save(FAMILIES[family], tmp_path)
    target = HFTarget(spec_of(tmp_path), CPU)
    assert target.aux_layer_ids == [1, 3, 4]
    documents, batch = packed([13, 1, 30, 7])
    features = target(batch)
    eager = {"attn_implementation": "eager", "dtype": torch.float32}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **eager).eval()
    aux, last, logits = [], [], []
    for ids in documents:
        with torch.no_grad():
            output = plain(input_ids=ids[None], output_hidden_states=True)
        aux.append(torch.cat([output.hidden_states[i][0] for i in (2, 4, 5)], dim=-1))
        last.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    logits = torch.cat(logits)[batch.teacher_rows]
    assert_close(features.aux_hidden_states, torch.cat(aux), **CLOSE)
    assert_close(features.last_hidden_states, torch.cat(last)[batch.teacher_rows], **CLOSE)
    assert torch.equal(features.argmax, logits.argmax(-1))
    assert_close(features.logsumexp, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)

    ids, places = documents[2], torch.arange(30)
    cache = DynamicCache(config=target.config)
    target.states(ids[:20], places[:20], cache)
    found = target.states(ids[20:], places[20:], cache)
    whole = target.states(ids, places)
    assert_close(found, tuple(states[20:] for states in whole), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_shape_is_derived(family):
    config = FAMILIES[family]
    draft = derive_config(config, 32)
    assert draft.hidden_size == draft.target_hidden_size == 64
    assert draft.head_dim == (getattr(config, "head_dim", None) or 16)
    assert (draft.num_attention_heads, draft.num_key_value_heads) == (4, 2)
    assert draft.max_position_embeddings == 256
    assert (draft.vocab_size, draft.draft_vocab_size) == (96, 32)
    if family in ("llama", "qwen3"):
        assert draft.rope_theta == config.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("config", "width", "head_dim"),
    [
        (FalconConfig(num_hidden_layers=8, hidden_size=64, num_attention_heads=4), 256, 16),
        (GPTJConfig(n_layer=8, n_embd=64, n_head=4), 256, 16),
        (OPTConfig(num_hidden_layers=8, hidden_size=64, num_attention_heads=4), 256, 16),
        # Its layers of full attention have heads of another size.
        (Gemma4TextConfig(**SHAPE, head_dim=16, global_head_dim=32), 128, 16),
    ],
)
def test_a_draft_has_a_shape_where_configs_name_no_width(config, width, head_dim):
    draft = derive_config(config, 32)
    assert (draft.intermediate_size, draft.head_dim) == (width, head_dim)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_own_attention_agrees(target_folder, attention):
    _, batch = packed([13, 1, 30], 2048)
    ours = HFTarget(spec_of(target_folder), CPU)(batch)
    theirs = HFTarget(spec_of(target_folder), CPU, attention=attention)(batch)
    assert_close(ours.aux_hidden_states, theirs.aux_hidden_states, **CLOSE)


def test_how_documents_go_through_is_said_once(target_folder, capsys):
    """However often the target is loaded, here or in a process that the handle is sent to."""
    handle = handle_of(target_folder)
    handle.load()
    handle.close()
    handle.load()
    pickle.loads(pickle.dumps(handle)).load()
    said = capsys.readouterr().out
    assert said.count("target: documents go packed through LlamaForCausalLM") == 1


def test_a_target_is_described_by_its_weights(tmp_path):
    model = save(FAMILIES["llama"], tmp_path)
    before = spec_of(tmp_path).identity
    assert spec_of(tmp_path).identity == before
    model.lm_head.weight.data[3, 3] += 1
    model.save_pretrained(tmp_path)
    assert spec_of(tmp_path).identity != before


def test_what_is_refused(target_folder, tmp_path):
    assert engines_default(32) == [1, 15, 28] and engines_default(7) == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"model\.path"):
        spec_of(tmp_path)
    save(LlamaConfig(**SHAPE | {"num_hidden_layers": 6}), tmp_path)
    with pytest.raises(ConfigError, match=r"6 layers.*model\.aux_layer_ids"):
        spec_of(tmp_path)
    HFTarget.check_settings({"tp_size": 1}, spec_of(target_folder))
    with pytest.raises(ConfigError, match=r"target\.tp_size=8: .* use target=sglang"):
        HFTarget.check_settings({"tp_size": 8}, spec_of(target_folder))
    save(PhiConfig(**SHAPE | {"num_key_value_heads": 4}), tmp_path)
    with pytest.raises(ConfigError, match="changes its logits behind the head"):
        HFTarget(spec_of(tmp_path), CPU)


@pytest.mark.parametrize(
    ("place", "ask"),
    [
        ((HFTarget, "generate_padded"), lambda target: target.pads_left),
        ((TextBatch, "add"), HFTarget.check_decoding),
    ],
)
def test_want_of_memory_is_no_property_of_the_model(place, ask, target_folder, monkeypatch):
    target = HFTarget(spec_of(target_folder), CPU)
    monkeypatch.setattr(*place, Mock(side_effect=torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        ask(target)


def test_loading_generates_nothing(target_folder, monkeypatch):
    monkeypatch.setattr(HFTarget, "generate_padded", Mock(side_effect=AssertionError))
    HFTarget(spec_of(target_folder), CPU).generate([[5]], 2)


def test_what_is_not_finite_is_not_close():
    ones, nan = torch.ones(3, 2), torch.full((3, 2), torch.nan)
    assert gap(ones, ones) == gap(nan, nan) == gap(0 * ones, 0 * ones) == 0
    assert gap(nan, ones) > 1e9 and gap(ones / 0, ones) > 1e9


REGIONS = {"llama": (17, 8), "qwen3": (33, 8), "qwen3-moe": (33, 0), "gemma": (17, 8)}
REGIONS |= {"phi": (0, 0), "phi3": (17, 8)}
MORE = {"gemma": GemmaConfig(**SHAPE, head_dim=16), "phi": PhiConfig(**SHAPE)}
MORE["phi3"] = Phi3Config(**SHAPE, pad_token_id=0)


@pytest.mark.parametrize("family", REGIONS)
def test_fused_kernels_give_the_states_of_the_models_own_code(family, tmp_path, monkeypatch):
    """Norms and gated MLPs are found by what they compute; all families rotate queries and keys."""
    compile = torch.compile  # of one family traced, with no machine code made; it takes long

    def trace(function, **options):
        return compile(function, backend="aot_eager", **options) if family == "llama" else function

    monkeypatch.setattr(torch, "compile", trace)
    fused.region.cache_clear()
    model = AutoModelForCausalLM.from_config((FAMILIES | MORE)[family])
    for name, weight in model.named_parameters():
        weight.data += 0.3 * torch.randn_like(weight) * ("norm" in name)
    model.save_pretrained(tmp_path)
    _, batch = packed([13, 1, 30, 7])
    own, ours = (HFTarget(spec_of(tmp_path), CPU, kernels=kind) for kind in ("eager", "fused"))
    modules = list(ours.model.modules())
    forwards = [type(m).__name__ for m in modules if hasattr(m.forward, "own")]
    norms = sum(name.endswith("RMSNorm") for name in forwards)
    assert (norms, len(forwards) - norms) == REGIONS[family]
    source = sys.modules[type(ours.decoder.layers[0].self_attn).__module__]
    assert source.apply_rotary_pos_emb.own.__module__ == source.__name__
    wanted, found = own(batch), ours(batch)
    for name, states in vars(found).items():
        assert_close(states, getattr(wanted, name), **CLOSE)
    half = HFTarget(spec_of(tmp_path, dtype="bfloat16"), CPU, kernels="fused")(batch)
    assert gap(half.last_hidden_states, wanted.last_hidden_states) < 0.06


@pytest.mark.parametrize(
    ("failure", "reason"),
    [(RuntimeError("no Triton"), "no Triton"), (None, "the states differ by")],
)
def test_without_fused_kernels_the_own_code_is_used(
    failure, reason, target_folder, monkeypatch, capsys
):
    """A line of the log says why; where they were asked for, the run is refused."""
    wrong = Mock(side_effect=failure or (lambda *tensors: (2 * tensors[0], 2 * tensors[1])))

    def region(name, schema, function):
        return wrong if "rotate" in name else function

    monkeypatch.setattr(fused, "region", region)
    target = HFTarget(spec_of(target_folder), CPU)
    _, batch = packed([13, 1, 30], 2048)
    wanted = target(batch).aux_hidden_states
    target.fuse("auto")
    assert f"target: without fused kernels: {reason}" in capsys.readouterr().out
    assert torch.equal(target(batch).aux_hidden_states, wanted)
    with pytest.raises(ConfigError, match=rf"fused does not work here \({reason}.*=eager"):
        target.fuse("fused")


def test_packed_documents_do_not_wait_for_the_device(target_folder, monkeypatch):
    """transformers finds packed documents by asking the device, unless it is asked for no mask."""
    target = HFTarget(spec_of(target_folder), CPU)
    ask = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(ask, Mock(side_effect=AssertionError))
    _, batch = packed([13, 1, 30], 2048)
    target(batch)
    with pytest.raises(AssertionError):
        target.states(batch.input_ids, batch.position_ids)
