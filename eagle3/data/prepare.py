"""Rows -> ids, loss mask, held-out prompts and draft vocabulary, in flat, memory-mapped files.

Workers parse, render and tokenise; this process writes and counts, in order, so that the artefact
does not depend on how many there were. Memory holds a few chunks and about 150 bytes a row.
"""

import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eagle3.batch import Document
from eagle3.config import Data, Source
from eagle3.data.chat import NOT_FOUND, Chat, with_system
from eagle3.data.encoder import LEFT_OUT, RECORD, Chunk, Encoder, encode_in_order
from eagle3.data.rows import RowError
from eagle3.data.sources import DataFile, SourceFiles, find_files, locate_rows, read_rows, why_none
from eagle3.data.vocab import choose_vocab
from eagle3.errors import RunError
from eagle3.runs.artefact import artefact, describe_file, fingerprint, read_facts
from eagle3.runs.disk import read_json, write_atomically
from eagle3.runs.progress import Progress

STATE = "state.json"
NOTED = ("rows", "tokens", "not_found", "reasons", "candidates", "example")
PART_CHUNKS = 128  # about 8,000 rows, the most that a killed call does again
COUNTED_ROWS = 1024
FORMAT = 4  # part of the fingerprint, raised when the same rows come to be encoded differently
EXAMPLE_LETTERS = 2000
INDEX = np.dtype([("start", "i8"), ("length", "i4"), ("supervised", "i4"), ("teachers", "i4")])
# What of `data` the prepared data depends on, beside its files and template.
KEYS = (
    "num_samples", "max_length", "preformatted", "system_prompt", "train_only_last_turn",
    "on_reject",
)  # fmt: skip


