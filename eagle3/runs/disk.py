"""Whether a folder's disk can hold what is about to be written."""

import shutil
from pathlib import Path

from eagle3.errors import RunError


def free_bytes(folder: str | Path) -> int:
    """What may still be written to `folder`, which need not exist yet."""
    folder = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def size_text(size: float) -> str:
    """Bytes in words: 4.1 TB, 350 GB, 2.0 MB."""
    for name, unit in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= unit:
            digits = 1 if size < 100 * unit else 0
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size / 1e3:.0f} kB"


def check_disk(needed: int, folder: str | Path, most: int | None = None) -> None:
    """Raise RunError when `needed` bytes of hidden states do not fit on the disk of `folder`, or
    are above `most`.
    """
    room = free_bytes(folder)
    limit = f"{folder} has {size_text(room)} free"
    if most is not None and most < room:
        room, limit = most, f"hidden_states.max_disk leaves {size_text(most)}"
    if needed > room:
        raise RunError(
            f"the hidden states need {size_text(needed)}, but {limit}; set mode=hybrid, "
            "hidden_states.dtype=int8, another hidden_states.path or a smaller data.num_samples"
        )
