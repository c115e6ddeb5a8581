"""Test-only: the CPU operators that SGLang 0.5.23 asks of its kernel package, in plain torch.

The published wheel of that package is CUDA only. Written from SGLang's call sites, with only what
Llama, Qwen3 and Qwen3-MoE call in prefill, decode and EAGLE3 speculation; everything else is
absent, so that a use of it fails loudly. `convert_weight_packed` is absent on purpose: SGLang then
takes its own plain-torch paths for norms, RoPE, linear layers and experts, on every CPU. Batches
are loops here, because clarity matters and speed does not.

Shapes: B requests, N tree nodes a request (the last committed token and the drafts after it), H
heads, D head dim, S cache slots. `req_to_token` [requests, positions] int32 holds the cache slot of
every position of every request.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__version__ = "0.0.0+standin"
LIBRARY = torch.library.Library("sgl_kernel", "DEF")
LIBRARY.define(
    "extend_attention_cpu(Tensor q, Tensor? k, Tensor? v, Tensor(a!) o, Tensor k_cache, "
    "Tensor v_cache, float k_scale, float v_scale, Tensor req_to_token, Tensor requests, "
    "Tensor lengths, Tensor extends, Tensor starts, int longest, float scaling, float cap, "
    "bool cross, int window, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask, "
    "bool causal) -> ()"
)
LIBRARY.define(
    "decode_attention_cpu(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, float k_scale, "
    "float v_scale, Tensor(c!) o, Tensor? k, Tensor? v, Tensor slots, Tensor(d!) partial, "
    "Tensor req_to_token, Tensor requests, Tensor lengths, float scaling, float cap, bool cross, "
    "int window, Tensor? encoder_lens, Tensor? sinks) -> ()"
)


def refuse(cap: float, cross: bool, window: int, sinks: Tensor | None) -> None:
    if cap or cross or window > 0 or sinks is not None:
        raise NotImplementedError(
            "the test stand-in has no logit cap, cross attention, sliding window or sinks"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """q [n, H, D] on k, v [m, kv heads, D], mask bool [n, m] or None -> [n, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)[
        0
    ].transpose(0, 1)


def extend_attention(
    q, k, v, o, k_cache, v_cache, k_scale, v_scale, req_to_token, requests, lengths, extends,
    starts, longest, scaling, cap, cross, window, encoder_lens, sinks, tree_mask, causal,
):  # fmt: skip
    """New tokens q [T, H, D] see the cached prefix and each other: causally, or by tree_mask bool
    (flat, B x N x N).
    """
    refuse(cap, cross, window, sinks)
    for b, (request, length, n, start) in enumerate(
        zip(requests.tolist(), lengths.tolist(), extends.tolist(), starts.tolist())
    ):
        slots = req_to_token[request, :length].long()
        new = slice(start, start + n)
        if tree_mask is not None:
            inner = tree_mask[b * n * n : (b + 1) * n * n].view(n, n).bool()
        else:
            inner = torch.ones(n, n, dtype=torch.bool)
            inner = inner.tril() if causal else inner
        mask = torch.cat([torch.ones(n, length - n, dtype=torch.bool), inner], dim=1)
        keys, values = k_cache[slots], v_cache[slots]
        if k is not None:
            keys[length - n :], values[length - n :] = (
                k[new].view_as(keys[:n]),
                v[new].view_as(values[:n]),
            )
        o[new] = attend(q[new], keys, values, mask, scaling)


def decode_attention(
    q, k_cache, v_cache, k_scale, v_scale, o, k, v, slots, partial, req_to_token, requests, lengths,
    scaling, cap, cross, window, encoder_lens, sinks,
):  # fmt: skip
    """One new token a row: its k, v go to cache slots `slots`, then q [B, H, D] sees `lengths`
    positions.
    """
    refuse(cap, cross, window, sinks)
    if k is not None:
        k_cache[slots.long()] = k.view(-1, *k_cache.shape[1:])
        v_cache[slots.long()] = v.view(-1, *v_cache.shape[1:])
    for b, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
        seen = req_to_token[request, :length].long()
        o[b : b + 1] = attend(q[b : b + 1], k_cache[seen], v_cache[seen], None, scaling)


LIBRARY.impl("extend_attention_cpu", extend_attention, "CPU")
LIBRARY.impl("decode_attention_cpu", decode_attention, "CPU")


def assign_req_to_token_pool_cpu(requests, req_to_token, begins, ends, slots, width) -> None:
    """Write the flat list `slots` into positions begins[b]..ends[b] of each request."""
    done = 0
    for request, begin, end in zip(requests.tolist(), begins.tolist(), ends.tolist()):
        req_to_token[request, begin:end] = slots[done : done + end - begin].to(req_to_token.dtype)
        done += end - begin


def assign_extend_cache_locs_cpu(requests, req_to_token, begins, ends, slots, width) -> None:
    """The reverse: gather positions begins[b]..ends[b] of each request into the flat `slots`."""
    done = 0
    for request, begin, end in zip(requests.tolist(), begins.tolist(), ends.tolist()):
        slots[done : done + end - begin] = req_to_token[request, begin:end].to(slots.dtype)
        done += end - begin


