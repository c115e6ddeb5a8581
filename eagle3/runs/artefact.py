"""What stages leave behind: folders named by a fingerprint of everything they were made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from eagle3.errors import RunError


def fingerprint(inputs: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of `inputs`."""
    # 64 bits: a folder's name that can be read out, and two of a million never meet.
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_file(path: str | Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": Path(path).stat().st_size, "sha256": digest}


def artefact(
    cache_dir: str, kind: str, inputs: dict, write: Callable[[Path], dict] | None, stage: str
) -> Path:
    """The folder `<cache_dir>/<kind>/<fingerprint>`: reused when complete, else filled by `write`.

    `write(folder)` finds what an interrupted call left; without it the folder must be there.
    """
    path = Path(cache_dir) / kind / fingerprint(inputs)
    if (path / "artefact.json").is_file():
        return path
    if write is None:
        raise RunError(f"cache_dir={cache_dir} has no {kind}/{path.name}: add {stage} to stages")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise RunError(f"cache_dir={cache_dir} cannot be written: {error}") from error
    # Runs of a sweep want the same artefact at the same moment: one writes it, the others wait.
    with lock:
        if (path / "artefact.json").is_file():  # another process wrote it while this one waited
            return path
        partial = path.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        facts = write(partial)
        content = json.dumps({"inputs": inputs, "facts": facts}, indent=1, default=str)
        (partial / "artefact.json").write_text(content)
        partial.rename(path)  # only what is complete has its name
    return path


def read_facts(path: Path) -> dict[str, Any]:
    """What `write` returned for the artefact at `path`."""
    return json.loads((path / "artefact.json").read_text())["facts"]


def read_inputs(path: Path) -> dict[str, Any]:
    """What the artefact at `path` was made from."""
    return json.loads((path / "artefact.json").read_text())["inputs"]
