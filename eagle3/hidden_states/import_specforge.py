"""SpecForge's hidden states on disk (`rows_0-2000/data_0.ckpt[.gz]`), converted once to a store.

A file holds one document: `input_ids` [n], `loss_mask` [n], `aux_hidden_state` [1,n,A] and
`hidden_state` [1,n,H], the last one after the target's final norm (H its hidden size, A that of all
auxiliary layers). What
SpecForge trains on is kept, so that `loss/mask=shifted` gives its losses: it cuts a document at the
maximal length and never supervises the last row it then has. A capture in batches pads on the right
with id 0, and SpecForge trains with these rows as part of the document, so they stay. Rows behind
the last one with hidden states go.
"""

import gzip
import io
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from eagle3.batch import Document, Features
from eagle3.config import HiddenStates
from eagle3.errors import RunError
from eagle3.hidden_states.shards import SHARD_BYTES, VERSION, is_finite
from eagle3.hidden_states.store import Store, check_inputs, create_store, stored_bytes
from eagle3.runs.artefact import artefact, fingerprint, read_facts
from eagle3.runs.disk import read_json, write_atomically
from eagle3.runs.progress import Progress
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import head_statistics
from eagle3.target.weights import TargetWeights, load_weights

KEYS = ("input_ids", "loss_mask", "aux_hidden_state", "hidden_state")
FLOATS = {torch.float16, torch.bfloat16, torch.float32}
EXACT = {"fp32": FLOATS, "bf16": {torch.bfloat16}, "int8": set()}  # what a store keeps as it is
UNSUPERVISED = "has no supervised token"


class FileError(Exception):
    """Why a file gives no document: the reason by which they are counted (and a detail)."""


def import_specforge(
    section: HiddenStates, target: TargetHandle, max_length: int, cache_dir: str
) -> Path:
    """The store of SpecForge's files in `hidden_states.path`, converted if need be. RunError."""
    files = in_order(Path(section.path))
    stats = [(path.relative_to(section.path), path.stat()) for path in files]
    content = {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats}
    inputs = {"kind": "import", "format": VERSION, "imported": fingerprint(content)}
    inputs |= {"model": fingerprint(target.spec.identity), "max_length": max_length}
    inputs["aux_size"] = target.spec.aux_size
    inputs["hidden_states.dtype"] = section.dtype
    fill = partial(convert, files, target, inputs, section.on_damage)
    # Not among the store's inputs, as a run may be resumed with another.
    inputs = inputs | {"on_damage": section.on_damage}
    folder = artefact(cache_dir, "imported", inputs, fill, "import")
    if rounded := read_facts(folder).get("rounded"):
        reason = f"hidden_states.dtype={section.dtype} is less precise than their files are"
        print(f"import: the states of {rounded} documents were rounded: {reason}")
    return folder


def choose_dtype(section: HiddenStates) -> str:
    """The precision asked for, else that of the store or files in `hidden_states.path`, or bf16."""
    if section.dtype is not None or section.path is None:
        return section.dtype or "bf16"
    if stored := check_inputs(Path(section.path), {}):
        return stored["hidden_states.dtype"]
    for file in in_order(Path(section.path)):
        with suppress(FileError, LookupError, TypeError, AttributeError):  # read again, and judged
            states = load(file)["aux_hidden_state"]
            return "bf16" if states.dtype == torch.bfloat16 else "fp32"
    return "bf16"


def hidden_state_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("data_*") if path.name.endswith((".ckpt", ".ckpt.gz")))


def in_order(folder: Path) -> list[Path]:
    """The files, in the order of their numbers: data_2 before data_10."""
    found = hidden_state_files(folder)
    return sorted(found, key=lambda path: (list(map(int, re.findall(r"\d+", str(path)))), path))


def is_specforge(folder: Path) -> bool:
    return any(hidden_state_files(folder))


