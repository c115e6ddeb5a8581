"""The target's own answers to held-out prompts, and exact greedy acceptance on them without
decoding.

On text that the target generated greedily, the draft at anchor t proposes exactly what chain
drafting would propose when served there. So one teacher-forced unroll, and a walk over anchors t ->
t + emitted, gives the acceptance length of every draft length at once.

n tokens of an answer and its prompt, K steps, M supervised pairs, T packed tokens.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from eagle3.batch import Batch, Document, Features, pack, serving
from eagle3.config import Eval
from eagle3.draft.model import Draft
from eagle3.loss import FrozenWeights, SoftTargetLoss
from eagle3.runs.artefact import artefact, read_inputs
from eagle3.target.handle import TargetHandle
from eagle3.ttt import unroll


@dataclass
class Answer:
    """A prompt and the target's greedy answer, `input_ids` [n]; `prompt_length` are the prompt."""

    id: str
    input_ids: torch.Tensor
    prompt_length: int
    features: Features


def generate(
    section: Eval, prompts: list[dict[str, Any]], target: TargetHandle, cache_dir: str, write: bool
) -> Path:
    """The stage: the folder of the target's answers to `prompts` ({"id", "input_ids"}).

    Without `write` they must be there. Raises RunError.
    """
    inputs = target.identity | {
        "prompts": prompts,
        "max_new_tokens": section.max_new_tokens,
        "batch_size": section.batch_size,
    }

    def write_folder(folder: Path) -> dict[str, int]:
        length, size = section.max_new_tokens, section.batch_size
        return write_answers(folder, target.load(), prompts, length, size)

    return artefact(cache_dir, "generated", inputs, write_folder if write else None, "generate")


def write_answers(
    folder: Path, target: Any, prompts: list[dict], max_new_tokens: int, batch_size: int
) -> dict[str, int]:
    """Answer prompts, shortest first, a file for each batch, so that a killed call goes on.

    A file holds flat tensors of its documents, in order. Returns the facts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shortened = answered = 0
    for number, indices in enumerate(track(batches, description="generate", transient=True)):
        path = folder / f"part_{number:05d}.safetensors"
        if not path.exists():
            batch = [prompts[i]["input_ids"] for i in indices]
            tensors = answer_batch(target, batch, max_new_tokens)
            tensors["index"] = torch.tensor(indices)
            save_file(tensors, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        tensors = load_file(path)
        shortened += int(tensors["shortened"].sum())
        answered += int((tensors["lengths"] - tensors["prompt_lengths"]).sum())
    return {"answers": len(prompts), "answer_tokens": answered, "shortened_at_ties": shortened}


def answer_batch(
    target: Any, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, torch.Tensor]:
    """Flat tensors of one part. An answer ends before the first token that isn't the packed pass's
    argmax.

    Batched generation and the packed pass round differently, so a near tie may go either way;
    cutting there (counted as shortened) leaves text on which the walk over anchors is exact.
    """
    answers = target.generate(prompts, max_new_tokens)
    any_token = torch.ones(target.config.vocab_size, dtype=torch.bool)
    parts: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(Features)}
    parts["input_ids"] = []
    lengths, shortened = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, start = torch.tensor(prompt + answer), len(prompt)
        document = Document(0, ids, torch.arange(len(ids)) >= start)
        batch = pack([document], any_token, 1, serving).to(target.device)
        features = target(batch).to(torch.device("cpu"))
        # Teacher rows begin at the prompt's last token, whose argmax is the answer's first.
        wrong = (features.argmax[:-1] != ids[start + 1 :]).nonzero()
        keep = len(ids) if len(wrong) == 0 else start + int(wrong[0]) + 1
        parts["input_ids"].append(ids[:keep])
        parts["aux_hidden_states"].append(features.aux_hidden_states[:keep])
        for name in ("last_hidden_states", "argmax", "logsumexp"):
            parts[name].append(getattr(features, name)[: keep - start])
        lengths.append(keep)
        shortened.append(keep < len(ids))
    flat = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
    flat["lengths"] = torch.tensor(lengths)
    flat["prompt_lengths"] = torch.tensor([len(prompt) for prompt in prompts])
    flat["shortened"] = torch.tensor(shortened)
    return flat


def load_answers(folder: Path) -> list[Answer]:
    """The answers of the artefact, in order of their prompts."""
    prompts = read_inputs(folder)["prompts"]
    answers: dict[int, Answer] = {}
    for path in sorted(folder.glob("part_*.safetensors")):
        tensors = load_file(path)
        lengths, prompt_lengths = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
        teachers = [n - p for n, p in zip(lengths, prompt_lengths, strict=True)]
        ids = tensors["input_ids"].split(lengths)
        aux = tensors["aux_hidden_states"].split(lengths)
        last = tensors["last_hidden_states"].split(teachers)
        argmax = tensors["argmax"].split(teachers)
        logsumexp = tensors["logsumexp"].split(teachers)
        for i, index in enumerate(tensors["index"].tolist()):
            features = Features(aux[i], last[i], argmax[i], logsumexp[i])
            answers[index] = Answer(prompts[index]["id"], ids[i], prompt_lengths[i], features)
    assert sorted(answers) == list(range(len(prompts))), "an artefact must answer every prompt"
    return [answers[index] for index in sorted(answers)]


@dataclass
class AnswerBatch:
    """Answers packed with their features, on the host."""

    batch: Batch
    answers: list[Answer]


def pack_answers(
    answers: list[Answer], t2d: torch.Tensor, steps: int, tokens_per_step: int
) -> list[AnswerBatch]:
    """Pack answers, in order, into batches of at most `tokens_per_step` tokens (or one answer)."""
    groups, used = [[]], 0
    for answer in answers:
        if used + len(answer.input_ids) > tokens_per_step and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(answer)
        used += len(answer.input_ids)
    packed = []
    for group in groups:
        documents = []
        for number, answer in enumerate(group):
            mask = torch.arange(len(answer.input_ids)) >= answer.prompt_length
            documents.append(Document(number, answer.input_ids, mask, answer.features))
        packed.append(AnswerBatch(pack(documents, t2d.cpu(), steps, serving), group))
    return packed


@dataclass
class Evaluation:
    """Means over the rounds of all held-out answers; `acceptance_length[L]`: that of draft length
    L.

    `accepted_at[k - 1]`: the share of rounds in which the k-th drafted token is accepted. It,
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
        lengths = {
            "eval/acceptance_length": self.acceptance_length[self.draft_length],
            "eval/loss": self.loss,
        }
        at = {f"eval/accepted_at_{k}": share for k, share in enumerate(self.accepted_at, start=1)}
        return lengths | at


