"""Where a run computes."""

import ctypes
import os
from pathlib import Path

import torch

from eagle3.config import RunConfig
from eagle3.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is the CUDA device where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=auto or device=cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: returning and zeroing them again costs a sixth of a CPU step's time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library, another allocator
    for option, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 1 << 26), (M_MMAP_THRESHOLD, 1 << 25)):
        mallopt(option, value)


def launch(config: RunConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Run the pipeline in this process; returns the acceptance length."""
    from eagle3.pipeline import execute

    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    if choose_device(config.device).type == "cpu":
        keep_freed_memory()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    return execute(config, run_dir, overrides)
