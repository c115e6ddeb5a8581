"""The target's own answers to held-out prompts, and exact acceptance without decoding.

On text that the target wrote, the draft at anchor t proposes exactly what chain drafting would
propose when served there. So one teacher-forced unroll, and a walk over anchors t -> t + emitted,
gives the acceptance length of every draft length at once. On greedy text a draft is accepted or
not. On text sampled at a temperature the token x was emitted with probability p(x), as an accepted
draft with min(p(x), q(x)), and what comes next depends on the text alone: so a draft was accepted
there with chance min(1, q(x) / p(x)), and the walk adds up the chances that a round begins at t.
A block drafter is unrolled in blocks as engines serve for `draft_length` (see `decode.drafter`);
shorter lengths are those of the same block, of which fewer tokens are verified.

n tokens of an answer and its prompt, P answers, A anchors, K steps, M supervised pairs, T packed
tokens, U teacher rows, V vocabulary.
"""

import shutil
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from eagle3.batch import Batch, Document, Features, by_step, fill, pack, serving
from eagle3.config import DraftSection, Eval
from eagle3.draft.attention import Dense
from eagle3.draft.model import Draft
from eagle3.engines.engine import Answer, is_loop
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

COVERED = 0.95  # of a text; a draft that misses one token in 20 loses a tenth of its length at 5
MOST_APART = 0.1  # of the tokens; 0.02 are near ties of SmolLM2-135M in bf16
FORMAT = 3  # of the files, part of their fingerprint


@dataclass
class HeldOut(Document):
    """A prompt and its answer, which the loss mask has; sampled ones have `log_p` fp32 [U], the
    log-probability of the token behind each teacher row, at the temperature of the answer.
    """

    log_p: torch.Tensor | None = None


def generate(
    section: Eval, prompts: list[dict[str, Any]], target: TargetHandle, cache_dir: str, write: bool
) -> Path:
    """The stage: the folder of the target's answers to `prompts` ({"id", "input_ids"}), which must
    be there without `write`. Raises RunError.
    """
    # What an answer depends on beside its prompt and its temperature.
    known = target.identity | {"eval.max_new_tokens": section.max_new_tokens, "format": FORMAT}

    def fill_folder(folder: Path) -> dict[str, int]:
        facts = {"answers": len(prompts)}
        for temperature in section.temperature:
            sampled = {"temperature": temperature} if temperature else {}
            kept = Path(cache_dir, "answers", fingerprint(known | sampled))
            paths = [kept / f"{fingerprint(prompt['input_ids'])}.safetensors" for prompt in prompts]
            asked = {path: prompt["input_ids"] for path, prompt in zip(paths, prompts, strict=True)}
            answer_prompts(section, target, temperature, asked, kept)
            answered = 0
            for number, path in enumerate(paths):
                answered += len(load_tensors(path)["input_ids"]) - len(asked[path])
                link(path, answer_path(folder, number, temperature))
            facts[f"answer_tokens{suffix(temperature)}"] = answered
        return facts

    made_from = known | {"eval.temperature": section.temperature, "prompts": prompts}
    return artefact(cache_dir, "generated", made_from, fill_folder if write else None, "generate")


def answer_prompts(
    section: Eval, target: TargetHandle, temperature: float, asked: dict[Path, list[int]],
    kept: Path,
) -> None:  # fmt: skip
    """Write the answers of prompts by path, of which some are there, a file each as it ends."""
    kept.mkdir(parents=True, exist_ok=True)
    missing = {path: ids for path, ids in asked.items() if not is_whole(path)}
    done, units = len(asked) - len(missing), "prompts"
    units += f" at temperature {temperature:g}" if temperature else ""
    print(f"generate: {done:,} of {len(asked):,} answers are in {kept}")
    with Progress("generate", len(asked), units, done) as bar:
        if not missing:
            return
        waiting, sampling, model, apart = iter(missing.items()), None, target.load(), 0
        if temperature:
            sampling = {"temperature": temperature, "top_p": 1.0, "top_k": 0}
            head = target.load_weights().head
        given = section.batch_size, section.max_new_tokens, sampling, bar.count_tokens
        for path, answer in model.answer(lambda: next(waiting, None), *given):
            document = read_answer(model, missing[path], answer)
            tensors = {name: x.contiguous() for name, x in vars(document.features).items()}
            tensors["input_ids"] = document.input_ids
            if temperature:
                tensors["log_p"] = log_p(document, head, temperature)
            else:
                # At near ties decoding and the packed pass may round differently: what was decoded
                # is the text that drafts must meet.
                argmax, following = tensors["argmax"][:-1], torch.tensor(answer[1:])
                apart += int((argmax != following).sum())
                argmax.copy_(following)
            save_tensors(path, tensors)
            bar.advance(answers=1)
    if apart > MOST_APART * bar.tokens:
        chosen = f"decoding chose {apart:,} of {bar.tokens:,} tokens otherwise than one pass over"
        print(f"generate: warning: {chosen} the answers would, more than rounding explains")


