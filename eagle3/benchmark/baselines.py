"""What drafting is worth without a model: two cheap drafts, walked over a known greedy answer."""

from collections.abc import Callable, Iterable
from itertools import takewhile

import torch

Drafts = Callable[[list[int], int], list[int]]


def bigram_table(conversations: Iterable[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """int64 [V]: each token's most frequent successor (the smallest id of these), -1 for none."""
    pairs = torch.cat([ids[:-1].long() * vocab_size + ids[1:] for ids in conversations])
    pairs, counts = pairs.unique(return_counts=True)
    first, second = pairs // vocab_size, pairs % vocab_size
    # One number that orders by count, and of equal counts puts the smaller id first.
    rank = counts * vocab_size + (vocab_size - 1 - second)
    best = torch.full((vocab_size,), -1).scatter_reduce(0, first, rank, "amax")
    return torch.where(best < 0, -1, vocab_size - 1 - best % vocab_size)


def bigram(successors: list[int], text: list[int], draft_length: int) -> list[int]:
    """A chain of most frequent successors, ended by a token that has none."""
    drafted = []
    token = successors[text[-1]]
    while token >= 0 and len(drafted) < draft_length:
        drafted.append(token)
        token = successors[token]
    return drafted


def prompt_lookup(text: list[int], draft_length: int) -> list[int]:
    """What followed the latest earlier occurrence of the longest n-gram, 3 to 1, at the end."""
    for length in (3, 2, 1):
        for end in range(len(text) - 1, length - 1, -1):
            # Most places fail at the first token, which is cheaper than a slice.
            if text[end - 1] == text[-1] and text[end - length : end] == text[-length:]:
                return text[end : end + draft_length]
    return []


def acceptance_of(drafts_at: Drafts, prompt: list[int], answer: list[int], steps: int) -> list[int]:
    """Tokens that each round commits if `drafts_at(text, steps)` drafts for a greedy target.

    As in `eagle3.decode.speculate` the first token of the answer comes from the prefill.
    """
    text, left, emitted = prompt + answer[:1], answer[1:], []
    while left:
        drafted = drafts_at(text, steps)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(drafted, left, strict=False))
        # A round commits one more, the target's own; the last one what is left.
        emitted.append(min(len(list(same)) + 1, len(left)))
        text, left = text + left[: emitted[-1]], left[emitted[-1] :]
    return emitted
