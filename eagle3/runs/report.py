"""A run's results, from its files: report.html, the page that shows it; tables for a terminal."""

import math
import shlex
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from eagle3.config import compose_flat, flatten
from eagle3.runs.disk import read_json
from eagle3.runs.logger import read_metrics, redact
from eagle3.runs.progress import duration

RATES = ("tokens_per_second", "baseline_tokens_per_second")
# The columns of the benchmark, in their order.
TITLES = {
    "suite": "suite", "config": "batch, steps, top-k, verify", "num_prompts": "prompts",
    "truncated": "answers cut at max_new_tokens",
    "acceptance_length": "acceptance length", "interval95": "95 % interval",
    "tokens_per_second": "tokens/s with draft",
    "baseline_tokens_per_second": "tokens/s without draft",
    "speedup": "speedup", "speedup_interval95": "95 % interval of speedup",
    "lossless": "lossless", "equal_answers": "answers equal to the target's own",
    "tie_gap": "widest tie", "score": "score", "baseline_score": "score without draft",
    "num_scored": "answers scored", "first_round": "acceptance, first round",
    "acceptance_length_loop_free": "acceptance, loops left out", "loops": "answers that loop",
    "bigram": "acceptance, bigram", "prompt_lookup": "acceptance, prompt look-up",
}  # fmt: skip
# As many as fit into 80 columns of a terminal.
SHOWN = {"suite", "config", "acceptance_length", "speedup", "lossless", "score", *RATES}
COSTLESS = {"prompt_lookup": "prompt look-up", "bigram": "a bigram"}
MAX_POINTS = 150  # a browser draws no more than these legibly on 400 pixels
MAX_SUITES = 6  # as many as there are colours

MEASURED = "eval/acceptance_length"  # at temperature 0; at 1 with `_t1` behind it
# Parts of training, and the stages whose time goes to the same.
PARTS = {
    "data": ["prepare", "view"], "target": ["import", "regenerate", "generate", "capture"],
    "draft": [], "evaluation": ["check", "benchmark"], "checkpoint": ["export"],
}  # fmt: skip
UNCOMPARED = ("name", "model.path", "cache_dir", "train.resume", "stages", "plan")

Line = list[tuple[float, float]]


class Plot:
    """Lines by label, and where they lie on a drawing whose y axis begins at `floor`, if given."""

    highest: tuple[float, float]  # the point that a ring is drawn around, if one is

    def __init__(self, lines: dict[str, Line], floor: float | None = None, width=420, height=270):
        self.lines, self.floor, self.width, self.height = lines, floor, width, height
        self.left, self.right, self.top, self.bottom = 42, width - 14, 10, height - 44
        points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
        xs, ys = zip(*points, strict=True)
        # Half a unit where all values are the same: a range of no length cannot be drawn.
        margin = (max(xs) - min(xs)) * 0.07 or 0.5
        self.x_range = min(xs) - margin, max(xs) + margin
        low = min(ys) if floor is None else floor
        margin = (max(ys) - low) * 0.12 or 0.5
        self.y_range = low - margin * (floor is None), max(ys) + margin
        self.x_ticks, self.y_ticks = ticks(*self.x_range, smallest=1.0), ticks(*self.y_range)

    def x(self, value: float) -> float:
        return round(float(np.interp(value, self.x_range, (self.left, self.right))), 1)

    def y(self, value: float) -> float:
        return round(float(np.interp(value, self.y_range, (self.bottom, self.top))), 1)


