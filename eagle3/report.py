"""report.html, the one page that shows a run, and the table printed at its end; both only read the run's files."""

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eagle3.logger import read_metrics, redact

# Columns of the benchmark table in their order; what a row holds beyond them follows.
COLUMNS = {
    "suite": "suite",
    "config": "batch, steps, top-k, verify",
    "num_prompts": "prompts",
    "acceptance_length": "acceptance length",
    "interval95": "95 % interval",
    "acceptance_length_loop_free": "without loops",
    "loops": "answers that loop",
    "first_round": "first round",
    "bigram": "bigram",
    "prompt_lookup": "prompt look-up",
    "tokens_per_second": "tokens/s",
    "baseline_tokens_per_second": "tokens/s without draft",
    "speedup": "speedup",
    "speedup_interval95": "95 % interval of speedup",
    "lossless": "lossless",
    "tie_gap": "widest tie",
}
SUMMARY = {
    "acceptance_length": "acceptance\nlength",
    "tokens_per_second": "tokens/s",
    "baseline_tokens_per_second": "without\ndraft",
    "speedup": "speedup",
    "lossless": "lossless",
    "bigram": "bigram",
    "prompt_lookup": "prompt\nlook-up",
}
LOSSLESS = {
    "yes": "The output is lossless: token for token the target's own.",
    "tie": "The output is the target's own but for ties between its two best tokens.",
    "no": "The output is NOT lossless: it differs from the target's own.",
    None: "Whether the output is lossless was not checked.",
}
MAX_POINTS = 400
MAX_SUITES = 6
# Placeholders that become CSS variables in the SVG, so that one drawing serves the light and the dark page.
INK, MUTED, GRID, ACCENT, PAGE = "#010101", "#020202", "#030303", "#040404", "#050505"
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    PAGE: "var(--page)",
}
RC = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
}


def read_json(path: Path) -> dict:
    """The object in a JSON file, its NaN as None; {} where there is none."""
    return json.loads(path.read_text(), parse_constant=lambda name: None) if path.exists() else {}


def write_report(run_dir: str | Path) -> Path:
    """Makes `run_dir`/report.html from run.json, metrics.jsonl, benchmark.json and evaluation.json; returns its path.

    Any of them may be missing. The page holds its drawings and styles and loads nothing.
    """
    run_dir = Path(run_dir)
    run = redact(read_json(run_dir / "run.json"))
    benchmark = redact(read_json(run_dir / "benchmark.json"))
    evaluation = redact(read_json(run_dir / "evaluation.json"))
    metrics = read_metrics(run_dir / "metrics.jsonl")
    name = str(run.get("config", {}).get("name") or run_dir.name)
    rows = benchmark_rows(benchmark)
    columns, lengths = benchmark_columns(rows), by_draft_length(evaluation)
    accuracy_note = "Share of supervised tokens whose best drafted token is the target's best."
    acceptance = [
        draft_length_figure(evaluation),
        position_figure(rows, evaluation, metrics),
        evaluation_figure(metrics),
    ]
    training = [loss_figure(metrics), steps_figure(metrics, "loss", "Unweighted, for each step of the unroll.")]
    training.append(steps_figure(metrics, "accuracy", accuracy_note))
    facts = {
        "Training": training_facts(metrics),
        "Held-out evaluation": scalars(without(evaluation, "acceptance_length") if lengths else evaluation),
        "Benchmark protocol": scalars(benchmark.get("protocol")),
        "Other benchmark values": scalars(without(benchmark, "suites", "protocol")),
    }
    folded = ("config", "overrides", "hardware", "versions", "git", "seeds", "inputs")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE_TEMPLATE)
    html = page.render(
        name=name,
        headline=headline(rows, evaluation, metrics),
        tiles=tiles(rows, evaluation, metrics, run),
        sections={"Acceptance": list(filter(None, acceptance)), "Training": list(filter(None, training))},
        columns=[(COLUMNS.get(key, key.replace("_", " ")), key) for key in columns],
        cells=[[cell(key, row.get(key)) for key in columns] for row in rows],
        facts={title: values for title, values in facts.items() if values},
        folded={key.capitalize(): as_yaml(run[key]) for key in folded if run.get(key)},
    )
    path = run_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def summary_table(run_dir: str | Path) -> Table:
    """What a run achieved, for the terminal: acceptance length by draft length, then the benchmark."""
    run_dir = Path(run_dir)
    evaluation = read_json(run_dir / "evaluation.json")
    rows = benchmark_rows(read_json(run_dir / "benchmark.json"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), title_justify="left")
    table.caption_justify = "left"
    table.title = Text(f"Result of {run_dir.name}")
    table.add_column("draft", overflow="fold")
    found = [key for key in SUMMARY if any(row.get(key) is not None for row in rows)]
    keys = list(dict.fromkeys(["acceptance_length", *found]))
    for key in keys:
        table.add_column(SUMMARY[key], justify="right", no_wrap=True)
    for length, accepted in by_draft_length(evaluation):
        table.add_row(f"{length} drafted", cell("acceptance_length", accepted))
    if table.row_count:
        table.caption = "N drafted: a chain of N tokens on the held-out prompts"
        table.add_section()
    for row in rows:
        config = cell("config", row.get("config")).replace(", ", ",")
        table.add_row(Text(f"{row['suite']} {config}"), *[Text(cell(key, row.get(key))) for key in keys])
    return table


