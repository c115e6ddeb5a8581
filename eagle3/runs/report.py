"""A run's results: report.html, the one page that shows a run, and tables for the terminal and for
a tracker. All of it is made from the run's files.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from eagle3.runs.logger import read_metrics, redact

# The columns of the benchmark and their titles; those marked True are in the terminal too.
COLUMNS = {
    "suite": ("suite", False),
    "config": ("batch, steps, top-k, verify", False),
    "num_prompts": ("prompts", True),
    "acceptance_length": ("acceptance length", True),
    "interval95": ("95 % interval", False),
    "tokens_per_second": ("tokens/s with draft", True),
    "baseline_tokens_per_second": ("tokens/s without draft", True),
    "speedup": ("speedup", True),
    "speedup_interval95": ("95 % interval of speedup", False),
    "lossless": ("lossless", True),
    "equal_answers": ("answers equal to the target's own", False),
    "tie_gap": ("widest tie", False),
    "score": ("score", True),
    "baseline_score": ("score without draft", True),
    "num_scored": ("answers scored", False),
    "first_round": ("acceptance, first round", True),
    "acceptance_length_loop_free": ("acceptance, loops left out", True),
    "loops": ("answers that loop", False),
    "bigram": ("acceptance, bigram", True),
    "prompt_lookup": ("acceptance, prompt look-up", True),
}
LEGEND = """Acceptance length: tokens that each pass of the target yields; 1 is no draft.
Bigram and prompt look-up: drafts without a model. Lossless: the target's own
answers, token for token; tie: but for ties between its two best tokens."""
SIDE_BY_SIDE = 4
MAX_POINTS = 150
MAX_SUITES = 6  # as many as there are colours

Line = list[tuple[float, float]]


class Plot:
    """Lines by label, and where their points and ticks lie on a drawing of width x height."""

    def __init__(
        self,
        lines: dict[str, Line],
        floor: float | None = None,
        width: float = 420,
        height: float = 270,
    ):
        """The y axis begins at `floor`, or below the lowest point."""
        self.lines, self.floor, self.width, self.height = lines, floor, width, height
        self.left, self.right, self.top, self.bottom = 42, width - 14, 10, height - 44
        points = [point for line in lines.values() for point in line] or [(0.0, 0.0)]
        self.highest = max(points, key=lambda point: point[1])  # of equal ones the first
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.x_range = padded(min(xs), max(xs), 0.07)
        self.y_range = padded(min(ys) if floor is None else floor, max(ys), 0.12)
        if floor is not None:
            self.y_range = floor, self.y_range[1]
        self.x_ticks, self.y_ticks = ticks(*self.x_range, whole=True), ticks(*self.y_range)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.bottom - (value - low) / (high - low) * (self.bottom - self.top), 1)


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = (high - low) * share or 0.5
    return low - margin, high + margin


def ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """Four to ten round numbers between, as text too; fewer where they must be `whole`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    fitting = [factor for factor in (1, 2, 5) if (high - low) / (step * factor) >= 4]
    step *= max(fitting, default=1)
    if whole:
        step = max(step, 1.0)
    digits = max(0, -math.floor(math.log10(step)))
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(n * step, f"{n * step:,.{digits}f}") for n in numbers]


