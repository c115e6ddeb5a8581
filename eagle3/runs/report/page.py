"""report.html, the one page that shows a run; it only reads the run's files."""

from pathlib import Path

import yaml
from jinja2 import Environment

from eagle3.runs.logger import read_metrics, redact
from eagle3.runs.report.figures import figures
from eagle3.runs.report.summary import COLUMNS, benchmark_columns, benchmark_rows, cell, read_json

LOSSLESS = {
    "yes": "The output is lossless: token for token the target's own.",
    "tie": "The output is the target's own but for ties between its two best tokens.",
    "no": "The output is NOT lossless: it differs from the target's own.",
    None: "Whether the output is lossless is checked at temperature 0 only.",
}


def write_report(run_dir: str | Path) -> Path:
    """Makes `run_dir`/report.html from run.json and, where the stages left them, metrics.jsonl,
    evaluation.json and benchmark.json; returns its path.

    The page holds its drawings and styles and loads nothing.
    """
    run_dir = Path(run_dir)
    run, benchmark = (redact(read_json(run_dir / f"{name}.json")) for name in ("run", "benchmark"))
    evaluation, metrics = (
        read_json(run_dir / "evaluation.json"),
        read_metrics(run_dir / "metrics.jsonl"),
    )
    rows = benchmark_rows(benchmark)
    columns = benchmark_columns(rows)
    facts = {
        "Training": training_facts(metrics),
        "Held-out evaluation": {
            key: value for key, value in evaluation.items() if key != "acceptance_length"
        },
        "Benchmark protocol": benchmark.get("protocol", {}),
    }
    made_from = {
        "Config": run["config"],
        "Overrides": run["overrides"],
        "Inputs": run["inputs"],
        "Environment": {key: run[key] for key in ("git", "hardware", "versions")},
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    ).render(
        name=run["config"]["name"],
        headline=headline(rows, evaluation),
        tiles=tiles(rows, evaluation, run["inputs"]),
        sections=figures(rows, evaluation, metrics),
        columns=[COLUMNS[key][0] for key in columns],
        rows=[[(key, cell(key, row.get(key))) for key in columns] for row in rows],
        facts={
            title: {key.replace("_", " "): cell(key, value) for key, value in values.items()}
            for title, values in facts.items()
            if values
        },
        folded={
            title: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
            for title, value in made_from.items()
            if value
        },
    )
    path = run_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def span(rows: list[dict], key: str, form: str = "{:.2f}") -> str | None:
    """The value of one row, or the range over several: `1.42`, `1.20–1.90`; None if no row has it."""
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return None
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def losslessness(rows: list[dict]) -> str | None:
    """That of the worst row: `no`, `tie`, `yes`; None if it was not checked."""
    seen = {cell("lossless", row["lossless"]) for row in rows}
    return next((worst for worst in ("no", "tie", "yes") if worst in seen), None)


def held_out(evaluation: dict) -> float:
    return evaluation["acceptance_length"][str(evaluation["draft_length"])]


def headline(rows: list[dict], evaluation: dict) -> str:
    """The result in a sentence or two, as far as it was measured."""
    accepted = span(rows, "acceptance_length")
    if accepted:
        suites = list(dict.fromkeys(row["suite"] for row in rows))
        where = suites[0] if len(suites) == 1 else f"{len(suites)} suites"
        measured = (
            f"Acceptance length {accepted} on {where}, {span(rows, 'speedup')} times the speed of decoding without "
            f"the draft. {LOSSLESS[losslessness(rows)]}"
        )
        warnings = [
            f"{row['suite']} {row['config']}: {row['warning']}." for row in rows if "warning" in row
        ]
        return " ".join([measured, *warnings])
    if evaluation:
        return (
            f"Acceptance length {held_out(evaluation):.2f} on held-out prompts with {evaluation['draft_length']} "
            "drafted tokens; no benchmark was run."
        )
    return "No acceptance length was measured."


def tiles(rows: list[dict], evaluation: dict, inputs: dict) -> list[tuple[str, str]]:
    """(what, value) of the row of large numbers."""
    speedup = span(rows, "speedup")
    found = [
        ("acceptance length", span(rows, "acceptance_length")),
        ("speedup", speedup and f"{speedup}×"),
        ("tokens/s with draft", span(rows, "tokens_per_second", "{:,.0f}")),
        ("tokens/s without", span(rows, "baseline_tokens_per_second", "{:,.0f}")),
        ("lossless", losslessness(rows)),
    ]
    if evaluation:
        found.append(
            (f"held-out, {evaluation['draft_length']} drafted", f"{held_out(evaluation):.2f}")
        )
    if "prepared" in inputs:
        found.append(("draft vocabulary coverage", f"{inputs['prepared']['vocab_coverage']:.1%}"))
    return [(what, value) for what, value in found if value]


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
    return facts | {
        "peak memory": f"{max(row['peak_memory_bytes'] for row in trained) / 2**30:.2f} GiB"
    }