def benchmark_rows(benchmark: dict) -> list[dict]:
    """The rows of all suites, each with its `suite`."""
    suites = benchmark.get("suites") or {}
    suites = {suite: [rows] if isinstance(rows, dict) else rows for suite, rows in suites.items()}
    return [{"suite": suite, **row} for suite, rows in suites.items() for row in rows]


def benchmark_columns(rows: list[dict]) -> list[str]:
    """The known columns that occur in the rows, then the other plain values they hold."""
    known = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    others = [key for row in rows for key, value in row.items() if key not in COLUMNS and is_plain(value)]
    return known + list(dict.fromkeys(others))


def benchmark_table(benchmark: dict) -> tuple[list[str], list[list]]:
    """Column names and rows of plain values of benchmark.json, for a tracker."""
    rows = benchmark_rows(benchmark)
    columns = benchmark_columns(rows)
    values = [[(key, row.get(key)) for key in columns] for row in rows]
    return columns, [[value if is_plain(value) else cell(key, value) for key, value in row] for row in values]


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def cell(key: str, value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        joint = " – " if key.endswith("interval95") else ", "
        return joint.join(cell(key, inner) for inner in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(name, inner)}" for name, inner in value.items())
    if key == "speedup" and isinstance(value, int | float):
        return f"{value:.2f}×"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10000 else str(value)


def number(value: float) -> str:
    """Three or so digits: 2.41, 0.0123, 153, 12,400."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 or value == 0 else f"{value:.3g}"


def span(rows: list[dict], key: str, form: str) -> str | None:
    """A measured value of one row, or the range over several: `1.42`, `1.20–1.90`; None if no row has it."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    low, high = (form.format(pick(values)) for pick in (min, max)) if values else (None, None)
    return low if low == high else f"{low}–{high}"


def losslessness(rows: list[dict]) -> str | None:
    """`no` if any row is not lossless, `tie` if any differs by a tie only, `yes` if all are; None if not checked."""
    seen = [row["lossless"] for row in rows if row.get("lossless") is not None]
    if not seen:
        return None
    if any(value is False for value in seen):
        return "no"
    return "yes" if all(value is True for value in seen) else "tie"


def headline(rows: list[dict], evaluation: dict, metrics: list[dict]) -> str:
    """The result in a sentence or two, as far as it was measured."""
    accepted, speed = span(rows, "acceptance_length", "{:.2f}"), span(rows, "speedup", "{:.2f}")
    if accepted:
        suites = list(dict.fromkeys(str(row["suite"]) for row in rows))
        where = suites[0] if len(suites) == 1 else f"{len(suites)} suites"
        sentence = f"Acceptance length {accepted} on {where}"
        sentence += f", {speed} times the speed of decoding without the draft. " if speed else ". "
        return sentence + LOSSLESS[losslessness(rows)]
    measured = held_out(evaluation)
    if measured:
        length, accepted = measured
        return (
            f"Acceptance length {accepted:.2f} on held-out prompts with {length} drafted tokens; no benchmark was run."
        )
    best = best_evaluation(metrics)
    if best:
        return f"Acceptance length {best[1]:.2f} on held-out prompts at update {best[0]}; no benchmark was run."
    return "No acceptance length was measured."


def tiles(rows: list[dict], evaluation: dict, metrics: list[dict], run: dict) -> list[tuple[str, str]]:
    """(what, value) of the row of large numbers."""
    measured, best, coverage = held_out(evaluation), best_evaluation(metrics), find_coverage(run)
    speed = span(rows, "speedup", "{:.2f}")
    held_out_tile = (f"held-out, {measured[0]} drafted", measured[1]) if measured else ("held-out", best and best[1])
    found = [
        ("acceptance length", span(rows, "acceptance_length", "{:.2f}")),
        ("speedup", speed and f"{speed}×"),
        ("tokens/s with draft", span(rows, "tokens_per_second", "{:,.0f}")),
        ("tokens/s without", span(rows, "baseline_tokens_per_second", "{:,.0f}")),
        ("lossless", losslessness(rows)),
        (held_out_tile[0], held_out_tile[1] and f"{held_out_tile[1]:.2f}"),
        ("draft vocabulary coverage", coverage and f"{coverage:.1%}"),
    ]
    return [(what, value) for what, value in found if value]


def find_coverage(run: Any) -> float | None:
    """The first number in run.json whose key speaks of coverage: a share of the training tokens."""
    for key, value in run.items() if isinstance(run, dict) else ():
        if "coverage" in str(key) and isinstance(value, float) and 0 <= value <= 1:
            return value
        inner = find_coverage(value)
        if inner is not None:
            return inner
    return None


def training_facts(metrics: list[dict]) -> dict[str, str]:
    """How the training went, in a few numbers."""
    trained = [row for row in metrics if row.get("loss") is not None]
    if not trained:
        return {}
    last, best = trained[-1], best_evaluation(metrics)
    facts = {"updates": last["step"], "first loss": trained[0]["loss"], "last loss": last["loss"]}
    if best:
        facts["best update"] = best[0]
    for key in ("tokens_per_second", "data_wait_fraction", "mfu"):
        values = sorted(row[key] for row in trained if row.get(key) is not None)
        if values:
            facts[f"median {key.replace('_', ' ')}"] = values[len(values) // 2]
    facts = {key: cell(key, value) for key, value in facts.items()}
    peak = max((row.get("peak_memory_bytes") or 0 for row in trained), default=0)
    return facts | ({"peak memory": f"{peak / 2**30:.2f} GiB"} if peak else {})


def scalars(values: Any, prefix: str = "") -> dict[str, str]:
    """The plain values and short lists of nested dicts: `a.b` -> as shown."""
    found = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            found[f"{prefix}{key}"] = f"{value:.4g}"
        elif is_plain(value) or (len(value) <= 16 and all(map(is_plain, value))):
            found[f"{prefix}{key}"] = cell(str(key), value)
    return found


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def by_draft_length(evaluation: dict) -> list[tuple[int, float]]:
    """(draft length, acceptance length) in order; `acceptance_length` of evaluation.json may also be one number."""
    lengths = evaluation.get("acceptance_length")
    if not isinstance(lengths, dict):
        return []
    return sorted(
        (int(length), value) for length, value in lengths.items() if str(length).isdigit() and value is not None
    )


def held_out(evaluation: dict) -> tuple[int, float] | None:
    """(draft length, acceptance length) at the `draft_length` of the evaluation, else at the longest measured."""
    lengths = by_draft_length(evaluation)
    chosen = [pair for pair in lengths if pair[0] == evaluation.get("draft_length")] or lengths[-1:]
    return chosen[0] if chosen else None


def best_evaluation(metrics: list[dict]) -> tuple[int, float] | None:
    """(update, acceptance length) of the best evaluation; of equal ones the first."""
    points = series(metrics, "eval/acceptance_length")
    return max(points, key=lambda point: point[1]) if points else None


def series(metrics: list[dict], key: str) -> list[tuple[int, float]]:
    """(update, value) where a line has the key, averaged in groups when there are too many to draw."""
    points = [(row["step"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
    group = -(-len(points) // MAX_POINTS)
    if group <= 1 or key.startswith("eval/"):
        return points
    groups = (points[start : start + group] for start in range(0, len(points), group))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def step_keys(metrics: list[dict], prefix: str) -> list[str]:
    """The keys `prefix`0, `prefix`1, ... that occur, in order of their number."""
    keys = {key for row in metrics for key in row if re.fullmatch(re.escape(prefix) + r"\d+", key)}
    return sorted(keys, key=lambda key: int(key[len(prefix) :]))


def ramp(index: int, count: int) -> str:
    """Placeholder of colour `index` of an ordered row of `count`."""
    return f"#0601{round(100 * index / max(count - 1, 1)):02x}"


def draw(paint, title: str, note: str, alt: str) -> dict:
    """A figure for the page: `paint(axes)` on fresh axes, as inline SVG in CSS colours."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks; the browser's own font has them
        figure = Figure(figsize=(4.2, 2.9), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper left", ncols=4, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r'\1role="img"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    for placeholder, colour in CSS_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub("#0601([0-9a-f]{2})", lambda match: mix(int(match[1], 16)), svg)
    svg = re.sub("#0701([0-9a-f]{2})", lambda match: f"var(--series-{int(match[1], 16)})", svg)
    return {"title": title, "note": note, "alt": alt, "svg": Markup(svg)}


def mix(percent: int) -> str:
    return f"color-mix(in oklab, var(--ramp-end) {percent}%, var(--ramp-start))"


def loss_figure(metrics: list[dict]) -> dict | None:
    """Loss over updates."""
    points = series(metrics, "loss")
    if not points:
        return None

    def paint(axes):
        axes.plot(*zip(*points, strict=True), color=ACCENT)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("update")

    return draw(
        paint,
        "Loss",
        "The weighted sum over the steps of the unroll, as it is minimised.",
        "Loss over updates",
    )


def steps_figure(metrics: list[dict], what: str, note: str) -> dict | None:
    """`what`/step_k over updates, one line a step."""
    lines = {key: series(metrics, key) for key in step_keys(metrics, f"{what}/step_")}
    lines = {key: points for key, points in lines.items() if points}
    if not lines:
        return None

    def paint(axes):
        for index, (key, points) in enumerate(lines.items()):
            label = f"step {key.rsplit('_', 1)[1]}"
            axes.plot(*zip(*points, strict=True), color=ramp(index, len(lines)), linewidth=1.2, label=label)
        if what == "accuracy":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("update")

    return draw(paint, f"{what.capitalize()} by step", note, f"{what} of each step over updates")


def evaluation_figure(metrics: list[dict]) -> dict | None:
    """Acceptance length over updates, the best one marked."""
    points = series(metrics, "eval/acceptance_length")
    if not points:
        return None
    best = best_evaluation(metrics)

    def paint(axes):
        axes.plot(*zip(*points, strict=True), color=ACCENT, marker="o", markersize=3.5)
        axes.plot(*best, color=ACCENT, marker="o", markersize=9, markerfacecolor=PAGE, markeredgewidth=2)
        right = best[0] > (points[0][0] + points[-1][0]) / 2
        axes.annotate(
            f"best {best[1]:.2f} at update {best[0]:,}", best, (0, 9), textcoords="offset points",
            ha="right" if right else "left", fontweight="bold",
        )  # fmt: skip
        axes.margins(y=0.18)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("update")

    note = "On held-out prompts that the target answered; the checkpoint marked here is the one exported."
    return draw(paint, "Acceptance length while training", note, f"Best {best[1]:.2f} at update {best[0]}")


def draft_length_figure(evaluation: dict) -> dict | None:
    """Acceptance length for every number of drafted tokens."""
    points = by_draft_length(evaluation)
    if not points:
        return None

    def paint(axes):
        axes.plot(*zip(*points, strict=True), color=ACCENT, marker="o", markersize=5)
        for point in points:
            axes.annotate(f"{point[1]:.2f}", point, (-3, 5), textcoords="offset points", ha="right", fontsize=8)
        axes.set_ylim(bottom=1)
        axes.margins(x=0.1, y=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("drafted tokens a round")

    note = "Tokens that each pass of the target yields, its own included; 1 is decoding without a draft."
    return draw(paint, "Acceptance length by draft length", note, "Acceptance length by draft length")


def position_figure(rows: list[dict], evaluation: dict, metrics: list[dict]) -> dict | None:
    """Share accepted at every position of the draft: of the suites, else of the evaluation, else while training."""
    lines = {}
    for row in rows:
        if row.get("accepted_by_position") and row["suite"] not in lines and len(lines) < MAX_SUITES:
            lines[row["suite"]] = row["accepted_by_position"]
    if not lines and evaluation.get("accepted_at"):
        lines["held-out prompts"] = evaluation["accepted_at"]
    if not lines:
        keys = step_keys(metrics, "eval/accepted_at_")
        lines["held-out prompts"] = [series(metrics, key)[-1][1] for key in keys if series(metrics, key)]
    lines = {name: list(line.values()) if isinstance(line, dict) else line for name, line in lines.items() if line}
    if not lines:
        return None

    def paint(axes):
        for index, (name, line) in enumerate(lines.items()):
            label = name if len(str(name)) <= 24 else f"{str(name)[:23]}…"
            axes.plot(
                range(1, len(line) + 1),
                line,
                color=f"#0701{index:02x}",
                marker="o",
                markersize=4,
                label=label,
            )
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlabel("position in the draft")

    hidden = len({row["suite"] for row in rows if row.get("accepted_by_position")}) - len(lines)
    note = "Share of rounds in which the drafted token at each position was accepted"
    note += f"; {hidden} more suites are in the table." if hidden > 0 else "."
    return draw(paint, "Accepted by position", note, "Share accepted by position in the draft")


def as_yaml(value: Any) -> str:
    if is_plain(value):
        return str(value)
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100).rstrip()


PAGE_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}</title>
<style>
:root {
  --page: #fff; --panel: #f6f7f9; --ink: #1b2027; --muted: #5d6673; --line: #dfe3e8; --accent: #1c5fb8;
  --good: #1a7f45; --bad: #b3261e; --ramp-start: #12407f; --ramp-end: #9ec4f3;
  --series-0: #1c5fb8; --series-1: #c2570c; --series-2: #128272; --series-3: #a3348f; --series-4: #8a6d00;
  --series-5: #5b6472;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14171c; --panel: #1c2027; --ink: #e8ebef; --muted: #9ba5b3; --line: #333a44; --accent: #7db2f5;
  --good: #62c98d; --bad: #ff8a80; --ramp-start: #a9d0ff; --ramp-end: #2f5f9e;
  --series-0: #7db2f5; --series-1: #f5a35c; --series-2: #58c9b5; --series-3: #e58fd3; --series-4: #d8bd4d;
  --series-5: #a9b2bf;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2.5rem) 4rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
.headline { font-size: 1.1rem; max-width: 46rem; margin: .6rem 0 1.6rem; color: var(--muted); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tile { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; white-space: nowrap; }
.tile span { color: var(--muted); font-size: .82rem; }
.yes { color: var(--good); } .no { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 2rem 2.5rem; }
figure { margin: 0; min-width: 0; max-width: 32rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { color: var(--muted); font-size: .82rem; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem .45rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; vertical-align: bottom; }
.wide th { white-space: normal; min-width: 5rem; }
th:first-child, td:first-child { text-align: left; }
td.strong { font-weight: 650; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 2rem 2.5rem; }
.facts table { width: 100%; } .facts td { white-space: normal; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--muted); }
details { border-top: 1px solid var(--line); } details:last-child { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .6rem 0; font-weight: 550; }
pre { margin: 0 0 1rem; padding: .9rem 1rem; background: var(--panel); border-radius: .5rem; }
pre { overflow-x: auto; font-size: .8rem; }
</style>
</head>
<body>
<main>
<h1>{{ name }}</h1>
<p class="headline">{{ headline }}</p>
<div class="tiles">
{% for what, value in tiles %}
<div class="tile"><b class="{{ value if what == "lossless" }}">{{ value }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
{% if cells %}
<h2>Benchmark</h2>
<div class="scroll"><table class="wide">
<thead><tr>{% for title, key in columns %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in cells %}
<tr>
{%- for value in row %}
{% set key = columns[loop.index0][1] %}
<td class="{{ 'strong' if key in ('acceptance_length', 'speedup') }}
{%- if key == 'lossless' and value in ('yes', 'no') %}{{ value }}{% endif %}">{{ value }}</td>
{%- endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% for title, figures in sections.items() if figures %}
<h2>{{ title }}</h2>
<div class="figures">
{% for figure in figures %}
<figure aria-label="{{ figure.alt }}"><h3>{{ figure.title }}</h3>{{ figure.svg }}
<figcaption>{{ figure.note }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% if facts %}
<h2>In numbers</h2>
<div class="facts">
{% for title, values in facts.items() %}
<section><h3>{{ title }}</h3><div class="scroll"><table>
{% for key, value in values.items() %}
<tr><td>{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table></div></section>
{% endfor %}
</div>
{% endif %}
{% if folded %}
<h2>How it was made</h2>
{% for title, text in folded.items() %}
<details><summary>{{ title }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
{% endif %}
</main>
</body>
</html>
"""
