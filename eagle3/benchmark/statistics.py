"""From answers to acceptance, speed and equality, with intervals over prompts.

P questions of a suite, R resamples of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from eagle3.benchmark.suites import Question
from eagle3.engines.engine import Answer
from eagle3.evaluate import is_loop

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
    def rounds(self) -> int:
        return sum(answer.rounds for answer in self.answers)

    @property
    def ids(self) -> list[list[int]]:
        return [answer.ids for answer in self.answers]


def acceptance(trials: list[Trial], steps: int, seed: int) -> dict:
    """Acceptance length in all its forms; None where no round was needed or none is reported.

    `accepted_by_position`: share of rounds in which the draft at position 1..steps was accepted.
    """
    answers = [answer for trial in trials for answer in trial.answers]
    free = [answer for answer in answers if not is_loop(answer.ids)]
    first = [answer.emitted[0] for answer in answers if answer.emitted]
    by_position = [answer for answer in answers if answer.accepted_at is not None]
    tokens, rounds = totals([[trial.tokens, trial.rounds] for trial in trials])
    free_tokens = sum(len(answer.ids) - 1 for answer in free)

    def length(picked: torch.Tensor) -> torch.Tensor:
        return tokens[picked].sum(1) / rounds[picked].sum(1)

    def accepted_at(position: int) -> float | None:
        accepted = sum(answer.accepted_at[position] for answer in by_position)
        return ratio(accepted, sum(answer.rounds for answer in by_position))

    return {
        "acceptance_length": ratio(tokens.sum(), rounds.sum()),
        "interval95": interval95(length, len(trials), seed),
        "acceptance_length_loop_free": ratio(free_tokens, sum(answer.rounds for answer in free)),
        "loops": len(answers) - len(free),
        "first_round": ratio(sum(first), len(first)),
        "accepted_by_position": [accepted_at(position) for position in range(steps)],
    }


def speed(drafted: list[Trial], baseline: list[Trial], seed: int) -> dict:
    """Tokens per second with the draft and without it, each question with itself."""
    tokens, seconds = totals([[trial.tokens, trial.seconds] for trial in drafted])
    base_tokens, base_seconds = totals([[trial.tokens, trial.seconds] for trial in baseline])

    def speedup(picked: torch.Tensor) -> torch.Tensor:
        with_draft = tokens[picked].sum(1) / seconds[picked].sum(1)
        return with_draft * base_seconds[picked].sum(1) / base_tokens[picked].sum(1)

    with_draft = ratio(tokens.sum(), seconds.sum())
    without = ratio(base_tokens.sum(), base_seconds.sum())
    return {
        "tokens_per_second": with_draft,
        "baseline_tokens_per_second": without,
        "speedup": ratio(with_draft, without),
        "speedup_interval95": interval95(speedup, len(drafted), seed),
    }


def equality(drafted: list[Trial], baseline: list[Trial]) -> dict:
    """`lossless`: all answers are those of the target alone, token for token; and their share."""
    same = [one.ids == other.ids for one, other in zip(drafted, baseline, strict=True)]
    return {"lossless": all(same), "equal_answers": sum(same) / len(same)}


def totals(rows: list[list[float]]) -> torch.Tensor:
    """P rows of n numbers -> float64 [n,P]."""
    return torch.tensor(rows, dtype=torch.float64).T


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return float(numerator / denominator) if denominator and numerator is not None else None


def interval95(
    statistic: Callable[[torch.Tensor], torch.Tensor], questions: int, seed: int
) -> list[float] | None:
    """Bootstrap over questions: `statistic` of int64 [R,P], those of each resample, is [R]."""
    generator = torch.Generator().manual_seed(seed)
    # Turns and tokens of one question depend on each other, so questions are drawn as a whole.
    picked = torch.randint(questions, (RESAMPLES, questions), generator=generator)
    values = statistic(picked)
    values = values[values.isfinite()]  # a resample may hold no round at all
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return values.quantile(ends).tolist() if len(values) else None
