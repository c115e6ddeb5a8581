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
from eagle3.data.rows import RowError, read_conversation
from eagle3.data.sources import SUFFIXES, DataFile, decode, find_files, raw_rows
from eagle3.errors import ConfigError, RunError


@dataclass
class Question:
    """A conversation up to the first turn to be answered, and the user's `later` turns.

    Or its `input_ids`. `reference` is what an answer is scored by; in a suite that can be shown as
    solved it is the solution.
    """

    messages: Messages = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    input_ids: list[int] | None = None
    reference: Any = None
    id: str = ""


@dataclass(frozen=True)
class Suite:
    """`source` on the hub (subset `*`: all, in order), `read` a row of it, `score` an answer.

    `read` raises RowError, KeyError, TypeError or ValueError for what is no row of the suite.
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
    """A row of one's own: prompts as `prepare` holds them out (`id`, `input_ids`), the user's
    `turns` or a `prompt`, or any conversation, of which the last user turn is asked.
    """
    # Prompts of `prepare` are what the target reads: a template around them would be a second one.
    if "input_ids" in row:
        return Question(input_ids=row["input_ids"], id=row["id"])
    turns = row.get("turns", row.get("prompt"))
    if turns is None or "messages" in row:
        return Question(read_conversation(row).messages)
    return user_turns(*([turns] if isinstance(turns, str) else turns))


def with_answer(question: str, row: dict) -> Question:
    """A row whose column `question` is asked, and `answer` is the reference."""
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
    """`name:num_prompts`, or `name` for all of them (None); a name is a suite's or a local file.

    Raises ConfigError.
    """
    # Only what stands behind the last colon is a count: paths may hold colons too.
    name, colon, count = re.fullmatch(r"(.*?)(?:(:)([^:/.]*))?", spec).groups()
    if name not in SUITES and not (name.endswith(SUFFIXES) and Path(name).is_file()):
        allowed = f"{', '.join(SUITES)} or a file that exists, each with :num_prompts"
        hint = nearest(name, list(SUITES))
        raise ConfigError(f"benchmark.suites={spec} is unknown; allowed: {allowed}{hint}")
    if colon and not (count.isdecimal() and int(count) > 0):
        wanted = "must be name:num_prompts with a number above 0"
        raise ConfigError(f"benchmark.suites={spec} {wanted}, such as {name}:48")
    return name, int(count) if colon else None


def load_questions(
    name: str, count: int | None, path: str | None, cache_dir: str
) -> list[Question]:
    """The first `count` questions of a suite, or as many as it has.

    They come from `path` where that is given, else from the hub or the file that `name` is. Raises
    RunError for a row that is none and for a suite without questions.
    """
    suite = SUITES.get(name, OWN)
    source = Source(path or name) if path or suite.source is None else suite.source
    questions = []
    for file in find_all_files(name, source, cache_dir):
        for line, raw, _ in raw_rows(file):
            try:
                question = suite.read(decode(raw))
            except (RowError, LookupError, TypeError, ValueError) as error:
                problem = f"not a question of the suite {name} ({error})"
                raise RunError(f"{file.name}, line {line}: {problem}") from error
            own_id = question.id or f"{Path(file.name).name}:{line}"
            questions.append(replace(question, id=own_id))
            if len(questions) == count:
                return questions
    if not questions:
        raise RunError(f"benchmark.suites names {name}, but {path or name} holds no question")
    return questions


def find_all_files(name: str, source: Source, cache_dir: str) -> Iterator[DataFile]:
    """The files of a source, subset by subset, so that no more is fetched than is read."""
    try:
        subsets = [source.subset]
        if source.subset == "*":
            from datasets import get_dataset_config_names

            subsets = get_dataset_config_names(source.path)
        for subset in subsets:
            yield from find_files(replace(source, subset=subset), cache_dir, "benchmark.suites")
    except ConfigError:
        raise
    except Exception as error:  # each file system and hub client raises its own kinds
        reason = " ".join(str(error.__cause__ or error).split())
        problem = f"{source.path} is no local file and cannot be fetched ({reason})"
        remedy = f"download it and set +benchmark.paths.{name}=<file>"
        raise RunError(f"benchmark.suites={name}: {problem}; {remedy}") from error
