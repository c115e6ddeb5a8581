"""What the answers of an engine come to: acceptance, speed, equality, each with its interval over
prompts.

P questions of a suite, R resamples of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from eagle3.benchmark.suites import Question
from eagle3.evaluate import is_loop

RESAMPLES = 2000


@dataclass
class Answer:
    """What an engine answered to one prompt.

    `ids` [n] without the prompt, `rounds` verification rounds, which committed all tokens but the
    first (the prefill gives that one); `accepted_at[k-1]` rounds in which the draft at position k
    was accepted, None without a draft or where the engine does not tell it per request; `seconds`
    of this request's decoding where known, else of the request. `emitted`: tokens of every round,
    where the engine tells them.
    """

    ids: list[int]
    rounds: int
    accepted_at: list[int] | None
    seconds: float
    text: str
    emitted: list[int] | None = None


@dataclass
class Trial:
    """One question under one config: the prompt and the answer of every turn, and its share of the
    seconds.
    """

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
    """Acceptance length in all its forms; None where there was no round or an engine does not tell.

    `accepted_by_position`: share of rounds in which the draft at position 1..steps was accepted.
    """
    answers = [answer for trial in trials for answer in trial.answers]
    tokens, rounds = totals([[trial.tokens, trial.rounds] for trial in trials])
    free = [answer for answer in answers if not is_loop(answer.ids)]
    first = [answer.emitted[0] for answer in answers if answer.emitted]
    told = [answer for answer in answers if answer.accepted_at is not None]
    told_rounds = sum(answer.rounds for answer in told)
    return {
        "acceptance_length": ratio(tokens.sum(), rounds.sum()),
        "interval95": interval95(
            lambda picked: tokens[picked].sum(1) / rounds[picked].sum(1), len(trials), seed
        ),
        "acceptance_length_loop_free": ratio(
            sum(len(a.ids) - 1 for a in free), sum(a.rounds for a in free)
        ),
        "loops": len(answers) - len(free),
        "first_round": ratio(sum(first), len(first)),
        "accepted_by_position": [
            ratio(sum(a.accepted_at[k] for a in told), told_rounds) for k in range(steps)
        ],
    }


def speed(drafted: list[Trial], alone: list[Trial], seed: int) -> dict:
    """Tokens per second with the draft and without it, each question with itself."""
    tokens, seconds = totals([[trial.tokens, trial.seconds] for trial in drafted])
    alone_tokens, alone_seconds = totals([[trial.tokens, trial.seconds] for trial in alone])

    def speedup(picked: torch.Tensor) -> torch.Tensor:
        with_draft = tokens[picked].sum(1) / seconds[picked].sum(1)
        return with_draft * alone_seconds[picked].sum(1) / alone_tokens[picked].sum(1)

    with_draft, without = (
        ratio(tokens.sum(), seconds.sum()),
        ratio(alone_tokens.sum(), alone_seconds.sum()),
    )
    return {
        "tokens_per_second": with_draft,
        "baseline_tokens_per_second": without,
        "speedup": ratio(with_draft, without),
        "speedup_interval95": interval95(speedup, len(drafted), seed),
    }


def equality(drafted: list[Trial], alone: list[Trial]) -> dict:
    """`lossless`: whether all answers are those of the target alone, token for token;
    `equal_answers`: their share.
    """
    same = [one.ids == other.ids for one, other in zip(drafted, alone, strict=True)]
    return {"lossless": all(same), "equal_answers": sum(same) / len(same)}


def totals(rows: list[list[float]]) -> torch.Tensor:
    """P rows of n numbers -> float64 [n,P]."""
    return torch.tensor(rows, dtype=torch.float64).T


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return float(numerator / denominator) if denominator and numerator is not None else None


def interval95(
    statistic: Callable[[torch.Tensor], torch.Tensor], questions: int, seed: int
) -> list[float] | None:
    """Bootstrap over questions: `statistic` of int64 [R,P], the questions of every resample -> [R]."""
    picked = torch.randint(
        questions, (RESAMPLES, questions), generator=torch.Generator().manual_seed(seed)
    )
    values = statistic(picked)
    values = values[values.isfinite()]
    return (
        values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
        if len(values)
        else None
    )
