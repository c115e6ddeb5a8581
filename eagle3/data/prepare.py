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


def conversation_hash(messages: Messages) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()


def split(rows: list[Row], options: Preparation) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows: from `eval_path`, else the conversations with the lowest hashes."""
    if options.eval_path is not None:
        return rows, list(read_rows(options.eval_path))[: options.num_heldout]
    answered = {
        conversation_hash(row.messages): row for row in rows if row.messages and row.messages[-1]["role"] == "assistant"
    }
    if 0 < len(answered) <= options.num_heldout:
        raise RunError(
            f"data.path={options.path} has {len(answered)} different conversations, too few to hold out "
            f"eval.num_prompts={options.num_heldout}; lower it or give data.eval_path"
        )
    chosen = sorted(answered)[: options.num_heldout]
    train = [row for row in rows if not row.messages or conversation_hash(row.messages) not in chosen]
    return train, [answered[name] for name in chosen]


def write(folder: Path, tokenizer: PreTrainedTokenizerBase, options: Preparation) -> dict:
    """Fill `folder`; returns the facts: rows, documents, tokens, supervised tokens, rejects by reason, coverage."""
    rows, heldout_rows = split(list(read_rows(options.path))[: options.num_samples], options)
    if not rows:
        raise RunError(f"data.path={options.path} has no rows; give a file with one conversation a line")
    ids, masks, lengths, cut = [], [], [], 0
    rejects: list[tuple[Row, str]] = []
    for row in track(rows, description="prepare", transient=True):
        try:
            encoded = encode_row(row, tokenizer, options)
        except RowError as error:
            rejects.append((row, str(error)))
            continue
        cut += len(encoded.input_ids) > options.max_length
        ids.append(np.array(encoded.input_ids[: options.max_length], dtype=np.int32))
        masks.append(np.array(encoded.loss_mask[: options.max_length], dtype=bool))
        lengths.append(len(ids[-1]))
    write_rejects(folder / "rejects.jsonl", rejects, options)
    if not ids:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(reason for _, reason in rejects).items())
        raise RunError(f"data.path={options.path}: none of {len(rows)} rows can be trained on ({reasons})")
    heldout = heldout_prompts(heldout_rows, tokenizer, options)
    flat_ids, flat_mask = np.concatenate(ids), np.concatenate(masks)
    counts = np.bincount(flat_ids[flat_mask], minlength=options.vocab_size)
    ends = {flat_ids[i] for i in np.flatnonzero(flat_mask & ~np.append(flat_mask[1:], False))}
    vocab = choose_vocab(counts, options.draft_vocab_size, end_of_turn(tokenizer) & {int(i) for i in ends})
    np.save(folder / "input_ids.npy", flat_ids)
    np.save(folder / "loss_mask.npy", flat_mask)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "vocab.npy", vocab)
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    return {
        "rows": len(rows),
        "documents": len(lengths),
        "tokens": len(flat_ids),
        "supervised_tokens": int(flat_mask.sum()),
        "cut_to_max_length": int(cut),
        "rejected": dict(Counter(reason for _, reason in rejects)),
        "heldout_prompts": len(heldout),
        "vocab_coverage": coverage(counts, vocab),
    }


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens; one that closes an assistant turn always belongs to the draft vocabulary."""
    return set(tokenizer.all_special_ids)


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase, options: Preparation):
    if row.messages is None:
        raise RowError(row.reason)
    encoded = encode(tokenizer, with_system(row.messages, options.system_prompt), options.only_last_turn)
    mask = np.array(encoded.loss_mask[: options.max_length], dtype=bool)
    if not (mask[1:] & mask[:-1])[1:].any():
        too_long = len(encoded.loss_mask) > options.max_length
        raise RowError("no assistant token within data.max_length" if too_long else "assistant turn too short")
    return encoded


def write_rejects(path: Path, rejects: list[tuple[Row, str]], options: Preparation) -> None:
    lines = [{"file": row.file, "line": row.line, "reason": reason} for row, reason in rejects]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if rejects and options.on_reject == "fail":
        row, reason = rejects[0]
        raise RunError(f"{row.file}, line {row.line}: {reason} (data.on_reject=skip would count it and go on)")


def heldout_prompts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, options: Preparation) -> list[dict]:
    """Held-out rows as {"id", "input_ids"}: everything up to the last assistant turn, which is left out."""
    prompts = []
    for row in rows:
        if row.messages is None:
            continue
        ids = encode_prompt(tokenizer, with_system(row.messages, options.system_prompt))
        if len(ids) <= options.max_length:
            prompts.append({"id": f"{Path(row.file).name}:{row.line}", "input_ids": ids})
    if not prompts:
        raise RunError(f"data.eval_path={options.eval_path or options.path} has no prompt within data.max_length")
    return prompts
