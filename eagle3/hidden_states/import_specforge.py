"""SpecForge's hidden states on disk (`rows_0-2000/data_0.ckpt[.gz]`), converted once to a store.

A file holds one document: `input_ids` [n], `loss_mask` [n], `aux_hidden_state` [1,n,3H] and
`hidden_state` [1,n,H], the last one after the target's final norm. What SpecForge trains on is
kept, so that `loss/mask=shifted` gives its losses: it cuts a document at the maximal length and
never supervises the last row it then has. A capture in batches pads on the right with id 0 before
the target runs, and SpecForge trains with these rows as part of the document, so they stay. Rows
that the target never computed go: ids beyond the hidden states, rows that an `attention_mask`
excludes, rows of zeros.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch.nn import functional as F

from eagle3.batch import Document, Features
from eagle3.config import HiddenStates
from eagle3.errors import RunError
from eagle3.hidden_states.shards import SHARD_BYTES, VERSION, write_atomically
from eagle3.hidden_states.store import Store, create_store, stored_bytes
from eagle3.runs.artefact import artefact, fingerprint
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import head_statistics
from eagle3.target.weights import TargetWeights, load_weights

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
GEMMAS = {"gemma", "gemma2", "gemma3", "gemma3_text"}
OFFSET_NORMS = GEMMAS | {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
UNSUPERVISED = "has no supervised token"


class FileError(Exception):
    """Why a file gives no document: `reason`, by which such files are counted, and the detail."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(f"{reason} ({detail})" if str(detail) else reason)
        self.reason = reason


def import_specforge(
    section: HiddenStates, target: TargetHandle, max_length: int, cache_dir: str, write: bool
) -> Path:
    """The store of SpecForge's files in `hidden_states.path`, converted if need be. RunError."""
    source = Path(section.path)
    files = sorted(hidden_state_files(source), key=natural)
    stats = [(path.relative_to(source), path.stat()) for path in files]
    inputs = {
        "format": VERSION,
        "imported": fingerprint({str(p): [stat.st_size, stat.st_mtime_ns] for p, stat in stats}),
        "model": fingerprint(target.spec.identity),
        "hidden_states.dtype": section.dtype,
        "max_length": max_length,
    }

    def convert_into(folder: Path) -> dict[str, Any]:
        weights = load_weights(target.spec, target.device)
        return convert(files, folder, weights, inputs, section.on_damage)

    given = inputs | {"on_damage": section.on_damage}
    return artefact(cache_dir, "imported", given, convert_into if write else None, "import")


def hidden_state_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("data_*") if path.name.endswith((".ckpt", ".ckpt.gz")))


def is_specforge(folder: Path) -> bool:
    """Whether it holds such files; false where it does not exist."""
    return next(hidden_state_files(folder), None) is not None


def natural(path: Path) -> list:
    """Sorts data_9 before data_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def convert(
    files: list[Path], folder: Path, weights: TargetWeights, inputs: dict[str, Any], on_damage: str
) -> dict[str, Any]:
    """Fill `folder` with the files' documents, keyed by the number of their file.

    What an interrupted call completed is taken up. `inputs` say what the store is made from. Files
    that give no document are listed in rejects.jsonl. Returns the store's facts and `files`,
    `rejected` (count by reason), `padding` (rows left out) and `prenorm` (documents whose last
    hidden states came without the final norm). Raises RunError.
    """
    create_store(folder, inputs)
    store, noted = Store(folder, scan=False), folder / "progress.json"
    facts = {"files": 0, "padding": 0, "prenorm": 0}
    progress = {"facts": facts, "shards": 0, "skipped": [], "counts": [0] * len(weights.head)}
    if noted.exists():
        progress = json.loads(noted.read_text())
    facts, skipped, counts = progress["facts"], progress["skipped"], np.array(progress["counts"])
    documents, size = [], 0
    for key in track(range(facts["files"], len(files)), "import hidden states", transient=True):
        try:
            document = read_document(files[key], key, weights, inputs["max_length"], facts)
            documents.append(document)
            size += stored_bytes(document, inputs["hidden_states.dtype"])
            counts += np.bincount(document.input_ids[document.loss_mask], minlength=len(counts))
        except FileError as error:
            if on_damage == "fail" and error.reason != UNSUPERVISED:
                raise RunError(
                    f"{files[key]} {error}; capture it again or delete it, or set "
                    "hidden_states.on_damage=skip to leave such files out"
                ) from error
            skipped.append([str(files[key]), error.reason, str(error)])
        if documents and (size >= SHARD_BYTES or key == len(files) - 1):
            store.write(progress["shards"], documents)
            facts["files"] = key + 1
            progress["shards"] += 1
            content = json.dumps(progress | {"counts": counts.tolist()})
            write_atomically(noted, [content.encode()])
            documents, size = [], 0
    if progress["shards"] == 0:
        file, _, why = skipped[0]
        raise RunError(f"none of {len(files)} files gives a document; {file}, for one, {why}")
    rejects = [json.dumps({"file": file, "reason": why}) + "\n" for file, _, why in skipped]
    (folder / "rejects.jsonl").write_text("".join(rejects))
    store.scan()
    records = np.concatenate([store.open(n).records for n in range(progress["shards"])])
    store.complete(
        num_shards=progress["shards"],
        order=records["key"],
        lengths=records["tokens"],
        supervised=records["supervised"],
        counts=counts,
    )
    noted.unlink()
    rejected = dict(Counter(reason for _, reason, _ in skipped))
    return store.facts | facts | {"files": len(files), "rejected": rejected}


def read_document(
    path: Path, key: int, weights: TargetWeights, max_length: int, facts: dict[str, int]
) -> Document:
    """One file's document; counts in `facts` what was done to it. Raises FileError."""
    raw = load(path)
    whole = check(raw, weights.config.hidden_size)
    ids, mask, aux, last = (tensor[:max_length] for tensor in whole)
    mask = mask.clone()
    mask[-1:] = False
    n = count_own_rows(raw, ids, mask, aux, last)
    facts["padding"] += len(ids) - n
    ids, mask, aux, last = ids[:n], mask[:n], aux[:n], last[:n]
    if not mask.any():
        raise FileError(UNSUPERVISED)
    if ids.min() < 0 or ids.max() >= len(weights.head):
        spread = f"{ids.min()}..{ids.max()} of {len(weights.head)}"
        raise FileError("has ids outside the target's vocabulary", spread)
    for name, states in (("aux_hidden_state", aux), ("hidden_state", last)):
        if not torch.stack(states.aminmax()).isfinite().all():
            raise FileError("has hidden states that are NaN or infinite", name)
    last, applied = apply_norm(last, weights)
    facts["prenorm"] += applied
    last = last[mask | F.pad(mask[:-1], (1, 0))]
    head = weights.head.to(torch.promote_types(last.dtype, weights.head.dtype))
    argmax, logsumexp = head_statistics(last.to(head), head)
    return Document(key, ids.int(), mask, Features(aux, last, argmax.cpu(), logsumexp.cpu()))


