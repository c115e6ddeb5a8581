"""DFlash and DSpark: one pass drafts a whole block, which attends to itself both ways.

Row t drafts behind x_{t+1}, the newest token, from what the target knew at tokens up to t:

    c_j = RMS(W_fc [a_1; a_2; ...]_j)                 of every token j, once
    z   = E[x_{t+1}], E[M], ..., E[M]                 B slots, at positions t+1 ... t+B
    in each of L layers (Qwen3's: heads of q and k are normed):
        keys and values of W_k c_j, j <= t, and of W_k RMS(z) of all B slots; queries W_q RMS(z)
        z = z + W_o attn;  z = z + MLP(RMS(z))
    logits of a slot = target's head RMS(z)

In DFlash (arXiv 2602.06036) slot s drafts the token that it stands for, x_{t+1+s}, so that the
first slot drafts nothing; in DSpark (arXiv 2607.05147) slot s drafts the one behind it, x_{t+2+s},
and a bias of low rank makes a chain of the block: logits + W_2 W_1[x_{t+1+s}]. Either way step k
of a row drafts x_{t+k+2}, as in `ttt`, so pairs, teachers, loss and acceptance are those of EAGLE3.
Rows, mask, positions and first weights as in DeepSpec, which trained the drafts of DSpark's paper;
its cross-entropy is against the text's token, ours against the target's probabilities. Tensors,
keys and slots as in vLLM 0.32 (`qwen3_dflash.py`, `qwen3_dspark.py`) and SGLang 0.5.23
(`dflash.py`, `dspark.py`).

N rows of B slots, H query and G key/value heads of size d (R = H/G), D hidden size, T tokens of
which O are this rank's own, S numbers that the head reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle3.batch import Batch
from eagle3.config import DraftSection
from eagle3.draft.attention import Backend, KeysValues
from eagle3.draft.model import MLP, Draft, DraftConfig, Linear, RMSNorm
from eagle3.errors import ConfigError
from eagle3.kernels.eager import Eager, TakeRows, Weights


@dataclass
class DFlashConfig(DraftConfig):
    architecture: ClassVar[str] = "DFlashDraftModel"
    model_type: ClassVar[str] = "qwen3"
    method: ClassVar[str] = "dflash"
    title: ClassVar[str] = "DFlash"
    from_target: ClassVar[tuple[str, ...]] = ("embed_tokens.weight", "lm_head.weight")
    drafts_from: ClassVar[int] = 1  # the first slot that drafts
    reads_mask_token: ClassVar[bool] = True

    num_hidden_layers: int = 5
    block_size: int = 16  # slots
    mask_token_id: int = 0  # M

    @property
    def most_drafts(self) -> int:
        return self.block_size - self.drafts_from

    @classmethod
    def complete(cls, section: DraftSection, target_vocab_size: int) -> DraftSection:
        steps = section.block - cls.drafts_from
        return replace(section, ttt_steps=steps, vocab_size=target_vocab_size)

    @classmethod
    def chosen(cls, section: DraftSection) -> dict[str, Any]:
        sizes = {"num_hidden_layers": section.layers, "block_size": section.block}
        return sizes | {"mask_token_id": section.mask_token_id}

    @classmethod
    def slots(cls, steps: int) -> int:
        """Of a block that drafts so many tokens."""
        return cls.drafts_from + steps

    def build(self, attention: type[Backend], t2d: Tensor, d2t: Tensor) -> "DFlash":
        return DFlash(self, attention, t2d, d2t)


@dataclass
class DSparkConfig(DFlashConfig):
    architecture: ClassVar[str] = "Qwen3DSparkModel"
    method: ClassVar[str] = "dspark"
    title: ClassVar[str] = "DSpark"
    drafts_from: ClassVar[int] = 0

    block_size: int = 7
    markov_rank: int = 256

    @classmethod
    def chosen(cls, section: DraftSection) -> dict[str, Any]:
        return super().chosen(section) | {"markov_rank": section.markov_rank}

    def build(self, attention: type[Backend], t2d: Tensor, d2t: Tensor) -> "DSpark":
        return DSpark(self, attention, t2d, d2t)


class BlockAttention(nn.Module):
    """Projections of one layer, and norms of the heads of q and k."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size)
        self.k_proj = Linear(config.hidden_size, key_size)
        self.v_proj = Linear(config.hidden_size, key_size)
        self.o_proj = Linear(query_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)