@dataclass
class Prepared:
    """The artefact of `prepare`, memory-mapped: `index` has a record of INDEX for each document,
    `heldout` the prompts to measure on, {"id", "hash", "input_ids"}; `teachers` counts the rows
    that `Features` has teachers for.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    index: np.ndarray
    vocab: np.ndarray
    heldout: list[dict]
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.lengths = self.index["length"].astype(np.int64)
        self.supervised = self.index["supervised"].astype(np.int64)
        self.teachers = self.index["teachers"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """Equal for the same documents in the same order, whatever is held out beside them."""
        return self.facts["digest"]

    def document(self, number: int) -> Document:
        """Without features: those are still to be computed."""
        start, length = self.index[["start", "length"]][number].item()
        span = slice(start, start + length)
        ids, mask = self.input_ids[span].copy(), self.loss_mask[span].copy()
        return Document(number, torch.from_numpy(ids), torch.from_numpy(mask))

    def load(self, numbers: list[int]) -> list[Document]:
        return [self.document(number) for number in numbers]


def load_prepared(path: Path) -> Prepared:
    ids = np.memmap(path / "input_ids.bin", np.int32, "r")
    mask = np.memmap(path / "loss_mask.bin", bool, "r")
    index, vocab = np.load(path / "index.npy", mmap_mode="r"), np.load(path / "vocab.npy")
    heldout = [json.loads(line) for line in (path / "heldout.jsonl").read_text().splitlines()]
    return Prepared(ids, mask, index, vocab, heldout, path, read_facts(path))


def prepare(
    data: Data, num_heldout: int, vocab_size: int, draft_vocab_size: int, sources: SourceFiles,
    chat: Chat, cache_dir: str, write: bool,
) -> Prepared:  # fmt: skip
    """The prepared data; without `write` it must be there already. Raises ConfigError, RunError."""
    eval_files = find_files(Source(data.eval_path), cache_dir) if data.eval_path else []
    inputs = {
        **{f"data.{name}": getattr(data, name) for name in KEYS},
        "eval.num_prompts": num_heldout,
        "vocab_size": vocab_size,
        "draft.vocab_size": draft_vocab_size,
        "format": FORMAT,
        "files": [[source.weight, [file.identity for file in fs]] for source, fs in sources],
        "files of data.eval_path": [file.identity for file in eval_files],
        "chat": chat.identity,
    }

    def write_folder(folder: Path) -> dict[str, Any]:
        encoder = Encoder(chat, data)
        given = read_heldout(eval_files, encoder, num_heldout) if eval_files else ([], [])
        writer = Writer(folder, sources, vocab_size, 0 if eval_files else num_heldout)
        write_rows(writer, encoder, sources)
        return finish(writer, encoder, sources, given, draft_vocab_size)

    path = artefact(cache_dir, "prepared", inputs, write_folder if write else None, "prepare")
    return load_prepared(path)


def find_prepared(*inputs: Any) -> Prepared | None:
    """What `prepare` has left for the same inputs (but `write`), if anything."""
    with suppress(RunError):
        return prepare(*inputs, write=False)


class Writer:
    """Appends chunks to the flat files and notes, after each part, all that a killed call goes on
    from. `candidates` are those of the lowest opening hashes, ascending.
    """

    def __init__(self, folder: Path, sources: SourceFiles, vocab_size: int, num_heldout: int):
        self.names = [file.name for _, files in sources for file in files]
        self.folder, self.vocab_size, self.num_heldout = folder, vocab_size, num_heldout
        self.rows = self.tokens = self.not_found = 0
        self.reasons, self.candidates, self.example = {}, [], None
        vars(self).update(read_json(folder / STATE))
        self.files = []
        sizes = {"input_ids": 4 * self.tokens, "loss_mask": self.tokens}
        for name, size in (sizes | {"rows": RECORD.itemsize * self.rows}).items():
            path = folder / f"{name}.bin"
            stream = path.open("r+b" if path.exists() else "w+b")
            if stream.seek(0, os.SEEK_END) < size:
                raise RunError(f"{path} was damaged after it was written; delete {folder}")
            stream.truncate(size)  # to what complete parts left
            stream.seek(size)
            self.files.append(stream)

    def held_below(self) -> int:
        """Openings whose hash reaches this cannot be held out any more."""
        if len(self.candidates) < self.num_heldout:
            return 1 << 64
        return self.candidates[-1]["hash"] + 1 if self.candidates else 0

    def append(self, chunk: Chunk) -> None:
        """Raises RunError for ids beyond the target's vocabulary."""
        if len(chunk.ids) and chunk.ids.max() >= self.vocab_size:
            words = f"the tokenizer gives id {chunk.ids.max()} of {self.vocab_size}"
            raise RunError(f"{words}: it does not belong to this target")
        # A worker numbers the reasons of its chunk; here they are numbered through all chunks.
        known = self.reasons
        numbers = [known.setdefault(reason, len(known) + 1) for reason in chunk.reasons]
        for name in ("outcome", "repaired"):  # LEFT_OUT, -1, takes what stands last
            chunk.records[name] = np.array([0, *numbers, LEFT_OUT])[chunk.records[name]]
        for stream, values in zip(self.files, (chunk.ids, chunk.mask, chunk.records), strict=True):
            stream.write(values.tobytes())
        self.rows += len(chunk.records)
        self.tokens += len(chunk.ids)
        self.not_found += int((chunk.records["outcome"] == known.get(NOT_FOUND)).sum())
        self.example = self.example or chunk.example
        # The lowest hashes, so that what is held out depends on the conversations alone, not on
        # their order; of each opening the first one counts.
        if chunk.candidates:
            both = reversed([*self.candidates, *chunk.candidates])
            lowest = sorted({candidate["hash"]: candidate for candidate in both}.items())
            self.candidates = [candidate for _, candidate in lowest[: self.num_heldout]]

    def save(self) -> None:
        for stream in self.files:
            stream.flush()
            os.fsync(stream.fileno())
        # The rows are on disk before the state speaks of them.
        state = {name: getattr(self, name) for name in NOTED}
        write_atomically(self.folder / STATE, [json.dumps(state).encode()])

    def rejects(self, records: np.ndarray) -> list[dict]:
        """{"file", "line", "reason"} of the rows that are rejected."""
        words = {number: reason for reason, number in self.reasons.items()}
        rows = records[records["outcome"] > 0][["file", "line", "outcome"]].tolist()
        return [{"file": self.names[f], "line": i, "reason": words[n]} for f, i, n in rows]


