"""Rows to token ids in worker processes, chunk by chunk, handed back in order."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from eagle3.config import Data
from eagle3.data.chat import NOT_FOUND, Chat, Encoded, find_spans, with_system
from eagle3.data.rows import Conversation, RowError, read_conversation
from eagle3.data.sources import decode
from eagle3.errors import RunError

# What a worker gets at once: enough that handing over costs nothing, and few bytes under way.
CHUNK_ROWS = 64
STILL_SECONDS = 600  # after which a worker without a chunk counts as stopped
LEFT_OUT = -1  # the outcome of a row that its source's weight does not select
RECORD = np.dtype([
    ("source", "i2"), ("file", "i4"), ("line", "i8"), ("outcome", "i4"), ("repaired", "i4"),
    ("cut", "?"), ("tokens", "i4"), ("supervised", "i4"), ("teachers", "i4"),
    ("content", "u8"), ("opening", "u8"),
])  # fmt: skip
# (source, file, line, raw); raw is None where the source's weight leaves the row out
RawRow = tuple[int, int, int, Any]


@dataclass
class Chunk:
    """What becomes of some rows: `ids` int32 [n] and `mask` bool [n] of their documents, a record
    for each (`outcome` is 0, LEFT_OUT or, like `repaired`, a number in `reasons`, which count from
    1), prompts that may be held out; `example` renders one of the rows without turns.
    """

    ids: np.ndarray
    mask: np.ndarray
    records: np.ndarray
    reasons: dict[str, int]
    candidates: list[dict]
    example: str | None


def hash_of(value: object) -> int:
    """64 bits of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass
class Encoder:
    """Rows to token ids: all that a worker does."""

    chat: Chat
    data: Data

    def __getitem__(self, asked: tuple[list[RawRow], int]) -> Chunk:
        """What becomes of some rows; prompts only where the opening hashes below a number."""
        rows, held_below = asked
        ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        records, reasons, prompts = np.zeros(len(rows), RECORD), {}, []
        example = None
        for record, (source, file, line, raw) in zip(records, rows, strict=True):
            record["source"], record["file"], record["line"] = source, file, line
            if raw is None:
                record["outcome"] = LEFT_OUT
                continue
            # Workers do all that costs time: the process that reads would not keep up with parsing.
            try:
                conversation = read_conversation(decode(raw), self.data.preformatted)
                encoded = self.encode(conversation)
                opening = self.hash_opening(conversation)
                prompt = self.prompt(conversation) if opening < held_below else None
            except RowError as error:
                record["outcome"] = reasons.setdefault(str(error), len(reasons) + 1)
                if str(error) == NOT_FOUND:
                    example = example or self.example(conversation)
                continue
            kept = np.array(encoded.input_ids[: self.data.max_length], np.int32)
            mask = np.array(encoded.loss_mask[: self.data.max_length], bool)
            ids.append(kept)
            masks.append(mask)
            record["cut"] = len(kept) < len(encoded.input_ids)
            record["tokens"], record["supervised"] = len(kept), mask.sum()
            # of supervised rows and of those right behind them
            record["teachers"] = mask.sum() + (mask[:-1] & ~mask[1:]).sum()
            record["content"], record["opening"] = hash_of(encoded.text), opening
            if conversation.repaired:
                record["repaired"] = reasons.setdefault(conversation.repaired, len(reasons) + 1)
            if prompt:
                prompts.append({"hash": opening, "input_ids": prompt, "file": file, "line": line})
        ids, mask = np.concatenate(ids), np.concatenate(masks)
        return Chunk(ids, mask, records, reasons, prompts, example)

    def hash_opening(self, conversation: Conversation) -> int:
        """Equal where the first question is, whatever system message, spaces or answer it has."""
        text = conversation.text
        if text is not None:
            return hash_of(text[: find_spans(self.chat.turns, text)[0][0]])
        asked = takewhile(lambda m: m["role"] != "assistant", conversation.messages)
        return hash_of([" ".join(m["content"].split()) for m in asked if m["role"] != "system"])

    def encode(self, conversation: Conversation) -> Encoded:
        """With the system prompt. Raises RowError also where no answer is left to train on."""
        conversation.messages = with_system(conversation.messages, self.data.system_prompt)
        encoded = self.chat.encode(conversation, self.data.train_only_last_turn)
        limit = self.data.max_length
        # Row t predicts token t + 2 and asks that t + 1 is the answer's too: a turn of a single
        # token trains nothing.
        if not any(min(stop, limit) - max(first, 1) >= 2 for first, stop in encoded.spans):
            beyond = "no assistant token within data.max_length"
            raise RowError(beyond if len(encoded.input_ids) > limit else "assistant turn too short")
        return encoded

    def prompt(self, conversation: Conversation) -> list[int]:
        """The prompt of the last answer; none where the row ends otherwise or it is too long."""
        ids = []
        if conversation.text or conversation.messages[-1]["role"] == "assistant":
            with suppress(RowError):
                ids = self.chat.prompt_of(conversation)
        return ids if len(ids) <= self.data.max_length else []

    def example(self, conversation: Conversation) -> str:
        return conversation.text or self.chat.render(conversation.messages, conversation.tools)[0]


def encode_in_order(
    encoder: Encoder, rows: Iterator[RawRow], held_below: Callable[[], int], num_proc: int
) -> Iterator[Chunk]:
    """Chunks through `num_proc` processes (1: this one), in order. Raises RunError, ConfigError."""
    if encoder.data.preformatted or not encoder.chat.marked:
        encoder.chat.turns  # noqa: B018  probed here, once, and an error of it is a plain one
    # As a dataset, the encoder has at a chunk of rows what it makes of them. Workers are forked, so
    # that they start at once with the tokenizer in shared memory; they end when this process does.
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    forked = {"num_workers": num_proc, "multiprocessing_context": "fork", "timeout": STILL_SECONDS}
    loader = DataLoader(
        encoder,
        sampler=((chunk, held_below()) for chunk in chunks),
        batch_size=None,
        collate_fn=lambda chunk: chunk,
        generator=torch.Generator(),  # so that it takes nothing from the seeded one
        # the processes are the parallelism; threads of each would fight for the same cores
        worker_init_fn=lambda _: os.environ.update(TOKENIZERS_PARALLELISM="false"),
        **(forked if num_proc > 1 else {}),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGCONT)  # one that is stopped would not end either
        still = f"was stopped, or hangs, for {STILL_SECONDS} seconds"
        what = still if "timed out" in str(error) else "was killed, perhaps for memory"
        words = f"lower data.num_proc={num_proc}; the same command goes on from there"
        raise RunError(f"a process of prepare {what}: {words}") from error
