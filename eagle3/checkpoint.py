"""Resumable state: written under a temporary name, synced, renamed; `last` and `best` are links."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from eagle3.errors import RunError


def save(folder: Path, update: int, state: dict[str, Any], keep_last: int, best: bool = False) -> Path:
    """Write `folder/step_<update>/state.pt`, point `last` (and `best`) at it, prune all but `keep_last` and `best`."""
    path, partial = folder / f"step_{update}", folder / f"step_{update}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with open(partial / "state.pt", "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        if best:  # before `last`: killed between the two, the resumed run evaluates this update again
            link(folder / "best", path.name)
        link(folder / "last", path.name)
        prune(folder, keep_last)
    except OSError as error:
        raise RunError(f"the checkpoint of update {update} cannot be written to {folder}: {error}") from error
    return path


def link(name: Path, to: str) -> None:
    """Point the symbolic link `name` at its sibling `to`, in one step."""
    temporary = name.with_name(f".{name.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    os.replace(temporary, name)


def prune(folder: Path, keep_last: int) -> None:
    kept = {os.readlink(folder / name) for name in ("last", "best") if (folder / name).is_symlink()}
    steps = sorted(folder.glob("step_*[0-9]"), key=lambda p: int(p.name.removeprefix("step_")))
    for path in [*(step for step in steps[:-keep_last] if step.name not in kept), *folder.glob("step_*.partial")]:
        shutil.rmtree(path)


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint folder (or link); tensors and plain data only, so nothing in it can run."""
    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise RunError(
            f"checkpoint {path} cannot be read ({str(error).splitlines()[0]}); resume from another"
        ) from error