class BlockLayer(nn.Module):
    """A layer of Qwen3."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def weights(self, kernels, dtype: torch.dtype) -> Weights:
        """For a pass that computes in `dtype`."""
        attention, mlp = self.self_attn, self.mlp
        qkv = [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        rest = (p.weight for p in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return kernels.layer_weights(qkv, *rest, dtype)

    def heads(
        self, projected: Tensor, counts: tuple[int, ...], rotation, kernels=Eager
    ) -> list[Tensor]:
        """[n,*] -> heads [n,count,d]; the last `counts` are values, those in front queries (where
        there are three) and keys, normed and rotated.
        """
        norms = (self.self_attn.q_norm, self.self_attn.k_norm)[-len(counts) + 1 :]
        size = self.self_attn.q_norm.normalized_shape[0]
        *turned, values = projected.unflatten(-1, (-1, size)).split(counts, dim=1)
        normed = (norm(x) for norm, x in zip(norms, turned, strict=True))
        return [*(kernels.rotate(x, *rotation) for x in normed), values.contiguous()]

    def finish(self, hidden: Tensor, attended: Tensor, kernels, weights: Weights) -> Tensor:
        """Output projection, residual and MLP: hidden [n,D], attended [n,H,d] -> [n,D]."""
        hidden = kernels.linear(attended.flatten(1), weights.o, hidden)
        _, hidden, normed = kernels.norm(self.post_attention_layernorm, hidden, len(hidden))
        return kernels.feed_forward(normed, weights, hidden)


class MergeBlock(Eager):
    """Kernels for rows of slots, all of which see all keys of their block.

    Slots go to the backend as query heads, G*B*R of them, group by group, so that it has one row
    for each anchor. The block's own keys and values are [N,G*B,d], group by group too.
    """

    def __init__(self, block_size: int):
        self.block_size = block_size

    def grouped(self, later: list[Tensor]) -> list[Tensor]:
        """[N,G,B,d] each."""
        return [x.unflatten(1, (-1, self.block_size)) for x in later]

    def merge(self, q: Tensor, out: Tensor, lse: Tensor, later: list[Tensor]):
        keys, values = self.grouped(later)
        groups = (keys.shape[1], -1)
        scores, lse = block_scores(q.unflatten(1, groups), keys), lse.unflatten(1, groups)
        total = torch.logaddexp(lse, scores.logsumexp(-1))
        p = (scores - total[..., None]).exp().to(out.dtype)
        causal = out.unflatten(1, groups) * (lse - total).exp()[..., None].to(out.dtype)
        return (causal + p @ values).flatten(1, 2), total.flatten(1)

    def merge_backward(self, grad_out, q, out, lse, later, grad_q: Tensor) -> list[Tensor]:
        keys, values = self.grouped(later)
        groups = (keys.shape[1], -1)
        grad_out, q, out, lse = (x.unflatten(1, groups) for x in (grad_out, q, out, lse))
        p = (block_scores(q, keys) - lse[..., None]).exp()
        delta = (grad_out * out).sum(-1, dtype=lse.dtype, keepdim=True)
        grad_p = (grad_out @ values.mT).to(lse.dtype)
        grad_scores = (p * (grad_p - delta) * q.shape[-1] ** -0.5).to(q.dtype)
        grad_q += (grad_scores @ keys).flatten(1, 2)
        grads = grad_scores.mT @ q, p.to(q.dtype).mT @ grad_out
        return [grad.flatten(1, 2) for grad in grads]


def block_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Scaled products [N,G,Q,B] of q [N,G,Q,d] and keys [N,G,B,d], at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q @ keys.mT).to(wide) * q.shape[-1] ** -0.5


class DFlash(Draft):
    """fc and a norm for the context, L layers and a norm for the block; the target's embedding and
    head.
    """

    config: DFlashConfig

    def __init__(self, config: DFlashConfig, attention: type[Backend], t2d: Tensor, d2t: Tensor):
        super().__init__(config, attention, t2d, d2t)
        self.fc = Linear(config.aux_size, config.hidden_size)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.add_heads()
        self.draw_weights()

    def add_heads(self) -> None:
        """What stands behind the layers."""

    def begin(self, initial: Callable[..., None], embedding: Tensor, head: Tensor) -> None:
        token = self.config.mask_token_id
        if (embedding[token] == 0).all():  # a norm leaves it so, and slots would not differ
            problem = f"draft.mask_token_id={token}: the target's embedding of it is all zeros"
            raise ConfigError(f"{problem}; name another token that no text holds")

    def context(self, aux_hidden_states: Tensor) -> Tensor:
        """c of the target's layers [n,A] -> [n,D]: what all layers make keys and values of."""
        return self.hidden_norm(self.fc(aux_hidden_states))

    def embed(self, newest: Tensor, embedding: Tensor, size: int) -> Tensor:
        """Tokens [n] -> what their blocks of `size` slots read [n*size,D]."""
        ids = newest[:, None].repeat(1, size)
        ids[:, 1:] = self.config.mask_token_id
        return embedding[ids.flatten()]

    def unroll(self, embedding: Tensor, aux_hidden_states: Tensor, batch: Batch) -> Tensor:
        """As `ttt.unroll`: [N_0 + N_1 + ..., *] for the head; blocks are as long as steps take."""
        config, kernels, dtype = self.config, self.kernels.pick(embedding), embedding.dtype
        size, heads = config.slots(len(batch.row_counts)), config.num_attention_heads
        keys = config.num_key_value_heads
        places = batch.own[batch.rows]
        input_ids = F.pad(batch.input_ids, (0, 1))  # token 0 follows the end of a document
        ends = batch.document_ends[places]

        def ahead(count: int, distance: int) -> Tensor:
            """The tokens so far behind the first `count` rows."""
            far = places[:count] + distance
            return input_ids[torch.where(far < ends[:count], far, len(input_ids) - 1)]

        context = self.context(aux_hidden_states.to(dtype))
        context_rotation = self.rope(batch.position_ids[batch.own], batch.max_length)
        slots = torch.arange(1, size + 1, device=places.device)
        positions = (batch.position_ids[places][:, None] + slots).flatten()
        rotation = self.rope(positions, batch.max_length + size)
        hidden = self.embed(ahead(len(places), 1), embedding, size)

        def by_group(x: Tensor) -> Tensor:
            """[N*B,G*r,d] -> [N,G*B*r,d]."""
            return x.unflatten(1, (keys, -1)).unflatten(0, (-1, size)).transpose(1, 2).flatten(1, 3)

        for layer in self.layers:
            weights = layer.weights(kernels, dtype)
            of_context = kernels.linear(context, weights.hidden[heads * config.head_dim :])
            k, v = layer.heads(of_context, (keys, keys), context_rotation, kernels)
            merging = MergeBlock(size)
            keys_values = (batch.exchange or KeysValues)(merging, self.attention, batch, k, v)
            projected = kernels.linear(layer.input_layernorm(hidden), weights.hidden)
            block = layer.heads(projected, (heads, keys, keys), rotation, kernels)
            attended = keys_values.attend(*map(by_group, block))
            attended = attended.unflatten(1, (keys, size, -1)).transpose(1, 2).flatten(0, 1)
            hidden = layer.finish(hidden, attended.flatten(1, 2), kernels, weights)
        first = torch.arange(len(places), device=places.device) * size + config.drafts_from
        steps = list(enumerate(batch.row_counts))
        drafting = torch.cat([first[:count] + step for step, count in steps])
        newest = torch.cat([ahead(count, step + 1) for step, count in steps])
        return self.outputs(TakeRows.apply(hidden, drafting), newest)

    def outputs(self, hidden: Tensor, newest: Tensor) -> Tensor:
        """For the head, of slots' states [n,D]; `newest` [n] are the tokens before the drafted."""
        return hidden

    def chain_logits(self, logits: Tensor, newest: Tensor) -> Tensor:
        """Those of a slot by the target's head [n,Vd], once the tokens before [n] are drafted."""
        return logits

    def head_input(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)

    def head_weights(self, target_head: Tensor) -> tuple[Tensor, Tensor | None]:
        return target_head, None

    @staticmethod
    def training_flops(config: DFlashConfig, batch: Batch) -> int:
        """FLOPs of the products in a forward and backward pass of unroll and loss, without the
        causal part of attention.
        """
        size, length = config.hidden_size, batch.tokens
        queries = config.num_attention_heads * config.head_dim
        keys = 2 * config.num_key_value_heads * config.head_dim
        slots = len(batch.rows) * config.block_size
        layer = length * size * keys + slots * size * (2 * queries + keys)
        layer += 3 * slots * size * config.intermediate_size
        within_block = 14 * slots * queries * config.block_size  # its scores are made twice
        once = 4 * length * size * config.aux_size
        head = len(batch.pair_index) * size * config.draft_vocab_size
        teacher = len(batch.teacher_rows) * size * config.draft_vocab_size
        layers = config.num_hidden_layers * (6 * layer + within_block)
        return once + layers + 4 * head + 2 * teacher