def ticks(low: float, high: float, smallest: float = 0.0) -> list[tuple[float, str]]:
    """Four to ten round numbers between, as text too; fewer for steps below `smallest`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    fitting = [factor for factor in (1, 2, 5) if (high - low) / (step * factor) >= 4]
    step = max(step * max(fitting, default=1), smallest)
    digits = max(0, -math.floor(math.log10(step)))
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(n * step, f"{n * step:,.{digits}f}") for n in numbers]


def read_plots(run_dir: Path) -> dict[str, Plot]:
    """The drawings for which there are numbers, by the names that page.html uses."""
    evaluation = read_json(run_dir / "evaluation.json")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    rows = benchmark_rows(read_json(run_dir / "benchmark.json"))
    accepted = {}
    for row in rows:
        # Of several configs of a suite the first: lines of all would hide one another.
        if row["accepted_by_position"] and len(accepted) < MAX_SUITES:
            accepted.setdefault(row["suite"], row["accepted_by_position"])
    plots = {}
    if evaluation:
        lines = {name: series(each) for name, each in acceptance_lengths(evaluation).items()}
        plots["draft_length"] = Plot(lines, floor=1)
        accepted = accepted or {"held-out prompts": evaluation["accepted_at"]}
    if accepted:
        lines = {suite: series(shares) for suite, shares in accepted.items()}
        plots["position"] = Plot(lines, floor=0)
    if lengths := by_prompt_length(rows):
        lines, sizes = {}, sorted({size for found in lengths.values() for size in found})
        for config, found in list(lengths.items())[:MAX_SUITES]:
            points = ((size, found[size]) for size in sorted(found))
            lines[config] = [(math.log2(n), some["tokens"] / some["rounds"]) for n, some in points]
        plots["prompt_length"] = Plot(lines, floor=1)
        plots["prompt_length"].x_ticks = [(math.log2(size), f"{size:,}") for size in sizes]
    evaluated = {}
    for key in sorted({key for row in metrics for key in row if key.startswith(MEASURED)}):
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
        evaluated[f"temperature {key.removeprefix(MEASURED).lstrip('_t') or 0}"] = points
    if evaluated:
        points = next(iter(evaluated.values()))
        plots["evaluations"] = plot = Plot(evaluated if len(evaluated) > 1 else {"": points})
        # What `best` was chosen by need not be the first line.
        exported = [point for point in points if point[0] == evaluation.get("update")]
        plot.highest = exported[0] if exported else max(points, key=lambda point: point[1])
    trained = [row for row in metrics if "loss" in row]
    if trained:
        # However many steps the unroll had, as the metrics name them.
        steps = range(sum(key.startswith("loss/step_") for key in trained[0]))
        losses = {f"step {k}": curve(trained, f"loss/step_{k}") for k in steps}
        accuracies = {f"step {k}": curve(trained, f"accuracy/step_{k}") for k in steps}
        plots["loss"] = Plot({"": curve(trained, "loss")})
        plots["step_losses"], plots["step_accuracies"] = Plot(losses), Plot(accuracies, floor=0)
    return plots


def series(values: dict[str, float] | list[float]) -> Line:
    """Values by number, or from the first on."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values, start=1)
    return [(int(place), value) for place, value in pairs]


def acceptance_lengths(evaluation: dict) -> dict[str, dict[str, float]]:
    """By temperature in words, and by draft length; nothing has to be named where it is 0 alone."""
    sampled = evaluation.get("sampled", {})
    lengths = {"temperature 0" if sampled else "": evaluation["acceptance_length"]}
    return lengths | {f"temperature {t}": at["acceptance_length"] for t, at in sampled.items()}


def time_parts(run: dict, metrics: list[dict]) -> dict[str, float]:
    """Seconds by what they went to: of whole stages, and of training as its lines have them."""
    seconds, parts = run.get("seconds", {}), {}
    rest = seconds.get("train", 0.0)
    for name, stages in PARTS.items():
        trained = sum(row.get(f"seconds/{name}") or 0.0 for row in metrics)
        parts[name] = trained + sum(seconds.get(stage, 0.0) for stage in stages)
        rest -= trained
    parts["loading and the rest"] = max(0.0, rest)
    return parts if sum(parts.values()) else {}


@cache
def defaults() -> dict[str, Any]:
    """Every key of a run of a model of the user's own, as conf/ has it."""
    return compose_flat(["model=hf"])


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    """By dotted key what a run.json was asked for, or what the target has made of it."""
    return flatten(run["config"]) | run.get("derived", {})


