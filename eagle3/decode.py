"""Reference speculative decoding: batch 1, a chain of drafts, greedy or sampled, lossless either way.

The draft keeps what serving engines keep. Position t of the text, once the target has processed it, owns row t:
input (fc(g_t), E[x_{t+1}]), key and value at slot t, rotated by position t. Drafts in flight are the newest row's
later steps: step k reads the previous un-normalised output and draft k, and its key takes slot t + k, rotated by
t + k. Slots therefore equal positions, and the rows of accepted tokens overwrite the drafts' slots. The result
equals `ttt.unroll`.

n new rows, D hidden size, H query and G key/value heads of size d, L draft length, V and Vd vocabularies.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from eagle3.draft.model import Draft
from eagle3.draft.rope import rotate


@dataclass
class Generation:
    """`ids`: new tokens, the first of them from the prefill.

    `emitted` and `accepted`: per verification round the tokens it committed and how many of them were drafted; what
    lies behind an end of sequence or `max_new_tokens` is neither. `prefill_seconds` covers the prompt through the
    target and the draft.
    """

    ids: list[int]
    emitted: list[int]
    accepted: list[int]
    prefill_seconds: float
    decode_seconds: float

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification round; nan where no round was needed."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else float("nan")


class Greedy:
    """Temperature 0: a draft is accepted where it is the target's argmax."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """[n,V] -> int64 [n]."""
        return scores.argmax(-1)

    def verify(self, drafted, draft_scores, target_scores, target_ids) -> torch.Tensor:
        """Drafts [L] and the target's scores [L+1,V] -> committed ids: accepted drafts and one of the target."""
        best = target_scores.argmax(-1)
        accepted = (best[:-1] == drafted).cumprod(0).sum()
        return best[: int(accepted) + 1]


class Sample:
    """Sampling by rejection: tokens are distributed as the target's, whatever the draft proposes.

    Draft d is accepted with probability min(1, p(d) / q(d)); the first rejected one is replaced by a sample of
    max(p - q, 0), normalised (Leviathan et al., arXiv 2211.17192).
    """

    def __init__(self, temperature: float, generator: torch.Generator | None):
        self.temperature, self.generator = temperature, generator

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[n,V] -> probabilities, at least fp32."""
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores, 1, generator=self.generator)[:, 0]

    def verify(self, drafted, draft_scores, target_scores, target_ids) -> torch.Tensor:
        """Drafts [L] with their q (L tensors [1,Vd]) against p [L+1,V] -> committed tokens."""
        p = target_scores
        q = torch.zeros_like(p)  # its last row stays 0: behind the last draft, max(p - q, 0) is p
        q[:-1, target_ids] = torch.cat(draft_scores)
        p_drafted, q_drafted = (x[:-1].gather(1, drafted[:, None])[:, 0] for x in (p, q))
        luck = torch.rand(len(drafted), dtype=p.dtype, device=p.device, generator=self.generator)
        accepted = int((luck * q_drafted < p_drafted).cumprod(0).sum())
        residual = (p[accepted] - q[accepted]).clamp_(min=0)
        # p = q up to rounding may leave nothing of the residual
        own = self.draw(torch.where(residual.sum() > 0, residual, p[accepted])[None])
        return torch.cat([drafted[:accepted], own])


class Drafter:
    """A draft with its keys and values for a text of at most `capacity` positions, drafts in flight included."""

    def __init__(self, draft: Draft, embedding: torch.Tensor, capacity: int):
        """`embedding` [V,D] is the target's; its dtype is the one computed in."""
        dtype, config = embedding.dtype, draft.config
        if draft.lm_head.weight.dtype != dtype:
            draft = copy.deepcopy(draft).to(dtype)  # once, where the layers would cast their weights at every call
        self.draft, self.embedding, self.target_ids = draft, embedding, draft.target_ids
        self.qkv_weight = torch.cat([draft.qkv_weight(0), draft.qkv_weight(1)], dim=1)
        with torch.inference_mode(False):  # the draft keeps the tables, and training could not use inference tensors
            self.cos, self.sin = draft.rope(torch.arange(capacity, device=embedding.device), capacity)
        kv_heads = config.num_key_value_heads
        self.keys, self.values = embedding.new_empty(2, 1, kv_heads, capacity, config.head_dim).unbind()
        self.length = 0

    def project(self, token_ids: torch.Tensor, hidden: torch.Tensor, first: int) -> torch.Tensor:
        """Fill n slots from `first`, given int64 [n] and hidden [n,D]; returns q [H,d] of the last row."""
        layer, config = self.draft.midlayer, self.draft.config
        embedded = layer.input_layernorm(F.embedding(token_ids, self.embedding))
        qkv = F.linear(torch.cat([embedded, layer.hidden_norm(hidden)], dim=-1), self.qkv_weight)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qk, v = qkv.unflatten(-1, (-1, config.head_dim)).split((heads + kv_heads, kv_heads), dim=1)
        here = slice(first, first + len(token_ids))
        qk = rotate(qk, self.cos[here], self.sin[here])
        self.keys[0, :, here] = qk[:, heads:].transpose(0, 1)
        self.values[0, :, here] = v.transpose(0, 1)
        return qk[-1, :heads]

    def read(self, aux_hidden_states: torch.Tensor, next_ids: torch.Tensor) -> None:
        """Add the rows of n positions that the target has processed: their features and the tokens behind them."""
        hidden = self.draft.fc(aux_hidden_states.to(self.embedding.dtype))
        self.query, self.hidden = self.project(next_ids, hidden, self.length), hidden[-1:]
        self.length += len(next_ids)

    def attend(self, query: torch.Tensor, length: int) -> torch.Tensor:
        """[H,d] over the first `length` slots -> [1,H,d]; the heads of a group go in as query rows."""
        grouped = query.reshape(1, self.keys.shape[1], -1, query.shape[-1])
        attended = F.scaled_dot_product_attention(grouped, self.keys[:, :, :length], self.values[:, :, :length])
        return attended.reshape(1, -1, query.shape[-1])

    def chain(self, draft_length: int, rule) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Draft behind the newest row: target ids int64 [L] and each step's scores [1,Vd], with no host sync."""
        query, hidden, drafted, scores = self.query, self.hidden, [], []
        for step in range(draft_length):
            if step > 0:
                query = self.project(drafted[-1], hidden, self.length + step - 1)
            hidden = self.draft.finish(hidden, self.attend(query, self.length + step))
            scores.append(rule.scores(self.draft.logits(hidden)))
            drafted.append(self.target_ids[rule.draw(scores[-1])])
        return torch.cat(drafted), scores


