"""Resumable state: every rank writes its part; as safetensors, so that nothing can run code."""

import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, hf_storage

from eagle3.errors import RunError, first_line
from eagle3.runs.artefact import STATE, read_manifest, write_manifest
from eagle3.runs.disk import instead_of, step_folders, sync

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
Tensors = dict[str, torch.Tensor]


@dataclass
class CheckpointState:
    tensors: Tensors  # the same on every rank, but `rank_N/...`, which are rank N's alone
    plain: dict[str, Any]  # what JSON can hold


class CheckpointWriter:
    """Writes `folder/step_N` from a thread; every rank makes one and saves the same updates."""

    def __init__(
        self, folder: Path, keep_last: int, rank: int, world_size: int, timeout: timedelta | None
    ):
        self.folder, self.keep_last = folder, keep_last
        self.rank, self.world_size = rank, world_size
        # A group of its own: the thread's collectives would mix with those of training in another.
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        # A killed run may have had more ranks, whose files must not end up in a new folder.
        for partial in folder.glob("step_*.partial") if rank == 0 else ():
            shutil.rmtree(partial)
        # One thread, so that checkpoints are written in the order in which they were saved.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None

    def save(self, update: int, state: CheckpointState, best: bool = False) -> None:
        """Copy the state to the host and write it in the thread; first waits for the one before."""
        self.wait()
        # Copied, because the next update changes the weights while the thread still writes.
        mine = partition_tensors(state.tensors, self.rank, self.world_size)
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in mine.items()}
        self.writing = self.thread.submit(self._write, update, copied, state.plain, best)

    def _write(self, update: int, tensors: Tensors, plain: dict[str, Any], best: bool) -> None:
        path, partial = self.folder / f"step_{update}", self.folder / f"step_{update}.partial"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            storage = hf_storage.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            alone = self.group is None
            dcp.save(tensors, storage_writer=storage, process_group=self.group, no_dist=alone)
            if self.rank != 0:
                return
            write_manifest(partial / STATE, plain)
            if path.exists():  # from before a resumed run went back to an earlier one
                shutil.rmtree(path)
            os.replace(partial, path)
            sync(self.folder)  # or a loss of power undoes the rename
            # `best` before `last`: killed between the two, the resumed run evaluates this update
            # again; the other way round it would never learn that this one was better.
            if best:
                replace_link(self.folder / "best", path.name)
            replace_link(self.folder / "last", path.name)
            linked = {link.resolve() for link in (self.folder / "last", self.folder / "best")}
            for old in step_folders(self.folder)[: -self.keep_last]:
                if old.resolve() not in linked:
                    shutil.rmtree(old)
        except (OSError, CheckpointException) as error:
            reason = f"{first_cause(error)}; earlier ones are whole"
            raise RunError(f"{path} cannot be written: {reason}") from error

    def raise_if_failed(self) -> None:
        """Raise RunError if writing has failed meanwhile; never waits."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what is being written is on disk. Raises RunError when it could not be."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()


def first_cause(error: Exception) -> str:
    """The first line of what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def partition_tensors(tensors: Tensors, rank: int, world_size: int) -> Tensors:
    """The tensors that this rank writes, its own and about as many bytes as others of the rest."""
    own = {name for name in tensors if name.startswith("rank_")}
    loads, mine = [0] * world_size, {name: tensors[name] for name in own}
    # Largest first, names to break ties: every rank must come to the same partition by itself.
    for name in sorted(tensors.keys() - own, key=lambda name: (-tensors[name].nbytes, name)):
        writer = loads.index(min(loads))
        loads[writer] += tensors[name].nbytes
        if writer == rank:
            mine[name] = tensors[name]
    return mine


def replace_link(link: Path, target: str) -> None:
    # In one step, so that whoever reads meanwhile, or a kill, finds the old or the new one.
    temporary = link.with_name(f".{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def load_checkpoint(path: Path, prefix: str = "") -> CheckpointState:
    """Read a checkpoint to the host, of its tensors those named `prefix`... RunError if damaged."""
    try:
        plain = read_manifest(path / STATE, whole=True)
        reader = hf_storage.HuggingFaceStorageReader(str(path))
        found = reader.read_metadata().state_dict_metadata
        wanted = {name: meta for name, meta in found.items() if name.startswith(prefix)}
        tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in wanted.items()}
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # safetensors, json and dcp raise a dozen kinds: all mean the same
        reason = f"({first_cause(error)}); {instead_of(path)}"
        raise RunError(f"checkpoint {path} is damaged {reason}") from error
    return CheckpointState(tensors, plain)


def load_draft(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The fields of the draft's config and its state dict, on the host. Raises RunError."""
    state = load_checkpoint(path, "draft/")
    if "draft" not in state.plain:
        raise RunError(f"checkpoint {path} is of an older version; export with that, or train anew")
    weights = {name.removeprefix("draft/"): tensor for name, tensor in state.tensors.items()}
    return state.plain["draft"], weights
