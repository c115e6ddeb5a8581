"""Exact greedy acceptance without decoding: one teacher-forced unroll over text the target itself generated.

On such text the draft at anchor t proposes exactly what chain drafting would propose when served there, so walking
anchors t -> t + emitted gives the acceptance length of every draft length from one pass.
"""

from dataclasses import dataclass, fields

import torch

from eagle3.data.packing import Batch, pack
from eagle3.data.supervision import serving
from eagle3.draft.model import Draft
from eagle3.generate import Answer
from eagle3.loops import is_loop
from eagle3.loss import SoftTargetLoss
from eagle3.target.features import Features
from eagle3.ttt import unroll


@dataclass
class EvaluationBatch:
    batch: Batch
    features: Features
    answers: list[Answer]


@dataclass
class Evaluation:
    """Means over the rounds of all held-out answers; `acceptance_length[L]` is that of draft length L.

    `accepted_at[k - 1]`: the share of rounds in which the k-th drafted token is accepted; it, `first_round` (tokens of
    the first round after the prompt) and `loop_free` (acceptance length without answers that loop) are at
    `draft_length`. `loss` is per row supervised at step 0.
    """

    draft_length: int
    acceptance_length: dict[int, float]
    accepted_at: list[float]
    first_round: float
    loop_free: float
    loops: int
    answers: int
    loss: float

    def metrics(self) -> dict[str, float]:
        at = {f"eval/accepted_at_{k + 1}": value for k, value in enumerate(self.accepted_at)}
        return {"eval/acceptance_length": self.acceptance_length[self.draft_length], "eval/loss": self.loss, **at}


def batches(answers: list[Answer], t2d: torch.Tensor, steps: int, tokens_per_step: int) -> list[EvaluationBatch]:
    """Pack answers, in order, into batches of at most `tokens_per_step` tokens (or one answer); kept on the host."""
    groups, used = [[]], 0
    for answer in answers:
        if used + len(answer.input_ids) > tokens_per_step and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(answer)
        used += len(answer.input_ids)
    packed = []
    for group in groups:
        documents = [(i, answer.input_ids, answer.loss_mask) for i, answer in enumerate(group)]
        features = Features(
            *(torch.cat([getattr(answer.features, f.name) for answer in group]) for f in fields(Features))
        )
        packed.append(EvaluationBatch(pack(documents, t2d.cpu(), steps, serving), features, group))
    return packed


@torch.no_grad()
def evaluate(
    draft: Draft,
    embedding: torch.Tensor,
    draft_head: torch.Tensor,
    loss: SoftTargetLoss,
    batches: list[EvaluationBatch],
    draft_length: int,
) -> Evaluation:
    total_loss, rows, walks = 0.0, 0, []
    for item in batches:
        batch, features = item.batch.to(embedding.device), item.features.to(embedding.device)
        hidden = unroll(draft, embedding, features.aux_hidden_states, batch)
        output = loss(draft, hidden, features, batch, draft_head)
        total_loss += float(output.loss)
        rows += batch.normaliser
        accepted_TK = accepted_pairs(batch, output.correct).cpu()
        start = 0
        for answer, length in zip(item.answers, item.batch.documents.lengths, strict=True):
            walks.append((answer, accepted_TK[start : start + length]))
            start += length
    return summarise(walks, draft_length, total_loss / max(1, rows))


def accepted_pairs(batch: Batch, correct_M: torch.Tensor) -> torch.Tensor:
    """bool [T, K]: whether the draft's token of (row, step) is the target's; False where nothing is drafted."""
    counts = torch.tensor(batch.row_counts, device=correct_M.device)
    offsets = counts.cumsum(0) - counts
    accepted = torch.zeros(len(batch.input_ids), len(counts), dtype=torch.bool, device=correct_M.device)
    rows = batch.rows[batch.pair_index - offsets[batch.pair_step]]
    accepted[rows, batch.pair_step] = correct_M
    return accepted


def walk(accepted_nK: torch.Tensor, prompt_length: int, draft_length: int) -> list[int]:
    """Tokens emitted by each verification round of one answer.

    The first answer token comes from the prefill. A round drafts `draft_length` tokens at its anchor row t, commits
    the accepted ones and the target's next, as far as the answer goes.
    """
    leading = accepted_nK[:, :draft_length].long().cumprod(1).sum(1).tolist()
    anchor, last, emitted = prompt_length - 1, len(accepted_nK) - 2, []
    while anchor < last:
        emitted.append(min(leading[anchor] + 1, last - anchor))
        anchor += emitted[-1]
    return emitted


def summarise(walks: list[tuple[Answer, torch.Tensor]], draft_length: int, loss: float) -> Evaluation:
    steps = walks[0][1].shape[1]

    def mean_length(chosen, length: int) -> float:
        rounds = [walk(accepted, answer.prompt_length, length) for answer, accepted in chosen]
        return sum(map(sum, rounds)) / max(1, sum(map(len, rounds)))

    rounds = [walk(accepted, answer.prompt_length, draft_length) for answer, accepted in walks]
    counted = [tokens for answer in rounds for tokens in answer]
    free = [(a, accepted) for a, accepted in walks if not is_loop(a.input_ids[a.prompt_length :].tolist())]
    at = accepted_at(walks, draft_length)
    return Evaluation(
        draft_length=draft_length,
        acceptance_length={length: mean_length(walks, length) for length in range(1, steps + 1)},
        accepted_at=[at[k] / max(1, len(counted)) for k in range(draft_length)],
        first_round=sum(answer[0] for answer in rounds if answer) / max(1, sum(1 for answer in rounds if answer)),
        loop_free=mean_length(free, draft_length),
        loops=len(walks) - len(free),
        answers=len(walks),
        loss=loss,
    )


def accepted_at(walks: list[tuple[Answer, torch.Tensor]], draft_length: int) -> list[int]:
    """For each position 1..draft_length the number of rounds in which the token drafted there was accepted."""
    counts = [0] * draft_length
    for answer, accepted in walks:
        leading = accepted[:, :draft_length].long().cumprod(1).sum(1).tolist()
        anchor = answer.prompt_length - 1
        for tokens in walk(accepted, answer.prompt_length, draft_length):
            for k in range(min(leading[anchor], tokens)):
                counts[k] += 1
            anchor += tokens
    return counts