def suffix(temperature: float) -> str:
    """Of names: nothing at temperature 0, `_t1` at 1."""
    return f"_t{temperature:g}" if temperature else ""


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


def answer_path(folder: Path, number: int, temperature: float) -> Path:
    return folder / f"answer_{number:05d}{suffix(temperature)}.safetensors"


def read_answer(target: Any, prompt: list[int], answer: list[int]) -> Document:
    """An answer behind its prompt, with the target's features."""
    ids = torch.tensor(prompt + answer)
    document = Document(0, ids, torch.arange(len(ids)) >= len(prompt))
    return compute_features(target, [document])[0]


def log_p(document: Document, head: torch.Tensor, temperature: float) -> torch.Tensor:
    """fp32 [U]: the log-probability of the token behind each teacher row, over all of V; 0 behind
    the last.
    """
    following = document.input_ids[document.loss_mask].long()[1:].to(head.device)
    found = [torch.zeros(0)]
    # All logits at once would be 2 GB for 4,096 tokens of a vocabulary of 128k.
    for rows, ids in zip(document.features.last_hidden_states.split(256), following.split(256)):
        logits = (rows[: len(ids)].to(head.device) @ head.T).float() / temperature
        found.append((logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)).cpu())
    return F.pad(torch.cat(found), (0, 1))


def load_answers(folder: Path, temperature: float = 0.0) -> list[HeldOut]:
    """The answers at a temperature, in order of the prompts."""
    answers = []
    for number, prompt in enumerate(read_inputs(folder)["prompts"]):
        tensors = load_tensors(answer_path(folder, number, temperature))
        features = Features(*(tensors[field.name] for field in fields(Features)))
        ids = tensors["input_ids"]
        mask = torch.arange(len(ids)) >= len(prompt["input_ids"])
        answers.append(HeldOut(number, ids, mask, features, log_p=tensors.get("log_p")))
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
    chances, known, answers = [], [], load_answers(folder)
    for answer in answers:
        known_n = torch.isin(answer.input_ids, torch.as_tensor(vocab))
        known.append(known_n[answer.loss_mask])
        # What row t drafts at step k is the token at t + k + 2.
        ahead_n = F.pad(known_n.double(), (0, draft_length + 1))[2:]
        chances.append(ahead_n.unfold(0, draft_length, 1))
    most = acceptance_length(walk(answers, chances, draft_length))
    share = float(torch.cat(known).float().mean())
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
class Acceptance:
    """Means over the rounds of all answers at a temperature; `acceptance_length` by draft length.

    `accepted_at[k - 1]`: the share of rounds in which the k-th drafted token is accepted. It,
    `first_round` (tokens of the first round after the prompt), `loop_free` (acceptance length
    without answers that loop), and `tokens` and `rounds` of every answer are at `draft_length`.
    `prompts` are fingerprints, by which runs are paired.
    """

    acceptance_length: dict[int, float]
    accepted_at: list[float]
    first_round: float
    loop_free: float
    loops: int
    answers: int
    tokens: list[int]
    rounds: list[float]
    prompts: list[str]


@dataclass
class Evaluation(Acceptance):
    """Greedy acceptance, and by temperature that on `sampled` answers.

    `loss` is per row supervised at step 0 of the greedy answers.
    """

    draft_length: int
    loss: float
    sampled: dict[str, Acceptance]

    def metrics(self) -> dict[str, float]:
        metrics = {"eval/acceptance_length": self.acceptance_length[self.draft_length]}
        for name, at in self.sampled.items():
            length = at.acceptance_length[self.draft_length]
            metrics[f"eval/acceptance_length_t{name}"] = length
        metrics["eval/loss"] = self.loss
        at = {f"eval/accepted_at_{k}": share for k, share in enumerate(self.accepted_at, start=1)}
        return metrics | at


@torch.no_grad()
def evaluate(
    draft: Draft, frozen: FrozenWeights, loss: SoftTargetLoss, packed: dict[float, Packed],
    draft_length: int,
) -> Evaluation:  # fmt: skip
    """Unroll over the held-out answers, by temperature, and walk each at every draft length."""
    total_loss, num_rows, found = 0.0, 0, {}
    for temperature, batches in packed.items():
        documents, chances_nK = [], []
        for batch, answers in batches:
            batch = batch.to(frozen.embedding.device)
            hidden_ND = draft.unroll(frozen.embedding, batch.features.aux_hidden_states, batch)
            if temperature:
                log_p = torch.cat([answer.log_p for answer in answers]).to(hidden_ND.device)
                given = draft, hidden_ND, batch, frozen.draft_head, temperature
                log_q_M = draft_likelihoods(*given, loss.chunk_rows)
                chance_M = (log_q_M - log_p[batch.pair_teacher]).clamp(max=0).exp()
            else:
                output = loss(draft, hidden_ND, batch.features, batch, frozen.draft_head)
                total_loss += float(output.loss)
                num_rows += batch.normaliser
                chance_M = output.correct
            documents += answers
            chances_nK += by_step(batch, chance_M.double()).cpu().split(batch.documents.lengths)
        found[temperature] = accept(documents, chances_nK, draft_length)
    greedy, mean_loss = vars(found.pop(0.0)), total_loss / max(1, num_rows)
    sampled = {f"{temperature:g}": each for temperature, each in found.items()}
    return Evaluation(**greedy, draft_length=draft_length, loss=mean_loss, sampled=sampled)