def write_rows(writer: Writer, encoder: Encoder, sources: SourceFiles) -> None:
    """Append all rows that are not written yet. Raises RunError."""
    data, cores = encoder.data, len(os.sched_getaffinity(0))
    total, saved = data.num_samples and data.num_samples * len(sources), writer.rows
    with Progress("prepare", total, "rows", saved, kept=lambda: saved) as bar:
        rows = islice(bar.follow(locate_rows(sources, data.num_samples)), writer.rows, None)
        chunks = encode_in_order(encoder, rows, writer.held_below, data.num_proc or cores)
        for number, chunk in enumerate(chunks, start=1):
            writer.append(chunk)
            bar.advance(len(chunk.records), len(chunk.ids))
            check_rejects(writer.rejects(chunk.records), data)
            if number % PART_CHUNKS == 0:
                # Most rows without turns: the template is wrong, and hours need not pass first.
                check_found(writer, 0.5)
                writer.save()
                saved = writer.rows
    check_found(writer, 0.01)


def check_found(writer: Writer, allowed: float) -> None:
    """Raise RunError with an example when turns are not found in more of the rows."""
    if writer.not_found > allowed * writer.rows:
        words = f"assistant turns were not found in {writer.not_found} of {writer.rows} rows"
        shown = f"one is rendered as:\n{writer.example[:EXAMPLE_LETTERS]}"
        raise RunError(f"{words}: data.chat_template does not fit; {shown}")


def check_rejects(rejects: list[dict], data: Data) -> None:
    """End the stage at the first of `rejects` where `data.on_reject=fail`."""
    if rejects and data.on_reject == "fail":
        place = f"{rejects[0]['file']}, line {rejects[0]['line']}: {rejects[0]['reason']}"
        raise RunError(f"{place} (data.on_reject=skip counts it and goes on)")


def read_heldout(files: list[DataFile], encoder: Encoder, num_heldout: int) -> tuple[list, list]:
    """The first prompts of `data.eval_path` that can be used, and rejects. Raises RunError."""
    prompts, rejects = [], []
    for row in read_rows(files, preformatted=encoder.data.preformatted):
        try:
            if row.conversation is None:
                raise RowError(row.reason)
            conversation = row.conversation
            roles = [message["role"] for message in conversation.messages]
            if roles and "assistant" not in roles:  # of questions in turn the first is asked
                del conversation.messages[roles.index("user") + 1 :]
            conversation.messages = with_system(conversation.messages, encoder.data.system_prompt)
            ids = encoder.chat.prompt_of(conversation)
            if not 0 < len(ids) <= encoder.data.max_length:
                raise RowError("held-out prompt longer than data.max_length")
            opening = encoder.hash_opening(conversation)
            if any(prompt["hash"] == opening for prompt in prompts):
                raise RowError("asks what an earlier held-out prompt asks")
            place = f"{Path(row.file).name}:{row.line}"
            prompts.append({"id": place, "hash": opening, "input_ids": ids})
        except RowError as error:
            rejects.append({"file": row.file, "line": row.line, "reason": str(error)})
            check_rejects(rejects, encoder.data)
        if len(prompts) == num_heldout:
            break
    if not prompts:
        why = why_none(Counter(reject["reason"] for reject in rejects), files)
        raise RunError(f"data.eval_path={files[0].name}: no row can be asked ({why})")
    return prompts, rejects


