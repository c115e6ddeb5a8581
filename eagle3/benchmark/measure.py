"""Every benchmark: suites x configs, then statistics, scores and benchmark.json."""

import json
import time
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from eagle3.benchmark.request import Request, Subject
from eagle3.benchmark.samples import samples
from eagle3.benchmark.statistics import Trial, acceptance, by_prompt_length, equality, speed
from eagle3.benchmark.suites import SUITES, Question, Task, load_questions, parse_suite, setup_of
from eagle3.data.chat import Chat
from eagle3.data.rows import RowError
from eagle3.data.sources import names_data
from eagle3.errors import ConfigError
from eagle3.runs.disk import write_atomically
from eagle3.runs.progress import Progress
from eagle3.runs.tracking import device_name

NOTHING_ACCEPTED = (
    "acceptance is exactly 1.0, no draft was ever accepted: it belongs to another target, or the "
    "engine runs it as EAGLE, not EAGLE3, or lacks some of its tensors; see stages=[check]"
)
Trials = dict[tuple[int, ...], dict[str, list[Trial]]]  # by config and name of the suite


def benchmark(request: Request, tasks: list[Task], subject: Subject, run_dir: Path) -> None:
    """Measure a draft and the target alone; write benchmark.json. Raises ConfigError, RunError."""
    for task in tasks:
        if not task.questions:  # those that `load_tasks` could not have before `prepare`
            task.take([*map(SUITES[task.name].read, subject.prepared.heldout)], subject.seed)
    trials: Trials = {}
    with closing(request):
        facts = describe(request, subject, tasks) | request.start(subject, run_dir)
        try:
            for configs in in_order(request.configs, request.in_process):
                trials |= measure(request, configs, tasks, subject.chat)
        finally:
            # Hours may have gone into what was measured before an error or Ctrl-C.
            suites = {task.name: rows(request, task.name, trials, subject.seed) for task in tasks}
            if any(suites.values()):
                shown = samples(request.configs, trials, subject.chat)
                result = {"suites": suites, "protocol": facts, "samples": shown}
                content = json.dumps(result, indent=1, allow_nan=False).encode()
                write_atomically(run_dir / "benchmark.json", [content])


def load_tasks(request: Request, subject: Subject) -> list[Task]:
    """The suites and their questions, but those that `prepare` holds out. ConfigError, RunError."""
    tasks, data = [], subject.data
    for name, count in map(parse_suite, request.suites):
        setup = setup_of(request.protocol, name, request.system_prompt, data.system_prompt)
        setup = replace(setup, max_new_tokens=request.max_new_tokens or setup.max_new_tokens)
        task, path = Task(name, setup, count), request.paths.get(name)
        held_out = name == "heldout" and path is None
        if held_out and not names_data(data):
            problem = "benchmark.suites lists heldout, but no data is named to hold prompts out of"
            if len(request.suites) == 1:
                remedy = "set data=<preset> or data.path=..., or other suites, such as mtbench:80"
                raise ConfigError(f"{problem}; {remedy}")
            print(f"{problem}: it is left out")
            continue
        tasks.append(task)
        # Those are tokenised: behind another system prompt the rows themselves are asked.
        if held_out and setup.system_prompt == data.system_prompt:
            continue
        if held_out and data.eval_path is None:
            raise ConfigError("heldout behind another system prompt: set data.eval_path as well")
        path = data.eval_path if held_out else path
        task.take(load_questions(name, path, subject.cache_dir), subject.seed)
        for question in task.questions:
            try:
                task.prompt_ids(question, [], subject.chat)
            except RowError as error:
                problem = f"benchmark.suites={name}: {question.id} cannot be asked"
                raise ConfigError(f"{problem} ({error})") from error
    return tasks


def describe(request: Request, subject: Subject, tasks: list[Task]) -> dict[str, Any]:
    """How the suites were asked: a value where all agree, else one per suite."""
    asked = {key: getattr(request, key) for key in ("suites", "protocol", "temperature")}
    for key in ("max_new_tokens", "system_prompt", "shots", "stop"):
        values = {task.name: getattr(task.setup, key) for task in tasks}
        asked[key] = values if len({*values.values()}) > 1 else values[tasks[0].name]
    digest = sha256(subject.chat.template.encode()).hexdigest()[:12]
    kinds = {"chain" if topk == 1 else "tree" for _, steps, topk, _ in request.configs if steps}
    return asked | {
        "template": f"{subject.data.chat_template}, sha256 {digest}",
        "seed": subject.seed,
        "drafting": " and ".join(sorted(kinds)) or "none",
        "timing": "batch 1: decoding alone; larger batches: from first prompt to last answer",
        "device": device_name(subject.target.device),
    }


