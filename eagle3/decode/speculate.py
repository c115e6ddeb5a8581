"""Reference speculative decoding: chains and trees, batches, greedy or sampled, always lossless.

A round: the draft proposes a tree behind the newest token (`drafter`), the target processes all of
it in one forward pass in which each token sees its ancestors, and the tokens that the target would
have generated itself are kept. Position t of a text lies at slot t of the target's cache; a tree
lies behind its text until the accepted tokens have moved together, a chain where it will stay.

B sequences, W tokens of a pass, A target layers side by side, H its hidden size, V and Vd
vocabularies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from eagle3.decode.drafter import DRAFTERS, DraftCache
from eagle3.decode.tree import Tree, chain
from eagle3.draft.model import Draft
from eagle3.target.generation import RowsCache


@dataclass
class Generation:
    """The answer to a prompt, up to the end of sequence or `max_new_tokens`, and what it took."""

    ids: list[int]  # the first of them from the prefill
    emitted: list[int] = field(default_factory=list)  # tokens that each round committed
    accepted: list[int] = field(default_factory=list)  # and how many of them were drafted
    decode_seconds: float = 0.0  # until this sequence ended


class Accepted(NamedTuple):
    """The first `counts[b]` tokens of `ids` int64 [B,n], and the nodes whose features predict them,
    `path` int64 [B,n], the root first; so the last token is the target's own.
    """

    ids: torch.Tensor
    path: torch.Tensor
    counts: list[int]


def accept_matching(tree: Tree, target_tokens: torch.Tensor) -> Accepted:
    """Go down the tree while the target's token behind a node, of [B,W], is one of its children."""
    matches = target_tokens.gather(1, tree.parents.expand_as(tree.ids)) == tree.ids
    matches[:, 0] = True
    accepted = (matches[:, None] | ~tree.mask).all(-1).long()  # with all of its ancestors
    # A stable sort by acceptance brings the accepted path to the front, root first.
    counts = accepted.sum(1).tolist()
    path = accepted.argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
    return Accepted(target_tokens.gather(1, path), path, counts)


class Sampling:
    """Tokens are distributed as the target's, whatever the draft proposes.

    At temperature 0 a draft is accepted where it is the target's argmax. Else a chain is drawn from
    the draft. Draft d is accepted with probability min(1, p(d) / q(d)); the first rejected one is
    replaced by a sample of max(p - q, 0), normalised (Leviathan et al., arXiv 2211.17192). In a
    tree the target draws a token behind each node, and where that is a child, it is accepted.
    """

    def __init__(self, temperature: float = 0.0, generator: torch.Generator | None = None):
        self.temperature, self.generator = temperature, generator

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """[..,V] -> [..,V], at least fp32."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return (logits.to(wide) / self.temperature).softmax(-1)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """[..,V] -> int64 [..]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        flat = self.probabilities(logits).flatten(0, -2)
        return torch.multinomial(flat, 1, generator=self.generator).view(logits.shape[:-1])

    def verify(self, tree: Tree, logits: torch.Tensor, target_ids: torch.Tensor) -> Accepted:
        """Judge a tree by the target's logits [B,W,V] behind its nodes."""
        if self.temperature == 0 or not tree.logits:  # a tree, or a root alone
            return accept_matching(tree, self.draw(logits))
        p = self.probabilities(logits)
        # The last row of q stays 0: behind the last draft, max(p - q, 0) is p.
        q = torch.zeros_like(p)
        q[:, :-1, target_ids] = self.probabilities(torch.stack(tree.logits, dim=1))
        drafted, row = tree.ids[:, 1:], torch.arange(len(p), device=p.device)
        p_drafted, q_drafted = (x[:, :-1].gather(2, drafted[..., None])[..., 0] for x in (p, q))
        uniform = torch.empty_like(p_drafted).uniform_(generator=self.generator)
        accepted = (uniform * q_drafted < p_drafted).cumprod(1).sum(1)
        p, residual = p[row, accepted], (p - q)[row, accepted].clamp_(min=0)
        # Where p = q, rounding may leave nothing of the residual.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
        replacement = torch.multinomial(residual, 1, generator=self.generator)
        counts = (accepted + 1).tolist()
        ids = torch.cat([drafted, replacement], dim=1)[:, : max(counts)]
        ids[row, accepted] = replacement[:, 0]
        return Accepted(ids, tree.depths[:, : max(counts)].expand_as(ids), counts)


