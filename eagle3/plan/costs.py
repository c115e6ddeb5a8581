"""What a token costs: parameters, FLOPs and bytes, from shapes alone. No weights are loaded.

T packed tokens, N_k rows needed at step k, D hidden, H the target's hidden size, U teacher rows, M
supervised pairs.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from eagle3.batch import Batch
from eagle3.draft.attention import Dense
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")
HEAD_CHUNK_BYTES = 1 << 28  # of `target.hf.head_statistics`


@dataclass
class TargetSize:
    """Parameters of the target; `active` are those that a token passes through, embedding and head
    included.
    """

    parameters: int
    active: int
    embedding: int
    head: int
    tied: bool

    @property
    def layers(self) -> int:
        """Active parameters of the layers: what a token is multiplied with on its way to the last
        hidden state.
        """
        return self.active - self.embedding - (0 if self.tied else self.head)


def target_size(config: PretrainedConfig, trust_remote_code: bool = False) -> TargetSize:
    """Counts the parameters of a model that has shapes and no weights. Raises RunError."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        raise RunError(
            f"plan: transformers cannot make this model: {str(error).splitlines()[0]}"
        ) from error
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    experts = first_of(config, EXPERTS)
    idle = (
        routed - routed * (first_of(config, EXPERTS_PER_TOKEN) or experts) // experts
        if experts
        else 0
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(sizes.values())
    return TargetSize(total, total - idle, embedding.numel(), head.numel(), head is embedding)


def first_of(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    return next(
        (getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)),
        None,
    )


def prefill_flops(
    size: TargetSize, config: PretrainedConfig, lengths, weights, teacher_share: float
) -> float:
    """FLOPs of the target a token: layers, causal attention within documents, and the head on the
    teacher rows.

    A multiplication and an addition for each active parameter (Kaplan et al., arXiv 2001.08361);
    attention has two products of 2 d FLOPs for each pair of a query and an earlier key of a head,
    n^2 / 2 pairs in a document.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = float((weights * lengths.astype(float) ** 2).sum() / (weights * lengths).sum())
    attention = 2 * keys * heads * head_dim * config.num_hidden_layers
    return 2.0 * size.layers + attention + 2.0 * size.head * teacher_share


def draft_parameters(config: DraftConfig) -> int:
    """All that is trained."""
    with torch.device("meta"):
        draft = Draft(
            config, Dense, torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.long)
        )
    return sum(parameter.numel() for parameter in draft.parameters())


def saved_bytes(config: DraftConfig, batch: Batch, element: int, fused_norm: bool) -> int:
    """What autograd keeps of a micro-step between forward and backward, with `element` bytes a
    number.

    Read off `ttt.unroll`, `draft.model`, `attention.Attend` and `loss.FusedLoss`;
    tests/test_plan.py compares it with what autograd's hooks see. `fused_norm`: torch's kernel for
    GPUs keeps what a norm reads; elsewhere it keeps that and its quotient, both in fp32.
    """
    size, length, pairs = config.hidden_size, len(batch.input_ids), len(batch.pair_index)
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    rows, first = sum(batch.row_counts), batch.row_counts[0]
    later = rows - first
    normed = size * (
        length + later + rows + pairs
    )  # fc's output, hidden states, residuals, students
    numbers = length * (
        2 * size + 3 * config.target_hidden_size + 3 * kv
    )  # normed, aux, k0 rotated, k0 with v0
    numbers += rows * (
        2 * q + size + 2 * config.intermediate_size
    )  # q, attended; normed residual, gate, up
    numbers += first * size + later * (
        size + q + 3 * kv
    )  # normed rows; normed, v within q, k, v, and k rotated
    numbers += pairs * size  # the students' gradient
    small = 4 * (
        3 * length + 4 * rows + pairs + rows * config.num_attention_heads
    )  # statistics of norms, attention
    small += 4 * config.head_dim * (length + rows) + 8 * (
        length + rows + pairs
    )  # rotation; int64 indices
    kept = normed * (element if fused_norm else 8) + numbers * element + small
    kept += (
        length * size * (element if fused_norm else 4)
    )  # embeddings, or only their quotient: they are frozen
    return kept + weight_copies(config, len(batch.row_counts), element)


def weight_copies(config: DraftConfig, steps: int, element: int) -> int:
    """Weights in the activations' dtype, made anew and kept at every step; the head's gradient, in
    fp32.
    """
    size, q = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = size * (q + 2 * config.num_key_value_heads * config.head_dim)
    gradient = 4 * size * config.draft_vocab_size
    if element == 4:
        return gradient + 4 * 2 * qkv
    each = size * q + 3 * size * config.intermediate_size + qkv
    return gradient + element * (steps * each + qkv + 3 * size * config.target_hidden_size)


def prefill_bytes(config: PretrainedConfig, tokens: int, element: int) -> int:
    """Roughly what the target needs at work: one layer's activations, the auxiliary ones twice, a
    chunk of logits.
    """
    size, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or size // heads
    inner = config.intermediate_size
    if first_of(config, EXPERTS):
        chosen = first_of(config, EXPERTS_PER_TOKEN) or 1
        inner = chosen * (getattr(config, "moe_intermediate_size", None) or inner) + chosen * size
    numbers = 6 * size + 4 * size + (heads + 2 * kv_heads) * head_dim + 3 * inner
    return tokens * numbers * element + 3 * min(HEAD_CHUNK_BYTES, 4 * tokens * config.vocab_size)


def loss_bytes(config: DraftConfig, batch: Batch, chunk_rows: int, element: int) -> int:
    """What `FusedLoss` works on: for a chunk of teacher rows, their and the students' logits in
    fp32, and the head.
    """
    teachers = max(1, len(batch.teacher_rows))
    chunk = min(chunk_rows, teachers)
    pairs = chunk * len(batch.pair_index) // teachers
    logits = config.draft_vocab_size * (pairs * (4 * 4 + element) + chunk * (2 * 4 + element))
    return logits + config.draft_vocab_size * config.hidden_size * 2 * element
