"""Suites of questions, a data set and a function that reads its rows, and how they are asked."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from eagle3.benchmark import scoring
from eagle3.config import Source, nearest
from eagle3.data.chat import Chat, Messages, with_system
from eagle3.data.rows import read_conversation
from eagle3.data.sources import SUFFIXES, DataFile, decode, find_files, raw_rows
from eagle3.errors import ConfigError, RunError


@dataclass
class Question:
    """A conversation up to the first turn to be answered, or its `input_ids`; the `later` turns."""

    messages: Messages = field(default_factory=list)
    later: list[str] = field(default_factory=list)
    input_ids: list[int] | None = None
    reference: Any = None  # what an answer is scored by; None: it is not
    id: str = ""
    category: str = ""


@dataclass(frozen=True)
class Suite:
    """`read` takes a row of `source`; LookupError, TypeError or ValueError say that it is none."""

    read: Callable[[dict], Question]
    source: Source | None = None
    score: Callable[[str, Any], bool] | None = None
    runs_code: bool = False  # scoring runs what the model wrote


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return value


def one_turn(question: str, reference: Any) -> Question:
    return Question([{"role": "user", "content": text(question)}], reference=reference)


def conversation(row: dict) -> Question:
    """`id` and `input_ids` of `prepare`, one `prompt` or several, or any conversation."""
    if "input_ids" in row:
        return Question(input_ids=row["input_ids"], id=row["id"])  # behind a template already
    if row.get("prompt") is not None and "messages" not in row:
        row = {"turns": listed(row["prompt"])}
    messages = read_conversation(row).messages
    roles = [message["role"] for message in messages]
    # Of questions in turn the first is asked, and each other one behind the answers.
    first = len(roles) if "assistant" in roles else roles.index("user") + 1
    return Question(messages[:first], [message["content"] for message in messages[first:]])


def listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def read_question(row: dict, suite: Suite) -> Question:
    """By the suite's own columns, or as EAGLE's files have any suite: `turns` and `reference`."""
    if row.get("turns") and "messages" not in row:
        turns = listed(row["turns"])
        if any(str(turn).startswith(PLACEHOLDER) for turn in turns):
            remedy = "fill it with NVIDIA's prepare_data.py, set +benchmark.paths to the file"
            raise ValueError(f"a text that SPEED-Bench may not give on is missing: {remedy}")
        question = conversation({"turns": turns})
        # Code is scored by tests, which these files lack.
        references = [] if suite.runs_code else listed(row.get("reference") or [])
        question.reference = str(references[0]) if references else None
    else:
        question = suite.read(row)
    question.category = str(row.get("category") or "")
    return question


def with_answer(question: str, row: dict) -> Question:
    return one_turn(row[question], text(row["answer"]))


def humaneval(row: dict) -> Question:
    reference = {name: text(row[name]) for name in ("prompt", "test", "entry_point")}
    return one_turn(row["prompt"], reference)


def ceval(row: dict) -> Question:
    """Question, options and the request to choose one, worded as in SpecForge's benchmark."""
    options = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
    asked = f"{row['question']}\n\n选项：\n{options}\n请从A、B、C、D中选择一个答案。"
    return one_turn(asked, text(row["answer"]))


EAGLE = "https://raw.githubusercontent.com/SafeAILab/EAGLE/main/eagle/data/{}/question.jsonl"
HUMANEVAL = Source("openai/openai_humaneval", None, "test")
MATH500 = Source("HuggingFaceH4/MATH-500", None, "test")
GSM8K = Source("openai/gsm8k", "main", "test")
# arXiv 2604.09557: 80 questions of each of 11 domains, and 1,536 of about so many tokens each, by
# entropy. Rows whose texts have a licence of their own hold this instead, until NVIDIA's script
# (Model-Optimizer, examples/specdec_bench) has written them to a file.
SPEED, SPEED_SIZES = "nvidia/SPEED-Bench", ("1k", "2k", "8k", "16k", "32k")
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
SUITES = {
    "heldout": Suite(conversation),
    "mtbench": Suite(conversation, Source("HuggingFaceH4/mt_bench_prompts")),
    "gsm8k": Suite(partial(with_answer, "question"), GSM8K, scoring.gsm8k),
    "humaneval": Suite(humaneval, HUMANEVAL, scoring.humaneval, runs_code=True),
    "math500": Suite(partial(with_answer, "problem"), MATH500, scoring.math500),
    "alpaca": Suite(conversation, Source(EAGLE.format("alpaca"))),
    "qa": Suite(conversation, Source(EAGLE.format("qa"))),
    # Every subject; the answers of the test split are not public.
    "ceval": Suite(ceval, Source("ceval/ceval-exam", "*", "val"), scoring.ceval),
    "speed": Suite(conversation, Source(SPEED, "qualitative", "test")),
}
for size in SPEED_SIZES:
    SUITES[f"speed_{size}"] = Suite(conversation, Source(SPEED, f"throughput_{size}", "test"))


def parse_suite(spec: str) -> tuple[str, int | None]:
    """`name:num_prompts`, `name:all` or `name` (None), of a suite or a file. Raises ConfigError."""
    # Only what stands behind the last colon is a count: paths may hold colons too.
    name, colon, count = re.fullmatch(r"(.*?)(?:(:)([^:/.]*))?", spec).groups()
    if name not in SUITES and not (name.endswith(SUFFIXES) and Path(name).is_file()):
        allowed = f"{', '.join(SUITES)} or a file that exists{nearest(name, list(SUITES))}"
        problem = f"benchmark.suites={spec} is unknown; allowed: {allowed}"
        raise ConfigError(f"{problem}; a suite's local copy is +benchmark.paths.<suite>=<file>")
    if not colon or count == "all":
        return name, None
    if not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"benchmark.suites={spec} must end in a number above 0: {name}:48")
    return name, int(count)


