"""Training-time test: the draft unrolled on its own hidden states, only where a row is still
needed.

T packed tokens, O of them this rank's own (all, unless ranks share the batch), N_k rows needed at
step k (nested: the first N_k of `batch.rows`), D hidden, A layers of the target side by side, H
query and G key/value heads of size d. Per row t of a document x_0 x_1 ..., with g_t these layers:

    h^0_t   = W_fc g_t
    step k:   u = [RMS(E[x_{t+1+k}]); RMS(h^k_t)]
              q, k^k, v^k = R_{t+k} W_q u, R_{t+k} W_k u, W_v u         R: RoPE, at position t+k
              attn = softmax over {q.k^0_j, j <= t} and {q.k^i_t, i = 1..k}
              y = h^k_t + W_o attn;  h^{k+1}_t = y + MLP(RMS(y))

EAGLE-3.1 differs in `Draft.fuse`, W_fc [RMS(a_1); RMS(a_2); ...], and in `Draft.finish`, whose
h^{k+1}_t = RMS(y + MLP(RMS(y))) goes to the head as it is.
"""

from typing import TYPE_CHECKING

import torch

from eagle3.batch import Batch
from eagle3.draft.attention import KeysValues
from eagle3.kernels.eager import TakeRows

if TYPE_CHECKING:
    from eagle3.draft.model import EAGLE3, DraftConfig


def unroll(
    draft: "EAGLE3", embedding: torch.Tensor, aux_hidden_states_OA: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """h^1, h^2, ... of all steps one behind the other: [N_0 + N_1 + ..., D].

    `embedding` [V,D] is the target's, frozen; its dtype is the one computed in. Token id 0 stands
    for what follows the end of a document.
    """
    # W u = W_e RMS(E[x]) + W_h RMS(h). The first half depends on the token alone, so it is computed
    # once and read by every step, one token further on each time.
    length, own, rows = len(batch.input_ids), batch.own, batch.rows
    input_ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)])
    kernels = draft.kernels.pick(embedding)
    weights = draft.weights(kernels, embedding.dtype)
    normed_tokens = draft.midlayer.input_layernorm(embedding[input_ids])
    embedded_tokens = kernels.share(kernels.linear(normed_tokens, weights.embedded))
    heads, kv_heads = draft.config.num_attention_heads, draft.config.num_key_value_heads
    query_size = heads * draft.config.head_dim

    def within(places: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.where(places < ends, places, length)

    # Rows meet only in k^0 and v^0, so these are made of every token; the rest of rows in need
    # alone.
    hidden_OD = draft.fuse(aux_hidden_states_OA.to(embedding.dtype), kernels, weights)
    normed_OD = draft.midlayer.hidden_norm(hidden_OD)
    _, k0, v0 = kernels.heads(
        kernels.linear(normed_OD, weights.hidden[query_size:]), embedded_tokens,
        within(own + 1, batch.document_ends[own]),
        *draft.rope(batch.position_ids[own], batch.max_length), (0, kv_heads, kv_heads),
    )  # fmt: skip
    keys_values = (batch.exchange or KeysValues)(kernels, draft.attention, batch, k0, v0)

    hidden_ND, normed_ND = (TakeRows.apply(x, rows) for x in (hidden_OD, normed_OD))
    outputs = []
    places = own[rows]
    ends, positions = batch.document_ends[places], batch.position_ids[places]
    # Step 0 always runs, so that every weight gets a gradient on every rank.
    for step in range(max(1, batch.num_steps)):
        count = batch.row_counts[step]
        ahead = within(places[:count] + step + 1, ends[:count])
        rotation = draft.rope(positions[:count] + step, batch.max_length + step)
        weight, counts = weights.hidden[:query_size], (heads, 0, 0)
        if step > 0:
            norm = draft.midlayer.hidden_norm
            outputs[-1], hidden_ND, normed_ND = kernels.norm(norm, hidden_ND, count)
            weight, counts = weights.hidden, (heads, kv_heads, kv_heads)
        qkv = kernels.linear(normed_ND, weight)
        q, *own_kv = kernels.heads(qkv, embedded_tokens, ahead, *rotation, counts)
        attended = keys_values.attend(q, *(own_kv if step else ()), step=step)
        hidden_ND = draft.finish(hidden_ND, attended, kernels, weights)
        outputs.append(hidden_ND)
    return torch.cat(outputs)


def training_flops(config: "DraftConfig", batch: Batch) -> int:
    """FLOPs of the products in a forward and backward pass of unroll and loss.

    Attention, a few per cent, is left out.
    """
    size, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    rows, length, steps = sum(batch.row_counts), batch.tokens, batch.row_counts
    # What comes from the target wants no gradient, unless norms of its own stand in between.
    fuse = length * size * config.aux_size * (6 if config.fc_norm else 4)
    once = length * size * (qkv + qkv - heads) + steps[0] * size * heads
    each = rows * size * (heads + 3 * config.intermediate_size) + (rows - steps[0]) * size * qkv
    head = len(batch.pair_index) * size * config.draft_vocab_size
    teacher = len(batch.teacher_rows) * config.target_hidden_size * config.draft_vocab_size
    return fuse + 6 * (once + each + head) + 2 * teacher