def clock(device: torch.device) -> float:
    """Seconds, after all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cut(ids: list[int], room: int, eos_token_ids: set[int]) -> list[int]:
    """At most `room` tokens, ending with the first end-of-sequence token."""
    ends = (i + 1 for i, token in enumerate(ids) if token in eos_token_ids)
    return ids[: min(room, next(ends, room))]


@torch.inference_mode()
def speculate(
    target,
    draft: Draft,
    input_ids: torch.Tensor,
    draft_length: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """Answer the prompt `input_ids` int64 [n] with chains of `draft_length` >= 1 drafts.

    Each round the target checks all drafts in one forward pass; greedy ids equal those of `generate`.
    """
    rule = Sample(temperature, generator) if temperature else Greedy()
    prompt, device = len(input_ids), input_ids.device
    positions = torch.arange(prompt + max_new_tokens + draft_length, device=device)
    drafter = Drafter(draft, target.embedding, len(positions))
    cache, eos = DynamicCache(), target.eos_token_ids

    start = clock(device)
    aux, last = target.states(input_ids, positions[:prompt], cache)
    newest = rule.draw(rule.scores(target.lm_head(last[-1:])))
    drafter.read(aux, torch.cat([input_ids[1:], newest]))
    ids, emitted, accepted = newest.tolist(), [], []
    prefilled = clock(device)
    while len(ids) < max_new_tokens and ids[-1] not in eos:
        drafted, draft_scores = drafter.chain(draft_length, rule)
        here = prompt + len(ids) - 1
        aux, last = target.states(torch.cat([newest, drafted]), positions[here : here + draft_length + 1], cache)
        scores = rule.scores(target.lm_head(last))
        committed = rule.verify(drafted, draft_scores, scores, drafter.target_ids)
        cache.crop(len(committed) - draft_length - 1)  # a negative number: how many to forget
        drafter.read(aux[: len(committed)], committed)
        newest = committed[-1:]
        kept = cut(committed.tolist(), max_new_tokens - len(ids), eos)
        ids += kept
        emitted.append(len(kept))
        accepted.append(min(len(kept), len(committed) - 1))
    return Generation(ids, emitted, accepted, prefilled - start, clock(device) - prefilled)


@torch.inference_mode()
def generate(
    target,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Generation:
    """The same answer without a draft, a token per forward pass: what `speculate` must equal and beat."""
    rule = Sample(temperature, generator) if temperature else Greedy()
    prompt, device = len(input_ids), input_ids.device
    positions = torch.arange(prompt + max_new_tokens, device=device)
    cache, eos = DynamicCache(), target.eos_token_ids

    start = clock(device)
    _, last = target.states(input_ids, positions[:prompt], cache)
    newest = rule.draw(rule.scores(target.lm_head(last[-1:])))
    ids = newest.tolist()
    prefilled = clock(device)
    while len(ids) < max_new_tokens and ids[-1] not in eos:
        here = prompt + len(ids) - 1
        _, last = target.states(newest, positions[here : here + 1], cache)
        newest = rule.draw(rule.scores(target.lm_head(last)))
        ids += newest.tolist()
    rounds = len(ids) - 1
    return Generation(ids, [1] * rounds, [0] * rounds, prefilled - start, clock(device) - prefilled)
