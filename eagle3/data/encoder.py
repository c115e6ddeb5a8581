"""Rows to token ids in worker processes, chunk by chunk, handed back in order."""

import hashlib
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np

from eagle3.data.chat import NOT_FOUND, Chat, Encoded, find_spans, with_system
from eagle3.data.rows import Conversation, RowError
from eagle3.data.sources import parse_row
from eagle3.errors import RunError

LEFT_OUT = -1  # the outcome of a row that its source's weight does not select
RECORD = np.dtype(
    [
        ("source", "i2"),
        ("file", "i4"),
        ("line", "i8"),
        ("outcome", "i4"),
        ("tokens", "i4"),
        ("supervised", "i4"),
        ("teachers", "i4"),
        ("content", "u8"),
        ("opening", "u8"),
    ]
)


@dataclass
class Preparation:
    """What `write` needs to know; all of it is in the artefact's fingerprint."""

    num_samples: int | None
    max_length: int
    preformatted: bool
    system_prompt: str | None
    only_last_turn: bool
    on_reject: str
    num_heldout: int
    vocab_size: int
    draft_vocab_size: int


@dataclass
class Chunk:
    """What a worker made of some rows. `outcome` of a record is 0, or counts into `reasons` from 1."""

    ids: np.ndarray
    mask: np.ndarray
    records: np.ndarray
    reasons: list[str] = field(default_factory=list)
    candidates: list[dict] = field(default_factory=list)
    repaired: Counter = field(default_factory=Counter)
    cut: int = 0
    not_found: int = 0
    example: str | None = None


def hash_of(value: object) -> int:
    """64 bits of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )


def opening_hash(conversation: Conversation, chat: Chat) -> int:
    """Equal for conversations that open with the same question, whatever system message, space or
    answer it has.
    """
    if conversation.text is not None:
        return hash_of(conversation.text[: find_spans(chat, conversation.text)[0][0]])
    turns = [m for m in conversation.messages if m["role"] != "system"]
    first = next((i for i, m in enumerate(turns) if m["role"] == "assistant"), None)
    return hash_of([" ".join(m["content"].split()) for m in turns[:first]])


@dataclass
class Encoder:
    """Rows to token ids: all that a worker does."""

    chat: Chat
    options: Preparation

    def __call__(self, rows: list[tuple[int, int, int, object]], held_below: int) -> Chunk:
        """`rows`: (source, file, line, raw, or None for one that its weight leaves out).

        Prompts of rows whose opening hashes below `held_below` are candidates for holding out.
        """
        records = np.zeros(len(rows), RECORD)
        chunk = Chunk(np.zeros(0, np.int32), np.zeros(0, bool), records)
        ids, spans, total = [], [], 0
        for record, (source, file, line, raw) in zip(records, rows, strict=True):
            record["source"], record["file"], record["line"] = source, file, line
            if raw is None:
                record["outcome"] = LEFT_OUT
                continue
            try:
                conversation = self.conversation(raw)
                encoded = self.encode(conversation)
                opening = opening_hash(conversation, self.chat)
                prompt = self.prompt(conversation) if opening < held_below else None
            except RowError as error:
                reason = str(error)
                if reason not in chunk.reasons:
                    chunk.reasons.append(reason)
                record["outcome"] = chunk.reasons.index(reason) + 1
                if reason == NOT_FOUND:
                    chunk.not_found += 1
                    chunk.example = chunk.example or self.example(conversation)
                continue
            kept = encoded.input_ids[: self.options.max_length]
            inside = [
                (first, min(stop, len(kept))) for first, stop in encoded.spans if first < len(kept)
            ]
            ids.append(np.array(kept, dtype=np.int32))
            spans += [(first + total, stop + total) for first, stop in inside]
            total += len(kept)
            record["tokens"], record["supervised"] = (
                len(kept),
                sum(stop - first for first, stop in inside),
            )
            starts = {first for first, _ in inside} | {len(kept)}
            record["teachers"] = record["supervised"] + sum(
                stop not in starts for _, stop in inside
            )
            record["content"] = hash_of(encoded.text)
            record["opening"] = opening
            chunk.cut += len(encoded.input_ids) > len(kept)
            chunk.repaired.update([conversation.repaired] if conversation.repaired else [])
            if prompt is not None:
                chunk.candidates.append(
                    {"hash": opening, "source": source, "file": file, "line": line, "ids": prompt}
                )
        chunk.ids = np.concatenate(ids) if ids else chunk.ids
        chunk.mask = np.zeros(total, bool)
        for first, stop in spans:
            chunk.mask[first:stop] = True
        return chunk

    def conversation(self, raw: object) -> Conversation:
        return self.with_system(parse_row(raw, self.options.preformatted))

    def with_system(self, conversation: Conversation) -> Conversation:
        if conversation.messages:
            conversation.messages = with_system(conversation.messages, self.options.system_prompt)
        return conversation

    def encode(self, conversation: Conversation) -> Encoded:
        encoded = self.chat.encode(conversation, self.options.only_last_turn)
        inside = [
            min(stop, self.options.max_length) - max(first, 1) for first, stop in encoded.spans
        ]
        if not any(tokens >= 2 for tokens in inside):
            too_long = len(encoded.input_ids) > self.options.max_length
            raise RowError(
                "no assistant token within data.max_length"
                if too_long
                else "assistant turn too short"
            )
        return encoded

    def prompt(self, conversation: Conversation) -> list[int] | None:
        """The prompt of the last answer, where it can be held out: the row ends with an answer and
        the prompt fits.
        """
        if conversation.messages and conversation.messages[-1]["role"] != "assistant":
            return None
        try:
            ids = self.chat.prompt_of(conversation)
        except RowError:
            return None
        return ids if 0 < len(ids) <= self.options.max_length else None

    def example(self, conversation: Conversation) -> str:
        return conversation.text or self.chat.render(conversation.messages, conversation.tools)[0]


encoder: Encoder | None = None  # of a worker process


def start_worker(made: Encoder, parent: int) -> None:
    """Keep the encoder; end with the parent, however that ends."""
    global encoder
    encoder = made
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def encode_in_worker(rows: list, held_below: int) -> Chunk:
    return encoder(rows, held_below)


def encode_in_order(
    encode: Encoder, chunks: Iterator[list], held_below: Callable[[], int], num_proc: int
) -> Iterator[Chunk]:
    """Chunks of rows through `num_proc` processes (1: this one), handed out in order, a few of them
    ahead.
    """
    if num_proc == 1:
        yield from (encode(rows, held_below()) for rows in chunks)
        return
    # Forked, so that a worker starts at once with the tokenizer in memory it shares; it never
    # touches a GPU.
    pool = ProcessPoolExecutor(num_proc, get_context("fork"), start_worker, (encode, os.getpid()))
    ahead: deque[Future] = deque()
    try:
        for rows in chunks:
            ahead.append(pool.submit(encode_in_worker, rows, held_below()))
            if len(ahead) >= 2 * num_proc + 2:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    except BrokenProcessPool as error:
        raise RunError(
            f"a process of prepare was killed, perhaps for memory; lower data.num_proc={num_proc} and start again, "
            "it goes on from there"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
