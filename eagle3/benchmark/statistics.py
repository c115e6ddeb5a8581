"""From answers to acceptance, speed and equality, with intervals by R resamples of P prompts."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from eagle3.benchmark.suites import Question
from eagle3.engines.engine import Answer
from eagle3.evaluate import acceptance_length, ratio, summarise

RESAMPLES = 2000


@dataclass
class Trial:
    """One question under one config: prompt and answer of every turn, and the seconds in all."""

    question: Question
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Those of decoding: the first of every answer belongs to the prompt."""
        return sum(len(answer.ids) - 1 for answer in self.answers)

    @property
    def ids(self) -> list[list[int]]:
        return [answer.ids for answer in self.answers]


def acceptance(trials: list[Trial], steps: int, seed: int) -> dict:
    """Acceptance length in all its forms; None where no round was needed or none is reported."""
    counts = [(trial.tokens, sum(answer.rounds for answer in trial.answers)) for trial in trials]
    facts = summarise([answer for trial in trials for answer in trial.answers], steps)
    return facts | {"interval95": interval95(counts, torch.div, seed)}


def by_prompt_length(trials: list[Trial]) -> list[dict]:
    """Acceptance behind prompts of about so many tokens, to the nearest power of two."""
    groups = defaultdict(list)
    for trial in trials:
        for prompt, answer in zip(trial.prompts, trial.answers, strict=True):
            if answer.rounds:
                groups[2 ** round(math.log2(len(prompt)))].append(answer)
    return [
        {"prompt_tokens": size, "answers": len(some), "acceptance_length": acceptance_length(some)}
        | {"rounds": sum(answer.rounds for answer in some)}
        for size, some in sorted(groups.items())
    ]


def speed(drafted: list[Trial], baseline: list[Trial], seed: int) -> dict:
    """Tokens per second with the draft and without it, each question with itself."""
    pairs = zip(drafted, baseline, strict=True)
    counts = [(one.tokens, one.seconds, other.tokens, other.seconds) for one, other in pairs]
    # Ratios of sums: a mean of ratios would count a short answer as much as a long one.
    tokens, seconds, base_tokens, base_seconds = map(sum, zip(*counts, strict=True))
    with_draft, without = ratio(tokens, seconds), ratio(base_tokens, base_seconds)
    return {
        "tokens_per_second": with_draft,
        "baseline_tokens_per_second": without,
        "speedup": ratio(with_draft, without),
        "speedup_interval95": interval95(counts, lambda a, b, c, d: a / b * d / c, seed),
    }


def equality(drafted: list[Trial], baseline: list[Trial]) -> dict:
    """`lossless`: all answers are those of the target alone, token for token; and their share."""
    same = [one.ids == other.ids for one, other in zip(drafted, baseline, strict=True)]
    return {"lossless": all(same), "equal_answers": sum(same) / len(same)}


def interval95(counts: list[tuple[float, ...]], statistic: Callable, seed: int) -> list | None:
    """Bootstrap over P questions: `statistic` takes each column of `counts`, summed to [R]."""
    if len(counts) < 2:  # one says nothing of others
        return None
    columns = torch.tensor(counts, dtype=torch.float64).T
    generator = torch.Generator().manual_seed(seed)
    # Turns and tokens of one question depend on each other, so questions are drawn as a whole.
    picked = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator)
    values = statistic(*(column[picked].sum(1) for column in columns))
    values = values[values.isfinite()]  # a resample may hold no round at all
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return values.quantile(ends).tolist() if len(values) else None
