"""The portable EAGLE3 folder that SGLang, vLLM and TensorRT-LLM load: strict on write and on read.

Engines leave a missing tensor random and skip an unknown one without a word, so neither is ever allowed here.
"""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from eagle3.draft.attention import Backend
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError


def portable_config(draft: DraftConfig, target: PretrainedConfig, aux_layer_ids: list[int]) -> dict[str, Any]:
    """config.json of the portable format. Layer ids are written in both engines' conventions (SGLang adds one)."""
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
        **({} if draft.target_hidden_size == draft.hidden_size else {"target_hidden_size": draft.target_hidden_size}),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": aux_layer_ids, "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in aux_layer_ids],
    }


def write_draft(draft: Draft, folder: Path, target: PretrainedConfig, aux_layer_ids: list[int]) -> None:
    """Write `folder` (replacing it whole): bf16 safetensors under the portable names, and config.json."""
    tensors = {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in draft.named_parameters()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise RunError(f"the draft's {bad[0]} is not finite; it is not exported")
    if draft.config.draft_vocab_size < draft.config.vocab_size:
        tensors |= {"t2d": draft.t2d.cpu(), "d2t": draft.d2t.cpu()}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(portable_config(draft.config, target, aux_layer_ids), indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def read_draft(folder: Path, attention: Backend, target: PretrainedConfig, aux_layer_ids: list[int]) -> Draft:
    """Load a portable draft in fp32. Raises RunError on any missing, unknown or misshapen tensor, or another target.

    Where config.json names the auxiliary layers they must be `aux_layer_ids`: a wrong guess costs most of the
    acceptance and shows nowhere else.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise RunError(f"draft at {folder} cannot be read: {error}") from error
    values.setdefault("target_hidden_size", values.get("hidden_size"))
    missing = [f.name for f in fields(DraftConfig) if f.name not in values and f.default is f.default_factory]
    if missing:
        raise RunError(f"draft at {folder}: config.json lacks {missing[0]}")
    config = DraftConfig(**{f.name: values[f.name] for f in fields(DraftConfig) if f.name in values})
    for name, ours in (("vocab_size", config.vocab_size), ("hidden_size", config.target_hidden_size)):
        if ours != getattr(target, name):
            raise RunError(f"draft at {folder} is for a target with {name}={ours}, not {getattr(target, name)}")
    read = (values.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids", aux_layer_ids)
    if read != aux_layer_ids:
        raise RunError(f"draft at {folder} reads layers {read}, not {aux_layer_ids}; set model.aux_layer_ids={read}")
    if config.hidden_act != "silu":
        raise RunError(f"draft at {folder} has hidden_act={config.hidden_act}; only silu is supported")
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
    draft.load_state_dict({n: t.float() for n, t in tensors.items()} | {"t2d": t2d.bool(), "d2t": d2t.long()})
    return draft


def check_vocab(folder: Path, t2d: torch.Tensor, d2t: torch.Tensor, config: DraftConfig) -> None:
    """t2d and d2t must be two views of the same ascending list of target ids."""
    right_shape = t2d.shape == (config.vocab_size,) and d2t.shape == (config.draft_vocab_size,)
    if not right_shape or not torch.equal(d2t.long() + torch.arange(len(d2t)), t2d.nonzero()[:, 0]):
        raise RunError(f"draft at {folder}: t2d and d2t do not describe one vocabulary of {config.draft_vocab_size}")
