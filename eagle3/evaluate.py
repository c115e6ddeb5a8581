"""The target's own answers to held-out prompts, and exact greedy acceptance without decoding.

On text that the target generated greedily, the draft at anchor t proposes exactly what chain
drafting would propose when served there. So one teacher-forced unroll, and a walk over anchors t ->
t + emitted, gives the acceptance length of every draft length at once.

n tokens of an answer and its prompt, K steps, M supervised pairs, T packed tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from eagle3.batch import Batch, Document, Features, fill, pack, serving, starts_of
from eagle3.config import Eval
from eagle3.draft.model import Draft
from eagle3.hidden_states.capture import compute_features
from eagle3.loss import FrozenWeights, SoftTargetLoss
from eagle3.runs.artefact import MANIFEST, artefact, read_manifest
from eagle3.runs.tensors import load_tensors, save_tensors
from eagle3.target.handle import TargetHandle
from eagle3.ttt import unroll

FORMAT = 2  # of the files, part of their fingerprint


def generate(
    section: Eval, prompts: list[dict[str, Any]], target: TargetHandle, cache_dir: str, write: bool
) -> Path:
    """The stage: the folder of the target's answers to `prompts` ({"id", "input_ids"}).

    Without `write` they must be there. Raises RunError.
    """
    settings = {"max_new_tokens": section.max_new_tokens, "batch_size": section.batch_size}
    inputs = target.identity | {"prompts": prompts, "format": FORMAT} | settings

    def write_folder(folder: Path) -> dict[str, int]:
        return write_answers(folder, target.load(), prompts, **settings)

    return artefact(cache_dir, "generated", inputs, write_folder if write else None, "generate")


def write_answers(
    folder: Path, target: Any, prompts: list[dict], max_new_tokens: int, batch_size: int
) -> dict[str, int]:
    """Answer prompts, shortest first, a file each: a killed call goes on. Returns the facts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shortened = answered = 0
    for indices in track(batches, description="generate", transient=True):
        ids = [prompts[i]["input_ids"] for i in indices]
        paths = [answer_path(folder, i) for i in indices]
        if not all(path.exists() for path in paths):
            for path, tensors in zip(paths, answer_batch(target, ids, max_new_tokens), strict=True):
                save_tensors(path, tensors)
        for path, prompt in zip(paths, ids, strict=True):
            tensors = load_tensors(path)
            shortened += int(tensors["shortened"])
            answered += len(tensors["input_ids"]) - len(prompt)
    return {"answers": len(prompts), "answer_tokens": answered, "shortened_at_ties": shortened}


def answer_path(folder: Path, number: int) -> Path:
    return folder / f"answer_{number:05d}.safetensors"


def answer_batch(
    target: Any, prompts: list[list[int]], max_new_tokens: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of each answer, which ends before a token that isn't the packed pass's argmax.

    Batched generation and the packed pass round differently, so a near tie may go either way;
    cutting there (counted as shortened) leaves text on which the walk over anchors is exact.
    """
    for prompt, answer in zip(prompts, target.generate(prompts, max_new_tokens), strict=True):
        ids, start = torch.tensor(prompt + answer), len(prompt)
        document = Document(0, ids, torch.arange(len(ids)) >= start)
        (document,) = compute_features(target, [document])
        # Teacher rows begin at the answer's first token, whose argmax is its second.
        wrong = (document.features.argmax[:-1] != ids[start + 1 :]).nonzero()
        keep = len(ids) if len(wrong) == 0 else start + int(wrong[0]) + 1
        features = document.features.select(slice(keep), slice(keep - start))
        kept = {name: states.contiguous() for name, states in vars(features).items()}
        yield kept | {"input_ids": ids[:keep], "shortened": torch.tensor(keep < len(ids))}


def load_answers(folder: Path) -> list[Document]:
    """Prompts with their answers, which the loss mask has, in order of the prompts."""
    answers = []
    for number, prompt in enumerate(read_manifest(folder / MANIFEST)["inputs"]["prompts"]):
        tensors = load_tensors(answer_path(folder, number))
        features = Features(*(tensors[field.name] for field in fields(Features)))
        ids = tensors["input_ids"]
        mask = torch.arange(len(ids)) >= len(prompt["input_ids"])
        answers.append(Document(number, ids, mask, features))
    return answers


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
    """Unroll over the held-out answers and walk each of them."""
    total_loss, num_rows = 0.0, 0
    answers, accepted_nK = [], []
    for batch, batch_answers in packed:
        batch = batch.to(frozen.embedding.device)
        hidden_ND = unroll(draft, frozen.embedding, batch.features.aux_hidden_states, batch)
        output = loss(draft, hidden_ND, batch.features, batch, frozen.draft_head)
        total_loss += float(output.loss)
        num_rows += batch.normaliser
        answers += batch_answers
        accepted_nK += accepted_pairs(batch, output.correct).cpu().split(batch.documents.lengths)
    return summarise(answers, accepted_nK, draft_length, total_loss / max(1, num_rows))


def accepted_pairs(batch: Batch, correct_M: torch.Tensor) -> torch.Tensor:
    """bool [T,K]: whether the token drafted at (row, step) is the target's; False without one."""
    starts = starts_of(batch.row_counts).to(correct_M.device)
    rows = batch.rows[batch.pair_index - starts[batch.pair_step]]
    accepted = correct_M.new_zeros(len(batch.input_ids), len(starts))  # bool
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
    answers: list[Document], accepted_nK: list[torch.Tensor], draft_length: int, loss: float
) -> Evaluation:
    """The walks of all answers at every draft length, as means over their rounds."""
    prompts = [int((~answer.loss_mask).sum()) for answer in answers]
    walks = {
        length: [walk(*each, length) for each in zip(accepted_nK, prompts, strict=True)]
        for length in range(1, accepted_nK[0].shape[1] + 1)
    }
    chosen = walks[draft_length]
    loops = [is_loop(answer.input_ids[answer.loss_mask].tolist()) for answer in answers]
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