def read_plots(run_dir: Path) -> dict[str, Plot]:
    """The drawings for which the run has left numbers, by the names that page.html uses."""
    evaluation = read_json(run_dir / "evaluation.json")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    accepted: dict[str, list[float]] = {}
    for row in benchmark_rows(read_json(run_dir / "benchmark.json")):
        if row["accepted_by_position"] and len(accepted) < MAX_SUITES:
            accepted.setdefault(row["suite"], row["accepted_by_position"])
    plots = {}
    if evaluation:
        lengths = evaluation["acceptance_length"].items()
        plots["draft_length"] = Plot({"": [(int(k), value) for k, value in lengths]}, floor=1)
        accepted = accepted or {"held-out prompts": evaluation["accepted_at"]}
    if accepted:
        lines = {suite: list(enumerate(shares, 1)) for suite, shares in accepted.items()}
        plots["position"] = Plot(lines, floor=0)
    if evaluated := curve(metrics, "eval/acceptance_length"):
        plots["evaluations"] = Plot({"": evaluated})
    trained = [row for row in metrics if "loss" in row]
    if trained:
        steps = range(sum(key.startswith("loss/step_") for key in trained[0]))
        losses = {f"step {k}": curve(trained, f"loss/step_{k}") for k in steps}
        accuracies = {f"step {k}": curve(trained, f"accuracy/step_{k}") for k in steps}
        plots["loss"] = Plot({"": curve(trained, "loss")})
        plots["step_losses"], plots["step_accuracies"] = Plot(losses), Plot(accuracies, floor=0)
    return plots


