"""Every benchmark: suites x configs, then statistics, scores and benchmark.json."""

import json
import os
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from eagle3.benchmark.protocols import Setup, Task, setup_of
from eagle3.benchmark.request import Request, Subject
from eagle3.benchmark.statistics import Trial, acceptance, equality, speed
from eagle3.benchmark.suites import OWN, SUITES, Question, load_questions, parse_suite
from eagle3.data.chat import Chat
from eagle3.errors import ConfigError, RunError

WARM_UP_TOKENS = 8
TIMING = (
    "batch 1: decode only, prompts excluded; larger batches: from the first prompt to the last "
    "answer"
)
NOTHING_ACCEPTED = (
    "acceptance is exactly 1.0: no drafted token was ever accepted. Usual causes: the draft "
    "belongs to another target or chat template; the engine runs it as EAGLE, not EAGLE3; the "
    "engine did not find some of its tensors (check its log, or stages=[check]); auxiliary layers "
    "are off by one; d2t holds ids where the engine wants offsets"
)
console = Console(markup=False)


def benchmark(request: Request, subject: Subject, run_dir: Path) -> dict[str, Any]:
    """Measure a draft, and the target alone; write benchmark.json and return its content.

    The target alone, the baseline, is measured at every batch of the configs. Raises ConfigError
    and RunError; what was measured before is written then too.
    """
    tasks = [prepare_task(suite, request, subject) for suite in request.suites]
    digest = sha256(subject.chat.template.encode()).hexdigest()[:12]
    facts = {"suites": request.suites, "protocol": request.protocol}
    facts |= describe_setups(tasks)
    facts |= {
        "template": f"{subject.data.chat_template}, sha256 {digest}",
        "temperature": request.temperature,
        "seed": subject.seed,
        "drafting": kinds_of_drafting(request.configs),
        "timing": TIMING,
    }
    with closing(request):
        facts |= request.start(subject, run_dir)
        results = Results(request, facts, run_dir / "benchmark.json")
        try:
            for group in in_order(request.configs, request.simultaneous):
                trials = measure(request, group, tasks, subject.chat)
                for config, by_suite in zip(group, trials, strict=True):
                    results.trials[tuple(config)] = by_suite
        except (ConfigError, RunError, KeyboardInterrupt):
            # Hours may have gone into what was measured so far.
            if any(tuple(config) in results.trials for config in request.configs):
                results.write()
            raise
        return results.write()