def convert(
    files: list[Path], target: TargetHandle, inputs: dict[str, Any], on_damage: str, folder: Path
) -> dict[str, Any]:
    """Fill `folder` with the files' documents, keyed by their place in `files`; return facts."""
    weights = load_weights(target.spec, target.device)
    create_store(folder, inputs)
    store, noted = Store(folder), folder / "progress.json"
    done = {"files": 0, "shards": 0, "rounded": 0, "rejected": []}
    done |= {"counts": [0] * len(weights.head)} | read_json(noted)  # of an interrupted call
    rejected, counts = done["rejected"], np.array(done["counts"])
    documents, size, dtype = [], 0, inputs["hidden_states.dtype"]
    kept, total = partial(done.get, "files"), len(files)
    with Progress("import", total, "files", done["files"], kept=kept) as bar:
        for key in range(done["files"], total):
            try:
                sizes = inputs["aux_size"], inputs["max_length"]
                document = read_document(files[key], key, weights, *sizes)
                documents.append(document)
                size += stored_bytes(document, dtype)
                found = document.features
                of_files = {found.aux_hidden_states.dtype, found.last_hidden_states.dtype}
                done["rounded"] += not of_files <= EXACT[dtype]
                counts += np.bincount(document.input_ids[document.loss_mask], minlength=len(counts))
                bar.count_tokens(len(document.input_ids))
            except FileError as error:
                if on_damage == "fail" and str(error) != UNSUPERVISED:
                    remedy = "delete it, or set hidden_states.on_damage=skip to leave such out"
                    raise RunError(f"{files[key]} {error}; {remedy}") from error
                rejected.append({"file": str(files[key]), "reason": str(error)})
            if documents and (size >= SHARD_BYTES or key == total - 1):
                # The shard before the note of it: killed in between, it is written again, the same.
                store.write(done["shards"], documents)
                done |= {"files": key + 1, "shards": done["shards"] + 1, "counts": counts.tolist()}
                write_atomically(noted, [json.dumps(done).encode()])
                documents, size = [], 0
            bar.advance()
    if done["shards"] == 0:
        file, why = rejected[0].values()
        raise RunError(f"none of {len(files)} files gives a document; {file}, for one, {why}")
    (folder / "rejects.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rejected))
    store.scan()
    records = np.concatenate([store.open(number).records for number in range(done["shards"])])
    data = {"order": records["key"], "lengths": records["tokens"]}
    store.complete(done["shards"], supervised=records["supervised"], counts=counts, **data)
    noted.unlink()
    reasons = Counter(each["reason"].partition(" (")[0] for each in rejected)
    counted = {"files": len(files), "rejected": dict(reasons), "rounded": done["rounded"]}
    return store.facts | counted


def read_document(
    path: Path, key: int, weights: TargetWeights, aux_size: int, max_length: int
) -> Document:
    """One file's document. Raises FileError."""
    ids, mask, aux, last = check(load(path), weights.config.hidden_size, aux_size)
    ids, mask = ids[:max_length], mask[:max_length].clone()
    mask[-1:] = False  # as SpecForge does after cutting
    computed = (aux[:max_length].any(1) | last[:max_length].any(1)).nonzero()
    n = int(computed[-1]) + 1 if len(computed) else 0
    if mask[n:].any():
        raise FileError("has supervised tokens without hidden states")
    ids, mask, aux, last = ids[:n], mask[:n], aux[:n], last[:n]
    if not mask.any():
        raise FileError(UNSUPERVISED)
    if ids.min() < 0 or ids.max() >= len(weights.head):
        raise FileError(f"has ids outside the target's vocabulary ({ids.min()}..{ids.max()})")
    if not (is_finite(aux) and is_finite(last)):
        raise FileError("has hidden states that are NaN or infinite")
    if not is_normed(last, weights):
        raise FileError("has a hidden_state that did not go through the target's final norm")
    # A teacher's argmax and log-sum-exp are missing in the files: the head is run here, once.
    last = last[mask | F.pad(mask[:-1], (1, 0))]
    head = weights.head.to(torch.promote_types(last.dtype, weights.head.dtype))
    argmax, logsumexp = head_statistics(last.to(head), head)
    return Document(key, ids.int(), mask, Features(aux, last, argmax.cpu(), logsumexp.cpu()))


def load(path: Path) -> Any:
    """What `torch.save` wrote there, tensors on the CPU. Raises FileError."""
    try:
        # As a whole: torch checks no checksum, and a mapped file that is cut kills the process.
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if zipfile.ZipFile(io.BytesIO(data)).testzip():
            raise ValueError("its content does not match its checksum")
        # A pickle may name any function to call; with weights_only none but those of tensors.
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileError("is not loaded because it may run code") from error
    except Exception as error:  # damaged archives make torch and zipfile raise nearly anything
        line = str(error).partition("\n")[0]
        raise FileError(f"is truncated or damaged ({line})") from error


def check(raw: Any, hidden_size: int, aux_size: int) -> list[torch.Tensor]:
    """ids [m], mask bool [m], aux [n,A], last [n,H], n <= m. Raises FileError."""
    tensors = [raw.get(name) if isinstance(raw, dict) else None for name in KEYS]
    missing = [name for name, each in zip(KEYS, tensors) if not isinstance(each, torch.Tensor)]
    if missing:
        raise FileError(f"lacks tensors ({', '.join(missing)})")
    if "attention_mask" in raw:
        raise FileError("has an attention_mask, which SpecForge does not write")
    ids, mask, aux, last = (each.squeeze(0) for each in tensors)
    n = len(last) if last.ndim else 0
    fits = ids.ndim == 1 and mask.shape == ids.shape and 0 < n <= len(ids)
    fits &= aux.shape == (n, aux_size) and last.shape == (n, hidden_size)
    if not fits or ids.is_floating_point() or not {aux.dtype, last.dtype} <= FLOATS:
        found = (f"{name} {list(each.shape)} {each.dtype}" for name, each in zip(KEYS, tensors))
        layers = aux_size // hidden_size
        sizes = f"hidden size {hidden_size} and {layers} auxiliary layers"
        raise FileError(f"does not fit {sizes} ({', '.join(found)})")
    if not ((mask == 0) | (mask == 1)).all():
        raise FileError("has a loss_mask that is not 0 and 1")
    return [ids, mask.bool(), aux, last]


def is_normed(last: torch.Tensor, weights: TargetWeights) -> bool:
    """Whether last hidden states [n,H] went through the target's final norm, if it can be seen."""
    # After an RMS norm a row divided by the weight has a root mean square of 1, or a little less.
    if weights.norm is None or not hasattr(weights.config, "rms_norm_eps"):
        return True
    # 256 rows are enough: the rows of a residual stream differ by far more than the bounds below.
    sample = last[:: max(1, len(last) // 256)].float()
    sample = sample[sample.any(1)]
    for offset in (0, 1):  # some models scale by 1 + weight
        scale = weights.norm.to(last.device, torch.float32) + offset
        size = (sample[:, scale != 0] / scale[scale != 0]).square().mean(1).sqrt()
        if ((size > 0.9) & (size < 1.02)).all():
            return True
    return False
