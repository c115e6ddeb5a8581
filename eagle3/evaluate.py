"""The target's own answers to held-out prompts, and exact greedy acceptance without decoding.

On text that the target generated greedily, the draft at anchor t proposes exactly what chain
drafting would propose when served there. So one teacher-forced unroll, and a walk over anchors t ->
t + emitted, gives the acceptance length of every draft length at once.

n tokens of an answer and its prompt, K steps, M supervised pairs, T packed tokens.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from eagle3.batch import Batch, Document, Features, fill, pack, serving, starts_of
from eagle3.config import DraftSection, Eval
from eagle3.draft.attention import Dense
from eagle3.draft.model import Draft
from eagle3.engines.engine import Answer, answer_of_rounds, is_loop
from eagle3.errors import DamageError
from eagle3.export.read import locate
from eagle3.export.rules import read_draft
from eagle3.hidden_states.capture import compute_features
from eagle3.loss import FrozenWeights, SoftTargetLoss
from eagle3.runs.artefact import artefact, fingerprint, read_inputs
from eagle3.runs.progress import Progress
from eagle3.runs.tensors import load_tensors, save_tensors
from eagle3.target.handle import TargetHandle
from eagle3.target.spec import TargetSpec
from eagle3.ttt import unroll

COVERED = 0.95  # of a text; a draft that misses one token in 20 loses a tenth of its length at 5
FORMAT = 2  # of the files, part of their fingerprint


def generate(
    section: Eval, prompts: list[dict[str, Any]], target: TargetHandle, cache_dir: str, write: bool
) -> Path:
    """The stage: the folder of the target's answers to `prompts` ({"id", "input_ids"}).

    Without `write` they must be there. Raises RunError.
    """
    # What an answer depends on beside its prompt.
    known = target.identity | {"eval.max_new_tokens": section.max_new_tokens, "format": FORMAT}
    kept = Path(cache_dir, "answers", fingerprint(known))
    fill_folder = partial(write_answers, section, prompts, target, kept) if write else None
    return artefact(cache_dir, "generated", known | {"prompts": prompts}, fill_folder, "generate")


def write_answers(
    section: Eval, prompts: list[dict], target: TargetHandle, kept: Path, folder: Path
) -> dict[str, int]:
    """Answer the prompts that `kept` lacks, a file each as it ends, and link those of all into
    `folder`. Returns the facts.
    """
    kept.mkdir(parents=True, exist_ok=True)
    paths = [kept / f"{fingerprint(prompt['input_ids'])}.safetensors" for prompt in prompts]
    asked = {path: prompt["input_ids"] for path, prompt in zip(paths, prompts, strict=True)}
    missing = [path for path in asked if not is_whole(path)]
    print(f"generate: {len(asked) - len(missing):,} of {len(asked):,} answers are in {kept}")
    waiting = ((path, asked[path]) for path in missing)
    with Progress("generate", len(asked), "prompts", len(asked) - len(missing)) as bar:
        given = section.batch_size, section.max_new_tokens, None, bar.count_tokens
        answers = target.load().answer(lambda: next(waiting, None), *given) if missing else []
        for path, answer in answers:
            document, cut = with_features(target.load(), asked[path], answer)
            tensors = {name: x.contiguous() for name, x in vars(document.features).items()}
            tensors |= {"input_ids": document.input_ids, "shortened": torch.tensor(cut)}
            save_tensors(path, tensors)
            bar.advance(answers=1)
    shortened = answered = 0
    for number, path in enumerate(paths):
        tensors = load_tensors(path)
        shortened += int(tensors["shortened"])
        answered += len(tensors["input_ids"]) - len(asked[path])
        link(path, answer_path(folder, number))
    return {"answers": len(prompts), "answer_tokens": answered, "shortened_at_ties": shortened}


def is_whole(path: Path) -> bool:
    with suppress(DamageError):
        return bool(load_tensors(path))
    return False


def link(path: Path, name: Path) -> None:
    """The same file under another name; a copy where the file system knows no links."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, name)


