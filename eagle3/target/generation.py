"""Answers of a transformers target to many prompts: one that ends leaves its place to the next.

transformers' `generate` pads a batch to its longest prompt, copies the cache at each token, and
computes finished texts on until the last has ended. Here a cache has room for what is to come,
position t of a text at slot t of its row.

B texts, W tokens of a pass, S slots, G heads of keys and d their size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

SIMILAR = 0.8  # of the longest prompt of a padded prefill
ROOM = 64  # slots that a cache grows by at least
AHEAD = 8  # batches of prompts that are taken ahead, to be sorted by length

Take = Callable[[], tuple[Any, list[int]] | None]


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
        self.keys = self.with_room(self.keys, keys)
        self.values = self.with_room(self.values, values)
        self.keys[rows[:, None], :, places] = keys.transpose(1, 2)
        self.values[rows[:, None], :, places] = values.transpose(1, 2)
        if self.cache.prefill:
            return keys, values
        return self.keys[: len(rows), :, :slots], self.values[: len(rows), :, :slots]

    def with_room(self, kept: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """`kept`, or a larger copy where it ends before the slots in use; `new` is like it."""
        if kept.numel() and kept.shape[2] >= self.cache.slots:
            return kept
        # Zeros, as NaN of memory never written would show through a mask.
        room = self.cache.slots * 5 // 4 + ROOM
        larger = new.new_zeros(self.cache.num_rows, new.shape[1], room, new.shape[3])
        if kept.numel():
            larger[:, :, : kept.shape[2]] = kept
        return larger

    def get_seq_length(self) -> int:
        # Asked for masks: those behind a prompt are made here, and a prompt has nothing before it.
        return 0

    def move(self, source: list[int], target: list[int]) -> None:
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]


class RowsCache(Cache):
    """Room for `num_rows` texts; a pass has tokens of `rows` int64 [B] at `places` int64 [B,W]."""

    def __init__(self, num_rows: int):
        super().__init__(layer_class_to_replicate=lambda: RowsLayer(self))
        self.num_rows, self.slots = num_rows, 0

    def begin(self, rows: torch.Tensor, places: torch.Tensor, slots: int, prefill: bool) -> None:
        """Say where the next pass writes, and how many slots are in use with it."""
        self.rows, self.places, self.slots, self.prefill = rows, places, slots, prefill


@dataclass
class Text:
    """A prompt and its answer so far, ids both."""

    key: Any
    prompt: list[int]
    ids: list[int] = field(default_factory=list)

    @cached_property
    def digest(self) -> str:
        return xxh3_64_hexdigest(str(self.prompt).encode())

    @property
    def cached(self) -> int:
        # The newest token is not in the cache yet.
        return len(self.prompt) + len(self.ids) - 1


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
            return logits.argmax(-1)
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

    def __init__(self, target: Any, size: int, sampler: Sampler, max_new_tokens: int):
        self.target, self.sampler, self.texts = target, sampler, []
        self.size, self.max_new_tokens = size, max_new_tokens
        self.cache, self.device = RowsCache(size), target.device

    def add(self, texts: list[Text]) -> None:
        """Process prompts, the longest first, and draw the first tokens of their answers."""
        left = texts
        while left:
            most = max(1, self.target.batch_tokens // len(left[0].prompt))
            similar = sum(len(t.prompt) >= SIMILAR * len(left[0].prompt) for t in left)
            some, left = left[: min(most, similar)], left[min(most, similar) :]
            prompts = [torch.tensor(text.prompt) for text in some]
            ids = pad_sequence(prompts, batch_first=True).to(self.device)
            rows = torch.arange(len(some), device=self.device) + len(self.texts)
            places = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
            self.cache.begin(rows, places, ids.shape[1], prefill=True)
            last = self.target.states(ids, places, self.cache)[1]
            ends = ids.new_tensor([len(text.prompt) - 1 for text in some])
            self.texts += some
            self.draw(some, last[rows - rows[0], ends])

    def draw(self, texts: list[Text], last: torch.Tensor) -> None:
        """Add a token to each of these, from their last hidden states [B,H]."""
        drawn = self.sampler(self.target.lm_head(last), texts)
        for text, token in zip(texts, drawn.tolist(), strict=True):
            text.ids.append(token)

    def next_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Process the newest token of each text; `states` of [B,1] tokens."""
        newest = torch.tensor([[text.ids[-1]] for text in self.texts], device=self.device)
        places = newest.new_tensor([[text.cached] for text in self.texts])
        slots = max(text.cached for text in self.texts) + 1
        rows = torch.arange(len(self.texts), device=self.device)
        self.cache.begin(rows, places, slots, prefill=False)
        visible = (torch.arange(slots, device=self.device) <= places)[:, None]
        return self.target.states(newest, places, self.cache, visible=visible)

    def remove_finished(self) -> list[Text]:
        """The texts that have ended, of which the last ones of the others take the rows."""
        ends, most = self.target.eos_token_ids, self.max_new_tokens
        over = [text.ids[-1] in ends or len(text.ids) >= most for text in self.texts]
        count = over.count(False)
        gaps = [row for row in range(count) if over[row]]
        late = [row for row in range(count, len(over)) if not over[row]]
        finished = [text for text, ended in zip(self.texts, over, strict=True) if ended]
        for row, source in zip(gaps, late, strict=True):
            self.texts[row] = self.texts[source]
        del self.texts[count:]
        for layer in self.cache.layers if gaps else ():
            layer.move(late, gaps)
        return finished


@torch.inference_mode()
def answer(batch: TextBatch, take: Take, count: Callable[[int], Any]) -> Iterator[tuple]:
    """(key, answer) as answers end. `take` is asked for a (key, prompt) while there is room, and
    again after answers were handed out; `count` hears how many tokens each pass brought.
    """
    waiting: list[Text] = []
    while True:
        if not waiting:  # only then, or ever new long ones would always be before the short ones
            ahead = iter(take, None)
            waiting = [Text(*taken) for taken in islice(ahead, AHEAD * batch.size)]
            # Neighbours in length share a batch: each text reads as many slots as the longest has.
            waiting.sort(key=lambda text: len(text.prompt))
        new = [waiting.pop() for _ in range(min(len(waiting), batch.size - len(batch.texts)))]
        batch.add(new)
        if not batch.texts:
            return
        if not new:
            batch.draw(batch.texts, batch.next_states()[1][:, 0])
        count(len(new or batch.texts))
        for text in batch.remove_finished():
            yield text.key, text.ids
