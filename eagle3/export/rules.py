"""What would make a draft useless, by engine, from its files and its target's config alone.

Each rule is a function that yields findings. What engines do was read in SGLang 0.5.23, vLLM 0.32,
TensorRT-LLM and the official EAGLE code: all skip or invent tensors without a word, and none
compares the draft with its target. This project is one more engine, which refuses what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from eagle3.draft.attention import Backend, Dense
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.errors import RunError
from eagle3.export.read import PICKLED, DraftFiles, named_layers, read_any
from eagle3.target.layers import engines_default, meant_by
from eagle3.target.spec import TargetSpec

ENGINES = {
    "sglang": "SGLang",
    "vllm": "vLLM",
    "trtllm": "TensorRT-LLM",
    "official": "the official code",
    "ours": "this project",
}
ALL, LOADERS = tuple(ENGINES), ("sglang", "vllm", "trtllm")  # these choose a class by config.json
OTHERS = (*LOADERS, "official")
WRONG, WARNING, NOTE = "wrong", "warning", "note"
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
FUSED_NORMS = {  # of EAGLE-3.1 and its like
    "fc_norm": "fc_norm.0.weight",
    "norm_before_fc": "input_norm.weight",
}


@dataclass
class Finding:
    """`severity`: wrong (does not load, or drafts badly without a word), warning or note; `engines`
    it is true of, none where it is true of no engine in particular.
    """

    severity: str
    engines: tuple[str, ...]
    sentence: str


def wrong(engines: tuple[str, ...], sentence: str) -> Finding:
    return Finding(WRONG, engines, sentence)


def find_all(files: DraftFiles, target: TargetSpec) -> list[Finding]:
    """Every finding, in the order of the rules; shapes and vocabulary only where config.json has
    what they need.
    """
    rules = [architecture, shape, layers, rope, variants]
    if all(files.config.get(name) is not None for name in NEEDED):
        rules += [tensors, vocabulary]
    return [finding for rule in rules for finding in rule(files, target)]


def read_draft(folder: Path, attention: Backend, target: TargetSpec) -> Draft:
    """A draft of any known form, in fp32. Raises RunError for the first thing that is wrong.

    Where config.json names the auxiliary layers they must be the target's: a wrong guess costs most
    of the acceptance and shows nowhere else.
    """
    return build_draft(read_any(folder), attention, target)


def build_draft(files: DraftFiles, attention: Backend, target: TargetSpec) -> Draft:
    """As `read_draft`, from what was read."""
    for finding in find_all(files, target):
        if finding.severity == WRONG and "ours" in finding.engines:
            raise RunError(f"draft at {files.folder}: {finding.sentence}")
    config = files.shape
    weights = {name: t for name, t in files.tensors.items() if not name.endswith("inv_freq")}
    # Maps that engines do without: none for a whole vocabulary, and t2d follows from d2t.
    d2t = weights.pop("d2t", torch.zeros(config.draft_vocab_size)).long()
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[d2t + torch.arange(len(d2t))] = True
    draft = Draft(config, attention, t2d, d2t)
    float32 = {name: tensor.float() for name, tensor in weights.items() if name != "t2d"}
    draft.load_state_dict(float32 | {"t2d": t2d, "d2t": d2t})
    return draft


def architecture(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """By which class engines load the draft, and what they need to know it for one."""
    config, names = files.config, files.given.get("architectures") or []
    if files.is_speculators:
        sentence = "this is the speculators form, which only vLLM and this project read"
        yield Finding(NOTE, ("sglang", "trtllm", "official"), sentence)
        yield from speculators(files)
        return
    if not names:
        yield wrong(LOADERS, "config.json lacks architectures=[LlamaForCausalLMEagle3]")
    elif names[0] != "LlamaForCausalLMEagle3":
        known = names[0] in ("Eagle3LlamaForCausalLM", "LlamaForCausalLM")
        sentence = f"architectures is {names[0]}, not LlamaForCausalLMEagle3"
        yield wrong(("sglang",) if known else LOADERS, sentence)
    kind = config.get("model_type")
    if kind != "llama":
        yield wrong(LOADERS, f"model_type is {kind}; the layer of an EAGLE3 draft is llama")
    if config.get("draft_vocab_size") is None:
        sentence = "config.json lacks draft_vocab_size, which sizes the head and marks an EAGLE3"
        yield wrong(("sglang", "trtllm", "official", "ours"), sentence)


def speculators(files: DraftFiles) -> Iterator[Finding]:
    """What `vllm serve DRAFT` reads besides the layer."""
    given, section = files.given, files.given.get("speculators_config") or {}
    [method, *_] = section.get("proposal_methods") or [{}]
    verifier, kind = section.get("verifier") or {}, given["speculators_model_type"]
    if kind != "eagle3":
        yield wrong(ALL, f"speculators_model_type is {kind}, which is no EAGLE3")
    if not given.get("draft_vocab_size"):
        yield wrong(("vllm", "ours"), "config.json lacks draft_vocab_size")
    tokens = method.get("speculative_tokens")
    needed = {
        "transformer_layer_config": given.get("transformer_layer_config"),
        "speculators_config.proposal_methods[0].speculative_tokens": tokens,
        "speculators_config.verifier.name_or_path": verifier.get("name_or_path"),
    }
    for name in [name for name, value in needed.items() if not value]:
        yield wrong(("vllm",), f"config.json lacks {name}, without which vLLM does not start")
    if "norm_before_residual" not in given:
        sentence = "norm_before_residual is absent, which vLLM takes for true; write it"
        yield Finding(WARNING, ("vllm",), sentence)
        yield wrong(("ours",), "norm_before_residual is absent, so true; not computed here")


def shape(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Sizes that config.json names against the target's."""
    config, whole = files.config, target.config
    for name in NEEDED:
        if config.get(name) is None:
            yield wrong(ALL, f"config.json lacks {name}")
    vocab, size = config.get("vocab_size"), config.get("hidden_size")
    if vocab not in (None, whole.vocab_size):
        yield wrong(ALL, f"vocab_size is {vocab}, but the target has {whole.vocab_size}")
    read = config.get("target_hidden_size") or size
    if read not in (None, whole.hidden_size):
        yield wrong(ALL, f"it reads hidden states of {read} numbers, not {whole.hidden_size}")
    elif size != read:
        yield wrong(("ours",), f"hidden_size is {size}, not the target's {read}: unsupported here")
    if "target_hidden_size" in files.given and not files.is_speculators:
        if config["target_hidden_size"] is None:
            yield wrong(LOADERS, "target_hidden_size is null, taken for a number; leave it out")
        elif config["target_hidden_size"] == size:
            sentence = "target_hidden_size equals hidden_size; leave it out"
            yield Finding(WARNING, ("official",), sentence)
    heads, head_dim = config.get("num_attention_heads"), config.get("head_dim")
    if size and heads and head_dim not in (None, size // heads):
        sentence = f"head_dim is {head_dim}, not hidden_size / heads = {size // heads}"
        yield wrong(("official",), sentence)
    count, activation = config.get("num_hidden_layers", 1), config.get("hidden_act", "silu")
    if count != 1:
        yield wrong(("official", "ours"), f"num_hidden_layers is {count}; they know one layer")
    if activation != "silu":
        yield wrong((*LOADERS, "ours"), f"hidden_act is {activation}; they know only silu")


def readings(files: DraftFiles, num_layers: int) -> dict[str, list[int]]:
    """The layers whose outputs each engine feeds to this draft (TensorRT-LLM: unless told
    otherwise).
    """
    default = engines_default(num_layers)
    ids = (files.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    above = files.config.get("eagle_aux_hidden_state_layer_ids") or ids
    return {
        "sglang": meant_by("sglang", ids) if ids else default,
        "vllm": meant_by("vllm", above) if above else default,
        "trtllm": default,
        "official": default,
    }


def layers(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Which of the target's layers each engine would feed, against those that the draft names."""
    count, named = target.config.num_hidden_layers, named_layers(files.config)
    read = readings(files, count)
    if named is None:
        sentence = f"config.json names no layers; engines feed their default, {read['sglang']}"
        yield Finding(NOTE if count >= 7 else WRONG, OTHERS, sentence)
        return
    if len(named) != 3 or sorted(set(named)) != named or not 0 <= named[0] <= named[-1] < count:
        yield wrong(ALL, f"layers {named} must be three of 0..{count - 1}, low to high")
        return
    reasons = {
        "sglang": "SGLang reads only eagle_config.eagle_aux_hidden_state_layer_ids",
        "vllm": "vLLM reads the top-level eagle_aux_hidden_state_layer_ids as 1 above the layers",
        "official": "the official code has its default layers built in",
        "ours": f"set model.aux_layer_ids={named}",
    }
    read["ours"] = target.aux_layer_ids
    for engine, reason in reasons.items():
        if read[engine] != named:
            sentence = f"it was made for the outputs of layers {named}, but gets {read[engine]}"
            yield wrong((engine,), f"{sentence}: {reason}")
    if read["trtllm"] != named:
        sentence = f"gets {read['trtllm']} unless eagle3_layers_to_capture={named} is set there"
        yield Finding(WARNING, ("trtllm",), sentence)


def rope(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """A draft keeps the theta it was trained with, and must reach as far as the target."""
    wanted, theta = derive_config(target.config, 1).rope_theta, files.rope_theta
    if (theta or 10000.0) != wanted:
        named = f"rope_theta is {theta:g}" if theta else "rope_theta is not named, so 10000"
        sentence = f"{named}, while the target's is {wanted:g}: right only if trained so"
        yield Finding(WARNING, ALL, sentence)
    if files.rope_scaling:
        yield wrong(("ours",), f"rope_scaling={files.rope_scaling} is not computed here")
        kind = files.rope_scaling.get("rope_type", files.rope_scaling.get("type"))
        if kind not in ("linear", "dynamic"):
            yield Finding(WARNING, ("official",), f"rope_scaling of type {kind} stops it")
    longest = files.config.get("max_position_embeddings") or 2048  # as transformers takes it
    reach = target.config.max_position_embeddings
    if longest < reach:
        sentence = f"max_position_embeddings is {longest}, less than the target's {reach}: SGLang"
        yield wrong(("sglang",), f"{sentence} needs --context-length of at most {longest}")


def variants(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Other EAGLE3 graphs: which engines compute them, and whether flags and tensors agree."""
    config = files.config
    flags = (config.get("eagle_config") or {}) | config
    if config.get("norm_before_residual"):
        engines = ("sglang", "trtllm", "official", "ours")
        yield wrong(engines, "norm_before_residual is true, which only vLLM computes")
    for flag, tensor in FUSED_NORMS.items():
        if flags.get(flag):
            yield wrong(("official", "ours"), f"{flag} is true, which they do not compute")
            if tensor not in files.tensors:
                yield wrong(LOADERS, f"{flag} is true, but {tensor} is missing: no such norm")
        elif tensor in files.tensors:
            yield wrong(ALL, f"{tensor} is left out: config.json does not say {flag}")
    if flags.get("norm_output"):
        yield wrong(("official", "ours"), "norm_output is true (EAGLE-3.1): not computed")
    if flags.get("use_aux_norm"):
        yield wrong(("ours",), "use_aux_norm is true, which is not computed here")
    if config.get("tie_word_embeddings"):
        yield wrong(("sglang",), "tie_word_embeddings is true: an embedding becomes the head")


def tensors(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Names, shapes and values of what the engines load."""
    shape, found = files.shape, files.tensors
    with torch.device("meta"):
        draft = Draft(shape, Dense, torch.empty(0), torch.empty(0))
    expected = {name: list(tensor.shape) for name, tensor in draft.named_parameters()}
    whole = shape.draft_vocab_size == shape.vocab_size
    for name in sorted(expected.keys() - found.keys()):
        # vLLM and TensorRT-LLM then take the target's head
        engines = ("sglang", "official", "ours") if name == "lm_head.weight" and whole else ALL
        yield wrong(engines, f"{name} is missing; engines leave it random without a word")
    for name in sorted(found.keys() - expected.keys() - {"d2t", "t2d"}):
        if name == "embed_tokens.weight":
            yield wrong(("ours",), f"{name} is there; this project drafts with the target's")
        elif not name.endswith("inv_freq") and not name.startswith(("fc_norm.", "input_norm.")):
            given = files.renamed.get(name, name)
            yield wrong(ALL, f"{given} is no tensor of an EAGLE3 draft; skipped without a word")
    for name in sorted(expected.keys() & found.keys()):
        tensor, wanted = found[name], expected[name]
        if list(tensor.shape) != wanted:
            yield wrong(ALL, f"{name} has shape {list(tensor.shape)}, not {wanted}")
        elif not tensor.isfinite().all():
            yield wrong(ALL, f"{name} holds values that are not finite")
        elif tensor.numel() and not tensor.any():
            yield wrong(OTHERS, f"{name} is all zeros, as if never loaded or trained")
    yield from spelling(files, expected.keys() & found.keys())


def spelling(files: DraftFiles, names: set[str]) -> Iterator[Finding]:
    """Names that some loaders do not know, the kind of file, and of numbers."""
    given = sorted(files.renamed.values())
    prefixed = [name for name in given if name.startswith("model.")]
    if prefixed:
        sentence = f"names such as {prefixed[0]} begin with model.: skipped without a word"
        yield wrong(("vllm", "trtllm", "official"), sentence)
    elif given and not files.is_speculators:
        yield wrong(("official",), f"names such as {given[0]} are skipped without a word")
    if files.weights == PICKLED:
        yield Finding(NOTE, ALL, f"weights are in {PICKLED}, a pickle; safetensors is safe")
    kinds = {str(files.tensors[name].dtype).removeprefix("torch.") for name in names}
    if kinds - {"bfloat16", "float16"}:
        yield Finding(
            NOTE, OTHERS, f"weights are {', '.join(sorted(kinds))}; engines take the target's dtype"
        )


def vocabulary(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """d2t must be offsets (target id = draft id + d2t[draft id]); engines read nothing else."""
    size, count = files.shape.vocab_size, files.shape.draft_vocab_size
    d2t, t2d = files.tensors.get("d2t"), files.tensors.get("t2d")
    if count > size:
        yield wrong(ALL, f"draft_vocab_size={count} is more than vocab_size={size}")
        return
    if d2t is None:
        if count < size:
            yield wrong(ALL, "d2t is missing, so engines take draft ids for the target's")
        return
    if count == size:
        yield wrong(("vllm",), "d2t is there although the vocabularies are the same: vLLM stops")
    if d2t.shape != (count,) or d2t.is_floating_point():
        kind = str(d2t.dtype).removeprefix("torch.")
        yield wrong(ALL, f"d2t is {kind} {list(d2t.shape)}, but must be integers [{count}]")
        return
    listed = None if t2d is None else t2d.bool().nonzero()[:, 0]
    d2t = d2t.long()
    ids = d2t + torch.arange(count)
    outside = int(((ids < 0) | (ids >= size)).sum())
    twice = count - len(ids.unique())
    ascending = count > 1 and bool((d2t.diff() > 0).all())
    absolute = ascending if listed is None else torch.equal(d2t, listed)
    if absolute and not torch.equal(ids, d2t):
        yield wrong(ALL, "d2t holds the target's ids themselves; the draft id is added to it")
    elif outside or twice:
        what = f"{outside} ids outside 0..{size - 1}" if outside else f"{twice} ids twice"
        yield wrong(ALL, f"d2t leads to {what}")
    elif listed is None:
        yield Finding(NOTE, ("official",), "t2d is missing, which its training needs")
    elif len(t2d) != size or not torch.equal(ids.sort().values, listed):
        yield wrong(ALL, "t2d marks other tokens than d2t leads to; engines go by d2t")