def answer_path(folder: Path, number: int) -> Path:
    return folder / f"answer_{number:05d}.safetensors"


def with_features(target: Any, prompt: list[int], answer: list[int]) -> tuple[Document, bool]:
    """The answer, which ends before a token that isn't the packed pass's argmax, and whether so.

    Decoding and the packed pass round differently, so a near tie may go either way; cutting there
    (counted as shortened) leaves text on which the walk over anchors is exact.
    """
    ids, start = torch.tensor(prompt + answer), len(prompt)
    document = Document(0, ids, torch.arange(len(ids)) >= start)
    (document,) = compute_features(target, [document])
    # Teacher rows begin at the answer's first token, whose argmax is its second.
    wrong = (document.features.argmax[:-1] != ids[start + 1 :]).nonzero()
    keep = len(ids) if len(wrong) == 0 else start + int(wrong[0]) + 1
    features = document.features.select(slice(keep), slice(keep - start))
    return Document(0, ids[:keep], document.loss_mask[:keep], features), keep < len(ids)


def load_answers(folder: Path) -> list[Document]:
    """Prompts with their answers, which the loss mask has, in order of the prompts."""
    answers = []
    for number, prompt in enumerate(read_inputs(folder)["prompts"]):
        tensors = load_tensors(answer_path(folder, number))
        features = Features(*(tensors[field.name] for field in fields(Features)))
        ids = tensors["input_ids"]
        mask = torch.arange(len(ids)) >= len(prompt["input_ids"])
        answers.append(Document(number, ids, mask, features))
    return answers


def cover(
    folder: Path, vocab: np.ndarray, section: DraftSection, spec: TargetSpec, draft_length: int
) -> dict[str, float]:
    """Facts on the draft vocabulary, the data's ids [Vd] or that of `draft.init_from`: which share
    of the tokens of the target's answers it holds, and, printed as a warning, the acceptance length
    of a draft that is right on all these.
    """
    if section.init_from is not None:
        start = locate(section.init_from, "draft.init_from")
        vocab = read_draft(start, Dense, spec).target_ids
    rounds, known = [], []
    for answer in load_answers(folder):
        known_n = torch.isin(answer.input_ids, torch.as_tensor(vocab))
        known.append(known_n[answer.loss_mask])
        # As `accepted_pairs`: what row t drafts at step k is the token at t + k + 2.
        accepted_nK = F.pad(known_n, (0, draft_length + 1))[2:].unfold(0, draft_length, 1)
        rounds.append(walk(answer, accepted_nK, draft_length))
    share, most = float(torch.cat(known).float().mean()), acceptance_length(rounds)
    if share >= COVERED or most is None:
        return {"vocab_coverage": share}
    held = f"only {share:.1%} of the target's answers is in the draft vocabulary"
    remedy = "raise draft.vocab_size, or train on answers of the target (regenerate)"
    best = f"at best {most:.2f} tokens a round at draft length {draft_length}"
    print(f"generate: warning: {held}: {best}; {remedy}")
    return {"vocab_coverage": share, "acceptance_at_most": most}


Packed = list[tuple[Batch, list[Document]]]  # and the answers in each batch


def pack_answers(
    answers: list[Document], t2d: torch.Tensor, steps: int, tokens_per_step: int
) -> Packed:
    """Pack answers, in order, into batches of at most `tokens_per_step` tokens (or one answer)."""
    groups = fill(answers, [len(answer.input_ids) for answer in answers], tokens_per_step)
    return [(pack(group, t2d.cpu(), steps, serving), group) for group in groups]