def finish(
    writer: Writer, encoder: Encoder, sources: SourceFiles, given: tuple[list, list], size: int
) -> dict[str, Any]:
    """Leave out duplicates and what is held out, choose a draft vocabulary of `size`, write the
    index; returns the facts. `given` are the prompts and rejects of `data.eval_path`.
    """
    writer.save()
    folder, reasons, data_path = writer.folder, writer.reasons, writer.names[0]
    for stream in writer.files:
        stream.close()
    rows = np.fromfile(folder / "rows.bin", RECORD)
    usable = np.flatnonzero(rows["outcome"] == 0)
    # Of rows with the same content the first one counts.
    again = np.ones(len(usable), bool)
    again[np.unique(rows["content"][usable], return_index=True)[1]] = False
    if again.any():
        rows["outcome"][usable[again]] = reasons.setdefault("duplicate row", len(reasons) + 1)
    rejects = writer.rejects(rows)
    rejected = Counter(reject["reason"] for reject in rejects)
    if not len(usable):
        why = why_none(rejected, sources[0][1])
        raise RunError(f"data.path={data_path}: none of {len(rows)} rows can be trained on ({why})")
    check_rejects(rejects, encoder.data)
    heldout, unasked = given
    if not heldout:  # those of the lowest opening hashes, met while rows came by
        openings, heldout = len(np.unique(rows["opening"][rows["outcome"] == 0])), writer.candidates
        if openings <= writer.num_heldout or not heldout:
            words = f"has {openings} different prompts, too few to hold out"
            settings = f"eval.num_prompts={writer.num_heldout}; give data.eval_path"
            raise RunError(f"data.path={data_path} {words} {settings}")
        for prompt in heldout:
            prompt["id"] = f"{Path(writer.names[prompt.pop('file')]).name}:{prompt.pop('line')}"
    # Another answer to a held-out question would teach what is measured.
    held = np.isin(rows["opening"], np.array([p["hash"] for p in heldout], np.uint64))
    held &= rows["outcome"] == 0
    # Content decides over the fraction, so that the same rows come twice in every run.
    weights = np.maximum(1.0, [source.weight for source, _ in sources])[rows["source"]]
    drawn = (rows["content"] >> np.uint64(11)) / 2.0**53  # uniform in [0, 1)
    passes = np.floor(weights + drawn).astype(np.int64) * (rows["outcome"] == 0) * ~held
    if not passes.any():
        raise RunError(f"data.path={data_path}: every conversation is held out, none trains")
    index = np.empty(len(rows), INDEX)
    index["start"] = np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
    index[["length", "supervised", "teachers"]] = rows[["tokens", "supervised", "teachers"]]
    np.save(folder / "index.npy", np.repeat(index, passes))
    # by the weight and not by the passes, which for a fraction are drawn
    counts, ends = count_vocab(folder, rows, weights * (passes > 0), writer.vocab_size)
    special = {n for n, t in encoder.chat.tokenizer.added_tokens_decoder.items() if t.special}
    # An end of turn is drafted once an answer, too seldom to be sure of a place by its count.
    vocab = choose_vocab(counts, size, special & ends)
    np.save(folder / "vocab.npy", vocab)
    parts = ("index.npy", "input_ids.bin", "loss_mask.bin")
    for name, entries in ("heldout", heldout), ("rejects", rejects + unasked):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    repaired = Counter(rows["repaired"].tolist())
    facts = {
        "rows": len(rows),
        "documents": int((passes > 0).sum()),
        "documents_per_epoch": int(passes.sum()),
        "held_out_rows": int(held.sum()),
        "left_out_by_weight": int((rows["outcome"] == LEFT_OUT).sum()),
        "rejected": dict(rejected),
        "repaired": {reason: repaired[n] for reason, n in reasons.items() if n in repaired},
        "cut_to_max_length": int(rows["cut"].sum()),
        "tokens": int((rows["tokens"] * passes).sum()),
        "supervised_tokens": int((rows["supervised"] * passes).sum()),
        "heldout_prompts": len(heldout),
        "heldout_rejected": dict(Counter(reject["reason"] for reject in unasked)),
        "vocab_coverage_of_training_data": float(counts[vocab].sum() / max(1, counts.sum())),
        "digest": fingerprint({name: describe_file(folder / name) for name in parts}),
    }
    # What only an interrupted call needs; the state first, as it names the rows.
    (folder / STATE).unlink()
    (folder / "rows.bin").unlink()
    return facts


def count_vocab(
    folder: Path, rows: np.ndarray, weights: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, set[int]]:
    """Supervised tokens by their rows' weights, float64 [V], and tokens by which answers end."""
    counts, ends = np.zeros(vocab_size), set()
    # read, not memory-mapped: mapped pages would count as this process' memory
    files = (folder / "input_ids.bin").open("rb"), (folder / "loss_mask.bin").open("rb")
    with files[0] as ids_file, files[1] as mask_file:
        for first in range(0, len(rows), COUNTED_ROWS):
            part = slice(first, first + COUNTED_ROWS)
            tokens = rows["tokens"][part]
            weight = np.repeat(weights[part], tokens)
            ids = np.fromfile(ids_file, np.int32, tokens.sum())
            mask = np.fromfile(mask_file, bool, tokens.sum()) & (weight > 0)
            counts += np.bincount(ids[mask], weight[mask], vocab_size)
            ends.update(np.unique(ids[mask & ~np.append(mask[1:], False)]).tolist())
    return counts, ends