def changed(given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs from the defaults: (value, default) by dotted key."""
    known = defaults()
    keys = [key for key in given if key not in UNCOMPARED and known.get(key, ...) != given[key]]
    return {key: (given[key], known.get(key)) for key in keys}


def curve(trained: list[dict], key: str) -> Line:
    """(update, value) where it was measured; means of neighbours where points are too many."""
    points = [(row["step"], row[key]) for row in trained if row.get(key) is not None]
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def templates(folder: Path = Path(__file__).parent, autoescape: bool = True) -> Environment:
    # In pages names of runs and suites, and data rows quoted in reasons, are anybody's text.
    loader = FileSystemLoader(folder, encoding="utf-8")
    return Environment(loader=loader, autoescape=autoescape, trim_blocks=True, lstrip_blocks=True)


def write_report(run_dir: Path) -> Path:
    """Make `run_dir`/report.html, which loads nothing, from the run's files; return its path."""
    run, benchmark = (redact(read_json(run_dir / f"{name}.json")) for name in ("run", "benchmark"))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    last = next((row for row in reversed(metrics) if "loss" in row), {})
    training = {key: value for key, value in last.items() if "/" not in key}
    evaluation, rows = read_json(run_dir / "evaluation.json"), benchmark_rows(benchmark)
    warnings = [f"{r['suite']} {r['config']}: {r['warning']}." for r in rows if r.get("warning")]
    warnings += missing(run, benchmark, evaluation or training)
    by_temperature = {"": evaluation}
    for name, at in evaluation.get("sampled", {}).items():
        by_temperature[f", temperature {name}"] = at
    facts = {"Training, at its end": training}
    # Drawn, or of every answer: for comparisons, and too long to be read.
    unread = ("acceptance_length", "prompts", "tokens", "rounds", "sampled")
    for name, at in by_temperature.items():
        measured = {key: value for key, value in at.items() if key not in unread}
        facts[f"Held-out evaluation{name}"] = measured
    facts |= {"Benchmark protocol": benchmark.get("protocol", {})} | artefacts(run)
    values = {"run": run, "evaluation": evaluation, "facts": facts, "beaten": beaten(rows)}
    values |= {"columns": benchmark_columns(rows), "titles": TITLES, "cell": cell, "rows": rows}
    values |= {"warnings": warnings, "samples": benchmark.get("samples", {})}
    values["lengths"] = by_prompt_length(rows)
    values |= {"times": time_parts(run, metrics), "duration": duration}
    values |= {"changed": changed(settings_of(run))}
    values["command"] = shlex.join(["python", "run.py", *run.get("overrides", [])])
    if (run_dir / "draft" / "config.json").exists():
        values["draft"] = shlex.quote(str((run_dir / "draft").resolve()))
    for row in rows:
        row |= {"cells": cells(row), "costless": best_without_draft(row)[0]}
    dump = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True, width=100)
    page = templates().get_template("page.html")
    path = run_dir / "report.html"
    path.write_text(page.render(values, plots=read_plots(run_dir), yaml=dump), encoding="utf-8")
    return path


def missing(run: dict, benchmark: dict, trained: dict) -> list[str]:
    """A sentence for each stage that is listed, or suite that is asked, and left no result."""
    if run.get("pruned"):
        return ["Optuna ended this run before its last update, so that it has no draft."]
    suites = benchmark.get("suites", {})
    done = {"train": bool(trained), "benchmark": any(suites.values())}
    stages = [stage for stage in run["config"].get("stages", []) if not done.get(stage, True)]
    empty = [suite for suite, rows in suites.items() if not rows and done["benchmark"]]
    names = [f"stage {stage}" for stage in stages] + [f"suite {suite}" for suite in empty]
    return [f"The {name} left no result: it failed or was stopped." for name in names]


def artefacts(run: dict) -> dict[str, dict[str, Any]]:
    """The numbers of what the stages made or found, by a title; `regenerate` makes several."""
    found = {}
    for name, noted in run.get("inputs", {}).items():
        several = noted if isinstance(noted, list) else [noted]
        for number, facts in enumerate(several, start=1):
            title = name.replace("_", " ").capitalize() + f", {number}" * (len(several) > 1)
            found[title] = {k: fact for k, fact in facts.items() if isinstance(fact, int | float)}
    return found


def benchmark_rows(benchmark: dict) -> list[dict]:
    suites = benchmark.get("suites", {}).items()
    return [{"suite": suite, **row} for suite, rows in suites for row in rows]


