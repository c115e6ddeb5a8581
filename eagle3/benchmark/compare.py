"""Runs side by side, from what lies in their folders: a table for the terminal, compare.html.

Acceptance lengths have intervals by bootstrap over the held-out prompts that all runs have answered
with the same draft length. All runs are resampled alike, so that of the difference to the best one
what prompts have in common cancels.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eagle3.benchmark.statistics import interval95
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import ratio
from eagle3.runs.disk import read_json
from eagle3.runs.logger import read_metrics, redact
from eagle3.runs.report import Plot, cell, curve, series, settings_of, templates

GREEDY = "0"  # the temperature of an evaluation's own numbers; others are in its `sampled`
# Of the config: what every run has for itself, and what changes the meaning of a loss.
OWN = ("name", "runs", "stages", "sweep.", "train.resume", "cache_dir", "plan", "logger.")
OF_LOSS = ("loss.", "draft.ttt_steps", "draft.vocab_size")
NOT_COMPARABLE = "losses are not comparable"
MOST_SHOWN = 3  # settings in the legend of a curve
LAST_LINES = 5  # of metrics.jsonl, over which the loss at the end is a mean


@dataclass
class Acceptance:
    """Over prompts that all runs have, with the difference to the best run, which itself has none;
    intervals are None where there are fewer than two such prompts.
    """

    length: float
    interval: list[float] | None = None
    difference: float | None = None
    difference_interval: list[float] | None = None


@dataclass
class Run:
    """What a run's folder says of it; `config` is flat."""

    path: Path
    name: str
    config: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    pruned: bool
    settings: dict[str, str] = field(default_factory=dict)  # in which the runs differ
    acceptance: dict[str, Acceptance] = field(default_factory=dict)  # by temperature

    def __post_init__(self):
        self.trained = [row for row in self.metrics if "loss" in row]

    @property
    def label(self) -> str:
        """Its name, and what sets it apart where that is little."""
        shown = [f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items()]
        return ", ".join([self.name, *(shown if len(shown) <= MOST_SHOWN else [])])

    def total(self, key: str) -> float | None:
        """A sum over all lines of metrics.jsonl; None where older versions did not note it."""
        values = [row.get(key) for row in self.trained]
        return sum(values) if values and None not in values else None

    @property
    def numbers(self) -> dict[str, float | None]:
        """The columns beside acceptance. Hours are those of training, on all processes."""
        tokens, seconds = self.total("tokens"), self.total("seconds")
        rates = [row["tokens_per_second"] for row in self.trained if "tokens_per_second" in row]
        rate = fmean(rates) if rates else None
        launch = [self.config.get(f"launch.{key}", 1) for key in ("nproc_per_node", "nnodes")]
        losses = [row["loss"] for row in self.trained[-LAST_LINES:] if row["loss"] is not None]
        return {
            "loss": fmean(losses) if losses else None,
            "tokens": tokens,
            "tokens/s": tokens / seconds if tokens and seconds else rate,
            "device hours": None if seconds is None else seconds * prod(launch) / 3600,
        }

    def at(self, temperature: str) -> dict[str, Any]:
        """What was evaluated at a temperature; {} where nothing was."""
        sampled = self.evaluation.get("sampled", {})
        return self.evaluation if temperature == GREEDY else sampled.get(temperature, {})

    def counts(self, temperature: str) -> dict[str, tuple[float, float]]:
        """By prompt the tokens and rounds of its answer; {} of older versions."""
        at, prompts = self.at(temperature), self.evaluation.get("prompts")
        pairs = zip(at.get("tokens", ()), at.get("rounds", ()))
        return dict(zip(prompts, pairs)) if isinstance(prompts, list) else {}

    def over(self, size: int | None, key: str) -> list[tuple[float, float]]:
        """What was logged as `key`, over the tokens trained on in units of `size`, or updates."""
        points, tokens = [], 0
        for row in self.metrics:
            tokens += row.get("tokens") or 0
            points.append(row | {"step": tokens / size if size else row["step"]})
        return curve(points, key)


def read_run(path: Path) -> Run:
    """Raises RunError with a sentence for what is no run, or has nothing to compare."""
    recorded = redact(read_json(path / "run.json"))
    if not isinstance(recorded.get("config"), dict):
        raise RunError(f"{path} is no folder of a run: it has no run.json with a config")
    evaluation, metrics = read_json(path / "evaluation.json"), read_metrics(path / "metrics.jsonl")
    if not metrics and not evaluation:
        raise RunError(f"{path} was not trained: it has no metrics.jsonl and no evaluation.json")
    lengths, length = (evaluation.get(key) for key in ("acceptance_length", "draft_length"))
    if evaluation and not (isinstance(lengths, dict) and str(length) in lengths):
        raise RunError(f"{path / 'evaluation.json'} is damaged or of an older version")
    pruned = recorded.get("pruned", False)
    return Run(path, path.name, settings_of(recorded), evaluation, metrics, pruned)


