"""Resumable state: written beside the training under a temporary name, synced, renamed; `last` and
`best` are links.

torch.distributed.checkpoint writes and reads the tensors, as safetensors, so that nothing in a
checkpoint can run. Every rank writes its share of them, and a run with other ranks reads them all.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from eagle3.errors import RunError
from eagle3.parallel.ranks import PATIENCE, Ranks

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


@dataclass
class State:
    """`tensors` by name, the same on every rank; `own`, this rank's alone, under names with its
    number; `plain`: what JSON can hold.
    """

    tensors: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]
    plain: dict[str, Any]


class Checkpoints:
    """A run's `folder/step_N`, of which the newest `keep_last`, `last` and `best` stay; one is
    written at a time.
    """

    def __init__(self, folder: Path, keep_last: int, ranks: Ranks):
        self.folder, self.keep_last, self.ranks = folder, keep_last, ranks
        self.group = (
            dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world_size > 1 else None
        )
        # a killed run's files, some of ranks that there are no more, must not end up in a new
        # folder
        if ranks.is_main:
            for partial in folder.glob("step_*.partial"):
                shutil.rmtree(partial)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None

    def save(self, update: int, state: State, best: bool = False) -> None:
        """Copy the state to the host and write it in a thread; first waits for the one before."""
        self.wait()
        mine = share_of(state.tensors, self.ranks) | state.own
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in mine.items()}
        self.writing = self.writer.submit(self.write, update, copied, state.plain, best)

    def write(
        self, update: int, tensors: dict[str, torch.Tensor], plain: dict[str, Any], best: bool
    ) -> None:
        path, partial = self.folder / f"step_{update}", self.folder / f"step_{update}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(
                tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None
            )
            if not self.ranks.is_main:
                return
            with open(partial / "state.json", "w") as stream:
                json.dump(plain, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
            sync(self.folder)
            if (
                best
            ):  # before `last`: killed between the two, the resumed run evaluates this update again
                link(self.folder / "best", path.name)
            link(self.folder / "last", path.name)
            prune(self.folder, self.keep_last)
        except (OSError, CheckpointException) as error:
            raise RunError(
                f"the checkpoint of update {update} cannot be written to {self.folder} ({cause(error)}); make room and "
                "go on from the one before"
            ) from error

    def look(self) -> None:
        """Raise RunError if writing has failed meanwhile."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is there. Raises RunError when it could not be."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def cause(error: Exception) -> str:
    """What really happened on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0]


def share_of(tensors: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes: dealt so that all write about as many bytes."""
    loads = [0] * ranks.world_size
    mine = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        rank = loads.index(min(loads))
        loads[rank] += tensors[name].nbytes
        if rank == ranks.rank:
            mine[name] = tensors[name]
    return mine


def sync(folder: Path) -> None:
    """Make the names in a folder last."""
    number = os.open(folder, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def link(name: Path, to: str) -> None:
    """Point the symbolic link `name` at its sibling `to`, in one step."""
    temporary = name.with_name(f".{name.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(to)
    os.replace(temporary, name)


def prune(folder: Path, keep_last: int) -> None:
    kept = {os.readlink(folder / name) for name in ("last", "best") if (folder / name).is_symlink()}
    steps = sorted(folder.glob("step_*[0-9]"), key=number)
    for path in steps[:-keep_last]:
        if path.name not in kept:
            shutil.rmtree(path)


def number(step: Path) -> int:
    return int(step.name.removeprefix("step_"))


def load(path: Path, prefix: str = "") -> State:
    """A checkpoint folder (or link): all tensors whose names begin with `prefix`, on the host.
    Raises RunError.
    """
    try:
        plain = json.loads((path / "state.json").read_text())
        reader = HuggingFaceStorageReader(str(path))
        found = reader.read_metadata().state_dict_metadata
        wanted = {name: kind for name, kind in found.items() if name.startswith(prefix)}
        tensors = {
            name: torch.empty(kind.size, dtype=kind.properties.dtype)
            for name, kind in wanted.items()
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (
        Exception
    ) as error:  # safetensors, json and dcp raise a dozen kinds, and all mean the same
        real = path.resolve()
        others = [
            step.name
            for step in sorted(real.parent.glob("step_*[0-9]"), key=number)
            if step.name != real.name
        ]
        remedy = (
            f"to go on from {others[-1]}: ln -sfn {others[-1]} {real.parent}/last"
            if others
            else "start a new run"
        )
        raise RunError(f"checkpoint {path} is damaged ({cause(error)}); {remedy}") from error
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith("rank_")}
    return State(tensors, own, plain)


def draft_weights(path: Path) -> dict[str, torch.Tensor]:
    """The draft's state dict in a checkpoint."""
    return {
        name.removeprefix("draft/"): tensor for name, tensor in load(path, "draft/").tensors.items()
    }