def by_prompt_length(rows: list[dict]) -> dict[str, dict[int, Counter]]:
    """By config and about how many tokens a prompt has, of all suites: `answers`, their `tokens`
    and `rounds`; nothing where all prompts are about as long.
    """
    found: dict[str, dict[int, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        for part in row.get("by_prompt_length", ()):
            rounds, config = part["rounds"], cell("config", row["config"])
            counts = {"answers": part["answers"], "rounds": rounds}
            counts["tokens"] = part["acceptance_length"] * rounds
            found[config][part["prompt_tokens"]].update(counts)
    several = len({size for sizes in found.values() for size in sizes}) > 1
    return found if several else {}


def best_without_draft(row: dict) -> tuple[float | None, str]:
    """The highest acceptance length of what drafts without a model, and what reaches it."""
    known = [(row[key], words) for key, words in COSTLESS.items() if row.get(key) is not None]
    return max(known, default=(None, ""))


def beaten(rows: list[dict]) -> str:
    """Where the draft is worth less than what drafts without a model, in words; "" for nowhere."""
    places = []
    for row in rows:
        best, words = best_without_draft(row)
        # To the digits that are shown, so that no two equal numbers are told apart.
        best, own = round(best or 0, 2), round(row.get("acceptance_length") or 0, 2)
        if row["config"][1] > 0 and best > own:
            places.append(f"on {row['suite']} by {words} ({best:.2f} against {own:.2f})")
    places = list(dict.fromkeys(places))  # several batches of a suite often agree
    return f"What needs no draft beats this one: {', '.join(places)}." if places else ""


def truncated(rows: list[dict]) -> str:
    cut = {row["suite"]: row["truncated"] for row in rows if row.get("truncated")}
    counts = ", ".join(f"{count} of {suite}" for suite, count in cut.items())
    return f"Answers cut at max_new_tokens, which are not scored: {counts}." if cut else ""


def benchmark_columns(rows: list[dict]) -> list[str]:
    return [key for key in TITLES if any(row.get(key) is not None for row in rows)]


def cells(row: dict) -> dict[str, str]:
    """A row of the benchmark as shown, its rates in as many digits as their ratio, the speedup."""
    shown = {key: cell(key, row.get(key)) for key in TITLES}
    rates = [row.get(key) for key in RATES]
    for digits in range(4) if None not in rates else ():
        fast, slow = (round(rate, digits) for rate in rates)
        if slow and cell("speedup", fast / slow) == shown["speedup"]:
            return shown | {key: f"{row[key]:,.{digits}f}" for key in RATES}
    return shown


def cell(key: str, value: Any) -> str:
    """A value as a table shows it; three or so digits of a float: 2.41, 0.0123, 153, 12,400."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [f"{name}: {cell(key, each)}" for name, each in value.items()]
    if isinstance(value, list):
        joint = " – " if key.endswith("interval95") else ", "
        return joint.join(cell(key, each) for each in value) or "–"
    if key == "speedup":
        return f"{value:.2f}×"
    if key.endswith("interval95"):
        return f"{value:.2f}"
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    long = isinstance(value, float) or (isinstance(value, int) and value >= 10000)
    return f"{value:,.0f}" if long else str(value)


def summary(run_dir: Path, stages: list[str]) -> Group:
    """What these stages achieved, for a terminal of 80 columns; earlier ones have shown theirs."""
    evaluation = read_json(run_dir / "evaluation.json") if "train" in stages else {}
    rows = benchmark_rows(read_json(run_dir / "benchmark.json")) if "benchmark" in stages else []
    tables = []
    if evaluation:
        columns = acceptance_lengths(evaluation)
        titles = [f"acceptance, {name}" if name else "acceptance length" for name in columns]
        table = Table("held-out prompts", *titles, box=SIMPLE_HEAD)
        for length in evaluation["acceptance_length"]:
            table.add_row(f"{length} drafted", *(cell("", at[length]) for at in columns.values()))
        tables.append(table)
    if rows:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        columns = [key for key in benchmark_columns(rows) if key in SHOWN]
        shown_rows = [*map(cells, rows)]
        for key in columns:
            # rich would cut words of a title; only these two may be broken.
            words = [*TITLES[key].split(), *(shown[key] for shown in shown_rows)]
            width = None if key in ("suite", "config") else max(map(len, words))
            justify = "left" if key == "suite" else "right"
            table.add_column(TITLES[key], justify=justify, width=width, overflow="fold")
        for shown in shown_rows:
            # Text, because a suite's name may hold what rich takes for markup.
            table.add_row(*[Text(shown[key]) for key in columns])
        tables.append(table)
    first, last = ([Text(words)] if words else [] for words in (beaten(rows), truncated(rows)))
    return Group(*first, *tables, *last)
