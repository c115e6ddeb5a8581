"""Files: whether a disk can hold them, whole or not at all."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.filesize import decimal as size_text

from eagle3.errors import ConfigError, DamageError, RunError

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
REMEDY = "; delete it, or put a whole copy in its place"


def read_json(path: Path, parse_constant=lambda name: None, remedy=REMEDY) -> dict[str, Any]:
    """The object in a JSON file, its NaN as None; {} where there is none. Raises DamageError."""
    try:
        content = json.loads(path.read_text(), parse_constant=parse_constant)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} is damaged ({error}){remedy}") from error
    return content


def step_folders(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(checkpoints.glob("step_*[0-9]"), key=lambda path: int(path.name.split("_")[1]))


def instead_of(checkpoint: Path) -> str:
    """What to do when a checkpoint, or the one that a link names, cannot be read."""
    real, remedy = checkpoint.resolve(), "start a new run"
    link = checkpoint if checkpoint.is_symlink() else real.parent / "last"
    for other in step_folders(real.parent):
        if other != real:
            remedy = f"to go on from {other.name}: ln -sfn {other.name} {link}"
    return remedy


def free_bytes(folder: str | Path) -> int:
    """What may still be written to `folder`, which need not exist yet."""
    folder = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


@contextmanager
def name_full_disk(folders: list[str | Path], command: Callable[[], str]) -> Iterator[None]:
    """When a disk has no room, RunError says which of `folders`, what is free, how to go on."""
    try:
        yield
    except Exception as error:
        # By its words, as safetensors, torch and other processes hand on no more.
        if not any(words in str(error) for words in FULL):
            raise
        folder = getattr(error, "filename", None) or min(folders, key=free_bytes)
        what = getattr(error, "strerror", None) or error
        free = f"{folder} has {size_text(free_bytes(folder))} free"
        raise RunError(f"{what}; {free}: make room, and go on with: {command()}") from error


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomically(path: Path, pieces: Iterable[Any]) -> None:
    """On disk when this returns, or nothing is left of it and OSError raised (a full disk)."""
    # A name of its own: of a file that two processes write alike, either may be the last.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with partial.open("xb") as stream:
            stream.writelines(pieces)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)  # or a power cut may undo the renaming


def parse_size(text: str) -> int:
    """Bytes of a size such as 500GB or 1.5TB. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"hidden_states.max_disk={text} is no size; write it as 500GB or 1.5TB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def check_disk(needed: int, folder: str | Path, most: int | None = None) -> None:
    """Raise RunError when so many bytes do not fit on the disk of `folder`, or are above `most`."""
    room = free_bytes(folder)
    limit = f"{folder} has {size_text(room)} free"
    if most is not None and most < room:
        room, limit = most, f"hidden_states.max_disk leaves {size_text(most)}"
    if needed > room:
        remedy = "set mode=hybrid, hidden_states.dtype=int8 or another hidden_states.path"
        raise RunError(f"the hidden states need {size_text(needed)}, but {limit}; {remedy}")