@torch.no_grad()
def evaluate(
    draft: Draft,
    frozen: FrozenWeights,
    loss: SoftTargetLoss,
    packed: list[AnswerBatch],
    draft_length: int,
) -> Evaluation:
    """Unroll over the held-out answers and walk each of them."""
    total_loss, num_rows = 0.0, 0
    answers, accepted_nK = [], []
    for item in packed:
        batch = item.batch.to(frozen.embedding.device)
        hidden_ND = unroll(draft, frozen.embedding, batch.features.aux_hidden_states, batch)
        output = loss(draft, hidden_ND, batch.features, batch, frozen.draft_head)
        total_loss += float(output.loss)
        num_rows += batch.normaliser
        answers += item.answers
        accepted_nK += accepted_pairs(batch, output.correct).cpu().split(batch.documents.lengths)
    return summarise(answers, accepted_nK, draft_length, total_loss / max(1, num_rows))


def accepted_pairs(batch: Batch, correct_M: torch.Tensor) -> torch.Tensor:
    """bool [T,K]: whether the token drafted at (row, step) is the target's; False without one."""
    counts = torch.tensor(batch.row_counts, device=correct_M.device)
    offsets = counts.cumsum(0) - counts
    rows = batch.rows[batch.pair_index - offsets[batch.pair_step]]
    shape = len(batch.input_ids), len(counts)
    accepted = torch.zeros(shape, dtype=torch.bool, device=correct_M.device)
    accepted[rows, batch.pair_step] = correct_M
    return accepted


def walk(accepted_nK: torch.Tensor, prompt_length: int, draft_length: int) -> list[tuple[int, int]]:
    """(tokens emitted, drafted tokens accepted) of each verification round of one answer.

    The first answer token comes from the prefill. A round drafts `draft_length` tokens at its
    anchor row t, commits the accepted ones and the target's next, as far as the answer goes.
    """
    leading = accepted_nK[:, :draft_length].long().cumprod(1).sum(1).tolist()
    anchor, last, rounds = prompt_length - 1, len(accepted_nK) - 2, []
    while anchor < last:
        emitted = min(leading[anchor] + 1, last - anchor)
        rounds.append((emitted, min(leading[anchor], emitted)))
        anchor += emitted
    return rounds


def summarise(
    answers: list[Answer], accepted_nK: list[torch.Tensor], draft_length: int, loss: float
) -> Evaluation:
    """The walks of all answers at every draft length, as means over their rounds."""
    steps = accepted_nK[0].shape[1]
    walks = {
        length: [
            walk(accepted, answer.prompt_length, length)
            for answer, accepted in zip(answers, accepted_nK, strict=True)
        ]
        for length in range(1, steps + 1)
    }
    chosen = walks[draft_length]
    loops = [is_loop(answer.input_ids[answer.prompt_length :].tolist()) for answer in answers]
    free = [rounds for rounds, loop in zip(chosen, loops, strict=True) if not loop]
    rounds = [one for each in chosen for one in each]
    firsts = [each[0][0] for each in chosen if each]
    accepted = [sum(count > k for _, count in rounds) for k in range(draft_length)]
    return Evaluation(
        draft_length=draft_length,
        acceptance_length={length: mean_emitted(each) for length, each in walks.items()},
        accepted_at=[count / max(1, len(rounds)) for count in accepted],
        first_round=sum(firsts) / max(1, len(firsts)),
        loop_free=mean_emitted(free),
        loops=sum(loops),
        answers=len(answers),
        loss=loss,
    )


def mean_emitted(walks: list[list[tuple[int, int]]]) -> float:
    """The acceptance length: tokens a round emits, over all rounds of all answers."""
    emitted = [tokens for rounds in walks for tokens, _ in rounds]
    return sum(emitted) / max(1, len(emitted))


def is_loop(ids) -> bool:
    """Whether a block of <= 48 tokens comes three times in a row, over >= 24 tokens in all."""
    for period in range(1, 49):
        matching = 0  # how many tokens in a row equal the one a period before
        needed = max(2 * period, 24 - period)
        for now, before in zip(ids[period:], ids, strict=False):
            matching = matching + 1 if now == before else 0
            if matching >= needed:
                return True
    return False