def curve(metrics: list[dict], key: str) -> Line:
    """(update, value) where a line has the key; a mean over neighbours where there are too many to
    draw. Evaluations are all drawn, because the best one is marked.
    """
    points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
    size = 1 if key.startswith("eval/") else max(1, math.ceil(len(points) / MAX_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def templates() -> Environment:
    """The templates beside this file: everything they are given is escaped."""
    folder = FileSystemLoader(Path(__file__).parent, encoding="utf-8")
    return Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def write_report(run_dir: str | Path) -> Path:
    """Make `run_dir`/report.html from run.json and, where the stages left them, metrics.jsonl,
    evaluation.json and benchmark.json; return its path. The page loads nothing.
    """
    run_dir = Path(run_dir)
    run, benchmark = (redact(read_json(run_dir / f"{name}.json")) for name in ("run", "benchmark"))
    rows = benchmark_rows(benchmark)
    page = templates().get_template("page.html")
    html = page.render(
        run=run,
        training=training_facts(read_metrics(run_dir / "metrics.jsonl")),
        evaluation=read_json(run_dir / "evaluation.json"),
        protocol=benchmark.get("protocol", {}),
        rows=rows,
        columns=benchmark_columns(rows),
        titles=COLUMNS,
        plots=read_plots(run_dir),
        cell=cell,
        span=span,
        yaml=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True, width=100),
    )
    path = run_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def span(rows: list[dict], key: str, form: str = "{:.2f}") -> str | None:
    """The value of one row, or the range over several: `1.42`, `1.20–1.90`; None without any."""
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return None
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def training_facts(metrics: list[dict]) -> dict:
    """How the training went, in a few numbers."""
    trained = [row for row in metrics if "loss" in row]
    if not trained:
        return {}
    first, last = trained[0], trained[-1]
    facts = {"updates": last["step"], "first loss": first["loss"], "last loss": last["loss"]}
    for key in ("tokens_per_second", "data_wait_fraction", "mfu"):
        if key in last:
            facts[f"median {key}"] = sorted(row[key] for row in trained)[len(trained) // 2]
    peak = max(row["peak_memory_bytes"] for row in trained)
    return facts | {"peak memory": f"{peak / 2**30:.2f} GiB"}


def read_json(path: Path) -> dict:
    """The object in a JSON file, its NaN as None; {} where there is none."""
    return json.loads(path.read_text(), parse_constant=lambda name: None) if path.exists() else {}


def benchmark_rows(benchmark: dict) -> list[dict]:
    """The rows of all suites, each with its `suite`."""
    suites = benchmark.get("suites", {}).items()
    return [{"suite": suite, **row} for suite, rows in suites for row in rows]


def benchmark_columns(rows: list[dict]) -> list[str]:
    """The columns in which a row has a value."""
    return [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]


def benchmark_table(benchmark: dict) -> tuple[list[str], list[list]]:
    """Column names and rows of plain values of benchmark.json, for a tracker."""
    rows = benchmark_rows(benchmark)
    columns = benchmark_columns(rows)
    table = []
    for row in rows:
        values = {key: row.get(key) for key in columns}
        table.append([cell(k, v) if isinstance(v, list) else v for k, v in values.items()])
    return columns, table


def cell(key: str, value: Any) -> str:
    """A value as a table shows it; three or so digits of a float: 2.41, 0.0123, 153, 12,400."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return (" – " if key.endswith("interval95") else ", ").join(cell(key, v) for v in value)
    if key == "speedup":
        return f"{value:.2f}×"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    long = isinstance(value, float) or (isinstance(value, int) and value >= 10000)
    return f"{value:,.0f}" if long else str(value)


def prepared_table(facts: dict) -> Table:
    """What became of the rows that `prepare` read; the counts above the line add up to the rows."""
    rows = {
        "conversations to train on": facts["documents"],
        "held out, and what opens like them": facts["held_out_rows"],
    }
    if facts["left_out_by_weight"]:
        rows["left out by weight"] = facts["left_out_by_weight"]
    rows |= {f"rejected: {reason}": count for reason, count in facts["rejected"].items()}
    tokens = facts["tokens"]
    amounts = {
        "conversations an epoch passes over": facts["documents_per_epoch"],
        "tokens an epoch": tokens,
        "supervised": f"{facts['supervised_tokens'] / max(1, tokens):.1%}",
        "cut to data.max_length": facts["cut_to_max_length"],
        "draft vocabulary covers": f"{facts['vocab_coverage']:.2%} of supervised tokens",
        "held-out prompts": facts["heldout_prompts"],
    }
    amounts |= {f"repaired: {what}": count for what, count in facts["repaired"].items()}
    for reason, count in facts["heldout_rejected"].items():
        amounts[f"held-out row rejected: {reason}"] = count
    table = Table("prepare", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for section in (rows, {"rows read": facts["rows"]}, amounts):
        for name, value in section.items():
            # Text, because a reason may hold what rich takes for markup
            table.add_row(Text(name), value if isinstance(value, str) else f"{value:,}")
        table.add_section()
    return table


def summary_table(run_dir: str | Path) -> Group:
    """What a run achieved, for a terminal of 80 columns: on the held-out prompts, then the
    benchmark.
    """
    evaluation = read_json(Path(run_dir) / "evaluation.json")
    rows = benchmark_rows(read_json(Path(run_dir) / "benchmark.json"))
    tables = []
    if evaluation:
        table = terminal_table(f"Held-out prompts: {evaluation['answers']}", ["acceptance\nlength"])
        for length, accepted in evaluation["acceptance_length"].items():
            table.add_row(f"{length} drafted", cell("", accepted))
        table.add_section()
        drafted = f"{evaluation['draft_length']} drafted"
        table.add_row(f"{drafted}, first round", cell("", evaluation["first_round"]))
        table.add_row(f"{drafted}, loops left out", cell("", evaluation["loop_free"]))
        tables.append(table)
    for start in range(0, len(rows), SIDE_BY_SIDE):
        chosen = rows[start : start + SIDE_BY_SIDE]
        heads = [f"{row['suite']}\n{config_words(row['config'])}" for row in chosen]
        table = terminal_table("Benchmark", heads)
        for key in benchmark_columns(chosen):
            title, in_terminal = COLUMNS[key]
            if in_terminal:
                table.add_row(title, *[cell(key, row.get(key)) for row in chosen])
        tables.append(table)
    return Group(*tables, *([Text(LEGEND, style="dim")] if tables else []))


def config_words(config: list[int]) -> str:
    """A config above a column: `5 drafted` for a chain at batch 1, else its four numbers."""
    batch, steps, topk = config[:3]
    return f"{steps} drafted" if batch == 1 and topk <= 1 else ", ".join(map(str, config))


def terminal_table(title: str, columns: list[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table
