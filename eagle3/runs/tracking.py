"""A run as it is seen from outside: run.json, its tracker, what its stages print, its report."""

import json
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from eagle3.config import STAGES, RunConfig, instantiate, last_part
from eagle3.errors import ConfigError, RunError
from eagle3.runs.disk import FULL, read_json, write_atomically
from eagle3.runs.logger import NoTracker, redact
from eagle3.runs.report import benchmark_rows, summary, write_report
from eagle3.runs.resume import command_to_resume, is_run, keep_private

# Those whose versions may change a result.
PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "safetensors", "numpy")
# What run.json calls the artefact of a stage.
ARTEFACTS = {
    "import": "imported", "regenerate": "regenerated", "prepare": "prepared",
    "generate": "generated", "capture": "hidden_states",
}  # fmt: skip

# Overrides that are the same for all runs of a project, or say nothing of a draft.
SAME = ("cache_dir=", "hydra", "logger", "name=", "plan=", "stages=", "train.resume=")


class Tracking:
    """The record of a run in `run_dir`/run.json, with which a resumed run goes on."""

    def __init__(
        self, config: RunConfig, run_dir: Path, overrides: list[str], tracker: NoTracker, console
    ):
        self.path, self.stages = run_dir / "run.json", config.stages
        # The listed stages from the one at work on; all of them: nothing was made yet.
        self.left = [stage for stage in STAGES if stage in config.stages]
        self.tracker, self.console = tracker, console
        before, settings = read_json(self.path), asdict(config)
        keep_private(settings, run_dir)
        # With the command line of its first start a resumed run can be made again.
        first = before.get("overrides", overrides)
        tracker_id = before.get("tracker_id") or uuid.uuid4().hex[:8]
        shown = settings | {"overrides": first}
        tracker.start(run_dir, run_name(config.name, first), shown, tracker_id, bool(before))
        versions = {name: version(name) for name in PACKAGES}
        self.inputs: dict[str, Any] = before.get("inputs", {})
        self.seconds: dict[str, float] = before.get("seconds", {})  # by stage
        self.began = time.monotonic()
        self.content = {
            "config": settings,
            "overrides": first,
            "resumed_with": overrides if before else None,
            "versions": versions | {"python": platform.python_version()},
            "tracker_id": tracker_id,
            "git": git_commit(),
            "seeds": {"seed": config.seed},
            "inputs": self.inputs,
            "seconds": self.seconds,
        }

    def write(self) -> None:
        text = json.dumps(redact(self.content), indent=1, default=str)
        write_atomically(self.path, [text.encode()])

    def spend(self, stage: str) -> None:
        """The time since the stage before is this one's."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.began
        self.began = now

    def finish(self, stage: str) -> None:
        self.spend(stage)
        self.left = [each for each in self.left if STAGES.index(each) > STAGES.index(stage)]

    def note(self, stage: str, *artefacts: tuple[Path, dict[str, Any]]) -> None:
        """Keep the facts of a stage's artefacts in run.json, and print them if it is listed."""
        self.finish(stage)
        noted = [facts | {"path": str(path)} for path, facts in artefacts]
        self.inputs[ARTEFACTS[stage]] = noted if stage == "regenerate" else noted[0]
        self.write()
        # What another run made was shown there: only a stage the user asked for speaks.
        for facts in noted if stage in self.stages else ():
            table = Table(stage, "", box=SIMPLE_HEAD)
            for key, number in facts.items():
                if isinstance(number, int | float):
                    table.add_row(key.replace("_", " "), f"{round(number, 4):,}")
            self.console.print(table)
            self.console.print(f"{stage}: {facts['path']}")
            for name in ("rejected", "repaired", "heldout_rejected"):
                for reason, count in facts.get(name, {}).items():
                    self.console.print(f"{stage}: {name.replace('_', ' ')} {count:,} x {reason}")

    def note_damage(self, damaged: dict[int, str]) -> None:
        """Keep why documents of a store were left out of training, by key; print the first."""
        if damaged:
            self.inputs["damaged"] = {str(key): reason for key, reason in damaged.items()}
            self.write()
            first = "; ".join(f"{key}: {reason}" for key, reason in sorted(damaged.items())[:5])
            self.console.print(f"train: {len(damaged)} damaged documents were not read ({first})")