def load_questions(name: str, path: str | None, cache: str) -> list[Question]:
    """All questions of `path`, else of the hub or file `name`. Raises RunError."""
    # A file of one's own is read as the held-out prompts are.
    suite = SUITES.get(name, SUITES["heldout"])
    source = Source(path or name) if path or suite.source is None else suite.source
    questions = []
    for file in find_all_files(name, source, cache):
        for line, raw, _ in raw_rows(file):
            row = {}
            try:
                row = decode(raw)
                question = read_question(row, suite)
            except (LookupError, TypeError, ValueError) as error:
                reason = f"it has no {error}" if isinstance(error, LookupError) else error
                if row:
                    reason = f"{reason}; it has {', '.join(map(repr, [*row][:8]))}"
                place = f"{file.name}, line {line}"
                raise RunError(f"{place}: no question of the suite {name} ({reason})") from error
            question.id = question.id or f"{Path(file.name).name}:{line}"
            questions.append(question)
    if not questions:
        raise RunError(f"benchmark.suites names {name}, but {path or name} holds no question")
    return questions


def draw(questions: list[Question], count: int | None, seed: int) -> list[Question]:
    """`count` of them (None: all), even over categories, in their order; more hold the fewer."""
    order = random.Random(seed).sample(range(len(questions)), len(questions))
    before, rank = Counter(), {}
    for index in order:
        category = questions[index].category
        rank[index] = before[category]
        before[category] += 1
    chosen = sorted(order, key=rank.get)[:count]
    return [questions[index] for index in sorted(chosen)]


def find_all_files(name: str, source: Source, cache: str) -> Iterator[DataFile]:
    """The files of all subsets of a source."""
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


@dataclass(frozen=True)
class Setup:
    """Through the chat template, or a plain text behind `shots` solved questions, up to `stop`."""

    max_new_tokens: int
    system_prompt: str | None = None
    shots: int = 0
    stop: tuple[str, ...] = ()


SETUPS: dict[str, dict[str, Setup]] = {  # by protocol and suite; "" is every other suite
    # The plain question, behind the system prompt that the draft was trained with.
    "chat": {"": Setup(1024)},
    # What SpecForge's benchmarks of 2025 ask, whose numbers SpecBundle publishes. GSM8K is a raw
    # completion behind the first five rows of its own test split, which here are not asked too. Its
    # acceptance length divides all tokens by the rounds; ours leaves out the first token, so it is
    # lower by less than a percent.
    "specforge": {
        "": Setup(2048),
        "mtbench": Setup(2048, "llama2"),
        "gsm8k": Setup(512, shots=5, stop=("Question", "Assistant:", "<|separator|>")),
        "humaneval": Setup(1024),
    },
    # EAGLE's evaluation of Llama-3 chat models. Its scripts name 1024 new tokens, but do not hand
    # them to the decoder, which then ends at 512: benchmark.max_new_tokens=512 does what they do.
    "eagle": {"": Setup(1024, "llama2")},
}
# By protocol, what its trees are deeper than the number in benchmark.configs: EAGLE's `depth` does
# not count the first level, as steps do here and in SGLang. Its chains are cut by `total_token`.
MORE_STEPS = {"eagle": 1}


def setup_of(protocol: str, suite: str, asked: str | None, trained_with: str | None) -> Setup:
    """`asked` is benchmark.system_prompt; `trained_with` is data.system_prompt."""
    setup = SETUPS[protocol].get(suite, SETUPS[protocol][""])
    if protocol != "chat":
        return setup
    return replace(setup, system_prompt=trained_with if asked is None else asked)


@dataclass
class Task:
    """A suite and how it is asked; `examples` are shown with their solutions, for shots."""

    name: str
    setup: Setup
    count: int | None  # of questions to ask; None: all
    questions: list[Question] = field(default_factory=list)
    examples: list[Question] = field(default_factory=list)

    def take(self, questions: list[Question], seed: int) -> None:
        """Show the first, where there are shots, and ask some of the others. Raises RunError."""
        shots = self.setup.shots
        self.examples, others = questions[:shots], questions[shots:]
        if not others or any(example.reference is None for example in self.examples):
            needs = f"{shots} solved questions to show, and others to ask"
            raise RunError(f"benchmark.suites={self.name} needs {needs}; its file lacks them")
        self.questions = draw(others, self.count, seed)

    def prompt_ids(self, question: Question, answers: list[str], chat: Chat) -> list[int]:
        """What the target reads for the turn behind `answers`, its own to the turns before."""
        if question.input_ids is not None:
            return question.input_ids
        if self.setup.shots:
            shown = [f"{plain_text(example)} {example.reference}\n\n" for example in self.examples]
            return chat.tokenizer("".join(shown) + plain_text(question)).input_ids
        messages = with_system(question.messages, self.setup.system_prompt)
        for answer, turn in zip(answers, question.later, strict=False):
            answered = {"role": "assistant", "content": answer.strip()}
            messages = [*messages, answered, {"role": "user", "content": turn}]
        return chat.encode_prompt(messages)


def plain_text(question: Question) -> str:
    return f"Question: {question.messages[0]['content']}\nAnswer:"