def synchronized_time(device: torch.device) -> float:
    """Seconds, after all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class DecodingBatch:
    """Prompts and their answers in the caches of the target and, where there is one, the drafter:
    `rows`, those not finished, and `newest` int64 [B], their last tokens, which no cache has yet.
    """

    def __init__(self, target, prompts: list, max_new_tokens: int, rule: Sampling, drafter):
        """Prefill both caches and draw the first tokens."""
        self.target, self.rule, self.drafter = target, rule, drafter
        self.max_new_tokens, self.device = max_new_tokens, target.embedding.device
        self.cache, self.lengths = RowsCache(len(prompts)), [len(prompt) for prompt in prompts]
        self.rows = list(range(len(prompts)))
        ids = pad_sequence(prompts, batch_first=True).to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        ends = ids.new_tensor(self.rows), ids.new_tensor(self.lengths) - 1
        self.cache.begin(ends[0], positions, ids.shape[1], prefill=True)
        aux, last = target.states(ids, positions, self.cache)
        self.newest = rule.draw(target.lm_head(last[ends]))
        if drafter is not None:
            # Row t reads token t + 1, so the last row of a prompt reads the first answer.
            following = ids.roll(-1, dims=1)
            following[ends] = self.newest
            drafter.append(aux, following, self.lengths)
        self.generations = [Generation([token]) for token in self.newest.tolist()]
        self.prefilled = synchronized_time(self.device)

    def advance(self) -> None:
        """A round: draft a tree, run the target over it and commit what it would have generated."""
        if self.drafter is None:
            tree, target_ids = chain(self.newest[:, None], []), None
        else:
            tree = self.drafter.propose(self.newest, self.rule)
            target_ids = self.drafter.target_ids
        batch, width = tree.ids.shape
        starts, slots = self.newest.new_tensor(self.lengths)[:, None], max(self.lengths) + width
        row, node = (torch.arange(count, device=self.device) for count in (batch, width))
        self.cache.begin(row, starts + node, slots, prefill=False)
        visible = None
        # A chain behind texts of one length is causal by itself.
        if tree.logits is None or len({*self.lengths}) > 1:
            text = torch.arange(slots, device=self.device) < starts
            own = (starts + node)[:, None].expand(-1, width, -1)
            visible = text[:, None].repeat(1, width, 1)
            visible.scatter_(2, own, tree.mask.expand(batch, -1, -1))
        positions = starts + tree.depths
        aux, last = self.target.states(tree.ids, positions, self.cache, visible=visible)
        accepted = self.rule.verify(tree, self.target.lm_head(last), target_ids)
        ids, path, counts = accepted
        if tree.logits is None:
            of_each = row[:, None], slice(None)
            moved = starts + node[: path.shape[1]]
            self.cache.copy((*of_each, starts + path), (*of_each, moved))
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.record(accepted)
        if self.drafter is not None:
            self.drafter.append(aux[row[:, None], path], ids, counts)
        self.newest = ids[row, row.new_tensor(counts) - 1]

    def record(self, accepted: Accepted) -> None:
        """Add a round's tokens to the answers, up to their end."""
        for i, ids, count in zip(self.rows, accepted.ids.tolist(), accepted.counts, strict=True):
            generation = self.generations[i]
            kept = ids[: min(count, self.max_new_tokens - len(generation.ids))]
            ends = (n for n, token in enumerate(kept) if token in self.target.eos_token_ids)
            del kept[next(ends, len(kept)) + 1 :]
            generation.ids += kept
            generation.emitted.append(len(kept))
            generation.accepted.append(min(len(kept), count - 1))

    def drop_finished(self) -> bool:
        """Remove the texts that have ended from both caches; returns whether any goes on."""
        answers, eos = [self.generations[i] for i in self.rows], self.target.eos_token_ids
        goes_on = [len(a.ids) < self.max_new_tokens and a.ids[-1] not in eos for a in answers]
        unfinished = [row for row, more in enumerate(goes_on) if more]
        if len(unfinished) == len(answers):
            return True
        # Timed when one ends only, for each measurement waits for the device.
        seconds = synchronized_time(self.device) - self.prefilled
        for answer in answers:  # of those that go on, a later time takes its place
            answer.decode_seconds = seconds
        self.rows = [self.rows[row] for row in unfinished]
        self.lengths = [self.lengths[row] for row in unfinished]
        if unfinished:
            self.newest = self.newest[unfinished]
            self.cache.copy(unfinished, slice(len(unfinished)))
            if self.drafter is not None:
                self.drafter.select(unfinished)
        return bool(unfinished)


@torch.inference_mode()
def generate(
    target, prompts: list[torch.Tensor], max_new_tokens: int, rule: Sampling | None = None,
    drafter: DraftCache | None = None, count: Callable[[int], Any] = int,
) -> list[Generation]:  # fmt: skip
    """Answer a batch of prompts, int64 [n] each, greedily by default, with a drafter's tree in each
    forward pass; without one, a token per pass: what speculation must equal and beat. `count` hears
    how many tokens each pass brought.
    """
    batch = DecodingBatch(target, prompts, max_new_tokens, rule or Sampling(), drafter)
    count(len(prompts))
    while batch.drop_finished():
        batch.advance()
        count(sum(batch.generations[row].emitted[-1] for row in batch.rows))
    return batch.generations


def speculate(
    target, draft: Draft, prompts: list[torch.Tensor], steps: int, topk: int, verify_tokens: int,
    max_new_tokens: int, rule: Sampling | None = None,
) -> list[Generation]:  # fmt: skip
    """`generate` with a draft and the trees that `tree` describes. Raises ConfigError."""
    tree = steps, topk, verify_tokens
    drafter = DRAFTERS[type(draft)](draft, target, prompts, max_new_tokens, tree)
    return generate(target, prompts, max_new_tokens, rule, drafter)
