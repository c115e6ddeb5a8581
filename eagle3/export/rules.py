"""What would make a draft useless, by engine, told from its files and its target's config alone.

Each rule is a function that yields findings. What engines do was read in SGLang 0.5.23, vLLM 0.32,
TensorRT-LLM and the official EAGLE code: all skip or invent tensors without a word, and none
compares the draft with its target.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from transformers import PretrainedConfig

from eagle3.draft.initial import derive_config
from eagle3.export.folder import LLAMA_DEFAULTS, PICKLED, with_defaults
from eagle3.export.formats import DraftFiles
from eagle3.target.layers import engines_default, meant_by

ENGINES = {
    "sglang": "SGLang",
    "vllm": "vLLM",
    "trtllm": "TensorRT-LLM",
    "official": "the official code",
}
ALL = tuple(ENGINES)
WRONG, WARNING, NOTE = "wrong", "warning", "note"
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
FUSED_NORMS = {
    "fc_norm": "fc_norm.0.weight",
    "norm_before_fc": "input_norm.weight",
}  # EAGLE-3.1 and its like


@dataclass
class Finding:
    """`severity`: wrong (does not load, or drafts badly without a word), warning or note; `engines`
    it is true of.
    """

    severity: str
    engines: tuple[str, ...]
    sentence: str


def find_all(files: DraftFiles, target: PretrainedConfig) -> list[Finding]:
    """Every finding, in the order of the rules; shapes and vocabulary only where config.json has
    what they need.
    """
    rules = [architecture, shape, layers, rope, variants]
    if not [name for name in NEEDED if files.config.get(name) is None]:
        rules += [tensors, vocabulary]
    return [finding for rule in rules for finding in rule(files, target)]


def expected_shapes(files: DraftFiles) -> dict[str, tuple[int, ...]]:
    """What config.json asks for, under the portable names."""
    c = with_defaults(files.config)
    size, inner, heads = (
        c["hidden_size"],
        c["intermediate_size"],
        c["num_attention_heads"] * c["head_dim"],
    )
    kv_heads = c["num_key_value_heads"] * c["head_dim"]
    norms = (
        "midlayer.input_layernorm",
        "midlayer.hidden_norm",
        "midlayer.post_attention_layernorm",
        "norm",
    )
    return {
        "fc.weight": (size, 3 * c["target_hidden_size"]),
        **{f"{name}.weight": (size,) for name in norms},
        "midlayer.self_attn.q_proj.weight": (heads, 2 * size),
        "midlayer.self_attn.k_proj.weight": (kv_heads, 2 * size),
        "midlayer.self_attn.v_proj.weight": (kv_heads, 2 * size),
        "midlayer.self_attn.o_proj.weight": (size, heads),
        "midlayer.mlp.gate_proj.weight": (inner, size),
        "midlayer.mlp.up_proj.weight": (inner, size),
        "midlayer.mlp.down_proj.weight": (size, inner),
        "lm_head.weight": (c.get("draft_vocab_size") or c["vocab_size"], size),
    }


def architecture(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """By which class engines load the draft, and what they need to know it for one."""
    config, names = files.config, files.given.get("architectures") or []
    if files.is_speculators:
        others = ("sglang", "trtllm", "official")
        yield Finding(
            NOTE,
            others,
            "this is the speculators form, which vLLM reads; others need the portable one",
        )
        yield from speculators(files)
        return
    if not names:
        yield Finding(
            WRONG, ALL[:3], "config.json names no architectures; it must be LlamaForCausalLMEagle3"
        )
    elif names[0] != "LlamaForCausalLMEagle3":
        known = names[0] in ("Eagle3LlamaForCausalLM", "LlamaForCausalLM")
        engines = ("sglang",) if known else ALL[:3]
        yield Finding(
            WRONG,
            engines,
            f"architectures is {names[0]}, which must be LlamaForCausalLMEagle3 here",
        )
    if config.get("model_type") != "llama":
        yield Finding(
            WRONG,
            ALL[:3],
            f"model_type is {config.get('model_type')}; the layer of an EAGLE3 draft is llama",
        )
    if config.get("draft_vocab_size") is None:
        sentence = "config.json lacks draft_vocab_size, by which the head is sized and the draft known for EAGLE3"
        yield Finding(WRONG, ("sglang", "trtllm", "official"), sentence)


def speculators(files: DraftFiles) -> Iterator[Finding]:
    """What `vllm serve DRAFT` reads besides the layer."""
    given, section = files.given, files.given.get("speculators_config") or {}
    method = (section.get("proposal_methods") or [{}])[0]
    if given["speculators_model_type"] != "eagle3":
        yield Finding(
            WRONG,
            ALL,
            f"speculators_model_type is {given['speculators_model_type']}, which is no EAGLE3",
        )
    lacking = {
        "transformer_layer_config": given.get("transformer_layer_config"),
        "speculators_config.proposal_methods[0].speculative_tokens": method.get(
            "speculative_tokens"
        ),
        "speculators_config.verifier.name_or_path": (section.get("verifier") or {}).get(
            "name_or_path"
        ),
        "draft_vocab_size": given.get("draft_vocab_size"),
    }
    for name, value in lacking.items():
        if not value:
            yield Finding(
                WRONG, ("vllm",), f"config.json lacks {name}, without which vLLM does not start"
            )
    if "norm_before_residual" not in given:
        sentence = "norm_before_residual is absent, which vLLM takes for true and speculators for false; write it"
        yield Finding(WARNING, ("vllm",), sentence)


def shape(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """Sizes that config.json names against the target's."""
    config = files.config
    for name in NEEDED:
        if config.get(name) is None:
            yield Finding(WRONG, ALL, f"config.json lacks {name}")
    if config.get("vocab_size") not in (None, target.vocab_size):
        sentence = f"vocab_size is {config['vocab_size']}, but the target has {target.vocab_size}: another target's draft"
        yield Finding(WRONG, ALL, sentence)
    size = config.get("hidden_size")
    read = config.get("target_hidden_size") or size
    if read not in (None, target.hidden_size):
        sentence = (
            f"it reads hidden states of {read} numbers, but the target's have {target.hidden_size}"
        )
        yield Finding(WRONG, ALL, sentence)
    if "target_hidden_size" in files.given and not files.is_speculators:
        if config["target_hidden_size"] is None:
            sentence = "target_hidden_size is null, which is taken for a number; leave the key out"
            yield Finding(WRONG, ("sglang", "vllm", "trtllm"), sentence)
        elif config["target_hidden_size"] == size:
            yield Finding(
                WARNING,
                ("official",),
                "target_hidden_size equals hidden_size; leave it out for that loader",
            )
    heads = config.get("num_attention_heads")
    if size and heads and config.get("head_dim") not in (None, size // heads):
        sentence = f"head_dim is {config['head_dim']}, but the official code takes hidden_size / heads = {size // heads}"
        yield Finding(WRONG, ("official",), sentence)
    if config.get("num_hidden_layers", 1) != 1:
        sentence = (
            f"num_hidden_layers is {config['num_hidden_layers']}; the official code knows one layer"
        )
        yield Finding(WRONG, ("official",), sentence)
    if config.get("hidden_act", "silu") != "silu":
        yield Finding(
            WRONG, ALL[:3], f"hidden_act is {config['hidden_act']}; engines compute silu or refuse"
        )


def readings(files: DraftFiles, num_layers: int) -> dict[str, list[int]]:
    """The layers whose outputs each engine feeds to this draft (TensorRT-LLM: unless told
    otherwise).
    """
    default = engines_default(num_layers)
    ids = (files.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    above = files.config.get("eagle_aux_hidden_state_layer_ids") or ids
    vllm = meant_by("vllm", above) if above else default
    return {
        "sglang": meant_by("sglang", ids) if ids else default,
        "vllm": vllm,
        "trtllm": default,
        "official": default,
    }


def layers(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """Which of the target's layers each engine would feed, against those that the draft names."""
    count, named = target.num_hidden_layers, files.named_layers
    read = readings(files, count)
    if named is None:
        sentence = f"config.json names no layers, so every engine feeds the outputs of its default, {read['sglang']}"
        yield Finding(NOTE if count >= 7 else WRONG, ALL, sentence)
        return
    if len(named) != 3 or sorted(set(named)) != named or not 0 <= named[0] <= named[-1] < count:
        sentence = f"it names layers {named}, which must be three of 0..{count - 1}, low to high"
        yield Finding(WRONG, ALL, sentence)
        return
    reasons = {
        "sglang": "SGLang reads only eagle_config.eagle_aux_hidden_state_layer_ids, written without the 1 it adds",
        "vllm": "vLLM takes eagle_aux_hidden_state_layer_ids, at the top level, as 1 above the layers it feeds",
        "official": "the official code has its default layers built in",
    }
    for engine, reason in reasons.items():
        if read[engine] != named:
            sentence = (
                f"it was made for the outputs of layers {named}, but gets {read[engine]}: {reason}"
            )
            yield Finding(WRONG, (engine,), sentence)
    if read["trtllm"] != named:
        sentence = f"TensorRT-LLM feeds {read['trtllm']} unless its speculative_config has eagle3_layers_to_capture={named}"
        yield Finding(WARNING, ("trtllm",), sentence)


def rope(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """Positions: a draft keeps the theta it was trained with, and must reach as far as the target."""
    wanted = derive_config(target, 1).rope_theta
    theta = files.rope_theta
    if (theta or 10000.0) != wanted:
        named = f"rope_theta is {theta:g}" if theta else "rope_theta is not named, so 10000"
        sentence = (
            f"{named}, while the target's is {wanted:g}: right only if the draft was trained so"
        )
        yield Finding(WARNING, ALL, sentence)
    if files.rope_scaling:
        kind = files.rope_scaling.get("rope_type", files.rope_scaling.get("type"))
        if kind not in ("linear", "dynamic"):
            sentence = f"rope_scaling of type {kind} stops the official code; others apply it"
            yield Finding(WARNING, ("official",), sentence)
    longest = (
        files.config.get("max_position_embeddings") or LLAMA_DEFAULTS["max_position_embeddings"]
    )
    if longest < target.max_position_embeddings:
        sentence = (
            f"max_position_embeddings is {longest}, less than the target's {target.max_position_embeddings}: SGLang "
            f"does not start unless --context-length is at most {longest}"
        )
        yield Finding(WRONG, ("sglang",), sentence)


def variants(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """Other EAGLE3 graphs: which engines compute them, and whether flags and tensors agree."""
    config = files.config
    if config.get("norm_before_residual"):
        sentence = "norm_before_residual is true, which only vLLM computes; others take the raw residual without a word"
        yield Finding(WRONG, ("sglang", "trtllm", "official"), sentence)
    flags = (files.config.get("eagle_config") or {}) | config
    for flag, tensor in FUSED_NORMS.items():
        if flags.get(flag) and tensor not in files.tensors:
            yield Finding(
                WRONG,
                ALL[:3],
                f"{flag} is true, but {tensor} is missing, so that norm does nothing",
            )
        elif flags.get(flag):
            yield Finding(
                WRONG, ("official",), f"{flag} is true, which the official code does not compute"
            )
        elif tensor in files.tensors:
            yield Finding(
                WRONG,
                ALL,
                f"{tensor} is there, but config.json does not say {flag}, so it is left out",
            )
    if flags.get("norm_output"):
        sentence = "norm_output is true (EAGLE-3.1), which the official code and older engines do not compute"
        yield Finding(WRONG, ("official",), sentence)
    if config.get("tie_word_embeddings"):
        sentence = (
            "tie_word_embeddings is true, so SGLang uses the target's embedding as the draft's head"
        )
        yield Finding(WRONG, ("sglang",), sentence)


def tensors(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """Names, shapes and values of what the engines load."""
    wanted, found = expected_shapes(files), files.tensors
    beside = {
        "d2t",
        "t2d",
        "embed_tokens.weight",
        *(n for n in found if n.startswith(("fc_norm.", "input_norm."))),
    }
    whole = wanted["lm_head.weight"][0] == files.config["vocab_size"]
    for name in sorted(wanted.keys() - found.keys()):
        engines = ("sglang", "official") if name == "lm_head.weight" and whole else ALL
        yield Finding(WRONG, engines, f"{name} is missing; engines leave it random without a word")
    for name in sorted(found.keys() - wanted.keys() - beside):
        if not name.endswith("inv_freq"):
            sentence = f"{files.renamed.get(name, name)} is no tensor of an EAGLE3 draft: vLLM stops, others skip it silently"
            yield Finding(WRONG, ALL, sentence)
    for name in sorted(wanted.keys() & found.keys()):
        tensor = found[name]
        if tuple(tensor.shape) != wanted[name]:
            sentence = f"{name} has shape {list(tensor.shape)}, but config.json asks for {list(wanted[name])}"
            yield Finding(WRONG, ALL, sentence)
        elif not tensor.isfinite().all():
            yield Finding(WRONG, ALL, f"{name} holds values that are not finite")
        elif prod(tensor.shape) and not tensor.any():
            yield Finding(
                WRONG, ALL, f"{name} is all zeros, as if it had never been loaded or trained"
            )
    yield from spelling(files, wanted)


def spelling(files: DraftFiles, wanted: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Names that some loaders do not know, the kind of file, and of numbers."""
    prefixed = sorted(given for given in files.renamed.values() if given.startswith("model."))
    if prefixed:
        sentence = f"names such as {prefixed[0]} begin with model.: vLLM stops, the official code skips them silently"
        yield Finding(WRONG, ("vllm", "trtllm", "official"), sentence)
    elif files.renamed and not files.is_speculators:
        given = sorted(files.renamed.values())[0]
        yield Finding(
            WRONG, ("official",), f"names such as {given} are skipped silently by the official code"
        )
    if files.weights == PICKLED:
        yield Finding(
            NOTE, ALL, f"weights are in {PICKLED}, a pickle; safetensors is safe to read everywhere"
        )
    kinds = {
        str(files.tensors[n].dtype).removeprefix("torch.")
        for n in wanted.keys() & files.tensors.keys()
    }
    if kinds - {"bfloat16", "float16"}:
        sentence = f"weights are {', '.join(sorted(kinds))}; engines compute in the target's precision, usually bfloat16"
        yield Finding(NOTE, ALL, sentence)


def vocabulary(files: DraftFiles, target: PretrainedConfig) -> Iterator[Finding]:
    """d2t must be offsets (target id = draft id + d2t[draft id]); engines read nothing else."""
    size, found = files.config["vocab_size"], files.tensors
    count, d2t, t2d = (
        files.config.get("draft_vocab_size") or size,
        found.get("d2t"),
        found.get("t2d"),
    )
    if count > size:
        yield Finding(WRONG, ALL, f"draft_vocab_size={count} is more than vocab_size={size}")
        return
    if d2t is None:
        if count < size:
            yield Finding(WRONG, ALL, "d2t is missing, so engines take draft ids for the target's")
        return
    if count == size:
        yield Finding(
            WRONG,
            ("vllm",),
            "d2t is there although the vocabularies are the same, which stops vLLM",
        )
    if d2t.shape != (count,) or d2t.is_floating_point():
        kind = str(d2t.dtype).removeprefix("torch.")
        yield Finding(
            WRONG, ALL, f"d2t is {kind} {list(d2t.shape)}, but must be integers [{count}]"
        )
        return
    d2t, listed = d2t.long(), None if t2d is None else t2d.bool().nonzero()[:, 0]
    ids = d2t + torch.arange(count)
    usable = bool((ids >= 0).all() and (ids < size).all()) and len(ids.unique()) == count
    absolute = (
        torch.equal(d2t, listed)
        if listed is not None
        else bool((d2t.diff() > 0).all()) and count > 1
    )
    if absolute and not torch.equal(ids, d2t):
        sentence = "d2t holds the target's ids themselves, but engines add the draft id to it: every token but 0 is wrong"
        yield Finding(WRONG, ALL, sentence)
    elif not usable:
        bad = int(((ids < 0) | (ids >= size)).sum())
        what = (
            f"{bad} ids outside 0..{size - 1}" if bad else f"{count - len(ids.unique())} ids twice"
        )
        yield Finding(WRONG, ALL, f"d2t leads to {what}")
    elif listed is not None and (len(t2d) != size or not torch.equal(ids.sort().values, listed)):
        sentence = "t2d marks other tokens than d2t leads to; engines go by d2t, so one of training and serving is off"
        yield Finding(WRONG, ALL, sentence)
    elif listed is None:
        yield Finding(
            NOTE,
            ("official",),
            "t2d is missing; serving does without, training from this draft does not",
        )
