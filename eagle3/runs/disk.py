"""Whether a folder's disk can hold what is about to be written."""

import os
import shutil
from pathlib import Path

from rich.filesize import decimal as size_text

from eagle3.errors import RunError


def free_bytes(folder: str | Path) -> int:
    """What may still be written to `folder`, which need not exist yet."""
    folder = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def sync(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def check_disk(needed: int, folder: str | Path, most: int | None = None) -> None:
    """Raise RunError when so many bytes do not fit on the disk of `folder`, or are above `most`."""
    room = free_bytes(folder)
    limit = f"{folder} has {size_text(room)} free"
    if most is not None and most < room:
        room, limit = most, f"hidden_states.max_disk leaves {size_text(most)}"
    if needed > room:
        raise RunError(
            f"the hidden states need {size_text(needed)}, but {limit}; set mode=hybrid, "
            "hidden_states.dtype=int8, another hidden_states.path or a smaller data.num_samples"
        )
