"""A run's results as tables: in the terminal, for a tracker, and the cells of report.html."""

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

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


def read_json(path: Path) -> dict:
    """The object in a JSON file, its NaN as None; {} where there is none."""
    return json.loads(path.read_text(), parse_constant=lambda name: None) if path.exists() else {}


def prepared_table(learnt: dict) -> Table:
    """What became of the rows that `prepare` read; the counts above the line add up to the rows."""
    table = Table("prepare", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    rows = {
        "conversations to train on": learnt["documents"],
        "held out, and what opens like them": learnt["held_out_rows"],
    }
    rows |= (
        {"left out by weight": learnt["left_out_by_weight"]} if learnt["left_out_by_weight"] else {}
    )
    rows |= {f"rejected: {reason}": count for reason, count in learnt["rejected"].items()}
    for name, count in rows.items():
        table.add_row(Text(name), f"{count:,}")
    table.add_section()
    table.add_row("rows read", f"{learnt['rows']:,}")
    table.add_section()
    tokens, supervised = learnt["tokens"], learnt["supervised_tokens"]
    more = {
        "conversations an epoch passes over": f"{learnt['documents_per_epoch']:,}",
        "tokens an epoch": f"{tokens:,}",
        "supervised": f"{supervised / max(1, tokens):.1%}",
        "cut to data.max_length": f"{learnt['cut_to_max_length']:,}",
        "draft vocabulary covers": f"{learnt['vocab_coverage']:.2%} of supervised tokens",
        "held-out prompts": f"{learnt['heldout_prompts']:,}",
    }
    more |= {f"repaired: {what}": f"{count:,}" for what, count in learnt["repaired"].items()}
    more |= {
        f"held-out row rejected: {why}": f"{count:,}"
        for why, count in learnt["heldout_rejected"].items()
    }
    for name, value in more.items():
        table.add_row(Text(name), value)
    return table


def summary_table(run_dir: str | Path) -> Group:
    """What a run achieved, for a terminal of 80 columns: on the held-out prompts, then the
    benchmark.
    """
    run_dir = Path(run_dir)
    evaluation = read_json(run_dir / "evaluation.json")
    rows = benchmark_rows(read_json(run_dir / "benchmark.json"))
    tables = []
    if evaluation:
        table = terminal_table(f"Held-out prompts: {evaluation['answers']}", ["acceptance\nlength"])
        for length, accepted in evaluation["acceptance_length"].items():
            table.add_row(f"{length} drafted", cell("", accepted))
        table.add_section()
        table.add_row(
            f"{evaluation['draft_length']} drafted, first round",
            cell("", evaluation["first_round"]),
        )
        table.add_row(
            f"{evaluation['draft_length']} drafted, loops left out",
            cell("", evaluation["loop_free"]),
        )
        tables.append(table)
    for start in range(0, len(rows), SIDE_BY_SIDE):
        chosen = rows[start : start + SIDE_BY_SIDE]
        table = terminal_table(
            "Benchmark", [f"{row['suite']}\n{short(row['config'])}" for row in chosen]
        )
        for key in benchmark_columns(chosen):
            title, in_terminal = COLUMNS[key]
            if in_terminal:
                table.add_row(title, *[cell(key, row.get(key)) for row in chosen])
        tables.append(table)
    return Group(*tables, *([Text(LEGEND, style="dim")] if tables else []))


def short(config: list[int]) -> str:
    """A config above a column: `5 drafted` for a chain at batch 1, else its four numbers."""
    return (
        f"{config[1]} drafted" if config[0] == 1 and config[2] <= 1 else ", ".join(map(str, config))
    )


def terminal_table(title: str, columns: list[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    return table


def benchmark_table(benchmark: dict) -> tuple[list[str], list[list]]:
    """Column names and rows of plain values of benchmark.json, for a tracker."""
    rows = benchmark_rows(benchmark)
    columns = benchmark_columns(rows)
    values = [[(key, row.get(key)) for key in columns] for row in rows]
    return columns, [
        [cell(key, value) if isinstance(value, list) else value for key, value in row]
        for row in values
    ]


def benchmark_rows(benchmark: dict) -> list[dict]:
    """The rows of all suites, each with its `suite`."""
    return [
        {"suite": suite, **row}
        for suite, rows in benchmark.get("suites", {}).items()
        for row in rows
    ]


def benchmark_columns(rows: list[dict]) -> list[str]:
    """The columns in which a row has a value."""
    return [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]


def cell(key: str, value: Any) -> str:
    """A value as a table shows it; three or so digits of a float: 2.41, 0.0123, 153, 12,400."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return (" – " if key.endswith("interval95") else ", ").join(
            cell(key, inner) for inner in value
        )
    if key == "speedup":
        return f"{value:.2f}×"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return (
        f"{value:,.0f}"
        if isinstance(value, float) or (isinstance(value, int) and value >= 10000)
        else str(value)
    )
