"""The target in this process answers a dataset again: without a server, for small targets and small data."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row
from eagle3.regenerate import turns
from eagle3.regenerate.journal import Journal
from eagle3.target.hf import HFTarget


@dataclass
class Talk:
    """A row under way: what is `left` to say, what was `spoken`, and why it ended early."""

    left: list[Message]
    spoken: list[Message] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None


def builtin(
    run,
    rows: Iterator[Row],
    folder: Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises RunError.

    Batches are of rows that follow each other and have a seed of their own, so an interrupted call, which leaves a
    journal, goes on to the same answers. Temperature 0 is greedy.
    """
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": top_k or 0}
    sampling["max_new_tokens"] = max_new_tokens or run.config.data.max_length
    with Journal(folder) as journal:
        for first in count(0, batch_size):
            batch = {} if journal.complete else dict(enumerate(islice(rows, batch_size), first))
            if not batch:
                return journal.finish()
            if batch.keys() <= journal.offsets.keys():
                continue
            torch.manual_seed(seed + first)
            for (number, row), talk in zip(batch.items(), answer_batch(run, batch.values(), sampling), strict=True):
                journal.write(number, row, talk.spoken, talk.reason, Counter(answer_tokens=talk.tokens))


def answer_batch(run, rows: Iterator[Row], sampling: dict[str, Any]) -> list[Talk]:
    """Conversations, all answered turn by turn."""
    talks = []
    for row in rows:
        try:
            talks.append(Talk(turns.prompts(row, run.config.data.system_prompt)))
        except RowError as error:
            talks.append(Talk([], reason=str(error)))
    while asked := [(talk, prompt) for talk in talks if (prompt := next_prompt(run, talk))]:
        for (talk, prompt), ids in zip(asked, sample(run.target, [p for _, p in asked], sampling), strict=True):
            hear(run, talk, prompt, ids)
    return talks


def next_prompt(run, talk: Talk) -> list[int] | None:
    """The ids up to the next answer; None where there is none to come."""
    if talk.reason or (talk.spoken and talk.spoken[-1].get("truncated")):
        return None
    while talk.left:
        talk.spoken.append(talk.left.pop(0))
        if talk.spoken[-1]["role"] == "user":
            break
    else:
        return None
    try:
        ids = run.chat.encode_prompt(turns.history(talk.spoken))
        if len(ids) >= run.target.config.max_position_embeddings:
            raise RowError("the prompt is longer than the target's context")
    except RowError as error:
        talk.reason = str(error)
        return None
    return ids


def hear(run, talk: Talk, prompt: list[int], ids: list[int]) -> None:
    """Take the target's answer to `prompt`; it is truncated where it ends without the end of a turn."""
    text = run.chat.tokenizer.decode(ids, skip_special_tokens=True)
    if run.chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):
        text = "<think>" + text
    answer = turns.answer(text, None, truncated=ids[-1] not in run.target.eos_token_ids)
    if answer is None:
        talk.reason = "empty answer"
        return
    talk.spoken.append(answer)
    talk.tokens += len(ids)


@torch.no_grad()
def sample(target: HFTarget, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
    """Answers to a batch of prompts, at most up to the end of the target's context; an end of turn is kept."""
    eos = target.eos_token_ids
    pad = min(eos, default=0)
    width = max(map(len, prompts))
    output = target.generate(
        torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=target.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device),
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(eos) or None,
        pad_token_id=pad,
        **sampling,
    )
    answers = []
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        answers.append(row[: min(end, target.config.max_position_embeddings - len(prompt))])
    return answers
