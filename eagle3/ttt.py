"""Training-time test: the draft unrolled on its own hidden states, only where a row is still needed.

T packed tokens, N_k rows needed at step k (nested: the first N_k of `batch.rows`), D hidden, A three layers of the
target, H query and G key/value heads of size d.
"""

import torch

from eagle3.data.packing import Batch
from eagle3.draft.attention import attend
from eagle3.draft.model import Draft, DraftConfig, linear
from eagle3.draft.rope import rotate


def unroll(draft: Draft, embedding: torch.Tensor, aux_hidden_states_TA: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Hidden states after the layer, un-normalised, of all steps one behind the other: [N_0 + N_1 + ..., D].

    `embedding` [V, D] is the target's, frozen; its dtype is the one computed in. Token id 0 stands for what follows
    the end of a document.
    """
    rows, length = batch.rows, len(batch.input_ids)
    input_ids = torch.cat([batch.input_ids, batch.input_ids.new_zeros(1)])
    tokens = draft.project_embeddings(embedding[input_ids])
    hidden_weight = draft.qkv_weight(1)
    query_size = draft.config.num_attention_heads * draft.config.head_dim

    def read_tokens(places: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return tokens[torch.where(places < ends, places, length)]

    hidden_TD = draft.fc(aux_hidden_states_TA.to(embedding.dtype))
    normed_TD = draft.midlayer.hidden_norm(hidden_TD)
    every_row = torch.arange(length, device=rows.device)
    keys_values = linear(normed_TD, hidden_weight[query_size:])
    keys_values = keys_values + read_tokens(every_row + 1, batch.document_ends)[:, query_size:]
    k0, v0 = keys_values.unflatten(-1, (-1, draft.config.head_dim)).chunk(2, dim=-2)
    k0, v0 = rotate(k0, *draft.rope(batch.position_ids, batch.max_length)), v0.contiguous()

    hidden, normed, later, outputs = hidden_TD[rows], normed_TD[rows], [], []
    ends, positions = batch.document_ends[rows], batch.position_ids[rows]
    for step, count in enumerate(batch.row_counts):
        if count == 0 and step > 0:  # step 0 always runs, so that every weight gets a gradient on every rank
            break
        embedded = read_tokens(rows[:count] + step + 1, ends[:count])
        cos, sin = draft.rope(positions[:count] + step, batch.max_length + step)
        if step == 0:
            q = linear(normed, hidden_weight[:query_size]) + embedded[:, :query_size]
            q = q.unflatten(-1, (-1, draft.config.head_dim))
        else:
            hidden = hidden[:count]
            normed = draft.midlayer.hidden_norm(hidden)
            q, k, v = draft.split_heads(linear(normed, hidden_weight) + embedded)
            later.append((rotate(k, cos, sin), v.contiguous()))  # a view would keep q, k and v for backward
        q = rotate(q, cos, sin)
        attended = attend(draft.attention, batch.documents, rows[:count], q, k0, v0, later)
        hidden = draft.finish(hidden, attended)
        outputs.append(hidden)
    return torch.cat(outputs)


def training_flops(config: DraftConfig, batch: Batch) -> int:
    """FLOPs of the products in a forward and backward pass of unroll and loss; attention, a few per cent, left out."""
    size, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    rows, length, steps = sum(batch.row_counts), len(batch.input_ids), batch.row_counts
    once = length * size * (3 * config.target_hidden_size + qkv + qkv - heads) + steps[0] * size * heads
    each = rows * size * (heads + 3 * config.intermediate_size) + (rows - steps[0]) * size * qkv
    head = len(batch.pair_index) * size * config.draft_vocab_size
    teacher = len(batch.teacher_rows) * config.target_hidden_size * config.draft_vocab_size
    return 6 * (once + each + head) + 2 * teacher
