"""Families of transformers, built tiny by their config classes: what the target says of packed
documents equals what each says of a document alone, and what cannot be right is refused.
"""

import contextlib
import dataclasses
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import cut, edit_model, make_config, spec_of
from transformers import AutoModelForCausalLM, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eagle3.batch import Document, pack, serving
from eagle3.checks import check
from eagle3.errors import ConfigError, RunError
from eagle3.target.hf import HFTarget
from eagle3.target.loading import check_croppable, check_loadable

CPU = torch.device("cpu")
VOCABULARY = 256
# By the names of their configs, as patterns. Windows, chunks and what sparse attentions choose are
# smaller than the documents, so that all of them matter.
SIZES = {
    r"hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|emb_dim|embedding_dim": 64,
    r"attention_hidden_size|lru_width|(in|out)put_embedding_size|dim_model": 64,
    r"(decoder_)?vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"(num_hidden|n|num|decoder|encoder|num_encoder|num_decoder)_layers?|num_blocks": 8,
    r"max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length": 256,
    r"model_max_length|original_max_position_embeddings": 256,
    r"((swa_)?num_attention|n|num|(num_)?(de|en)coder_attention|attention)_heads?": 4,
    r"(swa_)?num_key_value_heads|num_kv_heads|linear_num_key_heads": 2,
    r"(\w+_)?head_dim|attention_head_size|kv_channels|d_head|dim_head|rotary_dim": 16,
    r"(kv|q|o)_lora_rank": 32,
    r"(n_routed|num|num_local|moe_num|zero)_experts?(_num)?|linear_num_value_heads": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k": 2,
    r"n_groups?|topk_group|first_k_dense_replace": 1,
    r"(?!.*multiplier).*intermediate_(size|multiple_size).*|.*ffn_(dim|hidden_size|size)": 64,
    r"dff|dim_ff|feed_forward_size": 64,
    r"(mamba_|ssm_)?d_state|(ssm_)?state_size|mamba_d_head|mamba_headdim": 16,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_ssm": 128,
    r"sliding_window(_size)?|attention_window_size|local_attention|window_size": 8,
    r"attention_chunk_size|index_topk": 8,
    r"index_block_size|indexer_compress_ratio": 4,
    r"index_topk_blocks": 2,
    r"bos_token_id": 0,
    r"(eos|eod|sep|cls|decoder_start|forced_eos)_token_id": 1,
    r"pad_token_id": 2,
}
# What must fit together beyond that, or would otherwise leave out what a family is known for.
EXTRA = {
    "bamba": {"attn_layer_indices": [1, 5]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 4,
        "index_n_heads": 2,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_budget": 8},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 4},
    "zaya": {"num_experts_per_tok": 1},
}
LENGTHS = (13, 2, 30, 7, 29)


def shrink(kind: type) -> dict:
    """Parameters of a config class that make its model tiny."""
    fields = dataclasses.is_dataclass(kind) and {f.name for f in dataclasses.fields(kind)}
    given = {}
    for name in fields or inspect.signature(kind).parameters:
        for pattern, size in SIZES.items():
            if re.fullmatch(pattern, name):
                given[name] = size
    if "kv_lora_rank" in given:  # latent attention has as many keys as queries
        given["num_key_value_heads"] = 4
    return given


def config_of(family: str, **changes):
    """The family's tiny config; raises whatever keeps it from being made tiny."""
    kind = CONFIG_MAPPING[family]
    given = shrink(kind) | EXTRA.get(family, {}) | changes
    inner = getattr(kind, "sub_configs", {}).get("text_config")
    if isinstance(inner, type):
        given["text_config"] = shrink(inner)
    return kind(**given)


def build(family: str, folder, **changes) -> None:
    """Save the family's tiny model; raises what `config_of` does, or its first pass."""
    config = config_of(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(parameter.numel() for parameter in model.parameters()) > 2e7:
        raise ValueError("not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 20)[None], use_cache=False)
    model.save_pretrained(folder)


def error_of(folder, target: HFTarget) -> float:
    """The largest relative difference of packed features from those of plain transformers."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    documents = [Document(i, row, torch.ones(len(row)).bool()) for i, row in enumerate(ids)]
    features = target(pack(documents, torch.ones(VOCABULARY).bool(), 3, serving))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parts = features.aux_hidden_states.split(LENGTHS), features.last_hidden_states.split(LENGTHS)
    worst = 0.0
    for row, aux, last in zip(ids, *parts, strict=True):
        with torch.no_grad():
            output = plain(input_ids=row[None], output_hidden_states=True, use_cache=False)
        # Families count the entries of this tuple differently.
        for layer in aux.unflatten(-1, (3, -1)).unbind(1):
            gaps = [(hidden[0] - layer).norm() / layer.norm() for hidden in output.hidden_states]
            worst = max(worst, float(min(gaps)))
        logits = output.logits[0]
        worst = max(worst, float((target.lm_head(last) - logits).norm() / logits.norm()))
    return worst


def judge(family: str, folder) -> tuple[str, str]:
    """What becomes of a family, and the sentence that refuses it."""
    try:
        build(family, folder)
    except Exception as error:  # whatever a config class may raise
        return "not built", repr(error)
    try:
        target = HFTarget(spec_of(folder), CPU)
    except (ConfigError, RunError) as error:
        return "refused", str(error)
    if (error := error_of(folder, target)) > 1e-3:
        return "wrong", f"{error:.1e}"
    return target.way, ""


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", "packed"), ("mistral", "packed"), ("gpt_oss", "padded"), ("qwen3_5_text", "padded")],
)
def test_documents_do_not_see_each_other(family, way, tmp_path):
    assert judge(family, tmp_path) == (way, "")


REFUSED = {
    "gemma2": "final_logit_softcapping",
    "bert-generation": "not causal",
    "xlm": "something else than its hidden states",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_right_is_refused(family, tmp_path):
    what, sentence = judge(family, tmp_path)
    assert what == "refused" and REFUSED[family] in sentence


@pytest.mark.slow
@pytest.mark.runs  # one family compiles something
def test_every_family_is_right_or_refused(tmp_path, capsys):
    logging.set_verbosity_error()
    table = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with contextlib.suppress(FileNotFoundError), capsys.disabled():
            table[family] = judge(family, tmp_path / family)
            print(f"{family:26} {table[family][0]:10} {table[family][1][:120]}")
    counts = Counter(what for what, _ in table.values())
    with capsys.disabled():
        print(counts)
    assert counts["wrong"] == 0
    assert counts["packed"] > 60 and counts["padded"] > 40 and counts["not built"] < 30


@pytest.mark.parametrize("family", ["llama4_text", "longcat_flash"])
def test_layers_are_found(family, tmp_path):
    build(family, tmp_path)
    spec = spec_of(tmp_path)
    assert spec.num_layers == 8 and spec.aux_layer_ids == [1, 3, 4]
    HFTarget(spec, CPU).check_decoding()


@pytest.mark.parametrize("family", ["mamba2", "qwen3_5_text", "lfm2", "deepseek_v32", "minimax"])
def test_what_cannot_be_taken_back_needs_an_engine(family):
    with pytest.raises(ConfigError, match=f"{family} target.*only engines decode it"):
        check_croppable(config_of(family))


@pytest.mark.parametrize(
    ("family", "without", "sentence"),
    [
        ("qwen3_5_text", "stages=[prepare,generate,train]", "only engines decode it"),
        ("bloom", None, "bloom target .* its config has no max_position_embeddings"),
    ],
)
def test_it_is_refused_before_the_run(family, without, sentence, tmp_path, tokenizer, settings):
    build(family, tmp_path / "target", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "target")
    asked = [*settings, f"model.path={tmp_path / 'target'}"]
    with pytest.raises(ConfigError, match=sentence):
        check(make_config(asked, tmp_path / "refused"))
    if without is not None:
        check(make_config([*asked, without], tmp_path / "allowed"))


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "mpt"])
def test_what_ignores_masks_is_not_decoded(family, tmp_path):
    build(family, tmp_path)
    with pytest.raises(ConfigError, match="cannot be decoded in this process"):
        HFTarget(spec_of(tmp_path), CPU).check_decoding()


AWQ = {"quantization_config": {"quant_method": "awq"}}
T5 = {"model_type": "t5", "architectures": ["T5Model"]}


@pytest.mark.parametrize(
    ("damage", "config", "sentence"),
    [
        (cut, {}, "does not open .* get it again"),
        (Path.unlink, {}, "has no weights"),
        (Path.touch, AWQ, "cannot be loaded by transformers here: .*install"),
        (Path.touch, T5, "cannot be loaded by transformers here: Unrecognized configuration class"),
    ],
)
def test_what_does_not_load_is_said_before_anything_runs(damage, config, sentence, tmp_path):
    build("llama", tmp_path)
    check_loadable(spec_of(tmp_path))
    damage(tmp_path / "model.safetensors")
    edit_model(tmp_path, config)
    with pytest.raises((ConfigError, RunError), match=sentence):
        HFTarget.check_settings({}, spec_of(tmp_path))


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("falcon_h1", "bfloat16", {}),  # a small leak
        ("llama4_text", "float32", {"attention_chunk_size": 128}),  # attention is not told of these
    ],
)
def test_what_leaks_little_or_seldom_is_not_packed(family, dtype, changes, tmp_path):
    build(family, tmp_path, **changes)
    assert HFTarget(spec_of(tmp_path, dtype=dtype), CPU).way == "padded"


def test_rope_that_changes_with_the_longest_text_limits_what_is_packed(tmp_path):
    scaled = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    scaled |= {"rope_theta": 1e4, "factor": 8.0}
    build("phi3", tmp_path, rope_parameters=scaled, original_max_position_embeddings=29)
    target = HFTarget(spec_of(tmp_path), CPU)
    assert target.way == "packed" and error_of(tmp_path, target) < 1e-3
    target.longest_together = 1000
    assert error_of(tmp_path, target) > 0.01
