"""What would make a draft useless, by engine, from its files and its target's config alone.

Each rule is a function that yields findings. What engines do was read in SGLang 0.5.23, vLLM 0.32,
TensorRT-LLM and the official EAGLE code: all skip or invent tensors without a word, and none
compares the draft with its target. This project is one more engine, which refuses what is wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from eagle3.draft.attention import Backend, Dense
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft, DraftConfig
from eagle3.draft.rope import max_positions
from eagle3.errors import RunError
from eagle3.export.read import LAYER_IDS, PICKLED, DraftFiles, named_layers, read_any
from eagle3.target.layers import engines_default, meant_by
from eagle3.target.spec import TargetSpec

ENGINES = {"sglang": "SGLang", "vllm": "vLLM", "trtllm": "TensorRT-LLM"}
ENGINES |= {"official": "the official code", "ours": "this project"}
ALL, LOADERS = tuple(ENGINES), ("sglang", "vllm", "trtllm")  # these choose a class by config.json
OTHERS, NOT_VLLM = (*LOADERS, "official"), ("sglang", "trtllm", "official", "ours")
READERS = ("sglang", "vllm", "ours")  # of block drafters
# What a block drafter may say of itself, and what is computed here.
COMPUTED = {
    "attention_bias": False, "is_causal": False, "causal": False, "use_swa": False,
    "attention_sink_bias": False, "attention_value_scale": 1.0, "output_multiplier": 1.0,
    "final_logit_softcapping": 0.0, "is_neox_style": True, "projector_type": None,
    "conv_kernel_size": 0, "selector_rank": 0, "confidence_head_with_markov": True,
}  # fmt: skip


@dataclass
class Finding:
    """What is true of `engines`, or in general; wrong: it does not load, or drafts badly."""

    engines: tuple[str, ...]
    sentence: str
    severity: Literal["wrong", "warning", "note"] = "wrong"


def find_all(files: DraftFiles, target: TargetSpec) -> list[Finding]:
    form = speculators if files.is_speculators else FORMS[type(files.shape)]
    own = [uncomputed] if files.shape.reads_mask_token else [variants, vocabulary]
    rules = [form, shape, layers, rope, tensors, *own]
    return [finding for rule in rules for finding in narrow(rule(files, target), files)]


def narrow(findings: Iterator[Finding], files: DraftFiles) -> Iterator[Finding]:
    """Without the engines that read no draft of this kind, of which a note says so."""
    for finding in findings:
        if files.shape.reads_mask_token and finding.severity != "note":
            finding.engines = tuple(name for name in finding.engines if name in READERS)
        if finding.engines:
            yield finding


def read_draft(draft: Path | DraftFiles, attention: Backend, target: TargetSpec) -> Draft:
    """A draft of any known form, in fp32. Raises RunError for the first thing that is wrong."""
    files = read_any(draft) if isinstance(draft, Path) else draft
    for finding in find_all(files, target):
        if finding.severity == "wrong" and "ours" in finding.engines:
            raise RunError(f"draft at {files.folder}: {finding.sentence}")
    # Maps that engines do without: none for a whole vocabulary, and t2d follows from d2t.
    d2t = files.tensors.get("d2t", torch.zeros(files.shape.draft_vocab_size)).long()
    t2d = torch.zeros(files.shape.vocab_size, dtype=torch.bool)
    t2d[d2t + torch.arange(len(d2t))] = True
    draft = files.shape.build(attention, t2d, d2t)
    for name, parameter in draft.named_parameters():
        parameter.data.copy_(files.tensors[name])
    return draft


def architecture(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """By which class engines load the draft, and what they need to know it for one."""
    [name, *_] = files.config.get("architectures") or [None]
    if name != "LlamaForCausalLMEagle3":
        # SGLang goes by this very name; vLLM and TensorRT-LLM take these two as well.
        engines = ("sglang",) if name in ("Eagle3LlamaForCausalLM", "LlamaForCausalLM") else LOADERS
        yield Finding(engines, f"architectures is [{name}], not [LlamaForCausalLMEagle3]")
    if files.config.get("model_type") != "llama":
        yield Finding(LOADERS, "model_type is not llama, which the layer of an EAGLE3 draft is")
    if files.config.get("draft_vocab_size") is None:
        yield Finding(NOT_VLLM, "config.json lacks draft_vocab_size")
    if "target_hidden_size" in files.config:
        if files.config["target_hidden_size"] is None:
            yield Finding(LOADERS, "target_hidden_size is null, taken for a number; leave it out")
        elif files.shape.target_hidden_size == files.shape.hidden_size:
            # The official loader takes its presence for a difference.
            yield Finding(("official",), "target_hidden_size must be left out", "warning")


def block(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """What engines need to know a block drafter by, and to draft with it."""
    shape, size = files.shape, target.config.vocab_size
    yield Finding(("trtllm", "official"), f"they read no {shape.title} draft", "note")
    if files.config.get("model_type") != shape.model_type:
        yield Finding(READERS, f"model_type is not {shape.model_type}, which its layers are")
    token = shape.mask_token_id
    if type(token) is not int or not 0 <= token < size:
        yield Finding(READERS, f"mask_token_id={token!r} is no token of the target's {size}")
    if shape.most_drafts < 1:
        yield Finding(READERS, f"block_size={shape.block_size} drafts nothing")
    if shape.draft_vocab_size != shape.vocab_size or "d2t" in files.tensors:
        words = f"it drafts {shape.draft_vocab_size} tokens by d2t; they draft all there are"
        yield Finding(("sglang", "ours"), words)


def markov(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    yield from block(files, target)
    head = files.config.get("markov_head_type")
    if head is None:
        yield Finding(("sglang",), "config.json lacks markov_head_type, without which it stops")
    elif head != "vanilla":
        yield Finding(("vllm", "ours"), f"markov_head_type is {head}; they compute only vanilla")


FORMS = {DraftConfig: architecture, DFlashConfig: block, DSparkConfig: markov}


def uncomputed(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Block drafters of other graphs, which the engines compute."""
    anchor = {"sample_from_anchor": files.shape.drafts_from == 0}
    for name, value in (COMPUTED | anchor).items():
        if (given := files.config.get(name)) is not None and given != value:
            yield Finding(("ours",), f"{name}={given} is not computed here")
    if {*(files.config.get("layer_types") or ())} - {"full_attention"}:
        words = f"layer_types={files.config['layer_types']} are not computed here: all must be full"
        yield Finding(("ours",), words)
    if (files.folder / "mask_embedding.pt").exists():
        yield Finding(("ours",), "mask_embedding.pt is there; this project reads the target's")


