"""Answers of a transformers target to many prompts: one that ends leaves its place to the next.

transformers' `generate` pads a batch to its longest prompt, copies the cache at each token, and
computes finished texts on until the last has ended. Here a cache has room for what is to come,
position t of a text at slot t of its row.

B texts, W tokens of a pass, S slots, G heads of keys and d their size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

SIMILAR = 0.8  # of the longest text of a padded pass
ROOM = 64  # slots that a cache grows by at least
AHEAD = 8  # batches of prompts that are taken ahead, to be sorted by length

Take = Callable[[], tuple[Any, list[int]] | None]


def similar(lengths: Sequence[int]) -> int:
    """How many texts of these lengths, the longest first, may be padded to the first one's."""
    return sum(length >= SIMILAR * lengths[0] for length in lengths)


class RowsLayer(DynamicLayer):
    """Keys and values [B,G,S,d] of a layer, with room for more tokens."""

    def __init__(self, cache: "RowsCache"):
        super().__init__()
        self.cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple:
        """Write at the cache's rows and places; returns what the new tokens may see: a prompt
        itself, and behind it all slots that are in use.
        """
        rows, places, slots = self.cache.rows, self.cache.places, self.cache.slots
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:0, :, :0], values[:0, :, :0]
        if slots > (room := self.keys.shape[2]):
            # Zeros, as NaN of memory never written would show through a mask.
            rows_left = self.cache.num_rows - len(self.keys)
            more = (0, 0, 0, slots * 5 // 4 + ROOM - room, 0, 0, 0, rows_left)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[rows[:, None], :, places] = keys.transpose(1, 2)
        self.values[rows[:, None], :, places] = values.transpose(1, 2)
        if self.cache.prefill:
            return keys, values
        return self.keys[: len(rows), :, :slots], self.values[: len(rows), :, :slots]

    def get_seq_length(self) -> int:
        # Before the tokens of this pass: masks that transformers makes are of that size.
        return self.cache.slots - self.cache.places.shape[1]


class RowsCache(Cache):
    """Room for `num_rows` texts; a pass has tokens of `rows` int64 [B] at `places` int64 [B,W]."""

    def __init__(self, num_rows: int):
        super().__init__(layer_class_to_replicate=lambda: RowsLayer(self))
        self.num_rows = num_rows

    def begin(self, rows: torch.Tensor, places: torch.Tensor, slots: int, prefill: bool) -> None:
        """Say where the next pass writes, and how many slots are in use with it."""
        self.rows, self.places, self.slots, self.prefill = rows, places, slots, prefill

    def copy(self, source: Any, target: Any) -> None:
        """Copy what lies at one index of [rows,G,S,d] to another one."""
        for layer in self.layers:
            if layer.is_initialized:  # of a layer without attention it is not
                layer.keys[target] = layer.keys[source]
                layer.values[target] = layer.values[source]


@dataclass
class Text:
    """A prompt and its answer so far, ids both; one of `ends`, or `most` tokens, end it."""

    key: Any
    prompt: list[int]
    most: int = 1
    ends: AbstractSet[int] = frozenset()
    ids: list[int] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        return xxh3_64_hexdigest(str(self.prompt).encode())

    @property
    def ended(self) -> bool:
        return len(self.ids) >= self.most or not self.ends.isdisjoint(self.ids[-1:])


class Sampler:
    """Draws tokens from logits: the most likely ones, or what chance decides for each text.

    `sampling` has temperature, top_p, top_k (0: all tokens) and seed; None is greedy.
    """

    def __init__(self, sampling: dict[str, Any] | None):
        self.greedy = sampling is None
        self.sampling = {"top_p": 1.0, "top_k": 0, "seed": 0} | (sampling or {})

    def chance(self, text: Text) -> float:
        """In [0,1): the same for the same seed, prompt and place, whatever else is in the batch."""
        place = f"{self.sampling['seed']} {text.digest} {len(text.ids)}"
        return xxh3_64_intdigest(place.encode()) / 2**64

    def __call__(self, logits: torch.Tensor, texts: list[Text]) -> torch.Tensor:
        """[B,V] -> int64 [B]."""
        if self.greedy:
            return logits.max(-1).indices  # argmax is four times slower on a CPU in bf16
        logits, ids = logits.float() / self.sampling["temperature"], None
        top_p, top_k = self.sampling["top_p"], self.sampling["top_k"]
        if top_k or top_p < 1:
            # The most likely ones first, of which a part is left.
            logits, ids = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))
        below = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        total = below[:, -1:]
        if top_p < 1:  # as many as reach it
            total = below.gather(1, (below < top_p * total).sum(1, keepdim=True))
        numbers = below.new_tensor([[self.chance(text)] for text in texts])
        # 2**64 - 1 over 2**64 is 1.0 in a float, behind the last token.
        chosen = torch.searchsorted(below, numbers * total, right=True)
        chosen = chosen.clamp_(max=logits.shape[1] - 1)
        return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


