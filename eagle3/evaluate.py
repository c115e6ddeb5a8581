"""The target's own answers to held-out prompts, and exact greedy acceptance on them without
decoding.

On text that the target generated, the draft at anchor t proposes exactly what chain drafting would
propose when served there, so walking anchors t -> t + emitted gives the acceptance length of every
draft length from one unroll.

The answers are an artefact of parts (one generation batch each, so an interrupted call goes on
where it stopped); a part holds flat tensors of its documents, in order.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from eagle3.batch import Batch, Document, Features, pack, serving
from eagle3.draft.model import Draft
from eagle3.loss import SoftTargetLoss
from eagle3.target.hf import HFTarget
from eagle3.ttt import unroll


@dataclass
class Answer:
    """A prompt and the target's greedy answer: `input_ids` [n], of which the first `prompt_length`
    are the prompt.
    """

    id: str
    input_ids: torch.Tensor
    prompt_length: int
    features: Features

    @property
    def loss_mask(self) -> torch.Tensor:
        return torch.arange(len(self.input_ids)) >= self.prompt_length


def write_answers(
    folder: Path, target: HFTarget, prompts: list[dict], max_new_tokens: int, batch_size: int
) -> dict:
    """Answer `prompts` ({"id", "input_ids"}) greedily, shortest first; returns the facts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shortened = answered = 0
    for number, indices in enumerate(track(batches, description="generate", transient=True)):
        path = folder / f"part_{number:05d}.safetensors"
        if not path.exists():
            tensors = answer_batch(
                target, [prompts[i]["input_ids"] for i in indices], max_new_tokens
            )
            tensors["index"] = torch.tensor(indices)
            save_file(tensors, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        lengths = load_file(path)
        shortened += int(lengths["shortened"].sum())
        answered += int((lengths["lengths"] - lengths["prompt_lengths"]).sum())
    return {"answers": len(prompts), "answer_tokens": answered, "shortened_at_ties": shortened}


def answer_batch(
    target: HFTarget, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, torch.Tensor]:
    """Flat tensors of one part. An answer ends before the first token that is not the packed pass's
    argmax.

    Batched generation and the packed pass round differently, so a near tie may go either way;
    cutting there (counted as shortened) leaves text on which the walk over anchors is exact.
    """
    documents = [
        torch.tensor(prompt + answer)
        for prompt, answer in zip(
            prompts, sample(target, prompts, max_new_tokens, GREEDY), strict=True
        )
    ]
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    parts: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(Features)} | {
        "input_ids": []
    }
    lengths, shortened = [], []
    for document, prompt in zip(documents, prompts, strict=True):
        mask = torch.arange(len(document)) >= len(prompt)
        batch = pack([Document(0, document, mask)], everything, 1, serving).to(target.device)
        features = target(batch).to(torch.device("cpu"))
        wrong = (features.argmax[:-1] != document[len(prompt) + 1 :]).nonzero()
        keep = len(document) if len(wrong) == 0 else len(prompt) + int(wrong[0]) + 1
        parts["input_ids"].append(document[:keep])
        parts["aux_hidden_states"].append(features.aux_hidden_states[:keep])
        for name in ("last_hidden_states", "argmax", "logsumexp"):
            parts[name].append(getattr(features, name)[: keep - len(prompt)])
        lengths.append(keep)
        shortened.append(keep < len(document))
    flat = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
    flat["lengths"], flat["prompt_lengths"] = (
        torch.tensor(lengths),
        torch.tensor([len(p) for p in prompts]),
    )
    return flat | {"shortened": torch.tensor(shortened)}


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def sample(
    target: HFTarget, prompts: list[list[int]], max_new_tokens: int, sampling: dict[str, Any]
) -> list[list[int]]:
    """Answers to a batch of prompts; the end-of-turn token is kept where the target produced it.

    `sampling`: GREEDY, or what transformers' `generate` takes in its place.
    """
    eos = sorted(target.eos_token_ids)
    width = max(map(len, prompts))
    pad = eos[0] if eos else 0
    output = target.generate(
        torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=target.device),
        attention_mask=torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device
        ),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
        **sampling,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next(
            (i + 1 for i, token in enumerate(row) if token in target.eos_token_ids), len(row)
        )
        answers.append(row[:end])
    return answers


def load_answers(folder: Path, prompts: list[dict]) -> list[Answer]:
    """The answers of an artefact, in order of their prompts."""
    answers: dict[int, Answer] = {}
    for path in sorted(folder.glob("part_*.safetensors")):
        tensors = load_file(path)
        lengths, prompt_lengths = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
        teachers = [n - p for n, p in zip(lengths, prompt_lengths, strict=True)]
        ids, aux = tensors["input_ids"].split(lengths), tensors["aux_hidden_states"].split(lengths)
        last, argmax, lse = (
            tensors[k].split(teachers) for k in ("last_hidden_states", "argmax", "logsumexp")
        )
        for i, index in enumerate(tensors["index"].tolist()):
            features = Features(aux[i], last[i], argmax[i], lse[i])
            answers[index] = Answer(prompts[index]["id"], ids[i], prompt_lengths[i], features)
    assert sorted(answers) == list(range(len(prompts))), (
        "a generated artefact must answer every prompt"
    )
    return [answers[index] for index in sorted(answers)]


