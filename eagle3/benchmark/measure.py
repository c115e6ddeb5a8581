"""The flow of every benchmark: suites x configs through an engine, then statistics, scores and
benchmark.json.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track

from eagle3.benchmark.protocols import PROTOCOLS, Manner, prompt_ids
from eagle3.benchmark.statistics import Answer, Trial, acceptance, equality, speed
from eagle3.benchmark.suites import OWN, SUITES, Question, load, parse
from eagle3.config import nearest
from eagle3.data.chat import Chat
from eagle3.errors import ConfigError, RunError

WARM_UP_TOKENS = 8
TIMING = "batch 1: decode only, prompts excluded; larger batches: from the first prompt to the last answer"
NOTHING_ACCEPTED = (
    "acceptance is exactly 1.0: no drafted token was ever accepted. Usual causes: the draft belongs to another target "
    "or chat template; the engine runs it as EAGLE, not EAGLE3; the engine did not find some of its tensors (check "
    "its log, or stages=[check]); auxiliary layers are off by one; d2t holds ids where the engine wants offsets"
)
console = Console(markup=False)


class Engine(Protocol):
    """A loaded target, with or without a draft, at one [batch, steps, topk, verify_tokens]."""

    def answer(
        self, prompts: list[list[int]], max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> list[Answer]:
        """One answer per prompt, in order, with up to `batch` requests in flight; ended before a
        text of `stop`.
        """

    def close(self) -> None:
        """Free what the opener took."""


Opener = Callable[[list[int]], Engine]
"""Called with [batch, steps, topk, verify_tokens]; steps 0 is the target alone."""


@dataclass
class Task:
    """A suite as it is asked: the manner, its questions, and those that are shown with their
    solutions.
    """

    name: str
    manner: Manner
    questions: list[Question]
    solved: list[Question]


def check(
    configs: list[list[int]],
    suites: list[str],
    protocol: str = "chat",
    system_prompt: str | None = None,
    paths: dict[str, str] | None = None,
) -> None:
    """Raises ConfigError for the first value under `benchmark` that no engine can run."""
    for config in configs:
        check_config(list(config))
    names = [parse(suite)[0] for suite in suites]
    if len(set(names)) < len(names):
        raise ConfigError(f"benchmark.suites={suites} names a suite twice; name each once")
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"benchmark.protocol={protocol} is unknown; allowed: {', '.join(PROTOCOLS)}"
            f"{nearest(protocol, list(PROTOCOLS))}"
        )
    for name in names:
        PROTOCOLS[protocol](name, system_prompt, None)
    for name, path in (paths or {}).items():
        if name not in SUITES:
            raise ConfigError(f"benchmark.paths.{name} is no suite; allowed: {', '.join(SUITES)}")
        if not os.path.exists(path):
            raise ConfigError(
                f"benchmark.paths.{name}={path} does not exist; give a local file or folder"
            )


def check_config(config: list[int]) -> None:
    if len(config) != 4 or not all(isinstance(number, int) for number in config):
        raise ConfigError(
            f"benchmark.configs={config} must be four numbers: batch, steps, topk, verify_tokens"
        )
    batch, steps, topk, verify_tokens = config
    alone = batch >= 1 and config[1:] == [0, 0, 0]
    chain = batch >= 1 and steps >= 1 and topk == 1 and verify_tokens == steps + 1
    nodes = (
        topk + (steps - 1) * topk * topk
    )  # what a round drafts: topk children of topk nodes at each further step
    tree = batch >= 1 and steps >= 1 and topk > 1 and 2 <= verify_tokens <= nodes + 1
    if not (alone or chain or tree):
        raise ConfigError(
            f"benchmark.configs={config} is none of [batch, 0, 0, 0] (the target alone), [batch, steps, 1, steps + 1] "
            f"(a chain) and [batch, steps, topk, verify_tokens] (a tree, verify_tokens 2 to {max(nodes, 1) + 1})"
        )


def run(
    job,
    opener: Opener,
    configs: list[list[int]],
    suites: list[str],
    max_new_tokens: int | None,
    temperature: float,
    system_prompt: str | None = None,
    protocol: str = "chat",
    execute_code: bool = False,
    paths: dict[str, str] | None = None,
    facts: dict[str, Any] | None = None,
    together: bool = False,
    further: Callable[[list[Trial], list[Trial], int], dict] | None = None,
) -> dict:
    """The stage `benchmark` of `job`, an `eagle3.pipeline.Run`: writes benchmark.json and returns
    what it holds.

    `opener` is called once per config and once per batch for the target alone, and must see to
    `temperature` itself. `max_new_tokens` None: what the protocol says. `facts` of the engine
    (runner, version, device, dtype, ...) go into benchmark.json's `protocol`. `together`: the
    engines of one batch may be open at the same time, and then take turns at every group of
    questions; else one config is measured after the other. `further(drafted, alone, steps)` adds to
    a row.
    """
    configs, suites = [list(config) for config in configs], list(suites)
    check(configs, suites, protocol, system_prompt, paths)
    tasks = [
        prepare(job, spec, protocol, system_prompt, max_new_tokens, paths or {}) for spec in suites
    ]
    measured: dict[tuple[int, ...], dict[str, list[Trial]]] = {}
    asked = (
        {"suites": suites, "protocol": protocol} | described(tasks) | {"template": template(job)}
    )
    asked |= {
        "temperature": temperature,
        "seed": job.config.seed,
        "drafting": drafting(configs),
        "timing": TIMING,
    }
    asked |= {"device": device_name(job.device)} | (facts or {})

    def row(task: Task, config: list[int]) -> dict:
        drafted, alone = (measured[key][task.name] for key in (tuple(config), (config[0], 0, 0, 0)))
        found = {"config": config, "num_prompts": len(drafted)}
        found |= acceptance(drafted, config[1], job.config.seed) | speed(
            drafted, alone, job.config.seed
        )
        found |= equality(drafted, alone) if temperature == 0 else {"lossless": None}
        found |= scores(task.name, drafted, alone, execute_code)
        found |= further(drafted, alone, config[1]) if further else {}
        return found | warning(task.name, found)

    def write() -> dict:
        done = [
            config for config in configs if {tuple(config), (config[0], 0, 0, 0)} <= measured.keys()
        ]
        rows = {task.name: [row(task, config) for config in done] for task in tasks}
        path, result = job.run_dir / "benchmark.json", {"suites": rows, "protocol": asked}
        path.with_suffix(".partial").write_text(json.dumps(result, indent=1, allow_nan=False))
        os.replace(path.with_suffix(".partial"), path)
        return result

    try:
        for opened in in_order(configs, together):
            for config, trials in zip(opened, answer(opener, opened, tasks, job.chat), strict=True):
                measured[tuple(config)] = trials
    except (ConfigError, RunError, KeyboardInterrupt):
        if any(tuple(config) in measured for config in configs):
            write()  # hours may have gone into what was measured before it ended
        raise
    return write()


def prepare(
    job,
    spec: str,
    protocol: str,
    system_prompt: str | None,
    max_new_tokens: int | None,
    paths: dict[str, str],
) -> Task:
    """A suite with its questions and how they are asked."""
    (name, count), data = parse(spec), job.config.data
    manner = PROTOCOLS[protocol](name, system_prompt, data.system_prompt)
    path = paths.get(name)
    if name == "heldout" and path is None:
        # what `prepare` holds out is tokenised with data.system_prompt; another one needs the
        # conversations
        as_prepared = manner.system_prompt == data.system_prompt
        path = str(job.prepared_path / "heldout.jsonl") if as_prepared else data.eval_path
        if path is None:
            raise ConfigError(
                "benchmark.suites: heldout is tokenised with data.system_prompt; to ask it otherwise (by "
                "benchmark.system_prompt or benchmark.protocol) set data.eval_path to conversations"
            )
    if max_new_tokens is not None:
        manner = replace(manner, max_new_tokens=max_new_tokens)
    questions = load(name, count and max(count, manner.shots), path, job.config.cache_dir)
    return Task(name, manner, questions[:count], questions[: manner.shots])


def in_order(configs: list[list[int]], together: bool) -> list[list[list[int]]]:
    """The configs that are open at the same time, the target alone at every batch among them."""
    groups = []
    for batch in dict.fromkeys(config[0] for config in configs):
        groups.append(
            [
                [batch, 0, 0, 0],
                *(config for config in configs if config[0] == batch and config[1] > 0),
            ]
        )
    if together:
        return groups
    # a server restarts only where more than the batch changes
    return [
        [config] for config in sorted(chain.from_iterable(groups), key=lambda config: config[1:])
    ]


def answer(
    opener: Opener, configs: list[list[int]], tasks: list[Task], chat: Chat
) -> list[dict[str, list[Trial]]]:
    """The trials of every config and suite. All configs are open at once; the order in which they
    answer a group of questions turns round from group to group, so that a machine that grows slower
    favours none.
    """
    trials = [{task.name: [] for task in tasks} for _ in configs]
    # a server with a batch is kept busy: its questions are given all at once
    size = (
        configs[0][0]
        if len(configs) > 1 or configs[0][0] == 1
        else max(len(task.questions) for task in tasks)
    )
    groups = [
        (t, t.questions[i : i + size]) for t in tasks for i in range(0, len(t.questions), size)
    ]
    name = "benchmark" if len(configs) > 1 else f"benchmark {configs[0]}"
    with ExitStack() as stack:
        engines = [stack.enter_context(closing(opener(config))) for config in configs]
        for engine, (batch, *_) in zip(engines, configs, strict=True):
            warm_up(engine, tasks[0], batch, chat)
        for number, (task, group) in enumerate(track(groups, description=name, transient=True)):
            for i in list(range(len(engines)))[:: 1 if number % 2 == 0 else -1]:
                trials[i][task.name] += ask(engines[i], group, task, configs[i][0], chat)
    return trials


def warm_up(engine: Engine, task: Task, batch: int, chat: Chat) -> None:
    prompts = [prompt_ids(q, [], task.manner, task.solved, chat) for q in task.questions[:batch]]
    engine.answer(prompts, min(WARM_UP_TOKENS, task.manner.max_new_tokens))


def ask(
    engine: Engine, questions: list[Question], task: Task, batch: int, chat: Chat
) -> list[Trial]:
    """All turns of these questions, each after the engine's own answers to the turns before.

    Answers that overlap in time share it in proportion to their own seconds.
    """
    trials, manner, wall = [Trial(question) for question in questions], task.manner, 0.0
    for turn in range(1 + max(len(question.later) for question in questions)):
        going = [trial for trial in trials if turn <= len(trial.question.later)]
        said = [[answer.text for answer in trial.answers] for trial in going]
        prompts = [
            prompt_ids(t.question, texts, manner, task.solved, chat)
            for t, texts in zip(going, said, strict=True)
        ]
        began = time.perf_counter()
        answers = engine.answer(prompts, manner.max_new_tokens, manner.stop)
        wall += time.perf_counter() - began
        for trial, prompt, given in zip(going, prompts, answers, strict=True):
            trial.prompts.append(prompt)
            trial.answers.append(given)
            trial.seconds += given.seconds
    total = sum(trial.seconds for trial in trials)
    if batch > 1 and total > 0:
        for trial in trials:
            trial.seconds *= wall / total
    return trials


def scores(name: str, drafted: list[Trial], alone: list[Trial], execute_code: bool) -> dict:
    """Share of right first answers with the draft and without, where the suite can be scored."""
    suite = SUITES.get(name, OWN)
    if suite.score is None or (suite.runs_code and not execute_code):
        return {}
    right = {}
    for trial in [*drafted, *alone]:
        key = trial.question.id, trial.answers[0].text
        if key not in right:
            right[key] = suite.score(trial.answers[0].text, trial.question.reference)
    count, baseline = (
        sum(right[t.question.id, t.answers[0].text] for t in trials) for trials in (drafted, alone)
    )
    return {
        "score": count / len(drafted),
        "baseline_score": baseline / len(alone),
        "num_scored": len(drafted),
    }


def warning(name: str, row: dict) -> dict[str, str]:
    """What the row should make one doubt; printed too."""
    if row["config"][1] == 0 or row["acceptance_length"] != 1:
        return {}
    console.print(
        f"benchmark: {name} {row['config']}: {NOTHING_ACCEPTED}", style="yellow", soft_wrap=True
    )
    return {"warning": NOTHING_ACCEPTED}


def described(tasks: list[Task]) -> dict[str, Any]:
    """How the suites were asked: a value where all agree, else one per suite."""
    manners = {task.name: asdict(task.manner) | {"stop": list(task.manner.stop)} for task in tasks}
    found = {}
    for key in ("max_new_tokens", "system_prompt", "shots", "stop"):
        values = {name: manner[key] for name, manner in manners.items()}
        first = next(iter(values.values()))
        found[key] = first if all(value == first for value in values.values()) else values
    return found


def template(job) -> str:
    """Which chat template the prompts went through, and the beginning of its digest."""
    return f"{job.config.data.chat_template}, sha256 {sha256(job.chat.template.encode()).hexdigest()[:12]}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def drafting(configs: list[list[int]]) -> str:
    kinds = {"chain" if topk == 1 else "tree" for _, steps, topk, _ in configs if steps > 0}
    return " and ".join(sorted(kinds)) or "none"
