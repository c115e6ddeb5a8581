"""Drafts at serving time: their cache for a batch of texts, and the trees that they propose.

EAGLE3: position t of a text, once the target has processed it, owns row t: input (h^0_t,
E[x_{t+1}]), key and value at slot t, rotated by position t. A node of depth k behind the newest row
t is that row's step k: it reads its parent's output and its own token, is rotated by t + k, and
sees the rows of its text, its ancestors and itself. Keys of nodes lie behind the longest text and
last for one round; accepted tokens get rows from the target's features. This equals `ttt.unroll`.

DFlash, DSpark (`draft.block`): row t is key and value of c_t in every layer, and a round's block
lies behind the longest text. It has only the slots that the drafted tokens take, where the draft
was trained with more, as in vLLM 0.32 (1 + `num_speculative_tokens` of DFlash, without the 1 of
DSpark) and SGLang 0.5.23 (`speculative_num_draft_tokens`, `speculative_dspark_block_size`).

B sequences, n new rows, K topk, S slots, L layers, D hidden size, A layers of the target side by
side, H query and G key/value heads of size d, V and Vd vocabularies.
"""

import copy
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from eagle3.decode.tree import Candidates, Tree, chain, check_tree
from eagle3.draft.block import DFlash, DSpark
from eagle3.draft.model import EAGLE3, Draft
from eagle3.kernels.eager import Eager, rotate