def wanted_ids(batch: Batch) -> torch.Tensor:
    """int64 [M]: the text's token that each pair drafts, which its teacher predicts."""
    return batch.input_ids[batch.teacher_rows[batch.pair_teacher] + 1]


def draft_likelihoods(
    draft: Draft, hidden_ND: torch.Tensor, batch: Batch, draft_head: torch.Tensor,
    temperature: float, chunk_rows: int,
) -> torch.Tensor:  # fmt: skip
    """fp32 [M]: the log-probability of the text's token, -inf where the draft cannot say it."""
    draft_ids = torch.full((draft.config.vocab_size,), -1, device=hidden_ND.device)
    draft_ids[draft.target_ids] = torch.arange(len(draft.target_ids), device=hidden_ND.device)
    wanted_M = draft_ids[wanted_ids(batch)]
    found = []
    for pairs, ids in zip(batch.pair_index.split(chunk_rows), wanted_M.split(chunk_rows)):
        log_q = (draft.logits(hidden_ND[pairs], draft_head).float() / temperature).log_softmax(-1)
        said = log_q.gather(1, ids.clamp(min=0)[:, None])[:, 0]
        found.append(said.masked_fill(ids < 0, -torch.inf))
    return torch.cat(found)


def accept(
    documents: list[HeldOut], chances_nK: list[torch.Tensor], draft_length: int
) -> Acceptance:
    """From the chance of every draft to be accepted, float64 [n,K] of each answer."""
    lengths = range(1, chances_nK[0].shape[1] + 1)
    walks = {length: walk(documents, chances_nK, length) for length in lengths}
    facts = summarise(walks[draft_length], draft_length)
    return Acceptance(
        acceptance_length={length: acceptance_length(w) or 0.0 for length, w in walks.items()},
        accepted_at=[share or 0.0 for share in facts["accepted_by_position"]],
        first_round=facts["first_round"] or 0.0,
        loop_free=facts["acceptance_length_loop_free"] or 0.0,
        loops=facts["loops"],
        answers=len(documents),
        tokens=[len(answer.ids) - 1 for answer in walks[draft_length]],
        rounds=[answer.rounds for answer in walks[draft_length]],
        prompts=[fingerprint(each.input_ids[~each.loss_mask].tolist()) for each in documents],
    )


def walk(
    documents: list[Document], chances_nK: list[torch.Tensor], draft_length: int
) -> list[Answer]:
    """The answers with the rounds, expected ones, in which a decoder would commit them.

    The first answer token comes from the prefill. A round drafts `draft_length` tokens at its
    anchor row t, commits the accepted ones and the target's next, as far as the answer goes: the
    k-th draft of row t is accepted, when those before it were, with chance [t,k-1], which is 0
    beyond the answer's end. Of `emitted` the answers have only the first round.
    """
    ids = [document.input_ids[document.loss_mask].tolist() for document in documents]
    # Anchors are the rows from the last of the prompt to the one that has a token to draft.
    anchors = [chance[-len(of) - 1 : -2] for chance, of in zip(chances_nK, ids, strict=True)]
    # [P,A,k]: the chance that at least k = 0 .. draft_length are accepted.
    reached_PAK = pad_sequence(anchors, batch_first=True)[..., :draft_length].cumprod(2)
    reached_PAK = F.pad(reached_PAK, (1, 0), value=1.0)
    emitted_PAK = reached_PAK - F.pad(reached_PAK[..., 1:], (0, 1))
    count, longest, width = reached_PAK.shape
    left_PA = torch.tensor([len(of) - 1 for of in ids])[:, None] - torch.arange(longest)
    begins_PA = F.pad(reached_PAK.new_ones(count, 1), (0, longest + width))
    for place in range(longest):
        reaches = slice(place + 1, place + 1 + width)
        begins_PA[:, reaches] += begins_PA[:, place, None] * emitted_PAK[:, place]
    begins_PA = begins_PA[:, :longest] * (left_PA > 0)
    accepted_PK = (begins_PA[..., None] * reached_PAK).sum(1)[:, 1:]
    first_P = (reached_PAK[:, :1] * (torch.arange(width) < left_PA[:, :1, None])).sum((1, 2))
    answers, rounds = [], begins_PA.sum(1).tolist()
    for number, (of, accepted) in enumerate(zip(ids, accepted_PK.tolist(), strict=True)):
        first = [float(first_P[number])] if rounds[number] else []
        answers.append(Answer(of, rounds[number], accepted, 0.0, "", first))
    return answers


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
