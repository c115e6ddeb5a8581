"""The draft before its first update: its shape, and what it takes over from the target or from another draft."""

import json
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from eagle3.config import DraftSection
from eagle3.draft.attention import Backend
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import ConfigError
from eagle3.target.hf import HFTarget


def derive_config(target: PretrainedConfig, draft_vocab_size: int) -> DraftConfig:
    """The target's own shape, as one layer; transformers 5 keeps theta in `rope_parameters`."""
    rope = getattr(target, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = target.num_attention_heads
    return DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(target, "num_key_value_heads", None) or heads,
        head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=target.hidden_size,
        max_position_embeddings=target.max_position_embeddings,
        rope_theta=rope.get("rope_theta", 10000.0),
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
    )


def read_config(path: str, derived: DraftConfig) -> DraftConfig:
    """The shape in a JSON file of the guides' kind; what it does not name is derived. Raises ConfigError.

    Maximum positions and RoPE theta are always the target's: the guides' files carry the training length.
    """
    try:
        values = json.loads(Path(path).read_text())
        shape = {f.name: values[f.name] for f in fields(DraftConfig) if values.get(f.name) is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"draft.config={path} is not a JSON object with the draft's shape: {error}") from error
    for name in ("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "hidden_act"):
        if name in shape and shape[name] != getattr(derived, name):
            raise ConfigError(
                f"draft.config={path}: {name}={shape[name]}, but it must be {getattr(derived, name)} here"
            )
    kept = {"max_position_embeddings": derived.max_position_embeddings, "rope_theta": derived.rope_theta}
    return replace(derived, **shape | kept)


def draft_config(section: DraftSection, target: PretrainedConfig) -> DraftConfig:
    """The shape that the config asks for. Raises ConfigError."""
    derived = derive_config(target, section.vocab_size)
    return derived if section.config is None else read_config(section.config, derived)


def new_draft(
    section: DraftSection, attention: Backend, target: HFTarget, t2d: torch.Tensor, d2t: torch.Tensor
) -> Draft:
    """A draft for `target`; its head starts as the target's rows of the draft vocabulary."""
    from eagle3.export import read_draft

    if section.init_from is not None:
        return read_draft(Path(section.init_from), attention, target.config, target.aux_layer_ids)
    draft = Draft(draft_config(section, target.config), attention, t2d, d2t)
    draft.lm_head.weight.data.copy_(target.head[draft.target_ids.to(target.head.device)])
    return draft