@dataclass
class EvaluationBatch:
    batch: Batch
    features: Features
    answers: list[Answer]


@dataclass
class Evaluation:
    """Means over the rounds of all held-out answers; `acceptance_length[L]` is that of draft length
    L.

    `accepted_at[k - 1]`: the share of rounds in which the k-th drafted token is accepted; it,
    `first_round` (tokens of the first round after the prompt) and `loop_free` (acceptance length
    without answers that loop) are at `draft_length`. `loss` is per row supervised at step 0.
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
        return {
            "eval/acceptance_length": self.acceptance_length[self.draft_length],
            "eval/loss": self.loss,
            **at,
        }


def batches(
    answers: list[Answer], t2d: torch.Tensor, steps: int, tokens_per_step: int
) -> list[EvaluationBatch]:
    """Pack answers, in order, into batches of at most `tokens_per_step` tokens (or one answer);
    kept on the host.
    """
    groups, used = [[]], 0
    for answer in answers:
        if used + len(answer.input_ids) > tokens_per_step and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(answer)
        used += len(answer.input_ids)
    packed = []
    for group in groups:
        documents = [
            Document(i, answer.input_ids, answer.loss_mask) for i, answer in enumerate(group)
        ]
        features = Features(
            *(
                torch.cat([getattr(answer.features, f.name) for answer in group])
                for f in fields(Features)
            )
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
    """bool [T, K]: whether the draft's token of (row, step) is the target's; False where nothing is
    drafted.
    """
    counts = torch.tensor(batch.row_counts, device=correct_M.device)
    offsets = counts.cumsum(0) - counts
    accepted = torch.zeros(
        len(batch.input_ids), len(counts), dtype=torch.bool, device=correct_M.device
    )
    rows = batch.rows[batch.pair_index - offsets[batch.pair_step]]
    accepted[rows, batch.pair_step] = correct_M
    return accepted


def walk(accepted_nK: torch.Tensor, prompt_length: int, draft_length: int) -> list[int]:
    """Tokens emitted by each verification round of one answer.

    The first answer token comes from the prefill. A round drafts `draft_length` tokens at its
    anchor row t, commits the accepted ones and the target's next, as far as the answer goes.
    """
    leading = accepted_nK[:, :draft_length].long().cumprod(1).sum(1).tolist()
    anchor, last, emitted = prompt_length - 1, len(accepted_nK) - 2, []
    while anchor < last:
        emitted.append(min(leading[anchor] + 1, last - anchor))
        anchor += emitted[-1]
    return emitted


def summarise(
    walks: list[tuple[Answer, torch.Tensor]], draft_length: int, loss: float
) -> Evaluation:
    steps = walks[0][1].shape[1]

    def mean_length(chosen, length: int) -> float:
        rounds = [walk(accepted, answer.prompt_length, length) for answer, accepted in chosen]
        return sum(map(sum, rounds)) / max(1, sum(map(len, rounds)))

    rounds = [walk(accepted, answer.prompt_length, draft_length) for answer, accepted in walks]
    counted = [tokens for answer in rounds for tokens in answer]
    free = [
        (a, accepted)
        for a, accepted in walks
        if not is_loop(a.input_ids[a.prompt_length :].tolist())
    ]
    at = accepted_at(walks, draft_length)
    return Evaluation(
        draft_length=draft_length,
        acceptance_length={length: mean_length(walks, length) for length in range(1, steps + 1)},
        accepted_at=[at[k] / max(1, len(counted)) for k in range(draft_length)],
        first_round=sum(answer[0] for answer in rounds if answer)
        / max(1, sum(1 for answer in rounds if answer)),
        loop_free=mean_length(free, draft_length),
        loops=len(walks) - len(free),
        answers=len(walks),
        loss=loss,
    )


def accepted_at(walks: list[tuple[Answer, torch.Tensor]], draft_length: int) -> list[int]:
    """For each position 1..draft_length the number of rounds in which the token drafted there was
    accepted.
    """
    counts = [0] * draft_length
    for answer, accepted in walks:
        leading = accepted[:, :draft_length].long().cumprod(1).sum(1).tolist()
        anchor = answer.prompt_length - 1
        for tokens in walk(accepted, answer.prompt_length, draft_length):
            for k in range(min(leading[anchor], tokens)):
                counts[k] += 1
            anchor += tokens
    return counts


def is_loop(ids):
    """True where `ids` (tokens) hold the same block of <= 48 tokens three times in a row, over >=
    24 tokens in all.
    """
    for period in range(1, 49):
        matching = 0  # how many tokens in a row equal the one a period before
        needed = max(2 * period, 24 - period)
        for now, before in zip(ids[period:], ids):
            matching = matching + 1 if now == before else 0
            if matching >= needed:
                return True
    return False
