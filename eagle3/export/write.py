"""The portable EAGLE3 folder that SGLang, vLLM and TensorRT-LLM load, and its speculators form:
strict both ways.

Engines leave a missing tensor random and skip an unknown one without a word, so neither is ever
allowed here.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig

from eagle3.draft.attention import Backend
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.export.folder import with_defaults
from eagle3.export.formats import DraftFiles, read_any
from eagle3.target.layers import numbered_by

UNSUPPORTED = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm", "use_aux_norm")


@dataclass
class MadeFor:
    """What a draft was made for, so that it can be served from its folder alone: `target` as
    model.path names it.
    """

    target: str
    draft_length: int


def portable_config(
    draft: DraftConfig,
    target: PretrainedConfig,
    aux_layer_ids: list[int],
    made_for: MadeFor | None = None,
) -> dict[str, Any]:
    """config.json of the portable format. Layer ids are written in both engines' conventions.

    Engines pass over the key `made_for`.
    """
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": draft.num_attention_heads,
        "num_key_value_heads": draft.num_key_value_heads,
        "head_dim": draft.head_dim,
        "hidden_act": draft.hidden_act,
        "rms_norm_eps": draft.rms_norm_eps,
        "initializer_range": draft.initializer_range,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": draft.vocab_size,
        "draft_vocab_size": draft.draft_vocab_size,
        "max_position_embeddings": draft.max_position_embeddings,
        "rope_theta": draft.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": target.eos_token_id,
        "pad_token_id": target.pad_token_id,
        "num_aux_hidden_states": 3,
        **(
            {}
            if draft.target_hidden_size == draft.hidden_size
            else {"target_hidden_size": draft.target_hidden_size}
        ),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": numbered_by("sglang", aux_layer_ids),
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": numbered_by("vllm", aux_layer_ids),
        **({} if made_for is None else {"made_for": asdict(made_for)}),
    }


def speculators_config(
    portable: dict[str, Any], made_for: MadeFor, target: PretrainedConfig
) -> dict[str, Any]:
    """config.json of the speculators form, from that of the portable one: `vllm serve FOLDER` needs
    nothing else.

    `norm_before_residual` is always written: vLLM takes an absent one for true.
    """
    layer = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "attention_bias",
        "mlp_bias", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings",
        "torch_dtype",
    )  # fmt: skip
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": portable["draft_vocab_size"],
        "target_hidden_size": portable.get("target_hidden_size"),
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": portable["eagle_aux_hidden_state_layer_ids"],
        "tie_word_embeddings": False,
        "torch_dtype": portable["torch_dtype"],
        "transformer_layer_config": {name: portable[name] for name in layer},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": made_for.draft_length}
            ],
            "verifier": {
                "name_or_path": made_for.target,
                "architectures": target.architectures or [],
            },
        },
    }


def exported(draft: Draft) -> dict[str, torch.Tensor]:
    """The draft's tensors under the portable names, weights in bf16. Raises RunError where one is
    not finite.
    """
    tensors = {
        name: p.detach().to("cpu", torch.bfloat16).contiguous()
        for name, p in draft.named_parameters()
    }
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise RunError(f"the draft's {bad[0]} is not finite; it is not exported")
    if draft.config.draft_vocab_size < draft.config.vocab_size:
        tensors |= {"t2d": draft.t2d.cpu(), "d2t": draft.d2t.cpu()}
    return tensors


def write_draft(
    draft: Draft,
    folder: Path,
    target: PretrainedConfig,
    aux_layer_ids: list[int],
    made_for: MadeFor | None = None,
) -> None:
    """Write `folder` (replacing it whole): bf16 safetensors under the portable names, and
    config.json.
    """
    write(folder, exported(draft), portable_config(draft.config, target, aux_layer_ids, made_for))


def write_speculators(
    draft: Draft,
    folder: Path,
    target: PretrainedConfig,
    aux_layer_ids: list[int],
    made_for: MadeFor,
) -> None:
    """Write `folder` (replacing it whole) as speculators and vLLM have it: the same tensors,
    `layers.0` the layer.
    """
    tensors = {
        name.replace("midlayer.", "layers.0."): tensor for name, tensor in exported(draft).items()
    }
    portable = portable_config(draft.config, target, aux_layer_ids)
    write(folder, tensors, speculators_config(portable, made_for, target))


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def read_draft(
    folder: Path, attention: Backend, target: PretrainedConfig, aux_layer_ids: list[int]
) -> Draft:
    """Load a draft of any known format in fp32. Raises RunError on any missing, unknown or
    misshapen tensor, or another target.

    Where config.json names the auxiliary layers they must be `aux_layer_ids`: a wrong guess costs
    most of the acceptance and shows nowhere else.
    """
    files = read_any(folder)
    config = shape_of(files)
    for name, ours in (
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.target_hidden_size),
    ):
        if ours != getattr(target, name):
            raise RunError(
                f"draft at {folder} is for a target with {name}={ours}, not {getattr(target, name)}"
            )
    read = files.named_layers or aux_layer_ids
    if read != aux_layer_ids:
        raise RunError(
            f"draft at {folder} reads layers {read}, not {aux_layer_ids}; set model.aux_layer_ids={read}"
        )
    return build(files, config, attention)


def shape_of(files: DraftFiles) -> DraftConfig:
    """The shape that config.json gives. Raises RunError where it is not one of a draft as trained
    here.
    """
    values, folder = files.config, files.folder
    needed = [f.name for f in fields(DraftConfig) if f.default is f.default_factory]
    derived = ("num_key_value_heads", "head_dim", "target_hidden_size")
    missing = [name for name in needed if values.get(name) is None and name not in derived]
    if missing:
        raise RunError(f"draft at {folder}: config.json lacks {missing[0]}")
    values = with_defaults(values)
    if values["hidden_act"] != "silu":
        raise RunError(
            f"draft at {folder} has hidden_act={values['hidden_act']}; only silu is supported"
        )
    absent = {"norm_before_residual": True} if files.is_speculators else {}  # as vLLM reads it
    odd = [f"{name}=true" for name in UNSUPPORTED if (absent | values).get(name)]
    odd += [f"rope_scaling={files.rope_scaling}"] if files.rope_scaling else []
    odd += [f"num_hidden_layers={n}" for n in [values.get("num_hidden_layers", 1)] if n != 1]
    if odd:
        raise RunError(
            f"draft at {folder} has {odd[0]}, which neither training nor the built-in decoder supports"
        )
    named = {f.name: values[f.name] for f in fields(DraftConfig) if f.name in values}
    return DraftConfig(**named | {"rope_theta": files.rope_theta or 10000.0})


def build(files: DraftFiles, config: DraftConfig, attention: Backend) -> Draft:
    """The draft in fp32. Raises RunError on any missing, unknown or misshapen tensor."""
    tensors, folder = dict(files.tensors), files.folder
    t2d = tensors.pop("t2d", torch.ones(config.vocab_size, dtype=torch.bool))
    d2t = tensors.pop("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    draft = Draft(config, attention, t2d, d2t)
    expected = dict(draft.named_parameters())
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "lacks" if name in expected else "has an unknown"
        raise RunError(f"draft at {folder} {state} tensor {name}; engines would not have said so")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            raise RunError(
                f"draft at {folder}: {name} has shape {list(tensors[name].shape)}, but its config.json asks for "
                f"{list(parameter.shape)}"
            )
    check_vocab(folder, t2d, d2t, config)
    draft.load_state_dict(
        {n: t.float() for n, t in tensors.items()} | {"t2d": t2d.bool(), "d2t": d2t.long()}
    )
    return draft


def check_vocab(folder: Path, t2d: torch.Tensor, d2t: torch.Tensor, config: DraftConfig) -> None:
    """t2d and d2t must be two views of the same ascending list of target ids."""
    right_shape = t2d.shape == (config.vocab_size,) and d2t.shape == (config.draft_vocab_size,)
    if not right_shape or not torch.equal(d2t.long() + torch.arange(len(d2t)), t2d.nonzero()[:, 0]):
        raise RunError(
            f"draft at {folder}: t2d and d2t do not describe one vocabulary of {config.draft_vocab_size}"
        )