class DSpark(DFlash):
    """DFlash with a bias by the token before, and how sure it is of each slot.

    The head reads [RMS(z); W_1[x]], so that the bias is the product with W_2 in further columns.
    """

    config: DSparkConfig
    measures_chances = True

    def add_heads(self) -> None:
        config = self.config
        self.markov_head = nn.ModuleDict({
            "markov_w1": Linear(config.markov_rank, config.vocab_size),
            "markov_w2": Linear(config.markov_rank, config.draft_vocab_size),
        })  # fmt: skip
        proj = nn.Linear(config.hidden_size + config.markov_rank, 1)
        self.confidence_head = nn.ModuleDict({"proj": proj})
        nn.init.zeros_(proj.weight)
        nn.init.zeros_(proj.bias)

    def outputs(self, hidden: Tensor, newest: Tensor) -> Tensor:
        bias = F.embedding(newest, self.markov_head["markov_w1"].weight)
        return torch.cat([hidden, bias.to(hidden.dtype)], dim=1)

    def chain_logits(self, logits: Tensor, newest: Tensor) -> Tensor:
        w1, w2 = (self.markov_head[name].weight for name in ("markov_w1", "markov_w2"))
        return logits + F.linear(F.embedding(newest, w1), w2)

    def head_input(self, hidden: Tensor) -> Tensor:
        states, bias = hidden.split([self.config.hidden_size, self.config.markov_rank], dim=1)
        return torch.cat([self.norm(states), bias], dim=1)

    def head_weights(self, target_head: Tensor) -> tuple[Tensor, Tensor]:
        return target_head, self.markov_head["markov_w2"].weight

    @staticmethod
    def training_flops(config: DSparkConfig, batch: Batch) -> int:
        rank, pairs = config.markov_rank, len(batch.pair_index)
        confidence = config.hidden_size + rank
        further = 6 * pairs * (rank * config.draft_vocab_size + confidence)
        return DFlash.training_flops(config, batch) + further

    def confidence(self, students: Tensor) -> Tensor:
        """[n], before the sigmoid: how likely the target keeps what is drafted."""
        proj = self.confidence_head["proj"]
        wide = proj.weight.dtype
        return F.linear(students.to(wide), proj.weight, proj.bias)[:, 0]

    def confidence_loss(self, students: Tensor, chances: Tensor, weights: Tensor) -> Tensor:
        """Binary cross-entropy against the chance that rejection sampling keeps the token, which is
        a constant here; the layers and W_1 learn from it too (the paper's equations 8 and 11, 5.1).
        """
        sure = self.confidence(students).to(chances.dtype)
        each = F.binary_cross_entropy_with_logits(sure, chances, reduction="none")
        return (each * weights).sum()


ARCHITECTURES = {each.architecture: each for each in (DraftConfig, DFlashConfig, DSparkConfig)}
