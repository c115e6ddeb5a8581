"""Conversations -> ids, loss mask, held-out prompts and draft vocabulary, in flat files that are memory-mapped."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from eagle3.data.chat import Messages, encode, encode_prompt, with_system
from eagle3.data.sources import Row, RowError, read_rows
from eagle3.data.vocab import choose_vocab, coverage
from eagle3.errors import RunError

Rejects = list[tuple[Row, str]]


@dataclass
class Prepared:
    """The artefact of `prepare`, memory-mapped. Document i is `offsets[i]:offsets[i + 1]` of the flat arrays."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    vocab: np.ndarray
    heldout: list[dict]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def document(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(index, input_ids int32 [n], loss_mask bool [n])."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return index, torch.from_numpy(self.input_ids[span].copy()), torch.from_numpy(self.loss_mask[span].copy())


def load(folder: Path) -> Prepared:
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("input_ids", "loss_mask", "offsets", "vocab")]
    heldout = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    return Prepared(*arrays, heldout)


@dataclass
class Preparation:
    """What `write` needs to know; all of it is in the artefact's fingerprint."""

    path: str
    eval_path: str | None
    num_samples: int | None
    max_length: int
    system_prompt: str | None
    only_last_turn: bool
    on_reject: str
    num_heldout: int
    vocab_size: int
    draft_vocab_size: int


def prompt_hash(messages: Messages) -> str:
    """Equal for conversations that ask the same, whatever the last answer is."""
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def hold_out(rows: list[Row], tokenizer: PreTrainedTokenizerBase, options: Preparation, rejects: Rejects) -> list[dict]:
    """Prompts for evaluation, {"id", "hash", "input_ids"}: of `eval_path`, else those of `rows` with the lowest hashes.

    What `eval_path` holds but cannot be used goes to `rejects`.
    """
    candidates = list(read_rows(options.eval_path)) if options.eval_path is not None else rows
    if options.eval_path is None:
        by_hash = {prompt_hash(r.messages): r for r in rows if r.messages and r.messages[-1]["role"] == "assistant"}
        if 0 < len(by_hash) <= options.num_heldout:
            raise RunError(
                f"data.path={options.path} has {len(by_hash)} different prompts, too few to hold out "
                f"eval.num_prompts={options.num_heldout}; lower it or give data.eval_path"
            )
        candidates = [by_hash[name] for name in sorted(by_hash)]
    prompts = []
    for row in candidates:
        ids = [] if row.messages is None else encode_prompt(tokenizer, with_system(row.messages, options.system_prompt))
        if 0 < len(ids) <= options.max_length:
            name = f"{Path(row.file).name}:{row.line}"
            prompts.append({"id": name, "hash": prompt_hash(row.messages), "input_ids": ids})
        elif options.eval_path is not None:
            rejects.append((row, row.reason or "held-out prompt longer than data.max_length"))
        if len(prompts) == options.num_heldout:
            break
    return prompts


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, options: Preparation) -> dict:
    """Fill `folder`; returns the facts: rows, documents, tokens, supervised tokens, rejects by reason, coverage."""
    rows = list(read_rows(options.path))[: options.num_samples]
    rejects: Rejects = []
    heldout = hold_out(rows, tokenizer, options, rejects)
    asked, held_rows = {prompt["hash"] for prompt in heldout}, 0
    ids, masks, cut = [], [], 0
    for row in track(rows, description="prepare", transient=True):
        if row.messages is not None and prompt_hash(row.messages) in asked:
            held_rows += 1
            continue
        try:
            encoded = encode_row(row, tokenizer, options)
        except RowError as error:
            rejects.append((row, str(error)))
            continue
        cut += len(encoded.input_ids) > options.max_length
        ids.append(np.array(encoded.input_ids[: options.max_length], dtype=np.int32))
        masks.append(np.array(encoded.loss_mask[: options.max_length], dtype=bool))
    write_rejects(folder / "rejects.jsonl", rejects, options)
    reasons = Counter(reason for _, reason in rejects)
    if not ids:
        told = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
        raise RunError(f"data.path={options.path}: none of {len(rows)} rows can be trained on ({told})")
    if not heldout:
        raise RunError(f"data.eval_path={options.eval_path or options.path} has no prompt within data.max_length")
    flat_ids, flat_mask = np.concatenate(ids), np.concatenate(masks)
    counts = np.bincount(flat_ids[flat_mask], minlength=options.vocab_size)
    ends = flat_ids[flat_mask & ~np.append(flat_mask[1:], False)].tolist()
    vocab = choose_vocab(counts, options.draft_vocab_size, set(tokenizer.all_special_ids) & set(ends))
    np.save(folder / "input_ids.npy", flat_ids)
    np.save(folder / "loss_mask.npy", flat_mask)
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, ids)], dtype=np.int64))
    np.save(folder / "vocab.npy", vocab)
    (folder / "heldout.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in heldout))
    return {
        "rows": len(rows),
        "documents": len(ids),
        "held_out_rows": held_rows,
        "tokens": len(flat_ids),
        "supervised_tokens": int(flat_mask.sum()),
        "cut_to_max_length": int(cut),
        "rejected": dict(reasons),
        "heldout_prompts": len(heldout),
        "vocab_coverage": coverage(counts, vocab),
    }


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, options: Preparation):
    if row.messages is None:
        raise RowError(row.reason)
    encoded = encode(tokenizer, with_system(row.messages, options.system_prompt), options.only_last_turn)
    mask = np.array(encoded.loss_mask[: options.max_length], dtype=bool)
    if not (mask[1:] & mask[:-1])[1:].any():
        too_long = len(encoded.loss_mask) > options.max_length
        raise RowError("no assistant token within data.max_length" if too_long else "assistant turn too short")
    return encoded


def write_rejects(path: Path, rejects: Rejects, options: Preparation) -> None:
    lines = [{"file": row.file, "line": row.line, "reason": reason} for row, reason in rejects]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rejects and options.on_reject == "fail":
        row, reason = rejects[0]
        raise RunError(f"{row.file}, line {row.line}: {reason} (data.on_reject=skip would count it and go on)")
