"""The portable EAGLE3 folder that SGLang, vLLM and TensorRT-LLM load, and its speculators form."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from eagle3.config import DraftSection, Export
from eagle3.draft.attention import Dense
from eagle3.draft.initial import draft_config
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.runs.checkpoint import draft_weights
from eagle3.target.layers import numbered_by
from eagle3.target.spec import TargetSpec

console = Console(markup=False)
LAYER_KEYS = (  # what the nested config of the speculators form has of the portable one
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range",
    "attention_bias", "mlp_bias", "vocab_size", "max_position_embeddings", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "torch_dtype",
)  # fmt: skip


@dataclass
class MadeFor:
    """What a draft was made for, so that it can be served from its folder alone: `target` as
    model.path names it.
    """

    target: str
    draft_length: int


def export_draft(
    checkpoint: Path,
    section: Export,
    shape: DraftSection,
    target: TargetSpec,
    draft_length: int,
    run_dir: Path,
) -> Path:
    """Write `run_dir/draft`, and `draft-speculators` where asked for, from a checkpoint folder.

    `draft_length` is what the drafts will be served with. Raises RunError without a checkpoint, or
    with one that is damaged or not finite.
    """
    if not checkpoint.exists():
        raise RunError(
            f"nothing to export: {run_dir} has no checkpoint; put train before export in stages"
        )
    state = draft_weights(checkpoint)
    draft = Draft(draft_config(shape, target.config), Dense, state["t2d"], state["d2t"])
    draft.load_state_dict(state)
    named = section.verifier or target.path
    absolute = str(Path(named).resolve()) if Path(named).is_dir() else named
    made_for = MadeFor(absolute, draft_length)
    folder = run_dir / "draft"
    write_draft(draft, folder, target, made_for)
    console.print(f"export: {folder}", soft_wrap=True)
    if section.speculators:
        write_speculators(draft, run_dir / "draft-speculators", target, made_for)
        console.print(f"export: {run_dir / 'draft-speculators'}", soft_wrap=True)
    return folder


def write_draft(
    draft: Draft, folder: Path, target: TargetSpec, made_for: MadeFor | None = None
) -> None:
    """Write `folder` (replacing it whole): bf16 safetensors under the portable names, and
    config.json.
    """
    config = portable_config(draft.config, target)
    if made_for is not None:
        config["made_for"] = asdict(made_for)  # engines pass over this key
    replace_folder(folder, exported(draft), config)


def write_speculators(draft: Draft, folder: Path, target: TargetSpec, made_for: MadeFor) -> None:
    """Write `folder` (replacing it whole) as speculators and vLLM have it: the same tensors,
    `layers.0` the layer.
    """
    tensors = {
        name.replace("midlayer.", "layers.0."): tensor for name, tensor in exported(draft).items()
    }
    replace_folder(folder, tensors, speculators_config(draft.config, target, made_for))


def portable_config(draft: DraftConfig, target: TargetSpec) -> dict[str, Any]:
    """config.json of the portable form. Layer ids are written in both engines' conventions."""
    shape = asdict(draft)
    if draft.target_hidden_size == draft.hidden_size:
        del shape["target_hidden_size"]  # the official loader takes its presence for a difference
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        **shape,
        "num_hidden_layers": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": target.config.bos_token_id,
        "eos_token_id": target.config.eos_token_id,
        "pad_token_id": target.config.pad_token_id,
        "num_aux_hidden_states": 3,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": numbered_by("sglang", target.aux_layer_ids),
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": numbered_by("vllm", target.aux_layer_ids),
    }


def speculators_config(draft: DraftConfig, target: TargetSpec, made_for: MadeFor) -> dict[str, Any]:
    """config.json of the speculators form: `vllm serve FOLDER` needs nothing else."""
    portable = portable_config(draft, target)
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": portable["draft_vocab_size"],
        "target_hidden_size": portable.get("target_hidden_size"),
        "norm_before_residual": False,  # always written: vLLM takes an absent one for true
        "eagle_aux_hidden_state_layer_ids": portable["eagle_aux_hidden_state_layer_ids"],
        "tie_word_embeddings": False,
        "torch_dtype": portable["torch_dtype"],
        "transformer_layer_config": {name: portable[name] for name in LAYER_KEYS},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": made_for.draft_length}
            ],
            "verifier": {
                "name_or_path": made_for.target,
                "architectures": target.config.architectures or [],
            },
        },
    }


def exported(draft: Draft) -> dict[str, torch.Tensor]:
    """The draft's tensors under the portable names, weights in bf16. Raises RunError where one is
    not finite.
    """
    tensors = {}
    for name, parameter in draft.named_parameters():
        tensors[name] = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        if not tensors[name].isfinite().all():
            raise RunError(f"the draft's {name} is not finite; it is not exported")
    # Engines need no map where the vocabularies are the same; vLLM even stops at one.
    if draft.config.draft_vocab_size < draft.config.vocab_size:
        tensors |= {"t2d": draft.t2d.cpu(), "d2t": draft.d2t.cpu()}
    return tensors


def replace_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """The folder gets its name only when complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