@dataclass
class Results:
    """What was measured so far: of each config the trials of every suite, by its name."""

    request: Request
    facts: dict[str, Any]
    path: Path
    trials: dict[tuple[int, ...], dict[str, list[Trial]]] = field(default_factory=dict)

    def write(self) -> dict[str, Any]:
        """Write and return benchmark.json, with the configs whose baseline is there too."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for config in self.request.configs:
            drafted = self.trials.get(tuple(config), {})
            baseline = self.trials.get((config[0], 0, 0, 0), {})
            for suite in drafted if baseline else ():
                row = self.row(suite, config, drafted[suite], baseline[suite])
                rows.setdefault(suite, []).append(row)
        result = {"suites": rows, "protocol": self.facts}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1, allow_nan=False))
        os.replace(partial, self.path)
        return result

    def row(
        self, suite: str, config: list[int], drafted: list[Trial], baseline: list[Trial]
    ) -> dict[str, Any]:
        request, seed, steps = self.request, self.facts["seed"], config[1]
        row = {"config": config, "num_prompts": len(drafted)}
        row |= acceptance(drafted, steps, seed) | speed(drafted, baseline, seed)
        # Sampled answers differ by chance.
        row |= equality(drafted, baseline) if request.temperature == 0 else {"lossless": None}
        row |= scores(suite, drafted, baseline, request.execute_code)
        row |= request.extra_columns(drafted, baseline, steps)
        if steps > 0 and row["acceptance_length"] == 1:
            row["warning"] = NOTHING_ACCEPTED
            line = f"benchmark: {suite} {config}: {NOTHING_ACCEPTED}"
            console.print(line, style="yellow", soft_wrap=True)
        return row


def prepare_task(suite: str, request: Request, subject: Subject) -> Task:
    """A suite of benchmark.suites with its questions. Raises ConfigError and RunError."""
    name, count = parse_suite(suite)
    data = subject.data
    setup = setup_of(request.protocol, name, request.system_prompt, data.system_prompt)
    path = request.paths.get(name)
    if name == "heldout" and path is None:
        path = heldout_path(setup, subject)
    if request.max_new_tokens is not None:
        setup = replace(setup, max_new_tokens=request.max_new_tokens)
    wanted = count and max(count, setup.shots)
    questions = load_questions(name, wanted, path, subject.cache_dir)
    return Task(name, setup, questions[:count], questions[: setup.shots])


def heldout_path(setup: Setup, subject: Subject) -> str:
    """The held-out prompts are tokenised: behind another system prompt, conversations are asked."""
    if setup.system_prompt != subject.data.system_prompt:
        if subject.data.eval_path is None:
            raise ConfigError(
                "benchmark.suites: heldout is tokenised with data.system_prompt; to ask it "
                "otherwise (by benchmark.system_prompt or benchmark.protocol) set data.eval_path "
                "to conversations"
            )
        return subject.data.eval_path
    if subject.heldout is None:
        raise ConfigError(
            "benchmark.suites: heldout asks the prompts that the data holds out, and there are "
            "none yet: add prepare to stages, or name other suites"
        )
    return str(subject.heldout)


def in_order(configs: list[list[int]], simultaneous: bool) -> list[list[list[int]]]:
    """Groups of configs that are open at the same time, the baseline of every batch included."""
    groups = []
    for batch in dict.fromkeys(config[0] for config in configs):
        drafting = [config for config in configs if config[0] == batch and config[1] > 0]
        groups.append([[batch, 0, 0, 0], *drafting])
    if simultaneous:
        return groups
    # A server restarts only where more than the batch changes.
    every = [config for group in groups for config in group]
    return [[config] for config in sorted(every, key=lambda config: config[1:])]


def measure(
    request: Request, configs: list[list[int]], tasks: list[Task], chat: Chat
) -> list[dict[str, list[Trial]]]:
    """The trials of every config and suite, with all configs open at once.

    They answer groups of questions in an order that turns round from group to group, so that a
    machine that grows slower favours none.
    """
    batch = configs[0][0]
    size = batch
    if len(configs) == 1 and batch > 1:
        size = max(len(task.questions) for task in tasks)  # all at once keeps a server busy
    groups = [
        (task, task.questions[start : start + size])
        for task in tasks
        for start in range(0, len(task.questions), size)
    ]
    trials = [{task.name: [] for task in tasks} for _ in configs]
    first = tasks[0]
    prompts = [first.prompt_ids(question, [], chat) for question in first.questions[:batch]]
    tokens = min(WARM_UP_TOKENS, first.setup.max_new_tokens)
    warm_up = replace(first.setup, max_new_tokens=tokens, stop=())
    for config in configs:
        request.open(config)
        request.answer(config, prompts, warm_up)
    turns = list(zip(configs, trials, strict=True))
    title = "benchmark" if len(configs) > 1 else f"benchmark {configs[0]}"
    for task, questions in track(groups, description=title, transient=True):
        for config, by_suite in turns:
            by_suite[task.name] += ask(request, config, questions, task, chat)
        turns.reverse()
    return trials


def ask(
    request: Request, config: list[int], questions: list[Question], task: Task, chat: Chat
) -> list[Trial]:
    """All turns of these questions, each after the model's own answers to the turns before.

    Seconds are those the answers report; at larger batches those of the clock.
    """
    trials = [Trial(question) for question in questions]
    wall = 0.0
    for turn in range(1 + max(len(question.later) for question in questions)):
        going = [trial for trial in trials if turn <= len(trial.question.later)]
        for trial in going:
            texts = [answer.text for answer in trial.answers]
            trial.prompts.append(task.prompt_ids(trial.question, texts, chat))
        prompts = [trial.prompts[-1] for trial in going]
        began = time.perf_counter()
        answers = request.answer(config, prompts, task.setup)
        wall += time.perf_counter() - began
        for trial, answer in zip(going, answers, strict=True):
            trial.answers.append(answer)
            trial.seconds += answer.seconds
    # Requests of a batch run side by side, and each reports all of its own time: what they report
    # only says how to divide what the clock says.
    total = sum(trial.seconds for trial in trials)
    if config[0] > 1 and total > 0:
        for trial in trials:
            trial.seconds *= wall / total
    return trials


def scores(suite: str, drafted: list[Trial], baseline: list[Trial], execute_code: bool) -> dict:
    """Share of right first answers with the draft and without, where the suite can be scored."""
    kind = SUITES.get(suite, OWN)
    if kind.score is None or (kind.runs_code and not execute_code):
        return {}
    right: dict[tuple[str, str], bool] = {}

    def share(trials: list[Trial]) -> float:
        keys = [(trial.question.id, trial.answers[0].text) for trial in trials]
        for key, trial in zip(keys, trials, strict=True):
            if key not in right:  # equal answers are scored once: code takes seconds to run
                right[key] = kind.score(key[1], trial.question.reference)
        return sum(right[key] for key in keys) / len(keys)

    return {"score": share(drafted), "baseline_score": share(baseline), "num_scored": len(drafted)}


def describe_setups(tasks: list[Task]) -> dict[str, Any]:
    """How the suites were asked: a value where all agree, else one per suite."""
    setups = {task.name: asdict(task.setup) | {"stop": list(task.setup.stop)} for task in tasks}
    described = {}
    for key in ("max_new_tokens", "system_prompt", "shots", "stop"):
        values = {name: setup[key] for name, setup in setups.items()}
        first = next(iter(values.values()))
        described[key] = first if all(value == first for value in values.values()) else values
    return described


def kinds_of_drafting(configs: list[list[int]]) -> str:
    kinds = {"chain" if topk == 1 else "tree" for _, steps, topk, _ in configs if steps > 0}
    return " and ".join(sorted(kinds)) or "none"
