"""Where a run computes."""

import os
from pathlib import Path

import torch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def launch(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the pipeline in this process; returns the acceptance length."""
    from eagle3.pipeline import execute

    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    return execute(config, run_dir, overrides)
