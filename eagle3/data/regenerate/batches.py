"""The target in this process answers a dataset again: without a server, for small targets and small
data.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from eagle3.data.regenerate import turns
from eagle3.data.regenerate.journal import Journal
from eagle3.data.rows import Message, RowError
from eagle3.data.sources import Row
from eagle3.evaluate import GREEDY, sample

Answer = Callable[[list[list[int]]], list[list[int]]]


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
    """Write `conversations.jsonl` and `rejects.jsonl` into `folder`; returns the facts. Raises
    RunError.

    Batches are of rows that follow each other and have a seed of their own, so an interrupted call,
    which leaves a journal, goes on to the same answers. Temperature 0 is greedy.
    """
    sampled = {
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p or 1.0,
        "top_k": top_k or 0,
    }

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        """At most up to the end of the target's context."""
        longest = max_new_tokens or run.config.data.max_length
        answers = sample(run.target, prompts, longest, sampled if temperature > 0 else GREEDY)
        context = run.target.config.max_position_embeddings
        return [ids[: context - len(prompt)] for prompt, ids in zip(prompts, answers, strict=True)]

    with Journal(folder) as journal:
        for first in count(0, batch_size):
            batch = [] if journal.complete else list(islice(rows, batch_size))
            if not batch:
                return journal.finish()
            if all(number in journal.offsets for number in range(first, first + len(batch))):
                continue
            torch.manual_seed(seed + first)
            answered = asyncio.run(answer_batch(run, batch, answer))
            for number, (row, entry) in enumerate(zip(batch, answered, strict=True), start=first):
                journal.write(number, row, entry)


async def answer_batch(run, rows: list[Row], answer: Answer) -> list[dict[str, Any]]:
    """Conversations side by side: all that ask are answered at once, until none asks any more."""
    asked: list[tuple[list[int], asyncio.Future]] = []

    async def complete(messages: list[Message], counts: Counter) -> Message:
        prompt = run.chat.encode_prompt(messages)
        if len(prompt) >= run.target.config.max_position_embeddings:
            raise RowError("the prompt is longer than the target's context")
        asked.append((prompt, asyncio.get_running_loop().create_future()))
        ids = await asked[-1][1]
        counts["answer_tokens"] += len(ids)
        text = run.chat.tokenizer.decode(ids, skip_special_tokens=True)
        if run.chat.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):
            text = "<think>" + text
        return turns.answer(text, None, truncated=ids[-1] not in run.target.eos_token_ids)

    system_prompt = run.config.data.system_prompt
    talks = [asyncio.create_task(turns.converse(complete, row, system_prompt)) for row in rows]
    await asyncio.sleep(0)  # each goes on until it asks or ends
    while asked:
        for (_, future), ids in zip(asked, answer([prompt for prompt, _ in asked]), strict=True):
            future.set_result(ids)
        asked.clear()
        await asyncio.sleep(0)
    return [talk.result() for talk in talks]