def speculators(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """What `vllm serve DRAFT` reads besides the layer."""
    config, kind = files.config, files.config["speculators_model_type"]
    yield Finding(("sglang", "trtllm", "official"), "they read no speculators form", "note")
    if kind != "eagle3":
        yield Finding(ALL, f"speculators_model_type={kind} is no EAGLE3, all that is judged here")
    if not config.get("draft_vocab_size"):
        yield Finding(("vllm", "ours"), "config.json lacks draft_vocab_size")
    for name, value in config["made_for"].items():
        if not value:
            yield Finding(("vllm",), f"speculators_config names no {name}: vLLM does not start")
    if "norm_before_residual" not in config:
        sentence = "norm_before_residual is absent, which vLLM takes for true; write it"
        yield Finding(("vllm",), sentence, "warning")
        yield Finding(("ours",), sentence)


def shape(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Sizes that config.json names against the target's."""
    shape, whole = files.shape, target.config
    size, heads, read = shape.hidden_size, shape.num_attention_heads, shape.target_hidden_size
    if shape.vocab_size != whole.vocab_size:
        yield Finding(ALL, f"vocab_size is {shape.vocab_size}, the target's {whole.vocab_size}")
    if read != whole.hidden_size:
        yield Finding(ALL, f"it reads hidden states of {read} numbers, not {whole.hidden_size}")
    elif size != read:
        engines = READERS if shape.reads_mask_token else ("ours",)
        yield Finding(engines, f"hidden_size is {size}, not the target's {read}")
    if shape.head_dim != size // heads:
        yield Finding(("official",), f"head_dim is {shape.head_dim}, not {size} / {heads} heads")
    if shape.hidden_act != "silu":
        yield Finding((*LOADERS, "ours"), f"hidden_act is {shape.hidden_act}; they know only silu")


def readings(files: DraftFiles, num_layers: int) -> dict[str, list[int]]:
    """The layers whose outputs each engine feeds to this draft, unless told otherwise."""
    read = dict.fromkeys(OTHERS, engines_default(num_layers))
    ids = files.config["eagle_config"].get(LAYER_IDS)
    above = files.config.get(LAYER_IDS) or ids  # vLLM takes SGLang's where its own are absent
    given = {"sglang": ids, "vllm": above}
    return read | {engine: meant_by(engine, ids) for engine, ids in given.items() if ids}


def layers(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Which of the target's layers each engine would feed, against those that the draft names."""
    count, named = target.num_layers, named_layers(files.config)
    read = readings(files, count) | {"ours": target.aux_layer_ids}
    number = files.shape.num_aux_hidden_states
    if named is None:
        sentence = f"config.json names no layers; engines feed their default, {read['sglang']}"
        fits = count >= 7 and number == len(read["sglang"])
        yield Finding(OTHERS, sentence, "note" if fits else "wrong")
        if number != len(read["ours"]):
            yield Finding(("ours",), f"it reads {number} layers; set so many model.aux_layer_ids")
        return
    if len(named) != number or sorted(set(named) & set(range(count))) != named:
        yield Finding(ALL, f"layers {named} must be {number} of 0..{count - 1}, low to high")
        return
    if files.is_speculators and number != 3 and "num_aux_hidden_states" not in files.config:
        yield Finding(("vllm",), "num_aux_hidden_states is absent, which vLLM takes for 3")
    if files.config.get(LAYER_IDS) and read["vllm"] != named:
        above = read.pop("vllm")
        sentence = f"config.json names the outputs of layers {named}, vLLM's key those of {above}"
        yield Finding(("sglang", "vllm"), f"{sentence}: one of them is wrong")
    # As many layers always fit in shape: nothing but a low acceptance gives a wrong choice away.
    reasons = {
        "sglang": f"SGLang reads only eagle_config.{LAYER_IDS}",
        "vllm": f"vLLM reads the top-level {LAYER_IDS} as 1 above the layers",
        "trtllm": f"set eagle3_layers_to_capture={named} there",
        "official": "the official code has its default layers built in",
        "ours": f"set model.aux_layer_ids={named}",
    }
    for engine, reason in reasons.items():
        if read.get(engine, named) != named:
            sentence = f"made for the outputs of layers {named}, it gets {read[engine]}: {reason}"
            yield Finding((engine,), sentence, "warning" if engine == "trtllm" else "wrong")


def rope(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """A draft keeps the theta it was trained with, and must reach as far as the target."""
    derived, theta = derive_config(target.config, 1), files.shape.rope_theta
    wanted, reach = derived.rope_theta, derived.max_position_embeddings
    if theta != wanted:
        sentence = f"rope_theta is {theta:g}, the target's {wanted:g}: right only if trained so"
        yield Finding(ALL, sentence, "warning")
    scaling = files.config["rope_scaling"] or files.config["rope_parameters"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        yield Finding(("ours",), f"rope_scaling={scaling} is not computed here")
        if kind not in ("linear", "dynamic"):
            yield Finding(("official",), f"rope_scaling of type {kind} stops it", "warning")
    # SGLang does not start a draft that reaches less far than its target.
    longest = max_positions(files.shape.max_position_embeddings, scaling)
    if longest < reach:
        remedy = f"not {reach}: set --context-length {longest} there, or less"
        yield Finding(("sglang",), f"max_position_embeddings is {longest}, {remedy}")


def variants(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Other EAGLE3 graphs: which engines compute them, and whether flags and tensors agree."""
    flags, shape = files.config["eagle_config"] | files.config, files.shape
    if files.config.get("num_hidden_layers", 1) != 1:
        yield Finding(("official", "ours"), "num_hidden_layers is not 1; they know one layer")
    if shape.num_aux_hidden_states == 1 and shape.target_hidden_size == shape.hidden_size:
        yield Finding(("sglang",), "a single layer's states pass for the draft's: fc is skipped")
    cannot = {"fc_norm": ("official",), "norm_output": ("official",), "use_aux_norm": ("vllm",)}
    cannot |= {"norm_before_fc": ("official", "ours"), "norm_before_residual": NOT_VLLM}
    cannot["tie_word_embeddings"] = ("sglang",)  # the embedding becomes its head
    for flag, engines in cannot.items():
        if flags.get(flag):
            # EAGLE-3.1 was chosen by whoever trained it, for engines that have it.
            severity = "warning" if engines == ("official",) else "wrong"
            yield Finding(engines, f"{flag} is true, which they do not compute", severity)
    # Engines make the norms of EAGLE-3.1 by the flag, and fill them with whatever is in the file.
    flags["fc_norm"] = files.shape.fc_norm
    for flag, prefix in {"fc_norm": "fc_norm.", "norm_before_fc": "input_norm."}.items():
        name = next((name for name in files.tensors if name.startswith(prefix)), None)
        if name and not flags.get(flag):
            yield Finding(ALL, f"{name} is left out: config.json does not say {flag}")
    if flags.get("norm_before_fc") and "input_norm.weight" not in files.tensors:
        yield Finding(LOADERS, "norm_before_fc is true, but input_norm.weight is missing")


def tensors(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """Names, shapes and values of what the engines load."""
    # Of the speculators form `official` reads nothing anyway.
    layer = () if files.is_speculators else ("official",)
    for prefix, engines in {"model.": ("vllm", "trtllm", "official"), "layers.0.": layer}.items():
        if engines and any(name.startswith(prefix) for name in files.names):
            yield Finding(engines, f"names that begin with {prefix} are not looked for")
    if files.weights == PICKLED:
        yield Finding(ALL, f"weights are in {PICKLED}, a pickle; safetensors is safe", "note")
    shape, found = files.shape, files.tensors
    with torch.device("meta"):  # names and shapes alone, no memory
        draft = shape.build(Dense, torch.empty(0), torch.empty(0))
    expected = dict(draft.named_parameters())
    whole = shape.draft_vocab_size == shape.vocab_size
    for name in sorted((expected.keys() | found.keys()) - {"d2t", "t2d"}):
        tensor, wanted = found.get(name), expected.get(name)
        if tensor is None:
            # vLLM and TensorRT-LLM take the target's head for one of the whole vocabulary
            engines = ("sglang", "official", "ours") if name == "lm_head.weight" and whole else ALL
            if name.startswith("confidence_head."):
                engines = ("sglang", "ours")
            yield Finding(engines, f"{name} is missing; engines leave it random without a word")
        elif name in shape.from_target:
            yield Finding(("ours",), f"{name} is there; this project drafts with the target's")
        elif wanted is None:
            if not name.endswith("inv_freq") and not name.startswith(("fc_norm.", "input_norm.")):
                yield Finding(ALL, f"{name} is no tensor of a draft of {shape.title}; skipped")
        elif tensor.shape != wanted.shape:
            yield Finding(ALL, f"{name} has shape {list(tensor.shape)}, not {list(wanted.shape)}")
        elif not tensor.isfinite().all():
            yield Finding(ALL, f"{name} holds values that are not finite")
        elif not tensor.any() and name != "confidence_head.proj.bias":
            yield Finding(OTHERS, f"{name} is all zeros, as if never loaded or trained")


def vocabulary(files: DraftFiles, target: TargetSpec) -> Iterator[Finding]:
    """d2t must be offsets (target id = draft id + d2t[draft id]); engines read nothing else."""
    size, count = files.shape.vocab_size, files.shape.draft_vocab_size
    d2t, t2d = files.tensors.get("d2t"), files.tensors.get("t2d")
    if count > size:
        yield Finding(ALL, f"draft_vocab_size={count} is more than vocab_size={size}")
    elif d2t is None and count < size:
        yield Finding(ALL, "d2t is missing, so engines take draft ids for the target's")
    elif d2t is not None and count == size:
        yield Finding(("vllm",), "d2t is there although the vocabularies are the same: vLLM stops")
    if d2t is None or count > size:
        return
    if d2t.shape != (count,) or d2t.is_floating_point():
        yield Finding(ALL, f"d2t is {d2t.dtype} {list(d2t.shape)}, not integers [{count}]")
        return
    ids = d2t.long() + torch.arange(count)
    listed = None if t2d is None else t2d.bool().nonzero()[:, 0]
    # Without t2d: ids are written in ascending order, while offsets repeat where two ids adjoin.
    absolute = bool((d2t.diff() > 0).all()) if t2d is None else torch.equal(d2t, listed)
    outside, twice = int(((ids < 0) | (ids >= size)).sum()), count - len(ids.unique())
    if absolute and count > 1:
        yield Finding(ALL, "d2t holds the target's ids themselves; the draft id is added to it")
    elif outside:
        yield Finding(ALL, f"d2t leads to {outside} ids outside 0..{size - 1}")
    elif twice:
        yield Finding(ALL, f"d2t leads to {twice} ids twice")
    elif t2d is not None and (len(t2d) != size or not torch.equal(ids.sort().values, listed)):
        yield Finding(ALL, "t2d marks other tokens than d2t leads to; engines go by d2t")
