"""What stages leave behind: folders named by a fingerprint of everything they were made from."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from xxhash import xxh3_128

from eagle3.config import flatten
from eagle3.errors import DamageError, RunError
from eagle3.runs.disk import read_json, write_atomically

MANIFEST, STATE = "artefact.json", "state.json"  # of artefacts, of checkpoints
# Not in a manifest: hidden states, terabytes with checksums of their own, and locks.
UNLISTED = ("shard_*.safetensors", ".*")
SHOWN_LETTERS, SHOWN_CHANGES = 15, 4  # of a value in a line, and of values


def fingerprint(inputs: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of `inputs`."""
    # 64 bits: a folder's name that can be read out, and two of a million never meet.
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_file(path: str | Path, algorithm: Any = hashlib.sha256) -> dict[str, Any]:
    digest = algorithm()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):  # hashlib.file_digest is not in Python 3.10
            digest.update(block)
    return {"bytes": Path(path).stat().st_size, digest.name.lower(): digest.hexdigest()}


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write a folder's last file: `content`, and size and checksum of all the others in it."""
    others = [file for file in sorted(path.parent.iterdir()) if not any(map(file.match, UNLISTED))]
    content = content | {"files": {file.name: describe_file(file, xxh3_128) for file in others}}
    content = json.loads(json.dumps(content, default=str))
    text = json.dumps(content | {"checksum": fingerprint(content)}, indent=1)
    write_atomically(path, [text.encode()])


def read_manifest(path: Path, whole: bool = False) -> dict[str, Any]:
    """What `write_manifest` wrote; `whole`: if all its files are as they were. DamageError."""
    if not path.is_file():
        raise DamageError(f"{path} is missing")
    content = read_json(path, parse_constant=float, remedy="")
    if content.pop("checksum", None) != fingerprint(content):
        raise DamageError(f"{path} is damaged or of an older version")
    files = content.pop("files")
    for name, described in files.items() if whole else ():
        file = path.with_name(name)
        if not file.is_file() or describe_file(file, xxh3_128) != described:
            raise DamageError(f"{file} is missing or not as it was written")
    return content


def artefact(
    cache_dir: str, kind: str, inputs: dict, write: Callable[[Path], dict] | None, stage: str
) -> Path:
    """The folder `<cache_dir>/<kind>/<fingerprint>`: checked where it is, else filled by `write`.

    `write(folder)` finds what an interrupted call left; without it the folder must be there.
    """
    name = fingerprint(inputs)
    path = Path(cache_dir) / kind / name
    announce(stage, path, inputs)
    if not path.is_dir():
        if write is None:
            raise RunError(f"cache_dir={cache_dir} has no {kind}/{name}: add {stage} to stages")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = acquire(FileLock(f"{path}.lock"), stage)
        except OSError as error:
            raise RunError(f"cache_dir={cache_dir} cannot be written: {error}") from error
        # Runs of a sweep want the same artefact at the same moment: one writes it, others wait.
        with lock:
            if not path.is_dir():
                partial = path.with_suffix(".partial")
                partial.mkdir(exist_ok=True)
                facts = write(partial)
                write_manifest(partial / MANIFEST, {"inputs": inputs, "facts": facts})
                return partial.rename(path)  # only what is complete has its name
    try:  # all of its files once, so that whoever opens them afterwards need not doubt them
        read_manifest(path / MANIFEST, whole=True)
    except DamageError as damage:
        raise RunError(f"{damage}; delete {path} and add {stage} to stages") from damage
    return path


def acquire(lock: FileLock, stage: str) -> Any:
    """The lock, once nobody else has it."""
    with suppress(Timeout):
        return lock.acquire(timeout=0)
    print(f"{stage}: another run makes {Path(lock.lock_file).stem}; waiting for it")
    return lock.acquire()


def read_facts(path: Path) -> dict[str, Any]:
    """What `write` returned for the artefact at `path`."""
    return read_manifest(path / MANIFEST)["facts"]


def read_inputs(path: Path) -> dict[str, Any]:
    """What the artefact at `path` was made from."""
    return read_manifest(path / MANIFEST)["inputs"]


def announce(
    stage: str, path: Path, inputs: dict, read: Callable[[Path], dict] = read_inputs
) -> None:
    """Print that `path` is used again; else what sets it apart from the nearest folder beside it.

    `read(folder)` gives the inputs of another one of the kind, or raises DamageError.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if path.is_dir():
        return print(f"{stage}: reused {path}")
    wanted, found = json.loads(json.dumps(inputs, default=str)), []
    # The newest first, which of equally near ones is named.
    others = path.parent.glob("*")  # those that are being made may be renamed meanwhile
    folders = [other for other in others if other.is_dir() and other.suffix != ".partial"]
    for folder in sorted(folders, key=os.path.getmtime, reverse=True):
        with suppress(DamageError):
            found.append((folder, differences(read(folder), wanted)))
    if found:
        nearest, changes = min(found, key=lambda each: len(each[1]))
        more = f" and {len(changes) - SHOWN_CHANGES} more" * (len(changes) > SHOWN_CHANGES)
        print(f"{stage}: not the one of {nearest}: {', '.join(changes[:SHOWN_CHANGES])}{more}")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words, by dotted key: both values where they are short."""
    before, now, changes = flatten(before), flatten(now), []
    for key in {**now, **before}:
        values = before.get(key), now.get(key)
        if values[0] == values[1]:
            continue
        shown = [json.dumps(value).strip('"') for value in values]
        if max(map(len, shown)) > SHOWN_LETTERS:  # of lists their sizes may tell enough
            shown = [f"{len(value):,}" if isinstance(value, list) else "" for value in values]
        changed = " -> ".join(shown) if shown[0] != shown[1] else "(changed)"
        changes.append(f"{key} {changed}")
    return changes
