"""Training-time test: the draft unrolled on its own hidden states, only where a row is still needed.

T packed tokens, O of them held by this process (all, unless ranks share the batch), N_k rows needed at step k (nested:
the first N_k of `batch.rows`), D hidden, A three layers of the target, H query and G key/value heads of size d.
"""

import torch

from eagle3.data.packing import Batch
from eagle3.draft.model import Draft, DraftConfig, linear
from eagle3.draft.rope import rotate


def unroll(draft: Draft, embedding: torch.Tensor, aux_hidden_states_OA: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Hidden states after the layer, un-normalised, of all steps one behind the other: [N_0 + N_1 + ..., D].

    `embedding` [V, D] is the target's, frozen; its dtype is the one computed in. Token id 0 stands for what follows
    the end of a document.
    """
    rows, length, exchange = batch.rows, len(batch.input_ids), batch.exchange
    input_ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)])
    tokens = draft.project_embeddings(embedding[input_ids])
    hidden_weight = draft.qkv_weight(1)
    query_size = draft.config.num_attention_heads * draft.config.head_dim

    def read_tokens(places: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return tokens[torch.where(places < ends, places, length)]

    hidden_OD = draft.fc(aux_hidden_states_OA.to(embedding.dtype))
    normed_OD = draft.midlayer.hidden_norm(hidden_OD)
    held = batch.held
    keys_values = linear(normed_OD, hidden_weight[query_size:])
    keys_values = keys_values + read_tokens(held + 1, batch.document_ends[held])[:, query_size:]
    k0, v0 = keys_values.unflatten(-1, (-1, draft.config.head_dim)).chunk(2, dim=-2)
    k0, v0 = rotate(k0, *draft.rope(batch.position_ids[held], batch.max_length)), v0.contiguous()
    k0, v0 = exchange.keys(k0, v0)

    hidden, normed, later, outputs = hidden_OD[rows], normed_OD[rows], [], []
    places = held[rows]
    ends, positions = batch.document_ends[places], batch.position_ids[places]
    for step, (count, anywhere) in enumerate(zip(batch.row_counts, exchange.steps(batch), strict=True)):
        if anywhere == 0 and step > 0:  # step 0 always runs, so that every weight gets a gradient on every rank
            break
        embedded = read_tokens(places[:count] + step + 1, ends[:count])
        cos, sin = draft.rope(positions[:count] + step, batch.max_length + step)
        own = None
        if step == 0:
            q = linear(normed, hidden_weight[:query_size]) + embedded[:, :query_size]
            q = q.unflatten(-1, (-1, draft.config.head_dim))
        else:
            hidden = hidden[:count]
            normed = draft.midlayer.hidden_norm(hidden)
            q, k, v = draft.split_heads(linear(normed, hidden_weight) + embedded)
            own = rotate(k, cos, sin), v.contiguous()  # a view would keep q, k and v for backward
        attended = exchange.attend(draft.attention, batch, step, rotate(q, cos, sin), k0, v0, later, own)
        hidden = draft.finish(hidden, attended)
        outputs.append(hidden)
    return torch.cat(outputs)


def training_flops(config: DraftConfig, batch: Batch) -> int:
    """FLOPs of the products in a forward and backward pass of unroll and loss; attention, a few per cent, left out."""
    size, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    rows, length, steps = sum(batch.row_counts), batch.tokens, batch.row_counts
    once = length * size * (3 * config.target_hidden_size + qkv + qkv - heads) + steps[0] * size * heads
    each = rows * size * (heads + 3 * config.intermediate_size) + (rows - steps[0]) * size * qkv
    head = len(batch.pair_index) * size * config.draft_vocab_size
    teacher = len(batch.teacher_rows) * config.target_hidden_size * config.draft_vocab_size
    return 6 * (once + each + head) + 2 * teacher
