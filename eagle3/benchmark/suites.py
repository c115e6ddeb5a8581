"""Suites of questions. A suite is a data set and a function that reads its rows."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eagle3.benchmark import scoring
from eagle3.config import Source, nearest
from eagle3.data.chat import Messages
from eagle3.data.rows import read_conversation
from eagle3.data.sources import SUFFIXES, DataFile, decode, find_files, raw_rows
from eagle3.errors import ConfigError, RunError


@dataclass
class Question:
    """A conversation up to the first turn to be answered, or its `input_ids`; the `later` turns.

    `reference` is what an answer is scored by.
    """

    messages: Messages = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    input_ids: list[int] | None = None
    reference: Any = None
    id: str = ""


@dataclass(frozen=True)
class Suite:
    """`read` takes a row of `source` and raises LookupError, TypeError or ValueError if it is none.

    `runs_code`: scoring runs what the model wrote.
    """

    read: Callable[[dict], Question]
    source: Source | None = None
    score: Callable[[str, Any], bool] | None = None
    runs_code: bool = False


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return value


def user_turns(*turns: str, reference: Any = None) -> Question:
    first, *later = map(text, turns)
    return Question([{"role": "user", "content": first}], later, reference=reference)


def conversation(row: dict) -> Question:
    """`id` and `input_ids` of `prepare`, the user's `turns` or `prompt`, or any conversation."""
    # Prompts of `prepare` are what the target reads: a template around them would be a second one.
    if "input_ids" in row:
        return Question(input_ids=row["input_ids"], id=row["id"])
    turns = row.get("turns", row.get("prompt"))
    if turns is None or "messages" in row:
        return Question(read_conversation(row).messages)
    return user_turns(*([turns] if isinstance(turns, str) else turns))


def with_answer(question: str, row: dict) -> Question:
    return user_turns(row[question], reference=text(row["answer"]))


def humaneval(row: dict) -> Question:
    reference = {name: text(row[name]) for name in ("prompt", "test", "entry_point")}
    return user_turns(row["prompt"], reference=reference)


def ceval(row: dict) -> Question:
    """Question, options and the request to choose one, worded as in SpecForge's benchmark."""
    options = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
    asked = f"{row['question']}\n\n选项：\n{options}\n请从A、B、C、D中选择一个答案。"
    return user_turns(asked, reference=text(row["answer"]))


HUMANEVAL = Source("openai/openai_humaneval", None, "test")
MATH500 = Source("HuggingFaceH4/MATH-500", None, "test")
GSM8K = Source("openai/gsm8k", "main", "test")
SUITES = {
    "heldout": Suite(conversation),
    "mtbench": Suite(conversation, Source("HuggingFaceH4/mt_bench_prompts")),
    "gsm8k": Suite(partial(with_answer, "question"), GSM8K, scoring.gsm8k),
    "humaneval": Suite(humaneval, HUMANEVAL, scoring.humaneval, runs_code=True),
    "math500": Suite(partial(with_answer, "problem"), MATH500, scoring.math500),
    # Every subject; the answers of the test split are not public.
    "ceval": Suite(ceval, Source("ceval/ceval-exam", "*", "val"), scoring.ceval),
}
# A file of one's own is read as the held-out prompts are.
OWN = SUITES["heldout"]


def parse_suite(spec: str) -> tuple[str, int | None]:
    """`name:num_prompts`, or `name` for all (None), of a suite or a file. Raises ConfigError."""
    # Only what stands behind the last colon is a count: paths may hold colons too.
    name, colon, count = re.fullmatch(r"(.*?)(?:(:)([^:/.]*))?", spec).groups()
    if name not in SUITES and not (name.endswith(SUFFIXES) and Path(name).is_file()):
        allowed = f"{', '.join(SUITES)} or a file that exists{nearest(name, list(SUITES))}"
        raise ConfigError(f"benchmark.suites={spec} is unknown; allowed: {allowed}")
    if colon and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"benchmark.suites={spec} must end in a number above 0: {name}:48")
    return name, int(count) if colon else None


def load_questions(name: str, count: int | None, path: str | None, cache: str) -> list[Question]:
    """The first `count` questions of a suite, or all; from `path`, else the hub or the file `name`.

    Raises RunError for a row that is none and for a suite without questions.
    """
    suite = SUITES.get(name, OWN)
    source = Source(path or name) if path or suite.source is None else suite.source
    questions = []
    for file in find_all_files(name, source, cache):
        for line, raw, _ in raw_rows(file):
            try:
                question = suite.read(decode(raw))
            except (LookupError, TypeError, ValueError) as error:
                place = f"{file.name}, line {line}"
                raise RunError(f"{place}: no question of the suite {name} ({error})") from error
            question.id = question.id or f"{Path(file.name).name}:{line}"
            questions.append(question)
            if len(questions) == count:
                return questions
    if not questions:
        raise RunError(f"benchmark.suites names {name}, but {path or name} holds no question")
    return questions


def find_all_files(name: str, source: Source, cache: str) -> Iterator[DataFile]:
    """The files of a source, subset by subset, so that no more is fetched than is read."""
    try:
        subsets = [source.subset]
        if source.subset == "*":
            from datasets import get_dataset_config_names

            subsets = get_dataset_config_names(source.path)
        for subset in subsets:
            yield from find_files(replace(source, subset=subset), cache, "benchmark.suites")
    except ConfigError:
        raise
    except Exception as error:  # each file system and hub client raises its own kinds
        reason = " ".join(str(error.__cause__ or error).split())
        problem = f"benchmark.suites={name}: {source.path} cannot be fetched ({reason})"
        raise RunError(f"{problem}; download it, set +benchmark.paths.{name}=<file>") from error
