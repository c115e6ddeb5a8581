"""Rows -> ids, loss mask, held-out prompts and draft vocabulary, in flat files that are
memory-mapped.

Worker processes parse, render and tokenise; this process reads, writes and counts, in order, so
that the artefact does not depend on how many there were. Memory holds a few chunks and, at the end,
about 150 bytes a row. A killed call goes on at the last part it finished.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128

from eagle3.batch import Document
from eagle3.data.chat import Chat
from eagle3.data.encoder import (
    LEFT_OUT,
    RECORD,
    Chunk,
    Encoder,
    Preparation,
    encode_in_order,
    opening_hash,
)
from eagle3.data.rows import RowError
from eagle3.data.sources import DataFile, SourceFiles, raw_rows, read_rows, selects
from eagle3.data.vocab import choose_vocab, coverage
from eagle3.data.writer import Writer
from eagle3.errors import RunError

CHUNK_ROWS, CHUNK_BYTES = 128, 1 << 22
PART_CHUNKS = 64
# of what is written: part of the fingerprint, raised when the same rows come to be encoded
# differently
FORMAT = 1
EXAMPLE_LETTERS = 2000
DUPLICATE = "duplicate row"
INDEX = np.dtype([("start", "i8"), ("length", "i4"), ("supervised", "i4"), ("teachers", "i4")])


@dataclass
class Prepared:
    """The artefact of `prepare`, memory-mapped: `index` has a record of INDEX for each document.

    `teachers` counts the rows that `Features` has teachers for: supervised ones and those behind
    them.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    index: np.ndarray
    vocab: np.ndarray
    heldout: list[dict]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return self.index["length"].astype(np.int64)

    @property
    def supervised(self) -> np.ndarray:
        return self.index["supervised"].astype(np.int64)

    @property
    def teachers(self) -> np.ndarray:
        return self.index["teachers"].astype(np.int64)

    def document(self, number: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """(number, input_ids int32 [n], loss_mask bool [n])."""
        start, length = self.index[["start", "length"]][number].item()
        span = slice(start, start + length)
        return (
            number,
            torch.from_numpy(self.input_ids[span].copy()),
            torch.from_numpy(self.loss_mask[span].copy()),
        )

    def begin(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def load(self, numbers: list[int], epoch: int = 0) -> list[Document]:
        """Documents without features: those are still to be computed."""
        return [Document(*self.document(number), features=None) for number in numbers]


def load(folder: Path) -> Prepared:
    heldout = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    return Prepared(
        np.memmap(folder / "input_ids.bin", np.int32, "r"),
        np.memmap(folder / "loss_mask.bin", bool, "r"),
        np.load(folder / "index.npy", mmap_mode="r"),
        np.load(folder / "vocab.npy"),
        heldout,
    )


def chunks_of(
    sources: SourceFiles, num_samples: int | None, skip: int, show: Callable[[int, float], None]
) -> Iterator[list]:
    """Lists of (source, file, line, raw) behind the first `skip` rows; files are numbered through
    all sources.

    `show` is told (file, share of it that was read) with every chunk.
    """

    def rows() -> Iterator[tuple]:
        first = 0
        for number, (_, files) in enumerate(sources):
            located = ((first + i, *row) for i, file in enumerate(files) for row in raw_rows(file))
            for file, line, raw, read in islice(located, num_samples):
                yield (
                    number,
                    file,
                    line,
                    raw if selects(sources[number][0].weight, line) else None,
                    read,
                )
            first += len(files)

    remaining = islice(rows(), skip, None)
    chunk: list[tuple] = []
    size = 0
    for row in remaining:
        chunk.append(row[:4])
        size += len(row[3]) if isinstance(row[3], bytes) else 1 << 12
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            show(row[1], row[4])
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def write(
    folder: Path,
    chat: Chat,
    options: Preparation,
    sources: SourceFiles,
    eval_files: list[DataFile],
    num_proc: int = 1,
) -> dict:
    """Fill `folder`; returns the facts: rows and what became of them, tokens, rejects by reason,
    coverage.
    """
    files = [file for _, found in sources for file in found]
    writer = Writer(folder, options, len(sources))
    encode = Encoder(chat, options)
    heldout, rejects = held_out_of(eval_files, encode) if eval_files else (None, [])
    if heldout is not None:
        writer.held.size = 0
    columns = (TextColumn("prepare {task.fields[rows]:,} rows"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=float(len(files)), rows=writer.state.rows)
        chunks = chunks_of(
            sources,
            options.num_samples,
            writer.state.rows,
            lambda file, share: progress.update(task, completed=file + share),
        )
        for number, chunk in enumerate(
            encode_in_order(encode, chunks, lambda: writer.held.below, num_proc), start=1
        ):
            writer.append(chunk)
            progress.update(task, rows=writer.state.rows)
            if options.on_reject == "fail":
                fail_on_reject(chunk, writer.state.reasons, files)
            if number % PART_CHUNKS == 0:
                check_found(writer, 0.5)
                writer.save()
    check_found(writer, 0.01)
    writer.save()
    writer.close()
    return finish(folder, chat.tokenizer, writer, sources, heldout, rejects)


def check_found(writer: Writer, allowed: float) -> None:
    """End with an example when the template's assistant turns are not found in more than that share
    of the rows.
    """
    state = writer.state
    if state.not_found > allowed * state.rows and (allowed < 0.5 or state.rows >= CHUNK_ROWS):
        raise RunError(
            f"assistant turns were not found in {state.not_found} of {state.rows} rows: data.chat_template does not "
            f"fit the tokenizer or the data; this is how one was rendered:\n{state.example[:EXAMPLE_LETTERS]}"
        )


def fail_on_reject(chunk: Chunk, reasons: list[str], files: list[DataFile]) -> None:
    for record in chunk.records[chunk.records["outcome"] > 0][:1]:
        raise RunError(
            rejected(files[record["file"]].name, record["line"], reasons[record["outcome"] - 1])
        )


def rejected(file: str, line: int, reason: str) -> str:
    return f"{file}, line {line}: {reason} (data.on_reject=skip would count it and go on)"


def held_out_of(files: list[DataFile], encode: Encoder) -> tuple[list[dict], list[dict]]:
    """The first prompts of `data.eval_path` that can be used, and what cannot: {"file", "line",
    "reason"}.
    """
    prompts, rejects = [], []
    for row in read_rows(files, preformatted=encode.options.preformatted):
        try:
            if row.conversation is None:
                raise RowError(row.reason)
            conversation = encode.with_system(row.conversation)
            ids = encode.chat.prompt_of(conversation)
            if not 0 < len(ids) <= encode.options.max_length:
                raise RowError("held-out prompt longer than data.max_length")
            opening = opening_hash(conversation, encode.chat)
            if any(prompt["hash"] == opening for prompt in prompts):
                raise RowError("asks what an earlier held-out prompt asks")
            prompts.append(
                {"id": f"{Path(row.file).name}:{row.line}", "hash": opening, "input_ids": ids}
            )
        except RowError as error:
            if encode.options.on_reject == "fail":
                raise RunError(rejected(row.file, row.line, str(error))) from error
            rejects.append({"file": row.file, "line": row.line, "reason": str(error)})
        if len(prompts) == encode.options.num_heldout:
            break
    if not prompts:
        raise RunError(f"data.eval_path={files[0].name} has no prompt within data.max_length")
    return prompts, rejects


def held_out_by_hash(writer: Writer, openings: int, files: list[str]) -> list[dict]:
    """The prompts that the writer kept while rows came by, out of so many different openings.
    Raises RunError.
    """
    wanted = writer.options.num_heldout
    if openings <= wanted:
        raise RunError(
            f"data.path={files[0]} has {openings} different prompts, too few to hold out "
            f"eval.num_prompts={wanted}; lower it or give data.eval_path"
        )
    if not writer.held.kept:
        raise RunError(f"data.path={files[0]} has no prompt within data.max_length to hold out")
    return [
        {
            "id": f"{Path(files[kept['file']]).name}:{kept['line']}",
            "hash": kept["hash"],
            "input_ids": kept["ids"],
        }
        for _, kept in sorted(writer.held.kept.items())
    ]


def finish(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    sources: SourceFiles,
    heldout: list[dict] | None,
    rejects: list[dict],
) -> dict:
    """Leave out duplicates and what is held out, choose the draft vocabulary, write the index;
    returns the facts.
    """
    state, options = writer.state, writer.options
    files = [file.name for _, found in sources for file in found]
    rows = np.fromfile(folder / "rows.bin", RECORD)
    outcome = rows["outcome"]
    starts = np.cumsum(rows["tokens"], dtype=np.int64) - rows["tokens"]
    usable = np.flatnonzero(outcome == 0)
    if not len(usable):
        counted = Counter(outcome[outcome > 0].tolist())
        told = (
            ", ".join(f"{count} x {state.reasons[i - 1]}" for i, count in counted.items())
            or "there are none"
        )
        raise RunError(
            f"data.path={files[0]}: none of {state.rows} rows can be trained on ({told})"
        )

    reasons = [*state.reasons, DUPLICATE]
    again = np.ones(len(usable), bool)
    again[np.unique(rows["content"][usable], return_index=True)[1]] = False
    outcome[usable[again]] = len(reasons)
    if again.any() and options.on_reject == "fail":
        file, line = rows[usable[again]][["file", "line"]][0].tolist()
        raise RunError(rejected(files[file], line, DUPLICATE))
    if heldout is None:
        heldout = held_out_by_hash(writer, len(np.unique(rows["opening"][usable])), files)
    held = (outcome == 0) & np.isin(
        rows["opening"], np.array([p["hash"] for p in heldout], np.uint64)
    )

    weights = np.array([source.weight for source, _ in sources])[rows["source"]]
    passes = np.floor(np.maximum(weights, 1) + (rows["content"] >> np.uint64(11)) / 2.0**53).astype(
        np.int64
    )
    trained = (outcome == 0) & ~held
    if not trained.any():
        raise RunError(
            f"data.path={files[0]}: every conversation is held out, so none is left to train on"
        )
    index = np.empty(len(rows), INDEX)
    index["start"], index["length"] = starts, rows["tokens"]
    index["supervised"], index["teachers"] = rows["supervised"], rows["teachers"]
    np.save(folder / "index.npy", np.repeat(index[trained], passes[trained]))

    counts = writer.counts - untrained_counts(folder, rows, index, trained, writer.counts.shape)
    counts = (counts * np.maximum(1.0, [[source.weight] for source, _ in sources])).sum(0)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    vocab = choose_vocab(counts, options.draft_vocab_size, special & set(state.ends))
    np.save(folder / "vocab.npy", vocab)
    (folder / "heldout.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in heldout))
    bad = [
        {"file": files[file], "line": line, "reason": reasons[place - 1]}
        for file, line, place in rows[outcome > 0][["file", "line", "outcome"]].tolist()
    ]
    (folder / "rejects.jsonl").write_text(
        "".join(json.dumps(reject) + "\n" for reject in [*bad, *rejects])
    )
    facts = {
        "rows": len(rows),
        "documents": int(trained.sum()),
        "documents_per_epoch": int(passes[trained].sum()),
        "held_out_rows": int(held.sum()),
        "left_out_by_weight": int((outcome == LEFT_OUT).sum()),
        "rejected": dict(Counter(reject["reason"] for reject in bad)),
        "repaired": state.repaired,
        "cut_to_max_length": state.cut,
        "tokens": int((rows["tokens"] * passes)[trained].sum()),
        "supervised_tokens": int((rows["supervised"] * passes)[trained].sum()),
        "heldout_prompts": len(heldout),
        "heldout_rejected": dict(Counter(reject["reason"] for reject in rejects)),
        "vocab_coverage": coverage(counts, vocab),
        "vocab_seen": int((counts > 0).sum()),
        "digest": digest(folder),
    }
    writer.forget()
    return facts


def digest(folder: Path) -> str:
    """Equal for the same documents in the same order, whatever was held out and chosen as
    vocabulary beside them.
    """
    total = xxh3_128()
    for name in ("index.npy", "input_ids.bin", "loss_mask.bin"):
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 24):
                total.update(block)
    return total.hexdigest()


def untrained_counts(
    folder: Path, rows: np.ndarray, index: np.ndarray, trained: np.ndarray, shape: tuple
) -> np.ndarray:
    """Supervised tokens of documents that were written and are not trained on, int64 [sources, V]."""
    counts = np.zeros(shape, np.int64)
    ids = np.memmap(folder / "input_ids.bin", np.int32, "r")
    mask = np.memmap(folder / "loss_mask.bin", bool, "r")
    for place in np.flatnonzero(~trained & (rows["tokens"] > 0)).tolist():
        start, length = index[["start", "length"]][place].item()
        span = slice(start, start + length)
        np.add.at(counts[rows["source"][place]], ids[span][mask[span]], 1)
    return counts