@contextmanager
def track_run(
    config: RunConfig, run_dir: Path, overrides: list[str], device: torch.device, console: Console
) -> Iterator[Tracking]:
    """Keeps run.json and ends the tracker; shows results, also of a run that fails behind a stage,
    with the command that repeats the rest.
    """
    tracker, exit_code = instantiate(config.logger), 1
    try:
        tracking = Tracking(config, run_dir, overrides, tracker, console)
        hardware = {"device": str(device), "name": device_name(device)}
        hardware |= {"threads": torch.get_num_threads(), "system": platform.platform()}
        tracking.content["hardware"] = hardware
        # Before the first stage: with its checkpoints it is what a killed run is resumed from.
        tracking.write()
        try:
            yield tracking
        except BaseException as error:
            if tracking.left:
                tracking.spend(tracking.left[0])
            if is_run(run_dir) or len(tracking.left) < len(set(config.stages)):
                with suppress(Exception):  # that would hide why the run failed
                    show_results(run_dir, tracking)
                left = tracking.left
                if "regenerate" in config.stages and "regenerate" not in left:
                    left = ["regenerate", *left]  # whose answers are what later stages read
                command = partial(command_to_resume, run_dir, overrides, left)
                name_command(error, command, console)
            raise
        tracking.content["finished"] = True
        show_results(run_dir, tracking)
        exit_code = 0  # what a tracker shows of a run: finished, not failed
    finally:
        tracker.finish(exit_code)


def show_results(run_dir: Path, tracking: Tracking) -> None:
    """Write run.json and the report, and print what was achieved."""
    tracking.write()
    report, tracker = write_report(run_dir), tracking.tracker
    tracker.keep(report)
    if "export" in tracking.stages and "export" not in tracking.left:
        tracker.keep(run_dir / "draft")
    if rows := acceptance_by_position(run_dir):
        tracker.table("acceptance_by_position", ["suite", "config", "position", "accepted"], rows)
    tracking.console.print(summary(run_dir, tracking.stages))
    # Of other runs the page has nothing new, unless that a stage is missing.
    if tracking.left or {"train", "benchmark"} & {*tracking.stages}:
        tracking.console.print(f"report: {report}")


def run_name(name: str, overrides: list[str]) -> str:
    """What a tracker calls a run: its name, and the overrides that tell it from its neighbours."""
    parts = [name]
    for override in redact(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if not override.lstrip("+~").startswith(SAME):
            parts.append(f"{key.rpartition('.')[2]}={last_part(value)}")
    return " ".join(parts)[:128]  # W&B takes no longer ones


def acceptance_by_position(run_dir: Path) -> list[list]:
    """Rows of (suite, config, position, share of rounds in which its token was accepted)."""
    evaluation = read_json(run_dir / "evaluation.json")
    measured = [("held-out prompts", "walked", evaluation.get("accepted_at", []))]
    for name, sampled in evaluation.get("sampled", {}).items():
        measured.append((f"held-out prompts, temperature {name}", "walked", sampled["accepted_at"]))
    for row in benchmark_rows(read_json(run_dir / "benchmark.json")):
        measured.append((row["suite"], str(row["config"]), row["accepted_by_position"] or []))
    return [
        [suite, config, position, share]
        for suite, config, shares in measured
        for position, share in enumerate(shares, start=1)
    ]


def name_command(error: BaseException, command: Callable[[], str], console: Console) -> None:
    """Let an error that is shown as one sentence end in `command`; print it before a traceback."""
    named = any(words in str(error) for words in (*FULL, "go on with: "))  # here, or later
    if isinstance(error, ConfigError | RunError) and not named:
        error.args = (f"{error}; when that is mended, go on with: {command()}",)
    elif isinstance(error, Exception) and not named:  # an interrupt names it itself
        console.print(f"go on with: {command()}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the code, with `+` when files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def read_acceptance(run_dir: Path) -> float | None:
    """The acceptance length a run has measured: the benchmark's first, else the evaluation's."""
    evaluation = read_json(run_dir / "evaluation.json")
    rows = benchmark_rows(read_json(run_dir / "benchmark.json"))
    if rows:
        # With no drafted token a row is the target alone.
        return next((row["acceptance_length"] for row in rows if row["config"][1] > 0), None)
    length = str(evaluation.get("draft_length"))
    return evaluation["acceptance_length"][length] if evaluation else None