def in_order(configs: list[list[int]], side_by_side: bool) -> list[list[list[int]]]:
    """Groups of configs that are open at the same time, the baseline of every batch included."""
    alone = [[batch, 0, 0, 0] for batch in dict.fromkeys(config[0] for config in configs)]
    drafting = [config for config in configs if config[1] > 0]
    if side_by_side:
        return [[one, *(config for config in drafting if config[0] == one[0])] for one in alone]
    # A server restarts only where more than the batch changes.
    return [[config] for config in sorted([*alone, *drafting], key=lambda config: config[1:])]


def measure(request: Request, configs: list[list[int]], tasks: list[Task], chat: Chat) -> Trials:
    """The trials of every suite under configs of one batch, with all of them open at once."""
    batch, first, groups = configs[0][0], tasks[0], []
    prompts = [first.prompt_ids(question, [], chat) for question in first.questions[:batch]]
    warm_up = replace(first.setup, max_new_tokens=8, stop=())
    for config in configs:
        request.open(config)
        request.answer(config, prompts, warm_up)
    for task in tasks:
        # All at once keeps a server busy.
        size = len(task.questions) if len(configs) == 1 and batch > 1 else batch
        starts = range(0, len(task.questions), size)
        groups += [(task, task.questions[start : start + size]) for start in starts]
    trials: Trials = {tuple(config): {task.name: [] for task in tasks} for config in configs}
    total = len(configs) * sum(len(task.questions) for task in tasks)
    with Progress(f"benchmark {configs[-1]}", total, "questions", kept=lambda: 0) as bar:
        request.count = bar.count_tokens
        for task, questions in groups:
            for config in configs:
                trials[tuple(config)][task.name] += ask(request, config, questions, task, chat)
                bar.advance(len(questions))
            configs = configs[::-1]  # a machine that grows slower favours none
    return trials


def ask(
    request: Request, config: list[int], questions: list[Question], task: Task, chat: Chat
) -> list[Trial]:
    """All turns of these questions, each after the model's own answers to the turns before."""
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


def rows(request: Request, suite: str, trials: Trials, seed: int) -> list[dict[str, Any]]:
    """What benchmark.json has of a suite: the configs that were measured, as was their baseline."""
    found = []
    for config in request.configs:
        key, alone, steps = tuple(config), (config[0], 0, 0, 0), config[1]
        if key not in trials or alone not in trials:
            continue
        pair = trials[key][suite], trials[alone][suite]
        row = {"config": config, "num_prompts": len(pair[0])}
        row["truncated"] = sum(answer.truncated for trial in pair[0] for answer in trial.answers)
        if steps > 0:
            row["drafts"] = request.choice_of_drafts(key[1:])
            row["by_prompt_length"] = by_prompt_length(pair[0])
        row |= acceptance(pair[0], steps, seed) | speed(*pair, seed)
        # Sampled answers differ by chance.
        row |= equality(*pair) if request.temperature == 0 else {"lossless": None}
        row |= scores(suite, *pair, request.execute_code)
        row |= request.extra_columns(*pair, steps)
        if steps > 0 and row["acceptance_length"] == 1:
            row["warning"] = NOTHING_ACCEPTED
            print(f"benchmark: {suite} {config}: {NOTHING_ACCEPTED}")
        found.append(row)
    return found


def scores(suite: str, drafted: list[Trial], baseline: list[Trial], execute_code: bool) -> dict:
    """Share of right first answers with the draft and without it, of those that were not cut."""
    kind = SUITES.get(suite, SUITES["heldout"])
    if kind.score is None or (kind.runs_code and not execute_code):
        return {}
    right: list[tuple[bool, bool]] = []
    for one, other in zip(drafted, baseline, strict=True):
        answer, alone, reference = one.answers[0], other.answers[0], one.question.reference
        if reference is not None and not answer.truncated and not alone.truncated:
            score = kind.score(alone.text, reference)
            # Equal answers are scored once: code takes seconds to run.
            same = answer.text == alone.text
            right.append((score if same else kind.score(answer.text, reference), score))
    names, columns = ("score", "baseline_score"), zip(*right, strict=True)  # none of no answer
    shares = {name: sum(column) / len(right) for name, column in zip(names, columns, strict=False)}
    return shares | {"num_scored": len(right)}
