"""The draft before its first update: its shape, and the weights that it starts with."""

import json
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from hydra.utils import get_object
from transformers import PretrainedConfig

from eagle3.config import DraftSection
from eagle3.draft.model import Draft, DraftConfig
from eagle3.draft.rope import max_positions
from eagle3.errors import ConfigError

# What a file of the guides may name but not change.
FIXED = ("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "hidden_act")
FIXED += ("num_aux_hidden_states", "block_size", "mask_token_id")


def derive_config(target: PretrainedConfig, draft_vocab_size: int) -> DraftConfig:
    """The target's own shape, as one layer; transformers 5 keeps theta in `rope_parameters`."""
    scaling = getattr(target, "rope_parameters", None) or {}
    rope = scaling.get("full_attention", scaling)
    heads = target.num_attention_heads

    def of_all_layers(name: str) -> int:
        with suppress(RuntimeError):  # transformers': layers differ in it, as in Gemma 4
            return getattr(target, name, None) or 0
        return 0

    return DraftConfig(
        hidden_size=target.hidden_size,
        # A mixture without a dense MLP gets one as large as its active experts together; families
        # that have names of their own for it (Falcon, GPT-J, OPT) get the usual four times.
        intermediate_size=of_all_layers("intermediate_size")
        or of_all_layers("moe_intermediate_size") * of_all_layers("num_experts_per_tok")
        or 4 * target.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=of_all_layers("num_key_value_heads") or heads,
        head_dim=of_all_layers("head_dim") or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=target.hidden_size,
        # Its own RoPE is not scaled: it is trained at the positions that it serves at.
        max_position_embeddings=max_positions(target.max_position_embeddings, scaling),
        rope_theta=rope.get("rope_theta", 10000.0),
        rms_norm_eps=getattr(target, "rms_norm_eps", 1e-6),
    )


def read_config(path: str, derived: DraftConfig) -> DraftConfig:
    """The shape in a JSON file of the guides' kind; what it does not name is derived.

    Maximum positions and RoPE theta are always the target's: the guides' files carry the training
    length. Raises ConfigError.
    """
    names = {f.name for f in fields(derived)} - {"max_position_embeddings", "rope_theta"}
    try:
        values = json.loads(Path(path).read_text())
        shape = {name: values[name] for name in names if values.get(name) is not None}
    except (OSError, ValueError, AttributeError) as error:
        problem = f"draft.config={path} is not a JSON object with the draft's shape: {error}"
        raise ConfigError(problem) from error
    for name in FIXED:
        value, needed = shape.get(name), getattr(derived, name, None)
        if value is not None and value != needed:
            raise ConfigError(f"draft.config={path}: {name}={value}, but it must be {needed} here")
    return replace(derived, **shape)


def draft_config(section: DraftSection, target: PretrainedConfig, num_layers: int) -> DraftConfig:
    """The shape that the config asks for, reading `num_layers` of the target. Or ConfigError."""
    kind = get_object(section.architecture["_target_"])
    values = asdict(derive_config(target, section.vocab_size)) | kind.chosen(section)
    derived = kind(**values | {"num_aux_hidden_states": num_layers})
    return derived if section.config is None else read_config(section.config, derived)


# The options of `draft/initial` change a new draft, given the target's embedding and head [V,D].


def random(draft: Draft, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """Weights as `Draft` draws them; the head is the target's rows of the draft vocabulary."""
    draft.lm_head.weight.data.copy_(head[draft.target_ids.to(head.device)])


def drawn(draft: Draft, embedding: torch.Tensor, head: torch.Tensor) -> None:
    """Weights as `Draft` draws them, the head too."""


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
    distance; values read E[x_{j+1}], and the output maps embeddings to the head's space. Copying
    names from the prompt is the slow part of learning to draft; this gives it at update 0, and
    everything stays trainable.

    `sharpness` scales the matching scores, `others` the weights that read the higher auxiliary
    states.
    """
    random(draft, embedding, head)
    config, attention = draft.config, draft.midlayer.self_attn
    size, head_dim, kv_heads = config.hidden_size, config.head_dim, config.num_key_value_heads
    groups = config.num_attention_heads // kv_heads
    generator = torch.Generator().manual_seed(seed)
    embedding, head = embedding.float().cpu(), head.float().cpu()
    normed = torch.nn.functional.rms_norm(embedding, (size,), eps=1e-5)
    mean = torch.nn.functional.normalize(normed.mean(0), dim=0)

    # The best map of low rank from embeddings to the head's rows of the same tokens: the singular
    # vectors of their outer products, of which each head gets the next `head_dim`.
    association = (head - head.mean(0)).T @ (normed - normed.mean(0)) / len(head)
    out, strength, into = torch.linalg.svd(association)
    out = out * (strength / strength[0])

    draft.fc.weight[:, size:].mul_(others)
    draft.fc.weight[:, :size] = torch.eye(size)
    slow = torch.arange(head_dim // 2)[round((1 - slow_share) * (head_dim // 2)) :]
    slow = torch.cat([slow, slow + head_dim // 2])  # RoPE turns dimension i with i + d/2
    for g in range(kv_heads):
        # Orthogonal to the mean embedding: what all tokens have in common matches everything.
        projection = torch.randn(size, len(slow), generator=generator)
        projection = projection - mean[:, None] * (mean @ projection)
        projection = torch.linalg.qr(projection).Q.T * sharpness**0.5
        attention.k_proj.weight[g * head_dim + slow, size:] = projection
        shared = torch.arange(g * head_dim, (g + 1) * head_dim) % size
        attention.v_proj.weight[shared, :size] = into[shared]
        for h in range(g * groups, (g + 1) * groups):
            attention.q_proj.weight[h * head_dim + slow, :size] = projection
            attention.o_proj.weight[:, h * head_dim : (h + 1) * head_dim] = out[:, shared] / groups