class DraftCache:
    """A draft with room for prompts and answers, of a `tree`: steps, topk, verify_tokens."""

    @torch.inference_mode()
    def __init__(
        self, draft: Draft, target, prompts: list[torch.Tensor], max_new_tokens: int,
        tree: Sequence[int], num_layers: int = 1,
    ):  # fmt: skip
        """The target's `embedding` [V,D] has the dtype that is computed in. Raises ConfigError."""
        config, self.embedding = draft.config, target.embedding
        check_tree(*tree, config.draft_vocab_size, config.most_drafts)
        steps, topk, verify_tokens = tree
        self.steps, self.topk, self.verify_tokens = steps, topk, verify_tokens
        batch_size, max_length = len(prompts), max(map(len, prompts)) + max_new_tokens
        dtype, device = self.embedding.dtype, self.embedding.device
        if draft.fc.weight.dtype != dtype:
            # Once, where the layers would cast their weights at every call.
            draft = copy.deepcopy(draft).to(dtype)
        self.draft, self.target_ids = draft, draft.target_ids
        # Behind the texts come a round's nodes, which the next round overwrites.
        slots = max_length + steps + steps * topk + 1
        # The draft keeps the tables, and training could not use inference tensors.
        with torch.inference_mode(False):
            self.rotation = torch.stack(draft.rope(torch.arange(slots, device=device), slots))
        # Zeros, because what a mask hides must still be finite.
        shape = (2, num_layers, batch_size, config.num_key_value_heads, slots, config.head_dim)
        self.keys, self.values = map(list, self.embedding.new_zeros(shape))  # L of [B,G,S,d]
        self.numbers = torch.arange(max(slots, batch_size), device=device)
        self.lengths = [0] * batch_size

    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values [B*n,G,d] of a layer at slots [B or 1,n]."""
        row = self.numbers[: len(self.lengths), None]
        shape = (len(row), -1, *k.shape[1:])
        self.keys[layer][row, :, slots] = k.view(shape)
        self.values[layer][row, :, slots] = v.view(shape)

    def select(self, rows: list[int]) -> None:
        """Keep only these sequences of the batch."""
        self.keys, self.values = ([x[rows] for x in each] for each in (self.keys, self.values))
        self.lengths = [self.lengths[row] for row in rows]

    def attend(self, query: torch.Tensor, length: int, visible: torch.Tensor | None, layer=0):
        """Queries [B*n,H,d] over the first `length` slots, as far as bool [B,n,S] visible."""
        (_, heads, size), (batch, groups) = query.shape, self.keys[layer].shape[:2]
        # The heads of a group go in as query rows: keys need no copy for each head.
        query = query.view(batch, -1, heads, size).transpose(1, 2).reshape(batch, groups, -1, size)
        if visible is not None:
            visible = visible[:, None, :, :length].repeat(1, 1, heads // groups, 1)
        keys, values = (x[layer][:, :, :length] for x in (self.keys, self.values))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
        return attended.reshape(batch, heads, -1, size).transpose(1, 2).reshape(-1, heads, size)


class Drafter(DraftCache):
    """Of EAGLE3."""

    @torch.inference_mode()
    def __init__(self, draft: EAGLE3, *given):
        super().__init__(draft, *given)
        # One product where training has two: here the time is that of starting kernels.
        self.weights = self.draft.weights(Eager, self.embedding.dtype)
        self.qkv_weight = torch.cat([self.weights.embedded, self.weights.hidden], dim=1)

    def project(self, token_ids: torch.Tensor, hidden: torch.Tensor, rotation: torch.Tensor):
        """int64 [N], [N,D] and cosines and sines [2,N,1,d/2] -> q [N,H,d], k and v [N,G,d]."""
        layer, config = self.draft.midlayer, self.draft.config
        embedded = layer.input_layernorm(F.embedding(token_ids, self.embedding))
        qkv = F.linear(torch.cat([embedded, layer.hidden_norm(hidden)], dim=-1), self.qkv_weight)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qk, v = qkv.unflatten(-1, (-1, config.head_dim)).split((heads + kv_heads, kv_heads), dim=1)
        qk = rotate(qk, *rotation)
        return qk[:, :heads], qk[:, heads:], v

    def append(self, aux_hidden_states: torch.Tensor, next_ids: torch.Tensor, counts: list[int]):
        """Add rows: features [B,n,A] and the tokens behind them [B,n]; `counts[b]` are real."""
        batch, width = next_ids.shape
        first, count = self.numbers.new_tensor([self.lengths, counts])
        slots = first[:, None] + self.numbers[:width]
        aux = aux_hidden_states.to(self.embedding.dtype).flatten(0, 1)
        hidden = self.draft.fuse(aux, Eager, self.weights)
        q, k, v = self.project(next_ids.flatten(), hidden, self.rotation[:, slots.flatten()])
        # Rows that are not real are overwritten by the next ones, and hidden until then.
        self.store(0, slots, k, v)
        newest = self.numbers[:batch] * width + count - 1
        self.query, self.hidden = q[newest], hidden[newest]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.query, self.hidden = self.query[rows], self.hidden[rows]

    def propose(self, newest: torch.Tensor, rule) -> Tree:
        """Draft behind `newest` int64 [B], the tokens that the newest rows have read, without a
        host sync. A chain's drafts are what `rule` draws, a tree's the draft's likeliest.
        """
        batch, topk, longest = len(newest), self.topk, max(self.lengths)
        ends, row = self.numbers.new_tensor(self.lengths), self.numbers[:batch, None]
        node = self.numbers[:topk]
        positions = ends.repeat_interleave(topk)[:, None] + self.numbers[: self.steps]
        rotation = self.rotation[:, positions]
        hidden, query, visible = self.hidden, self.query, None
        if topk > 1 or batch > 1:  # a lone chain sees all slots before it
            visible = (self.numbers < ends[:, None])[:, None]
        candidates = Candidates(batch, topk, newest.device)
        tokens, drafted, logits = newest, [newest], []
        for step in range(self.steps):
            length = longest + step * topk
            if step > 0:
                slots = slice(length - topk, length)
                query, k, v = self.project(tokens, hidden, rotation[:, :, step - 1])
                self.keys[0][:, :, slots] = k.view(batch, topk, *k.shape[1:]).transpose(1, 2)
                self.values[0][:, :, slots] = v.view(batch, topk, *v.shape[1:]).transpose(1, 2)
            attended = self.attend(query, length, visible)
            hidden = self.draft.finish(hidden, attended, Eager, self.weights)
            logits.append(self.draft.logits(hidden, None))
            if topk == 1:
                tokens = self.target_ids[rule.draw(logits[-1])]
                drafted.append(tokens)
            else:
                ids, parents = candidates.extend(logits[-1].view(batch, -1, len(self.target_ids)))
                tokens = self.target_ids[ids].flatten()
                hidden = hidden.view(batch, -1, hidden.shape[1])[row, parents].flatten(0, 1)
                visible = visible[row, parents]  # a node sees what its parent sees, and itself
            if visible is not None:
                visible[:, node, length + node] = True
        if topk == 1:
            return chain(torch.stack(drafted, dim=1), logits)
        return candidates.tree(newest, self.target_ids, self.verify_tokens)


class BlockDrafter(DraftCache):
    """Of DFlash and DSpark, which speak with the target's head [V,D] and its whole vocabulary."""

    @torch.inference_mode()
    def __init__(self, draft: DFlash, target, *given):
        super().__init__(draft, target, *given, num_layers=len(draft.layers))
        self.head, self.size = target.head, draft.config.slots(self.steps)
        dtype, layers = self.embedding.dtype, self.draft.layers
        self.layers = [(layer, layer.weights(Eager, dtype)) for layer in layers]

    def append(self, aux_hidden_states: torch.Tensor, next_ids: torch.Tensor, counts: list[int]):
        """As `Drafter` does; these rows read no token."""
        config, dtype = self.draft.config, self.embedding.dtype
        slots = self.numbers.new_tensor(self.lengths)[:, None] + self.numbers[: next_ids.shape[1]]
        context = self.draft.context(aux_hidden_states.to(dtype).flatten(0, 1))
        rotation, heads = self.rotation[:, slots.flatten()], [config.num_key_value_heads] * 2
        queries = config.num_attention_heads * config.head_dim
        for number, (layer, weights) in enumerate(self.layers):
            projected = F.linear(context, weights.hidden[queries:])
            self.store(number, slots, *layer.heads(projected, heads, rotation))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def propose(self, newest: torch.Tensor, rule) -> Tree:
        """A chain behind `newest`: one pass, then what `rule` draws, left to right."""
        draft, config, longest = self.draft, self.draft.config, max(self.lengths)
        heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        ends, slots = self.numbers.new_tensor(self.lengths)[:, None], self.numbers[: self.size]
        rotation, visible = self.rotation[:, (ends + slots).flatten()], None
        if len(newest) > 1:
            visible = (self.numbers < ends) | (self.numbers >= longest)
            visible = visible[:, None].expand(-1, self.size, -1)
        hidden = draft.embed(newest, self.embedding, self.size)
        for number, (layer, weights) in enumerate(self.layers):
            projected = F.linear(layer.input_layernorm(hidden), weights.hidden)
            query, k, v = layer.heads(projected, heads, rotation)
            self.store(number, longest + slots, k, v)
            attended = self.attend(query, longest + self.size, visible, number)
            hidden = layer.finish(hidden, attended, Eager, weights)
        drafting = hidden.unflatten(0, (len(newest), -1))[:, config.drafts_from :]
        by_head = F.linear(draft.norm(drafting), self.head)
        drafted, logits = [newest], []
        for step in range(self.steps):
            logits.append(draft.chain_logits(by_head[:, step], drafted[-1]))
            drafted.append(rule.draw(logits[-1]))
        return chain(torch.stack(drafted, dim=1), logits)


DRAFTERS = {EAGLE3: Drafter, DFlash: BlockDrafter, DSpark: BlockDrafter}
