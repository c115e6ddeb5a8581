"""Safetensors files with a checksum, which others read as any."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from xxhash import xxh3_128

from eagle3.errors import DamageError
from eagle3.runs.disk import REMEDY, write_atomically

CHECKSUM = "eagle3_checksum"  # in the metadata


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stated not in (None, checksum(tensors)):
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DamageError(f"{path} is damaged ({error}){REMEDY}") from error
    return tensors


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxh3_128()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
