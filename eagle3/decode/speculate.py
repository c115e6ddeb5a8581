"""Reference speculative decoding: chains and trees of drafts, batches of prompts, greedy or
sampled, lossless always.

A round: the draft grows a tree behind the newest token (`drafter`), the target reads all of it in
one forward pass in which each token sees its ancestors, and the tokens that the target would have
said itself are kept. Position t of a text lies at slot t of the target's cache; what is read in a
round lies behind the longest text until the accepted tokens have moved to the end of theirs.

B sequences, W tokens of a verification pass, the root included, L chain length, V and Vd
vocabularies, H hidden size.
"""

import time
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from eagle3.decode.drafter import Drafter
from eagle3.decode.tree import Tree, check_tree
from eagle3.draft.model import Draft


@dataclass
class Generation:
    """`ids`: new tokens, the first of them from the prefill.

    `emitted` and `accepted`: per verification round the tokens it committed and how many of them
    were drafted; what lies behind an end of sequence or `max_new_tokens` is neither.
    `prefill_seconds` covers the prompts of the whole batch through the target and the draft,
    `decode_seconds` the rounds until this sequence ended.
    """

    ids: list[int]
    emitted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification round; nan where no round was needed."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else float("nan")


@dataclass
class Verdict:
    """Per sequence the first `counts[b]` of `ids` int64 [B,n] are committed; their rows are those
    of the nodes `path` int64 [B,n] of the tree, the root first.
    """

    ids: torch.Tensor
    path: torch.Tensor
    counts: list[int]


def follow(tree: Tree, own: torch.Tensor) -> Verdict:
    """Go down the tree as long as the token that the target says behind a node, `own` int64 [B,W],
    is its child.
    """
    if tree.sees is None:
        counts = (1 + (own[:, :-1] == tree.ids[:, 1:]).cumprod(1).sum(1)).tolist()
        path = tree.depths[:, : max(counts)].expand(len(own), -1)
        return Verdict(own[:, : max(counts)], path, counts)
    said = own.gather(1, tree.parents) == tree.ids
    said[:, 0] = True
    accepted = (said[:, None] | ~tree.sees).all(-1).long()
    counts = accepted.sum(1).tolist()
    path = accepted.argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
    return Verdict(own.gather(1, path), path, counts)


class Greedy:
    """Temperature 0: a draft is accepted where it is the target's argmax."""

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """[..,V] -> int64 [..]."""
        return logits.argmax(-1)

    def verify(self, tree: Tree, logits: torch.Tensor, target_ids: torch.Tensor) -> Verdict:
        """The target's logits [B,W,V] of the nodes decide."""
        return follow(tree, self.draw(logits))


class Sample:
    """Tokens are distributed as the target's, whatever the draft proposes.

    A chain is drawn from the draft. Draft d is accepted with probability min(1, p(d) / q(d)); the
    first rejected one is replaced by a sample of max(p - q, 0), normalised (Leviathan et al., arXiv
    2211.17192). The nodes of a tree are not drawn, but likely: the target draws a token behind
    each, and where that is a child, the child is accepted.
    """

    def __init__(self, temperature: float, generator: torch.Generator | None):
        self.temperature, self.generator = temperature, generator

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """[..,V] -> [..,V], at least fp32."""
        return (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        ).softmax(-1)

    def choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        flat = probabilities.flatten(0, -2)
        return torch.multinomial(flat, 1, generator=self.generator).view(probabilities.shape[:-1])

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        return self.choose(self.probabilities(logits))

    def verify(self, tree: Tree, logits: torch.Tensor, target_ids: torch.Tensor) -> Verdict:
        if tree.sees is not None:
            return follow(tree, self.draw(logits))
        p = self.probabilities(logits)
        q = torch.zeros_like(p)  # its last row stays 0: behind the last draft, max(p - q, 0) is p
        q[:, :-1, target_ids] = self.probabilities(torch.stack(tree.logits, dim=1))
        drafted, row = tree.ids[:, 1:], torch.arange(len(p), device=p.device)
        p_drafted, q_drafted = (x[:, :-1].gather(2, drafted[..., None])[..., 0] for x in (p, q))
        luck = torch.rand(drafted.shape, dtype=p.dtype, device=p.device, generator=self.generator)
        accepted = (luck * q_drafted < p_drafted).cumprod(1).sum(1)
        p, residual = p[row, accepted], (p - q)[row, accepted].clamp_(min=0)
        # p = q up to rounding may leave nothing of the residual
        own = self.choose(torch.where(residual.sum(-1, keepdim=True) > 0, residual, p))
        counts = (accepted + 1).tolist()
        ids = torch.cat([drafted, own[:, None]], dim=1)[:, : max(counts)]
        ids[row, accepted] = own
        return Verdict(ids, tree.depths[:, : max(counts)].expand_as(ids), counts)


