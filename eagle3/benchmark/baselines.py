"""What drafting is worth without a model: two cheap drafts, walked over a known greedy answer."""

from collections.abc import Callable, Iterable

import torch

NGRAM = 3


def bigram_table(conversations: Iterable[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """int64 [V]: the most frequent successor of each token in texts of ids [n], -1 if it has none.

    Of equally frequent successors the smallest id wins.
    """
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
    for length in range(NGRAM, 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            # Most places fail at the first token, which is cheaper than a slice.
            if text[end - 1] == text[-1] and text[end - length : end] == text[-length:]:
                return text[end : end + draft_length]
    return []


def acceptance_of(
    drafts_at: Callable[[list[int], int], list[int]],
    prompt_ids: list[int],
    answer_ids: list[int],
    draft_length: int,
) -> list[int]:
    """Tokens that each round commits if `drafts_at(text, draft_length)` drafts for a greedy target.

    Rounds are those of `eagle3.decode.speculate`: the first answer token comes from the prefill, a
    round commits the accepted drafts and one token of the target, the last round what is left of
    the answer.
    """
    text, emitted = prompt_ids + answer_ids[:1], []
    while left := answer_ids[len(text) - len(prompt_ids) :]:
        accepted = 0
        for drafted, wanted in zip(drafts_at(text, draft_length), left, strict=False):
            if drafted != wanted:
                break
            accepted += 1
        emitted.append(min(accepted + 1, len(left)))
        text = text + left[: emitted[-1]]
    return emitted
