"""The draft before its first update: its shape, and what it takes over from the target or from
another draft.
"""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from eagle3.config import DraftSection
from eagle3.draft.attention import Backend
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import ConfigError
from eagle3.export.read import locate
from eagle3.target.hf import HFTarget
from eagle3.target.weights import TargetWeights


def derive_config(target: PretrainedConfig, draft_vocab_size: int) -> DraftConfig:
    """The target's own shape, as one layer; transformers 5 keeps theta in `rope_parameters`."""
    rope = getattr(target, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = target.num_attention_heads
    return DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=dense_size(target),
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


def dense_size(target: PretrainedConfig) -> int:
    """The MLP's size; of a mixture that has no dense one, what its active experts come to."""
    dense = getattr(target, "intermediate_size", None)
    return dense or target.moe_intermediate_size * target.num_experts_per_tok


def read_config(path: str, derived: DraftConfig) -> DraftConfig:
    """The shape in a JSON file of the guides' kind; what it does not name is derived. Raises
    ConfigError.

    Maximum positions and RoPE theta are always the target's: the guides' files carry the training
    length.
    """
    try:
        values = json.loads(Path(path).read_text())
        shape = {
            f.name: values[f.name] for f in fields(DraftConfig) if values.get(f.name) is not None
        }
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"draft.config={path} is not a JSON object with the draft's shape: {error}"
        ) from error
    for name in (
        "vocab_size",
        "draft_vocab_size",
        "hidden_size",
        "target_hidden_size",
        "hidden_act",
    ):
        if name in shape and shape[name] != getattr(derived, name):
            raise ConfigError(
                f"draft.config={path}: {name}={shape[name]}, but it must be {getattr(derived, name)} here"
            )
    kept = {
        "max_position_embeddings": derived.max_position_embeddings,
        "rope_theta": derived.rope_theta,
    }
    return replace(derived, **shape | kept)


def draft_config(section: DraftSection, target: PretrainedConfig) -> DraftConfig:
    """The shape that the config asks for. Raises ConfigError."""
    derived = derive_config(target, section.vocab_size)
    return derived if section.config is None else read_config(section.config, derived)


Initial = Callable[[Draft, torch.Tensor, torch.Tensor], None]


def random(draft: Draft, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """Weights as `Draft` draws them; only the head starts as the target's rows of the draft
    vocabulary.
    """
    draft.lm_head.weight.data.copy_(head[draft.target_ids.to(head.device)])


@torch.no_grad()
def induction(
    draft: Draft,
    embedding: torch.Tensor,
    head: torch.Tensor,
    sharpness: float = 5.0,
    slow_share: float = 0.4,
    others: float = 0.5,
    seed: int = 0,
) -> None:
    """Start attention as an induction head: look for the newest token earlier in the text, propose
    what followed it.

    Row j of step 0 holds the token behind it (its embedding, x_{j+1}) and, because residual streams
    keep a token's embedding in the low layers, its own token x_j in the lowest auxiliary state. So
    one layer can copy: queries read the embedding of x_{t+1}, keys the lowest auxiliary state
    through the same projection, on the `slow_share` of rotary dimensions that turn least with
    distance; values read E[x_{j+1}], and the output maps embeddings to the head's space by the best
    low-rank outer-product association of the two. Copying names from the prompt is the slow part of
    learning to draft; this gives it at update 0, and everything stays trainable.

    `embedding` [V,D] and `head` [V,D] are the target's; `sharpness` scales the matching scores;
    `others` scales the weights that read the two higher auxiliary states.
    """
    random(draft, embedding, head)
    size, head_dim, kv_heads = (
        draft.config.hidden_size,
        draft.config.head_dim,
        draft.config.num_key_value_heads,
    )
    groups = draft.config.num_attention_heads // kv_heads
    attention, generator = draft.midlayer.self_attn, torch.Generator().manual_seed(seed)
    embedding, head = embedding.float().cpu(), head.float().cpu()
    normed = torch.nn.functional.rms_norm(embedding, (size,), eps=1e-5)
    mean = torch.nn.functional.normalize(normed.mean(0), dim=0)
    association = (head - head.mean(0)).T @ (normed - normed.mean(0)) / len(head)
    out, strength, into = torch.linalg.svd(association)
    out = out * (strength / strength[0])

    draft.fc.weight[:, size:].mul_(others)
    draft.fc.weight[:, :size] = torch.eye(size)
    slow = torch.arange(head_dim // 2)[round((1 - slow_share) * (head_dim // 2)) :]
    slow = torch.cat([slow, slow + head_dim // 2])
    for g in range(kv_heads):
        projection = torch.randn(size, len(slow), generator=generator)
        projection = projection - mean[:, None] * (mean @ projection)
        projection = torch.linalg.qr(projection).Q.T * sharpness**0.5
        attention.k_proj.weight[g * head_dim + slow, size:] = projection
        shared = torch.arange(g * head_dim, (g + 1) * head_dim) % size
        attention.v_proj.weight[shared, :size] = into[shared]
        for h in range(g * groups, (g + 1) * groups):
            attention.q_proj.weight[h * head_dim + slow, :size] = projection
            attention.o_proj.weight[:, h * head_dim : (h + 1) * head_dim] = out[:, shared] / groups


def new_draft(
    section: DraftSection,
    attention: Backend,
    initial: Initial,
    target: HFTarget | TargetWeights,
    t2d: torch.Tensor,
    d2t: torch.Tensor,
) -> Draft:
    """The draft that `section.init_from` names, else a new one for `target` with the weights that
    `initial` gives.
    """
    from eagle3.export.rules import read_draft

    if section.init_from is not None:
        return read_draft(
            locate(section.init_from, "draft.init_from"),
            attention,
            target,
        )
    draft = Draft(draft_config(section, target.config), attention, t2d, d2t)
    initial(draft, target.embedding, target.head)
    return draft
