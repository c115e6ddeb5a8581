"""The target in this process answers a dataset again: without a server, for small targets and small data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row
from eagle3.errors import ConfigError
from eagle3.regenerate import turns
from eagle3.regenerate.journal import Journal
from eagle3.regenerate.meter import Meter
from eagle3.target.hf import HFTarget


@dataclass
class Talk:
    """A row under way: what is `left` to say, what was `spoken`, and why it ended early."""

    row: Row
    left: list[Message]
    spoken: list[Message] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None

    def next_prompt(self, run) -> list[int] | None:
        """The ids up to the next answer; None where there is none to come."""
        if self.reason or (self.spoken and self.spoken[-1].get("truncated")):
            return None
        while self.left:
            self.spoken.append(self.left.pop(0))
            if self.spoken[-1]["role"] == "user":
                return self.encode(run)
        return None

    def encode(self, run) -> list[int] | None:
        try:
            ids = run.chat.encode_prompt(turns.history(self.spoken))
        except RowError as error:
            self.reason = str(error)
            return None
        if len(ids) >= run.target.config.max_position_embeddings:
            self.reason = "the prompt is longer than the target's context"
            return None
        return ids

    def hear(self, run, prompt: list[int], ids: list[int]) -> None:
        """Take the target's answer to `prompt`; it is truncated where it ends without the end of a turn."""
        truncated = ids[-1] not in run.target.eos_token_ids
        text = run.chat.tokenizer.decode(ids, skip_special_tokens=True)
        if run.chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):
            text = "<think>" + text
        answer = turns.answer(text, None, truncated)
        if answer is None:
            self.reason = "empty answer"
            return
        self.spoken.append(answer)
        self.tokens += len(ids)


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
    total: int | None = None,
) -> dict[str, Any]:
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises ConfigError, RunError.

    Batches are of rows that follow each other and have a seed of their own, so an interrupted call, which leaves a
    journal, goes on to the same answers. Temperature 0 is greedy.
    """
    check(batch_size, max_new_tokens, temperature)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0, "top_k": top_k or 0}
    sampling["max_new_tokens"] = max_new_tokens or run.config.data.max_length
    journal = Journal(folder)
    try:
        if journal.facts is None:
            with Meter(total, journal.done) as meter:
                for number, batch in enumerate(batches(run, journal, meter, rows, batch_size)):
                    torch.manual_seed(seed + number)
                    answer_batch(run, journal, meter, batch, sampling)
        return journal.finish()
    finally:
        journal.close()


def check(batch_size: int, max_new_tokens: int | None, temperature: float) -> None:
    """Raises ConfigError for values that cannot work."""
    if batch_size < 1:
        raise ConfigError(f"regenerate.batch_size={batch_size} must be at least 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"regenerate.max_new_tokens={max_new_tokens} must be at least 1, or null")
    if temperature < 0:
        raise ConfigError(f"regenerate.temperature={temperature} must be at least 0")


def batches(run, journal: Journal, meter: Meter, rows: Iterator[Row], batch_size: int) -> Iterator[list[Talk]]:
    """`batch_size` usable rows at a time, finished or not, so that batches are the same after an interruption."""
    batch: list[Talk] = []
    for row, finished in journal.once(rows):
        try:
            batch.append(Talk(row, turns.prompts(row, run.config.data.system_prompt)))
        except RowError as error:
            if not finished:
                journal.reject(row, str(error))
                meter.row()
            continue
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def answer_batch(run, journal: Journal, meter: Meter, batch: list[Talk], sampling: dict[str, Any]) -> None:
    """Answer all conversations of a batch turn by turn, unless all were finished before."""
    unfinished = [talk for talk in batch if not journal.is_finished(talk.row)]
    if not unfinished:
        return
    while asked := [(talk, prompt) for talk in batch if (prompt := talk.next_prompt(run))]:
        answers = sample(run.target, [prompt for _, prompt in asked], sampling)
        for (talk, prompt), ids in zip(asked, answers, strict=True):
            talk.hear(run, prompt, ids)
    for talk in unfinished:
        if talk.reason:
            journal.reject(talk.row, talk.reason)
            meter.row()
        else:
            journal.answer(talk.row, talk.spoken, {"answer_tokens": talk.tokens}, {})
            meter.row(sum(m["role"] == "assistant" for m in talk.spoken), talk.tokens)


@torch.no_grad()
def sample(target: HFTarget, prompts: list[list[int]], sampling: dict[str, Any]) -> list[list[int]]:
    """Answers to a batch of prompts, at most up to the end of the target's context; an end of turn is kept."""
    eos = target.eos_token_ids
    pad = min(eos, default=0)
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=target.device)
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
    output = target.generate(
        input_ids,
        attention_mask=attention_mask,
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