def clock(device: torch.device) -> float:
    """Seconds, after all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cut(ids: list[int], room: int, eos_token_ids: set[int]) -> list[int]:
    """At most `room` tokens, ending with the first end-of-sequence token."""
    ends = (i + 1 for i, token in enumerate(ids) if token in eos_token_ids)
    return ids[: min(room, next(ends, room))]


class Texts:
    """Prompts and their answers in the target's cache. `rows`: the prompts whose answers go on, the
    batch of now.
    """

    def __init__(
        self, target, prompts: list[torch.Tensor], max_new_tokens: int, verify_tokens: int = 1
    ):
        self.target, self.max_new_tokens, self.eos_token_ids = (
            target,
            max_new_tokens,
            target.eos_token_ids,
        )
        self.cache, self.lengths = DynamicCache(), [len(prompt) for prompt in prompts]
        self.device, self.rows = target.embedding.device, list(range(len(prompts)))
        slots = max(self.lengths) + max_new_tokens + verify_tokens
        self.places = torch.arange(
            max(slots, len(prompts)), device=self.device
        )  # slots, and rows of the batch
        self.started = clock(self.device)

    def prefill(self, prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """aux_hidden_states [B,n,A], and last_hidden_states [B,H] of each prompt's last token."""
        ids = pad_sequence(prompts, batch_first=True).to(self.device)
        aux, last = self.target.states(ids, self.places[: ids.shape[1]].expand_as(ids), self.cache)
        return aux, last[self.places[: len(ids)], self.places.new_tensor(self.lengths) - 1]

    def begin(self, newest: torch.Tensor) -> list[int] | None:
        """Take the first tokens, int64 [B], when the prefill is done; returns what `drop_ended`
        does.
        """
        self.generations = [Generation([token]) for token in newest.tolist()]
        self.prefilled = clock(self.device)
        for generation in self.generations:
            generation.prefill_seconds = self.prefilled - self.started
        return self.drop_ended()

    def read(self, ids: torch.Tensor, depths: torch.Tensor, sees: torch.Tensor | None):
        """The target's states of int64 [B,W] behind the texts, laid out as in `Tree`: [B,W,A] and
        [B,W,H].
        """
        width, longest, ends = (
            ids.shape[1],
            max(self.lengths),
            self.places.new_tensor(self.lengths)[:, None],
        )
        self.in_place, visible = sees is None and min(self.lengths) == longest, None
        if not self.in_place:
            if sees is None:
                sees = (self.places[:width, None] >= self.places[:width]).expand(len(ids), -1, -1)
            text = (self.places[:longest] < ends)[:, None].expand(-1, width, -1)
            visible = torch.cat([text, sees], dim=-1)
        return self.target.states(ids, ends + depths, self.cache, visible=visible)

    def commit(self, verdict: Verdict, width: int) -> None:
        """Of the `width` tokens just read keep what the verdict says."""
        longest = max(self.lengths)
        if not self.in_place:
            row, read = self.places[: len(self.rows), None], longest + verdict.path
            kept = self.places.new_tensor(self.lengths)[:, None] + self.places[: read.shape[1]]
            for layer in self.cache.layers:
                layer.keys[row, :, kept] = layer.keys[row, :, read]
                layer.values[row, :, kept] = layer.values[row, :, read]
        self.lengths = [
            length + count for length, count in zip(self.lengths, verdict.counts, strict=True)
        ]
        self.cache.crop(
            max(self.lengths) - longest - width
        )  # a negative number: how many to forget
        for i, ids, count in zip(self.rows, verdict.ids.tolist(), verdict.counts, strict=True):
            generation = self.generations[i]
            kept = cut(ids[:count], self.max_new_tokens - len(generation.ids), self.eos_token_ids)
            generation.ids += kept
            generation.emitted.append(len(kept))
            generation.accepted.append(min(len(kept), count - 1))

    def drop_ended(self) -> list[int] | None:
        """Forget the texts that have ended; returns which of the batch go on, None if all."""
        answers = [self.generations[i].ids for i in self.rows]
        going = [
            len(ids) < self.max_new_tokens and ids[-1] not in self.eos_token_ids for ids in answers
        ]
        if all(going):
            return None
        now, longest = clock(self.device), max(self.lengths)
        for i, goes in zip(self.rows, going, strict=True):
            if not goes:
                self.generations[i].decode_seconds = now - self.prefilled
        left = [row for row, goes in enumerate(going) if goes]
        self.rows, self.lengths = (
            [self.rows[row] for row in left],
            [self.lengths[row] for row in left],
        )
        if left:
            self.cache.batch_select_indices(self.places.new_tensor(left))
            self.cache.crop(max(self.lengths) - longest)
        return left


