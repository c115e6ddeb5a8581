"""A run as it is seen from outside: its record, its tracker, what its stages print, its report."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from rich.console import Console

from eagle3.config import RunConfig
from eagle3.runs.logger import NoTracker, Wandb
from eagle3.runs.record import RunRecord
from eagle3.runs.report import benchmark_table, prepared_table, summary_table, write_report

# What run.json calls the artefact of a stage, and what a listed stage prints of it.
ARTEFACTS = {
    "import": ("imported", "{documents:,} documents, {bytes:,} bytes, {path}"),
    "regenerate": ("regenerated", "{answered:,} of {rows:,} conversations answered again, {path}"),
    "prepare": ("prepared", "{documents:,} conversations, {path}"),
    "generate": ("generated", "{answers:,} answers of the target, {answer_tokens:,} tokens"),
    "capture": (
        "hidden_states",
        "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes, {bytes_per_token:,.0f} a "
        "token, {path}",
    ),
}
# Overrides of a run that a benchmark of its draft in this process has no use for.
NOT_FOR_BENCHMARK = (
    "stages", "draft_path", "train.resume", "hydra.run.dir", "benchmark.temperature",
    "launch.nproc_per_node", "parallel", "parallel.ulysses", "parallel.ring",
)  # fmt: skip


class Tracking:
    """The record of a run under way; `note` adds what a stage read or made."""

    def __init__(
        self, record: RunRecord, tracker: NoTracker | Wandb, stages: list[str], console: Console
    ):
        self.record, self.tracker, self.stages, self.console = record, tracker, stages, console

    def note(self, stage: str, *artefacts: tuple[Path, dict[str, Any]]) -> None:
        """Keep the facts of a stage's artefacts in run.json, and print them if it is listed."""
        name, sentence = ARTEFACTS[stage]
        noted = [facts | {"path": str(path)} for path, facts in artefacts]
        self.record.inputs[name] = noted if stage == "regenerate" else noted[0]
        self.record.write()
        for facts in noted if stage in self.stages else ():
            if stage == "prepare":
                self.console.print(prepared_table(facts))
            self.console.print(f"{stage}: {sentence.format(**facts)}")
            for reason, count in facts.get("rejected", {}).items():
                self.console.print(f"{stage}: rejected {count:,} x {reason}")

    def note_damage(self, damaged: dict[int, str]) -> None:
        """Keep why documents of a store were left out of training, by key; print the first."""
        if not damaged:
            return
        self.record.inputs["damaged"] = {str(key): reason for key, reason in damaged.items()}
        first = "; ".join(f"{key}: {reason}" for key, reason in sorted(damaged.items())[:5])
        self.console.print(f"train: {len(damaged)} damaged documents were left out ({first})")


@contextmanager
def track_run(
    config: RunConfig, run_dir: Path, overrides: list[str], device: torch.device, console: Console
) -> Iterator[Tracking]:
    """Keeps run.json, forwards metrics.jsonl to the tracker, and writes report.html at the end."""
    record, tracker = RunRecord(config, run_dir, overrides, device), instantiate(config.logger)
    settings = dataclasses.asdict(config) | {"overrides": record.overrides}
    record.tracker_id = tracker.start(str(run_dir), config.name, settings, record.tracker_id)
    exit_code = 1
    try:
        record.write()
        yield Tracking(record, tracker, config.stages, console)
        record.write()
        report, measured = write_report(run_dir), run_dir / "benchmark.json"
        if measured.exists():
            tracker.table("benchmark", *benchmark_table(json.loads(measured.read_text())))
        tracker.page(report)
        exit_code = 0
    finally:
        tracker.finish(exit_code)
    console.print(summary_table(run_dir))
    console.print(f"report: {report}")
    draft = Path(config.draft_path or run_dir / "draft")
    if draft.exists():
        again = [o for o in record.overrides if o.split("=")[0] not in NOT_FOR_BENCHMARK]
        stages = "regenerate,benchmark" if "regenerate" in config.stages else "benchmark"
        again += [f"stages=[{stages}]", f"draft_path={draft}", "benchmark.temperature=1"]
        console.print(f"next, the same draft when sampling: python run.py {shlex.join(again)}")


def read_acceptance(run_dir: Path) -> float | None:
    """The acceptance length a run has measured: the benchmark's first, else the evaluation's."""
    benchmark, evaluation = run_dir / "benchmark.json", run_dir / "evaluation.json"
    if benchmark.exists():
        suites = json.loads(benchmark.read_text())["suites"]
        rows = [row for rows in suites.values() for row in rows]
        return next((row["acceptance_length"] for row in rows if row["config"][1] > 0), None)
    if evaluation.exists():
        values = json.loads(evaluation.read_text())
        return values["acceptance_length"][str(values["draft_length"])]
    return None