def load(path: Path) -> Any:
    """What `torch.save` wrote there, tensors on the CPU. Raises FileError.

    Read as a whole, not mapped: every byte is used, torch checks no checksum of the archive, and a
    mapped file that is cut while it is read kills the process.
    """
    unsafe, damaged = "is not loaded because it may run code", "is truncated or damaged"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise FileError("cannot be read", error) from error
    if data[:1] == pickle.PROTO:
        raise FileError(unsafe, "a bare pickle, not an archive of torch.save")
    try:
        broken = zipfile.ZipFile(io.BytesIO(data)).testzip()
        if broken is None:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        asked = f"it asks for {wanted[1] if wanted else 'more than tensors'}"
        raise FileError(unsafe, asked) from error
    except Exception as error:  # damaged archives make torch and zipfile raise nearly anything
        raise FileError(damaged, str(error).partition("\n")[0]) from error
    raise FileError(damaged, f"{broken} does not match its checksum")


def check(raw: Any, hidden_size: int) -> list[torch.Tensor]:
    """ids [m], mask bool [m], aux [n,3H], last [n,H], n <= m. Raises FileError."""
    if not isinstance(raw, dict):
        raise FileError("holds no dict", type(raw).__name__)
    missing = [name for name in KEYS if not isinstance(raw.get(name), torch.Tensor)]
    if missing:
        alone = missing == ["aux_hidden_state"]
        hint = ": captured without --enable-aux-hidden-states" if alone else ""
        raise FileError("lacks tensors", ", ".join(missing) + hint)
    shapes = ", ".join(f"{name} {list(raw[name].shape)}" for name in KEYS)
    found = []
    for name, (dimensions, dtypes) in KEYS.items():
        value = raw[name]
        if value.dtype not in dtypes:
            raise FileError("has a tensor of an unexpected dtype", f"{name}: {value.dtype}")
        if value.ndim == dimensions + 1 and len(value) == 1:
            value = value[0]
        if value.ndim != dimensions:
            raise FileError("has shapes that do not fit", shapes)
        found.append(value)
    ids, mask, aux, last = found
    if last.shape[1] != hidden_size or aux.shape[1] != 3 * hidden_size:
        sizes = f"{shapes}; target {hidden_size}"
        raise FileError("has hidden states of another size than the target", sizes)
    if not len(ids) == len(mask) >= len(aux) == len(last) > 0:
        raise FileError("has shapes that do not fit", shapes)
    if not ((mask == 0) | (mask == 1)).all():
        raise FileError("has a loss_mask that is not 0 and 1")
    if mask[len(aux) :].any() or (ids[len(aux) :] != ids[-1]).any():
        raise FileError("has tokens without hidden states", shapes)
    return [ids, mask.bool(), aux, last]


def count_own_rows(
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
    computed = aux.any(1) | last.any(1) | mask[:n] | (ids[:n] != ids[-1])
    return int(computed.nonzero()[-1]) + 1 if computed.any() else 0


def apply_norm(last: torch.Tensor, weights: TargetWeights) -> tuple[torch.Tensor, bool]:
    """Last hidden states [n,H] after the target's final norm, and whether that had to be applied.

    SpecForge never writes them before it, but tools that imitate its files do (vLLM hands out such
    states). After an RMS norm a row divided by the weight has a root mean square of 1, or a little
    less where eps counts; the rows of a residual stream differ by far more than the tolerances.
    """
    eps = getattr(weights.config, "rms_norm_eps", None)
    if weights.norm is None or eps is None:
        return last, False
    offset = weights.config.model_type in OFFSET_NORMS
    scale = weights.norm.to(last.device, torch.float32) + offset
    sample = last[:: max(1, len(last) // 256)].float()
    sample = sample[sample.any(1)][:, scale != 0] / scale[scale != 0]
    size = sample.square().mean(1).sqrt()
    if ((size > 0.9) & (size < 1.02)).all():
        return last, False
    return F.rms_norm(last.float(), last.shape[1:], scale, eps).to(last.dtype), True
