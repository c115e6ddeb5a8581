"""What stages leave behind: folders named by a fingerprint of everything they were made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from xxhash import xxh3_128

from eagle3.errors import DamageError, RunError
from eagle3.runs.disk import read_json, write_atomically

MANIFEST = "artefact.json"
# Not in a manifest: hidden states, terabytes with checksums of their own, and what goes later.
UNLISTED = ("shard_*.safetensors", "journal.jsonl", ".*")
CHECKSUM = "eagle3_checksum"  # in the metadata of safetensors


def fingerprint(inputs: dict[str, Any]) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of `inputs`."""
    # 64 bits: a folder's name that can be read out, and two of a million never meet.
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_file(path: str | Path, algorithm: Any = "sha256") -> dict[str, Any]:
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, algorithm)
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
    content = read_json(path, parse_constant=float)
    # One of an older version has no checksums.
    if content.pop("checksum", None) not in (None, fingerprint(content)):
        raise DamageError(f"{path} is not as it was written")
    for name, described in content.pop("files", {}).items() if whole else ():
        file = path.with_name(name)
        if not file.is_file() or describe_file(file, xxh3_128) != described:
            raise DamageError(f"{file} is missing or not as it was written")
    return content


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all, with a checksum that `load_tensors` reads."""
    content = memoryview(save(tensors, {"format": "pt"}))
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    # Two entries given to `save` would come in any order, and the file not twice the same.
    header["__metadata__"][CHECKSUM] = checksum(tensors)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns what follows, as the format asks
    write_atomically(path, [len(head).to_bytes(8, "little"), head, content[start:]])


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of any safetensors file. Raises DamageError."""
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(CHECKSUM)
        tensors = load_file(path)
        if stated not in (None, checksum(tensors)):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        remedy = "delete it, or put a whole copy in its place"
        raise DamageError(f"{path} is damaged ({error}); {remedy}") from error
    return tensors


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def artefact(
    cache_dir: str, kind: str, inputs: dict, write: Callable[[Path], dict] | None, stage: str
) -> Path:
    """The folder `<cache_dir>/<kind>/<fingerprint>`: checked where it is, else filled by `write`.

    `write(folder)` finds what an interrupted call left; without it the folder must be there.
    """
    path = Path(cache_dir) / kind / fingerprint(inputs)
    if path.is_dir():
        return check_artefact(path, stage)
    if write is None:
        raise RunError(f"cache_dir={cache_dir} has no {kind}/{path.name}: add {stage} to stages")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock").acquire()
    except OSError as error:
        raise RunError(f"cache_dir={cache_dir} cannot be written: {error}") from error
    # Runs of a sweep want the same artefact at the same moment: one writes it, the others wait.
    with lock:
        if path.is_dir():  # another process wrote it while this one waited
            return check_artefact(path, stage)
        partial = path.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        facts = write(partial)
        write_manifest(partial / MANIFEST, {"inputs": inputs, "facts": facts})
        partial.rename(path)  # only what is complete has its name
    return path


def check_artefact(path: Path, stage: str) -> Path:
    """Read all of its files once, so that whoever opens them afterwards need not doubt them."""
    try:
        read_manifest(path / MANIFEST, whole=True)
    except DamageError as damage:
        raise RunError(f"{damage}; delete {path} and add {stage} to stages") from damage
    return path


def read_facts(path: Path) -> dict[str, Any]:
    """What `write` returned for the artefact at `path`."""
    return read_manifest(path / MANIFEST)["facts"]


def read_inputs(path: Path) -> dict[str, Any]:
    """What the artefact at `path` was made from."""
    return read_manifest(path / MANIFEST)["inputs"]