class TextBatch:
    """Texts that are answered side by side; text i has row i of the cache."""

    def __init__(self, target: Any, size: int, sampler: Sampler):
        self.target, self.sampler, self.size, self.texts = target, sampler, size, []
        self.cache, self.device = RowsCache(size), target.device

    def add(self, texts: list[Text]) -> None:
        """Process prompts, the longest first, and draw the first tokens of their answers."""
        while texts:
            lengths = [len(text.prompt) for text in texts]
            size = min(similar(lengths), max(1, self.target.batch_tokens // lengths[0]))
            some, texts = texts[:size], texts[size:]
            prompts = [torch.tensor(text.prompt) for text in some]
            ids = pad_sequence(prompts, batch_first=True).to(self.device)
            row = torch.arange(size, device=self.device)
            places = torch.arange(lengths[0], device=self.device).expand_as(ids)
            self.cache.begin(row + len(self.texts), places, lengths[0], prefill=True)
            last = self.target.states(ids, places, self.cache)[1]
            self.texts += some
            self.draw(some, last[row, ids.new_tensor(lengths[:size]) - 1])

    def draw(self, texts: list[Text], last: torch.Tensor) -> None:
        """Add a token to each of these, from their last hidden states [B,H]."""
        drawn = self.sampler(self.target.lm_head(last), texts)
        for text, token in zip(texts, drawn.tolist(), strict=True):
            text.ids.append(token)

    def advance(self) -> None:
        """Process the newest token of each text and draw the next."""
        newest = torch.tensor([[text.ids[-1]] for text in self.texts], device=self.device)
        slots = [len(text.prompt) + len(text.ids) for text in self.texts]
        places = newest.new_tensor(slots)[:, None] - 1
        rows = torch.arange(len(self.texts), device=self.device)
        self.cache.begin(rows, places, max(slots), prefill=False)
        visible = (torch.arange(max(slots), device=self.device) <= places)[:, None]
        last = self.target.states(newest, places, self.cache, visible=visible)[1]
        self.draw(self.texts, last[:, 0])

    def remove_finished(self) -> list[Text]:
        """The texts that have ended, of which the last ones of the others take the rows."""
        texts = self.texts
        finished = [text for text in texts if text.ended]
        count = len(texts) - len(finished)
        gaps = [row for row in range(count) if texts[row].ended]
        late = [row for row in range(count, len(texts)) if not texts[row].ended]
        for gap, row in zip(gaps, late, strict=True):
            texts[gap] = texts[row]
        del texts[count:]
        if gaps:
            self.cache.copy(late, gaps)
        return finished


def answer(
    batch: TextBatch, take: Callable[[], Text | None], count: Callable[[int], Any]
) -> Iterator[Text]:
    """Texts as their answers end. `take` is asked for one while there is room, and again after
    texts were handed out; `count` hears how many tokens each pass brought.
    """
    waiting: list[Text] = []
    while True:
        if not waiting:  # only then, or ever new long ones would always be before the short ones
            waiting = list(islice(iter(take, None), AHEAD * batch.size))
            # Neighbours in length share a batch: each text reads as many slots as the longest has.
            waiting.sort(key=lambda text: len(text.prompt))
        new = [waiting.pop() for _ in range(min(len(waiting), batch.size - len(batch.texts)))]
        batch.add(new)
        if not batch.texts:
            return
        if not new:
            batch.advance()
        count(len(new or batch.texts))
        yield from batch.remove_finished()


def answer_padded(
    target: Any, texts: list[Text], sampler: Sampler, count: Callable[[int], Any]
) -> None:
    """Answer by transformers' `generate`, which ends when the last text does."""

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        chosen = sampler(logits, texts)
        count(sum(not text.ended for text in texts))
        for text, token in zip(texts, chosen.tolist(), strict=True):
            if not text.ended:
                text.ids.append(token)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0)

    options = {"max_new_tokens": max(text.most for text in texts), "logits_processor": [choose]}
    options["eos_token_id"] = sorted(target.eos_token_ids) or None
    target.generate_padded([text.prompt for text in texts], **options)
