"""SpecForge's hidden states on disk (`rows_0-2000/data_0.ckpt[.gz]`), converted once into our
store.

A file holds one document: `input_ids` [n], `loss_mask` [n], `aux_hidden_state` [1,n,3H] and
`hidden_state` [1,n,H], the last one after the target's final norm, because SpecForge trains with
nothing but the head behind it.

What SpecForge trains on is kept, so that `loss/mask=shifted` gives its losses: it cuts a document
at the maximal length and never supervises the last row it then has. A capture in batches pads on
the right with id 0 before the target runs, which sees these rows as tokens, and SpecForge then
trains with them as part of the document: they count in its normaliser and the first of them is a
teacher, so they stay. Rows that the target never computed go: ids beyond the hidden states, rows
that an `attention_mask` excludes, rows of zeros.

n tokens, H the target's hidden size, U teacher rows, V vocabulary.
"""

import gzip
import io
import json
import pickle
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from eagle3.batch import Features
from eagle3.errors import RunError
from eagle3.hidden_states.shards import SHARD_BYTES
from eagle3.hidden_states.store import Document, finish, shard_is_complete, write_shard
from eagle3.target.hf import head_statistics
from eagle3.target.weights import TargetWeights

INTEGERS = {torch.int16, torch.int32, torch.int64}
FLOATS = {torch.float16, torch.bfloat16, torch.float32}
# The dimensions without the one of the batch, and the dtypes.
KEYS = {
    "input_ids": (1, INTEGERS),
    "loss_mask": (1, INTEGERS | {torch.bool, torch.uint8, torch.float32}),
    "aux_hidden_state": (2, FLOATS),
    "hidden_state": (2, FLOATS),
}
# Model types of transformers whose norms scale by 1 + weight.
OFFSET_NORMS = {
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
}
UNSUPERVISED = "has no supervised token"


class FileError(Exception):
    """Why a file gives no document: `reason`, by which such files are counted, and the detail in
    brackets.
    """

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason} ({detail})" if str(detail) else reason)
        self.reason = reason


def hidden_state_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("data_*") if path.name.endswith((".ckpt", ".ckpt.gz")))


def is_specforge(folder: Path) -> bool:
    """Whether it holds such files; false where it does not exist."""
    return next(hidden_state_files(folder), None) is not None


def natural(path: Path) -> list:
    """Sorts data_9 before data_10."""
    parts: list = re.split(r"(\d+)", str(path))
    parts[1::2] = map(int, parts[1::2])
    return parts


def payload(path: Path) -> int:
    """Bytes, unpacked (modulo 4 GiB, as gzip notes it)."""
    if path.suffix != ".gz":
        return path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 4))
        return int.from_bytes(stream.read(4), "little")


def plan(files: list[Path], sizes: list[int]) -> list[range]:
    """Runs of files, by number, that make a shard of about `SHARD_BYTES`; they depend on nothing
    but the files.
    """
    shards, start, size = [], 0, 0
    for number, more in enumerate(sizes):
        if size and size + more > SHARD_BYTES:
            shards.append(range(start, number))
            start, size = number, 0
        size += more
    return [*shards, range(start, len(files))]


