"""Suites: named lists of prompts. A suite is a function that yields its questions; `SUITES` names them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from eagle3.data.chat import Chat, Messages, with_system
from eagle3.data.sources import Source, find_files, read_rows
from eagle3.errors import ConfigError, RunError


@dataclass
class Question:
    """What a suite asks: a conversation up to the turn to be answered, or its `input_ids` if it comes tokenised."""

    id: str
    messages: Messages | None = None
    input_ids: list[int] | None = None


@dataclass
class Prompt:
    """A question as the target gets it: `input_ids` int64 [n], with the header of the reply."""

    id: str
    suite: str
    input_ids: torch.Tensor


def heldout(path: str) -> Iterator[Question]:
    """Prompts as `prepare` holds them out (JSON Lines with `id` and `input_ids`), or the rows of a dataset."""
    if Path(path).name == "heldout.jsonl":
        for line in Path(path).read_text().splitlines():
            row = json.loads(line)
            yield Question(row["id"], input_ids=row["input_ids"])
        return
    for row in read_rows(find_files(Source(path), ".cache")):
        if row.conversation is None:
            raise RunError(f"{row.file}, line {row.line}: not a prompt of the suite heldout ({row.reason})")
        yield Question(f"{Path(row.file).name}:{row.line}", messages=row.conversation.messages)


SUITES: dict[str, Callable[[str], Iterator[Question]]] = {"heldout": heldout}


def parse(spec: str) -> tuple[str, int | None]:
    """`name:num_prompts`, or `name` for all of them (None). Raises ConfigError."""
    name, colon, count = spec.partition(":")
    if name not in SUITES:
        raise ConfigError(f"benchmark.suites={spec} is unknown; allowed: {', '.join(SUITES)}, each with :num_prompts")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"benchmark.suites={spec} must be name:num_prompts with a number above 0, such as {name}:48")
    return name, int(count) if colon else None


def load(specs: list[str], chat: Chat, heldout_path: str, system_prompt: str | None = None) -> list[Prompt]:
    """The first num_prompts prompts of every suite (fewer where it has fewer), in order.

    `system_prompt` goes before conversations that have none.
    """
    prompts = []
    for name, count in map(parse, specs):
        questions = list(islice(SUITES[name](heldout_path), count))
        if not questions:
            raise RunError(f"benchmark.suites names {name}, but {heldout_path} holds no prompt")
        prompts += [Prompt(q.id, name, tokenise(q, chat, system_prompt)) for q in questions]
    return prompts


def tokenise(question: Question, chat: Chat, system_prompt: str | None) -> torch.Tensor:
    """int64 [n]."""
    if question.input_ids is not None:
        if system_prompt is not None:
            raise ConfigError(
                f"benchmark.system_prompt cannot be put before {question.id}, which is tokenised already; "
                "set data.eval_path to conversations, or data.system_prompt instead"
            )
        return torch.tensor(question.input_ids)
    return torch.tensor(chat.encode_prompt(with_system(question.messages, system_prompt)))
