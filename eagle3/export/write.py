"""The folder that engines load (EAGLE3: also TensorRT-LLM), and EAGLE3's speculators form.

Keys of block drafters as SGLang 0.5.23 (`dflash_utils.py`, `dspark_config.py`, `dspark.py`) and
vLLM 0.32 (`qwen3_dflash.py`, `eagle3_utils.py`) read them: DFlash's in `dflash_config`, as z-lab
publishes them, DSpark's at the top level, as DeepSpec does.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eagle3.config import Export
from eagle3.draft.attention import Dense
from eagle3.draft.block import ARCHITECTURES, DFlashConfig, DSparkConfig
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.export.read import BLOCK_LAYER_IDS, LAYER_IDS, SINGLE, absolute
from eagle3.runs.checkpoint import load_draft
from eagle3.runs.tensors import save_tensors
from eagle3.target.layers import numbered_by
from eagle3.target.spec import TargetSpec

console = Console(markup=False)
# What the nested config of the speculators form leaves out of the portable one, and its own keys.
# vLLM 0.32 takes the number of layers from the nested one, and the norms of EAGLE-3.1 from outside.
OUTER = (
    "architectures", "draft_vocab_size", "target_hidden_size", "bos_token_id", "eos_token_id",
    "pad_token_id", "fc_norm", "norm_output", "eagle_config", LAYER_IDS, "made_for",
)  # fmt: skip
COPIED = ("draft_vocab_size", "target_hidden_size", "tie_word_embeddings", "torch_dtype", LAYER_IDS)
COPIED += ("fc_norm", "norm_output")


def export_draft(
    checkpoint: Path, section: Export, target: TargetSpec, draft_length: int, run_dir: Path
) -> None:
    """Write `run_dir/draft` (and `draft-speculators`) from a checkpoint folder. Raises RunError."""
    if not os.path.lexists(checkpoint):
        raise RunError(f"{run_dir} has no checkpoint to export; put train before export in stages")
    # As it was trained: `draft.init_from` may have brought another shape than the config's.
    shape, state = load_draft(checkpoint)
    kind = ARCHITECTURES[shape.pop("architecture", DraftConfig.architecture)]
    draft = kind(**shape).build(Dense, state["t2d"], state["d2t"])
    draft.load_state_dict(state)
    verifier = absolute(section.verifier or target.path)
    portable = portable_config(draft.config, target, verifier, draft_length)
    write_draft(draft, run_dir / "draft", portable)
    if section.speculators:
        write_draft(draft, run_dir / "draft-speculators", speculators_config(portable, target))


def write_draft(draft: Draft, folder: Path, config: dict[str, Any]) -> None:
    """Replace `folder` by config.json and bf16 weights; raises RunError for one not finite.

    Engines have the confidence head of DSpark in fp32.
    """
    prefix = "layers.0." if "speculators_model_type" in config else "midlayer."
    tensors = {}
    for name, parameter in draft.named_parameters():
        dtype = torch.float32 if name.startswith("confidence_head.") else torch.bfloat16
        tensor = parameter.detach().to("cpu", dtype).contiguous()
        if not tensor.isfinite().all():
            raise RunError(f"the draft's {name} is not finite; it is not exported")
        tensors[name.replace("midlayer.", prefix)] = tensor
    # Engines need no map where the vocabularies are the same; vLLM even stops at one.
    if draft.config.draft_vocab_size < draft.config.vocab_size:
        tensors |= {"t2d": draft.t2d.cpu(), "d2t": draft.d2t.cpu()}
    # The folder gets its name only when complete: an engine may be pointed at it at any time.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_tensors(partial / SINGLE, tensors)
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    console.print(f"export: {folder}", soft_wrap=True)


def portable_config(
    draft: DraftConfig, target: TargetSpec, verifier: str, draft_length: int
) -> dict[str, Any]:
    """config.json of the portable form, for a target named `verifier` and drafts of this length."""
    # A flag that is off is left out: whoever does not know the norms need not hear of them.
    shape = {name: value for name, value in asdict(draft).items() if value is not False}
    if draft.target_hidden_size == draft.hidden_size:
        del shape["target_hidden_size"]  # the official loader takes its presence for a difference
    return {
        "architectures": [draft.architecture],
        "model_type": draft.model_type,
        "torch_dtype": "bfloat16",
        **shape,
        "attention_bias": False,
        "rope_scaling": None,  # written, because the official code stops at llama3's
        "tie_word_embeddings": False,
        **{name: getattr(target.config, name) for name in OUTER if name.endswith("_token_id")},
        **OWN_KEYS[type(draft)](draft, target),
        # Engines pass over this key; launch/serve.sh needs nothing but the folder with it.
        "made_for": {"target": verifier, "draft_length": draft.most_drafts or draft_length},
    }


def eagle3_keys(draft: DraftConfig, target: TargetSpec) -> dict[str, Any]:
    """Each engine reads layers by the key of its own, in its own numbers."""
    layer_ids = numbered_by("sglang", target.aux_layer_ids)
    return {
        "num_hidden_layers": 1,
        "mlp_bias": False,
        "eagle_config": {LAYER_IDS: layer_ids, "use_aux_hidden_state": True},
        LAYER_IDS: numbered_by("vllm", target.aux_layer_ids),
    }


def dflash_keys(draft: DFlashConfig, target: TargetSpec) -> dict[str, Any]:
    nested = {"mask_token_id": draft.mask_token_id, BLOCK_LAYER_IDS: target.aux_layer_ids}
    return {"num_target_layers": target.num_layers, "dflash_config": nested}


def dspark_keys(draft: DSparkConfig, target: TargetSpec) -> dict[str, Any]:
    return {
        "num_target_layers": target.num_layers,
        BLOCK_LAYER_IDS: target.aux_layer_ids,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,  # its first slot drafts
    }


OWN_KEYS = {DraftConfig: eagle3_keys, DFlashConfig: dflash_keys, DSparkConfig: dspark_keys}


def speculators_config(portable: dict[str, Any], target: TargetSpec) -> dict[str, Any]:
    """config.json of the speculators form: `vllm serve FOLDER` needs nothing else."""
    made_for, architectures = portable["made_for"], target.config.architectures or []
    proposal = {"proposal_type": "greedy", "speculative_tokens": made_for["draft_length"]}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        **{name: portable[name] for name in COPIED if name in portable},
        "norm_before_residual": False,  # always written: vLLM takes an absent one for true
        "transformer_layer_config": {k: v for k, v in portable.items() if k not in OUTER},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": made_for["target"], "architectures": architectures},
        },
    }
