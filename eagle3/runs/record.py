"""run.json: what a run was made from, so that its folder explains itself."""

import dataclasses
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from eagle3.config import RunConfig
from eagle3.runs.logger import redact

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "safetensors", "numpy")


class RunRecord:
    """The content of `run_dir`/run.json. Stages add to `inputs` what they read and made, by name;
    `tracker_id` is the run's name at the experiment tracker.

    A resumed run goes on with the record it finds: its `overrides` stay those of the first start.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, overrides: list[str], device: torch.device
    ):
        self.config, self.device = config, device
        self.path = run_dir / "run.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.overrides: list[str] = before.get("overrides", overrides)
        self.resumed_with = overrides if before else None
        self.inputs: dict[str, Any] = before.get("inputs", {})
        self.tracker_id: str | None = before.get("tracker_id")

    def write(self) -> None:
        """Write run.json, in one step and without secrets."""
        versions = {name: version(name) for name in PACKAGES}
        content = {
            "config": redact(dataclasses.asdict(self.config)),
            "overrides": redact(self.overrides),
            "resumed_with": redact(self.resumed_with),
            "versions": versions | {"python": platform.python_version()},
            "tracker_id": self.tracker_id,
            "git": git_commit(),
            "hardware": hardware(self.device),
            "seeds": {"seed": self.config.seed},
            "inputs": self.inputs,
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, default=str))
        os.replace(partial, self.path)


def git_commit() -> str | None:
    """The commit of the code, with `+` when files differ from it; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output(
            [*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL, text=True
        )
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")


def hardware(device: torch.device) -> dict[str, Any]:
    """What a run computes on: `name` is that of the GPU, else of the processor."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