def in_order(path: Path) -> list[Any]:
    """Job 10 behind job 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def find_runs(given: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs in folders, sweeps or patterns, and a sentence for each that cannot be read.

    Raises ConfigError for what names no folder, RunError where no run can be read.
    """
    folders, runs, refused = [], [], []
    for pattern in map(str, given):
        folder = Path(pattern).expanduser()
        matched = [folder] if folder.is_dir() else map(Path, glob(str(folder)))
        matched = [path for path in matched if path.is_dir()]
        if not matched:
            raise ConfigError(f"runs: {pattern} names no folder; give runs, sweeps or patterns")
        for path in sorted(matched, key=in_order):
            inside = sorted((each.parent for each in path.rglob("run.json")), key=in_order)
            folders += [path] if (path / "run.json").exists() or not inside else inside
    for path in dict.fromkeys(path.resolve() for path in folders):
        try:
            runs.append(read_run(path))
        except RunError as error:
            refused.append(str(error))
    if not runs:
        raise RunError(f"runs: none can be compared: {'; '.join(refused)}")
    above = os.path.commonpath([run.path for run in runs])
    for run in runs if len(runs) > 1 else ():
        run.name = os.path.relpath(run.path, above)
    return runs, refused


def compare(given: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs with what sets them apart, and notes on what cannot be compared. As `find_runs`."""
    runs, notes = find_runs(given)
    notes = [f"left out: {sentence}" for sentence in notes]
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [setting(run.config, key) for run in runs]
        if len(set(values)) > 1 and not key.startswith(OWN):
            for run, value in zip(runs, values, strict=True):
                run.settings[key.removesuffix("._target_")] = value
    if pruned := [run.name for run in runs if run.pruned]:
        notes.append(f"ended by Optuna before their last update: {', '.join(pruned)}")
    differing = [key for key in runs[0].settings if key.startswith(OF_LOSS)]
    if differing:
        notes.append(f"{NOT_COMPARABLE}, because runs differ in {', '.join(differing)}")
    for temperature in temperatures(runs):
        notes += measure(runs, temperature)
    return runs, notes


def setting(config: dict[str, Any], key: str) -> str:
    """As it is shown; a function or class by its last name."""
    value = config.get(key, "–")
    if key.endswith("._target_"):
        value = str(value).rpartition(".")[2]
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def measure(runs: list[Run], temperature: str) -> list[str]:
    """Give the runs that were evaluated at a temperature their acceptance; returns notes."""
    measured = [run for run in runs if run.at(temperature)]
    known = {run.path: run.counts(temperature) for run in measured}
    first, *others = known.values()
    shared = [prompt for prompt in first if all(prompt in each for each in others)]
    lengths = {run.evaluation["draft_length"] for run in measured}
    paired = len(lengths) == 1 and len(shared) > 1
    for run in measured:
        length, interval = run.at(temperature)["acceptance_length"][str(min(lengths))], None
        if paired:
            counts = [known[run.path][prompt] for prompt in shared]
            length = ratio(*map(sum, zip(*counts, strict=True))) or 0.0
            interval = interval95(counts, torch.div, seed=0)
        run.acceptance[temperature] = Acceptance(length, interval)
    best = max(measured, key=lambda run: run.acceptance[temperature].length)
    for run in measured:
        found = run.acceptance[temperature]
        if run is not best:
            found.difference = found.length - best.acceptance[temperature].length
        if paired and run is not best:
            counts = [(*known[run.path][each], *known[best.path][each]) for each in shared]
            found.difference_interval = interval95(counts, lambda a, b, c, d: a / b - c / d, seed=0)
    where = "held-out prompts" if temperature == GREEDY else f"temperature {temperature}"
    if not paired:
        why = "their draft lengths differ" if len(lengths) > 1 else "too few prompts are in all"
        return [f"{where}: no intervals, because {why}"] * (len(measured) > 1)
    some = len(shared) < max(map(len, known.values()))
    return [f"{where}: over the {len(shared)} prompts that all runs have"] * some


def temperatures(runs: list[Run]) -> list[str]:
    """Those at which a run was evaluated."""
    known = [run.evaluation for run in runs if run.evaluation]
    return list(dict.fromkeys(t for each in known for t in (GREEDY, *each.get("sampled", ()))))


def with_interval(value: float | None, interval: list[float] | None, form: str = ".2f") -> str:
    """Such as 2.41 [2.30, 2.52]; None is the difference of the best run, and not shown."""
    bounds = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return "best" if value is None else f"{value:{form}}{bounds}"


def cells(runs: list[Run], notes: list[str]) -> dict[str, list[str]]:
    """The columns behind a run's name and settings, as tables show them."""
    shown: dict[str, list[str]] = {}
    for temperature in temperatures(runs):
        at = "" if temperature == GREEDY else f" at T {temperature}"
        lengths, differences = [], []
        for run in runs:
            found, length, difference = run.acceptance.get(temperature), "–", "–"
            if found:
                length = with_interval(found.length, found.interval)
                difference = with_interval(found.difference, found.difference_interval, "+.2f")
            lengths.append(length)
            differences.append(difference)
        shown |= {f"acceptance{at}": lengths, f"from the best{at}": differences}
    marked = any(note.startswith(NOT_COMPARABLE) for note in notes)
    for key in runs[0].numbers:
        column = [cell(key, run.numbers[key]) for run in runs]
        shown["loss*" if key == "loss" and marked else key] = column
    return shown


def table_of(columns: dict[str, list[str]]) -> Table:
    """Columns by title, names first. Of text, as a value may hold what rich takes for markup."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(columns):
        table.add_column(Text(title), justify="right" if number else "left", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def read_plots(runs: list[Run]) -> dict[str, tuple[Plot, str, dict[str, bool]]]:
    """Curves of all runs laid over each other, by title: with what the x axis has, and options."""
    totals, plots, dots = [run.total("tokens") for run in runs], {}, {"points": True}
    many = max(total or 0 for total in totals) > 5 * 10**6
    size, unit = (10**6, "million") if many else (1000, "thousand")
    axis = f"{unit} tokens trained on"
    if None in totals:
        size, axis = None, "update"

    def add(title: str, lines: list[list], x: str, options: dict, floor=None) -> None:
        if any(lines):  # those of other runs stay, or a run would change its colour
            labelled = dict(zip([run.label for run in runs], lines, strict=True))
            plots[title] = Plot(labelled, floor=floor), x, options

    for temperature in temperatures(runs):
        at = "" if temperature == GREEDY else f" at T {temperature}"
        key = "eval/acceptance_length" + (f"_t{temperature}" if at else "")
        lines = [run.over(size, key) for run in runs]
        add(f"Acceptance length{at} while training", lines, axis, dots)
        lines = [series(run.at(temperature).get("acceptance_length", {})) for run in runs]
        add(f"Acceptance length{at} by draft length", lines, "drafted tokens a round", dots, 1)
        lines = [series(run.at(temperature).get("accepted_at", [])) for run in runs]
        add(f"Accepted{at} by position", lines, "position in the draft", dots, 0)
    measured = [run for run in runs if size and GREEDY in run.acceptance]
    ends = sorted((run.total("tokens") / size, run.acceptance[GREEDY].length) for run in measured)
    if len(ends) > 1 and ends[-1][0] > 1.2 * ends[0][0]:  # as of sweep=data
        options = dots | {"values": True}
        plots["Best acceptance length by tokens"] = Plot({"": ends}), axis, options
    add("Loss", [run.over(size, "loss") for run in runs], axis, {})
    return plots


def show(given: Sequence[str | Path], folder: Path, console: Console) -> None:
    """The stage: print what differs and what was measured, and write compare.html, which loads
    nothing, into `folder`. As `find_runs`.
    """
    runs, notes = compare(given)
    settings = {key: [run.settings[key] for run in runs] for key in runs[0].settings}
    columns = cells(runs, notes)
    names = {"run": [run.name for run in runs]}
    if len(settings) > len(runs):  # a terminal has 80 columns
        turned = {run.name: list(run.settings.values()) for run in runs}
        console.print(table_of({"setting": list(settings)} | turned))
    elif settings:
        console.print(table_of(names | settings))
    wide = [title for title in columns if title == "tokens" or title.startswith("from the best at")]
    shown = {title: columns[title] for title in columns if title not in wide}
    console.print(table_of(names | shown))
    for note in notes:
        console.print(f"compare: {note}")
    page = templates().get_template("compare.html")
    values = {"runs": runs, "notes": notes, "columns": settings | columns}
    path = folder / "compare.html"
    path.write_text(page.render(values, plots=read_plots(runs)), encoding="utf-8")
    console.print(f"compare: {path}")


def compare_sweep(folder: Path) -> None:
    """The end of a sweep, where a job of it was trained."""
    trained = [path.parent for path in folder.rglob("metrics.jsonl")]
    if trained:
        try:
            show([folder], folder, Console(markup=False, soft_wrap=True))
        except (RunError, OSError) as error:  # those that failed are named all the same
            print(f"compare: {error}")