@torch.inference_mode()
def speculate(
    target,
    draft: Draft,
    prompts: list[torch.Tensor],
    steps: int,
    topk: int,
    verify_tokens: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """Answer a batch of prompts, int64 [n] each, with the trees that `tree` describes; raises
    ConfigError.

    Each round the target checks all drafts of all prompts in one forward pass; greedy ids equal
    those of `generate`.
    """
    check_tree(steps, topk, verify_tokens, draft.config.draft_vocab_size)
    rule = Sample(temperature, generator) if temperature else Greedy()
    texts = Texts(target, prompts, max_new_tokens, verify_tokens)
    max_length = max(texts.lengths) + max_new_tokens + steps
    drafter = Drafter(draft, target.embedding, len(prompts), max_length, steps, topk)
    aux, last = texts.prefill(prompts)
    newest = rule.draw(target.lm_head(last))
    following = [
        torch.cat([p[1:].to(texts.device), token[None]])
        for p, token in zip(prompts, newest, strict=True)
    ]
    drafter.read(aux, pad_sequence(following, batch_first=True), texts.lengths)
    left = texts.begin(newest)
    while texts.rows:
        if left:
            drafter.select(left)
            newest = newest[left]
        tree = drafter.grow(newest, verify_tokens, rule)
        aux, last = texts.read(tree.ids, tree.depths, tree.sees)
        verdict = rule.verify(tree, target.lm_head(last), drafter.target_ids)
        texts.commit(verdict, verify_tokens)
        row = texts.places[: len(newest), None]
        drafter.read(aux[row, verdict.path], verdict.ids, verdict.counts)
        newest = verdict.ids[row[:, 0], texts.places.new_tensor(verdict.counts) - 1]
        left = texts.drop_ended()
    return texts.generations


@torch.inference_mode()
def generate(
    target,
    prompts: list[torch.Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """The same answers without a draft, a token per forward pass: what `speculate` must equal and
    beat.
    """
    rule = Sample(temperature, generator) if temperature else Greedy()
    texts = Texts(target, prompts, max_new_tokens)
    _, last = texts.prefill(prompts)
    newest = rule.draw(target.lm_head(last))
    left = texts.begin(newest)
    root = newest.new_zeros(1, 1)
    while texts.rows:
        if left:
            newest = newest[left]
        _, last = texts.read(newest[:, None], root, None)
        newest = rule.draw(target.lm_head(last[:, 0]))
        texts.commit(Verdict(newest[:, None], root.expand(len(newest), 1), [1] * len(newest)), 1)
        left = texts.drop_ended()
    return texts.generations