def convert(
    source: Path,
    folder: Path,
    weights: TargetWeights,
    dtype: str,
    max_length: int | None,
    on_damage: str,
    target: dict | None = None,
) -> dict:
    """Fill `folder` with a store of `source`'s documents, keyed by the number of their file;
    returns the facts.

    `target` describes whose weights these are. What an interrupted call completed in `folder` is
    kept. `on_damage` is "fail" or "skip". The facts are those of the store and `files`, `rejected`
    (count by reason), `skipped` (file, reason; also in `rejects.jsonl`), `padding` (rows trimmed)
    and `prenorm` (documents whose last hidden states came without the final norm). Raises RunError.
    """
    files = sorted(hidden_state_files(source), key=natural)
    assert files, source
    sizes = [payload(path) for path in files]
    ends = list(accumulate(sizes))
    parts, number = [], 0
    columns = (
        TextColumn("import hidden states"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=ends[-1])
        for members in plan(files, sizes):
            noted = folder / f"part_{members.start:08d}.json"
            part = json.loads(noted.read_text()) if noted.exists() else None
            if part is None or (part["documents"] and not shard_is_complete(folder, number)):
                part = {"skipped": [], "documents": 0, "padding": 0, "prenorm": 0}
                documents = []
                for key in members:
                    progress.update(task, completed=ends[key] - sizes[key])
                    try:
                        documents.append(read_document(files[key], key, weights, max_length, part))
                    except FileError as error:
                        if on_damage == "fail" and error.reason != UNSUPERVISED:
                            raise RunError(
                                f"{files[key]} {error}; capture it again or delete it, or set "
                                "hidden_states.on_damage=skip to leave such files out"
                            ) from error
                        part["skipped"].append([str(files[key]), error.reason, str(error)])
                part["documents"] = len(documents)
                if documents:
                    write_shard(folder, number, documents, dtype)
                partial = noted.with_suffix(".tmp")
                partial.write_text(json.dumps(part))
                partial.replace(noted)
            parts.append(part)
            number += part["documents"] > 0
    skipped = [entry for part in parts for entry in part["skipped"]]
    if number == 0:
        raise RunError(
            f"no file in {source} gives a document; {skipped[0][0]}, for one, {skipped[0][2]}"
        )
    rejects = [{"file": file, "reason": sentence} for file, _, sentence in skipped]
    (folder / "rejects.jsonl").write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    inputs = {"imported": str(source), "target": target, "dtype": dtype, "max_length": max_length}
    facts = finish(folder, inputs, number)
    for noted in folder.glob("part_*.json"):
        noted.unlink()
    return facts | {
        "files": len(files),
        "rejected": dict(Counter(reason for _, reason, _ in skipped)),
        "skipped": rejects,
        "padding": sum(part["padding"] for part in parts),
        "prenorm": sum(part["prenorm"] for part in parts),
    }


def read_document(
    path: Path, key: int, weights: TargetWeights, max_length: int | None, part: dict
) -> Document:
    """One file's document; adds to `part` what was done to it. Raises FileError."""
    raw = load(path)
    ids, mask, aux, last = check(raw, weights.config.hidden_size)
    ids, mask, aux, last = (
        ids[:max_length],
        mask[:max_length].clone(),
        aux[:max_length],
        last[:max_length],
    )
    mask[-1:] = False
    n = own_rows(raw, ids, mask, aux, last)
    part["padding"] += len(ids) - n
    ids, mask, aux, last = ids[:n], mask[:n], aux[:n], last[:n]
    if not mask.any():
        raise FileError(UNSUPERVISED)
    if ids.min() < 0 or ids.max() >= len(weights.head):
        raise FileError(
            "has ids outside the target's vocabulary",
            f"{ids.min()}..{ids.max()} of {len(weights.head)}",
        )
    for name, states in (("aux_hidden_state", aux), ("hidden_state", last)):
        if not torch.stack(states.aminmax()).isfinite().all():
            raise FileError("has hidden states that are NaN or infinite", name)
    last, applied = after_norm(last, weights)
    part["prenorm"] += applied
    last = last[mask | F.pad(mask[:-1], (1, 0))]
    head = weights.head.to(torch.promote_types(last.dtype, weights.head.dtype))
    argmax, logsumexp = head_statistics(last.to(head), head)
    return Document(key, ids.int(), mask, Features(aux, last, argmax.cpu(), logsumexp.cpu()))


def load(path: Path) -> dict:
    """What `torch.save` wrote there, tensors on the CPU. Raises FileError.

    Read as a whole, not mapped: every byte is used, torch checks no checksum of the archive, and a
    mapped file that is cut while it is read kills the process.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise FileError("cannot be read", error) from error
    if data[:1] == pickle.PROTO:
        raise FileError(
            "is not loaded because it may run code", "a bare pickle, not an archive of torch.save"
        )
    try:
        broken = zipfile.ZipFile(io.BytesIO(data)).testzip()
        raw = (
            None if broken else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise FileError(
            "is not loaded because it may run code",
            f"it asks for {wanted[1] if wanted else 'more than tensors'}",
        ) from error
    except Exception as error:  # damaged archives make torch and zipfile raise nearly anything
        raise FileError(
            "is truncated or damaged", str(error).splitlines()[0] if str(error) else ""
        ) from error
    if broken:
        raise FileError("is truncated or damaged", f"{broken} does not match its checksum")
    return raw


def check(
    raw: object, hidden_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [m], mask bool [m], aux [n,3H], last [n,H], n <= m. Raises FileError."""
    if not isinstance(raw, dict):
        raise FileError("holds no dict", type(raw).__name__)
    missing = [name for name in KEYS if not isinstance(raw.get(name), torch.Tensor)]
    if missing:
        hint = (
            ": captured without --enable-aux-hidden-states"
            if missing == ["aux_hidden_state"]
            else ""
        )
        raise FileError("lacks tensors", ", ".join(missing) + hint)
    found = []
    for name, (dimensions, dtypes) in KEYS.items():
        value = raw[name]
        if value.dtype not in dtypes:
            raise FileError("has a tensor of an unexpected dtype", f"{name}: {value.dtype}")
        found.append(value[0] if value.ndim == dimensions + 1 and len(value) == 1 else value)
    shapes = ", ".join(f"{name} {list(raw[name].shape)}" for name in KEYS)
    if [value.ndim for value in found] != [dimensions for dimensions, _ in KEYS.values()]:
        raise FileError("has shapes that do not fit", shapes)
    ids, mask, aux, last = found
    if last.shape[1] != hidden_size or aux.shape[1] != 3 * hidden_size:
        raise FileError(
            "has hidden states of another size than the target", f"{shapes}; target {hidden_size}"
        )
    if not len(ids) == len(mask) >= len(aux) == len(last) > 0:
        raise FileError("has shapes that do not fit", shapes)
    if not ((mask == 0) | (mask == 1)).all():
        raise FileError("has a loss_mask that is not 0 and 1")
    if mask[len(aux) :].any() or (ids[len(aux) :] != ids[-1]).any():
        raise FileError("has tokens without hidden states", shapes)
    return ids, mask.bool(), aux, last


def own_rows(
    raw: dict, ids: torch.Tensor, mask: torch.Tensor, aux: torch.Tensor, last: torch.Tensor
) -> int:
    """How many of the m tokens are left without the padding on the right. Raises FileError."""
    n = len(aux)
    if isinstance(raw.get("attention_mask"), torch.Tensor):
        attended = raw["attention_mask"].flatten()[: len(ids)] != 0
        n = min(n, int(attended.sum()))
        if len(attended) != len(ids) or not attended[:n].all() or mask[n:].any():
            raise FileError("has an attention_mask that is no padding on the right")
        return n
    while (
        n
        and not mask[n - 1]
        and ids[n - 1] == ids[-1]
        and not aux[n - 1].any()
        and not last[n - 1].any()
    ):
        n -= 1
    return n


def after_norm(last: torch.Tensor, weights: TargetWeights) -> tuple[torch.Tensor, bool]:
    """Last hidden states [n,H] after the target's final norm, and whether that had to be applied.

    SpecForge never writes them before it, but tools that imitate its files do (vLLM hands out such
    states). After an RMS norm a row divided by the weight has a root mean square of 1, or a little
    less where eps counts; the rows of a residual stream differ by far more than the tolerances.
    """
    eps = getattr(weights.config, "rms_norm_eps", None)
    if weights.norm is None or eps is None:
        return last, False
    scale = weights.norm.to(last.device, torch.float32) + (
        weights.config.model_type in OFFSET_NORMS
    )
    sample = last[:: max(1, len(last) // 256)].float()
    sample = sample[sample.any(1)][:, scale != 0] / scale[scale != 0]
    size = sample.square().mean(1).sqrt()
    if ((size > 0.9) & (size < 1.02)).all():
        return last, False
    return F.rms_norm(last.float(), last.shape[1:], scale, eps).to(last.dtype), True