@dataclass
class Evaluation:
    """Means over the rounds of all held-out answers; `acceptance_length` by draft length.

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
        length = self.acceptance_length[self.draft_length]
        at = {f"eval/accepted_at_{k}": share for k, share in enumerate(self.accepted_at, start=1)}
        return {"eval/acceptance_length": length, "eval/loss": self.loss} | at


@torch.no_grad()
def evaluate(
    draft: Draft, frozen: FrozenWeights, loss: SoftTargetLoss, packed: Packed, draft_length: int
) -> Evaluation:
    """Unroll over the held-out answers and walk each of them at every draft length."""
    total_loss, num_rows = 0.0, 0
    documents, accepted_nK = [], []
    for batch, answers in packed:
        batch = batch.to(frozen.embedding.device)
        hidden_ND = unroll(draft, frozen.embedding, batch.features.aux_hidden_states, batch)
        output = loss(draft, hidden_ND, batch.features, batch, frozen.draft_head)
        total_loss += float(output.loss)
        num_rows += batch.normaliser
        documents += answers
        accepted_nK += accepted_pairs(batch, output.correct).cpu().split(batch.documents.lengths)
    walks = {
        length: [walk(*each, length) for each in zip(documents, accepted_nK, strict=True)]
        for length in range(1, accepted_nK[0].shape[1] + 1)
    }
    facts = summarise(walks[draft_length], draft_length)
    return Evaluation(
        draft_length=draft_length,
        acceptance_length={length: acceptance_length(w) or 0.0 for length, w in walks.items()},
        accepted_at=[share or 0.0 for share in facts["accepted_by_position"]],
        first_round=facts["first_round"] or 0.0,
        loop_free=facts["acceptance_length_loop_free"] or 0.0,
        loops=facts["loops"],
        answers=len(documents),
        loss=total_loss / max(1, num_rows),
    )


def accepted_pairs(batch: Batch, correct_M: torch.Tensor) -> torch.Tensor:
    """bool [T,K]: whether the token drafted at (row, step) is the target's; False without one."""
    starts = starts_of(batch.row_counts).to(correct_M.device)
    rows = batch.rows[batch.pair_index - starts[batch.pair_step]]
    accepted = correct_M.new_zeros(len(batch.input_ids), len(starts))  # bool
    accepted[rows, batch.pair_step] = correct_M
    return accepted


def walk(document: Document, accepted_nK: torch.Tensor, draft_length: int) -> Answer:
    """The answer in `document` as the rounds of a decoder would commit it.

    The first answer token comes from the prefill. A round drafts `draft_length` tokens at its
    anchor row t, commits the accepted ones and the target's next, as far as the answer goes.
    """
    leading = accepted_nK[:, :draft_length].long().cumprod(1).sum(1).tolist()
    ids, accepted = document.input_ids[document.loss_mask].tolist(), []
    anchor = len(leading) - len(ids) - 1
    while anchor < len(leading) - 2:
        accepted.append(leading[anchor])
        anchor += accepted[-1] + 1
    return answer_of_rounds(ids, "", accepted, draft_length, 0.0)


def summarise(answers: list[Answer], steps: int) -> dict[str, Any]:
    """Acceptance length in all its forms; None where no round was needed or none is reported."""
    # An answer that repeats itself is drafted without effort and would hide what a draft is worth.
    free = [answer for answer in answers if not is_loop(answer.ids)]
    first = [answer.emitted[0] for answer in answers if answer.emitted]
    rounds = sum(answer.rounds for answer in answers)
    accepted = [sum(answer.accepted_at[k] for answer in answers) for k in range(steps)]
    return {
        "acceptance_length": acceptance_length(answers),
        "acceptance_length_loop_free": acceptance_length(free),
        "loops": len(answers) - len(free),
        "first_round": ratio(sum(first), len(first)),
        "accepted_by_position": [ratio(count, rounds) for count in accepted],
    }


def acceptance_length(answers: list[Answer]) -> float | None:
    """Tokens that a round commits, over all rounds of all answers; the first needs no round."""
    tokens = sum(len(answer.ids) - 1 for answer in answers)
    return ratio(tokens, sum(answer.rounds for answer in answers))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return float(numerator / denominator) if denominator and numerator is not None else None