def assign_draft_cache_locs_contiguous_cpu(
    requests, req_to_token, lengths, slots, width, topk, columns
) -> None:
    """The topk x columns slots after each request's last position, into slots [B * topk *
    columns].
    """
    assign_extend_cache_locs_cpu(
        requests, req_to_token, lengths, lengths + topk * columns, slots, width
    )


def build_draft_decode_metadata_cpu(
    req_to_token, requests, lengths, topk, num_steps, width
) -> Tensor:
    """A row for each of B x topk branches: the request's prefix, then this branch's num_steps draft
    slots.
    """
    rows = torch.zeros(
        len(requests) * topk, int(lengths.max()) + num_steps, dtype=req_to_token.dtype
    )
    for b, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist())):
        for branch in range(topk):
            row, begin = rows[b * topk + branch], length + branch * num_steps
            row[:length] = req_to_token[request, :length]
            row[length : length + num_steps] = req_to_token[request, begin : begin + num_steps]
    return rows


def build_tree_kernel_efficient_cpu(
    parents,
    selected,
    lengths,
    tree_mask,
    positions,
    retrieve_index,
    next_token,
    next_sibling,
    topk,
    depth,
    nodes,
    mode,
) -> None:
    """Link the drafts that were kept into trees.

    selected [B, N-1]: index of each draft in the flattened list of all candidates, ascending;
    candidate c is child of candidate parents[b, c // topk], or of the root where c // topk is 0.
    Filled here: next_token and next_sibling [B, N] (first child, next child of the same parent, or
    -1), retrieve_index [B, N] (flat node numbers), positions [B * N], and tree_mask (flat, B x N x
    N): a node sees the root, its ancestors and itself. Equal scores may keep a child without its
    parent, which is then never reached.
    """
    if mode != 1:
        raise NotImplementedError("the test stand-in builds only the tree mask over the new tokens")
    masks = tree_mask[: len(lengths) * nodes * nodes].view(len(lengths), nodes, nodes)
    for b, length in enumerate(lengths.tolist()):
        kept = selected[b].tolist()
        wanted = [c // topk and int(parents[b, c // topk]) for c in kept]
        parent = [0] + [
            0 if c // topk == 0 else 1 + kept.index(p) if p in kept else None
            for c, p in zip(kept, wanted)
        ]
        retrieve_index[b] = torch.arange(b * nodes, (b + 1) * nodes)
        masks[b] = False
        masks[b, :, 0] = True
        for node in range(nodes - 1, 0, -1):
            if parent[node] is None:
                continue
            next_sibling[b, node] = next_token[b, parent[node]]
            next_token[b, parent[node]] = node
        for node in range(nodes):
            ancestor, steps = node, 0
            while ancestor:
                masks[b, node, ancestor] = True
                ancestor, steps = parent[ancestor], steps + 1
            positions[b * nodes + node] = length + steps


def verify_tree_greedy_cpu(
    predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token,
    retrive_next_sibling, target_predict,
) -> None:  # fmt: skip
    """Walk each tree along the target's own choices.

    target_predict [B, N] is the target's greedy token after each node. accept_index [B, depth] gets
    the flat numbers of the nodes on the path, accept_token_num [B] how many drafts were right,
    predicts [B * N] the target's token at each node of the path.
    """
    nodes = candidates.shape[1]
    for b in range(len(candidates)):
        node, right = 0, 0
        accept_index[b, 0] = b * nodes
        while True:
            wanted = target_predict[b, node]
            predicts[b * nodes + node] = wanted
            child = int(retrive_next_token[b, node])
            while child != -1 and candidates[b, child] != wanted:
                child = int(retrive_next_sibling[b, child])
            if child == -1 or right + 1 == accept_index.shape[1]:
                break
            node, right = child, right + 1
            accept_index[b, right] = b * nodes + node
        accept_token_num[b] = right


def fill_bonus_tokens_cpu(tokens, accepted, bonus, stride) -> None:
    """The last accepted token of each row of tokens [B, stride]; `accepted` counts it."""
    rows = torch.arange(len(accepted))
    bonus.copy_(tokens.reshape(-1)[rows * stride + accepted.long() - 1])


def fill_accept_out_cache_loc_cpu(accept_index, slots, accepted_slots) -> None:
    """Pack the slots of the accepted nodes (accept_index, -1 where nothing) to the front."""
    index = accept_index.reshape(-1)
    index = index[index != -1].long()
    accepted_slots[: len(index)] = slots[index].to(accepted_slots.dtype)


def copy_all_layer_kv_cache_cpu(pointers, strides, to, source) -> None:
    """Move cache rows `source` to rows `to` in every buffer, given by address and bytes a row; they
    may overlap.
    """
    for pointer, stride in zip(pointers.tolist(), strides.tolist()):
        rows = [ctypes.string_at(pointer + row * stride, stride) for row in source.tolist()]
        for row, content in zip(to.tolist(), rows):
            ctypes.memmove(pointer + row * stride, content, stride)


def rotate_input_ids_cpu(*_) -> None:
    raise NotImplementedError("the test stand-in has no multi-layer drafts")
