"""What the store of hidden states costs, beside one `torch.save` file a sample as SpecForge writes
them.

    python dev/compare_store.py                                        # half a GB, under a minute
    python dev/compare_store.py --documents 300 --hidden-size 512 --tokens 300

The same random bf16 states go through both in one process, on one thread: written and synced
(SpecForge does not sync its files; a second row is without), then read in random order, every page
of them. SpecForge's file is a dict of input_ids, loss_mask, hidden_state [1,n,H] and
aux_hidden_state [1,n,3H]; it is read with `torch.load(weights_only=True)`, with and without a
memory map, and has no checksum. What was written is read from the page cache, which a user cannot
drop: the figures are those of the code, and a disk slower than they are is the limit instead. MB
are of bf16 states.
"""

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from eagle3.batch import Document, Features
from eagle3.hidden_states.shards import DTYPES, SHARD_BYTES
from eagle3.hidden_states.store import Store, create_store, stored_bytes

SUPERVISED = 0.6


def make(count: int, length: int, hidden_size: int) -> list[Document]:
    """Documents of `length` tokens, give or take half, with an answer at their end; states are
    distinct memory.
    """
    documents = []
    for key in range(count):
        n = int(length * random.Random(key).uniform(0.5, 1.5))
        mask = torch.arange(n) >= int(n * (1 - SUPERVISED))
        u = int(mask.sum())
        last = torch.randn(u, hidden_size).bfloat16()
        aux = torch.randn(n, 3 * hidden_size).bfloat16()
        features = Features(aux, last, torch.randint(0, 100_000, (u,)), torch.randn(u))
        documents.append(
            Document(key, torch.randint(0, 100_000, (n,), dtype=torch.int32), mask, features)
        )
    return documents


def write_store(folder: Path, documents: list[Document], dtype: str) -> None:
    """Shards of the size that the capture stage makes."""
    create_store(folder, {"hidden_states.dtype": dtype})
    store = Store(folder)
    shard, size, number = [], 0, 0
    for document in documents:
        shard.append(document)
        size += stored_bytes(document, dtype)
        if size >= SHARD_BYTES or document is documents[-1]:
            store.write(number, shard)
            shard, size, number = [], 0, number + 1


def write_files(folder: Path, documents: list[Document], sync: bool) -> None:
    """SpecForge keeps the last hidden state of every token; zeros where this one has none."""
    for document in documents:
        n, features = len(document.input_ids), document.features
        last = torch.zeros(n, features.last_hidden_states.shape[1], dtype=torch.bfloat16)
        last[n - len(features.last_hidden_states) :] = features.last_hidden_states
        sample = {
            "input_ids": document.input_ids.long(),
            "loss_mask": document.loss_mask.long(),
            "hidden_state": last[None],
            "aux_hidden_state": features.aux_hidden_states[None],
        }
        with (folder / f"data_{document.key}.ckpt").open("wb") as stream:
            torch.save(sample, stream)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())


def touch(tensor: torch.Tensor) -> None:
    """Read every page of it."""
    tensor.view(-1).view(torch.uint8)[::4096].sum()


def read_store(folder: Path, order: list[int]) -> None:
    store = Store(folder)
    for key in order:
        touch(store.load([key])[key].features.aux_hidden_states)


def read_files(folder: Path, order: list[int], mmap: bool) -> None:
    """A mapped sample is not in memory yet; it is copied, as a batch would."""
    for key in order:
        sample = torch.load(folder / f"data_{key}.ckpt", weights_only=True, mmap=mmap)
        states = sample["aux_hidden_state"], sample["hidden_state"]
        for state in states:
            touch(state.clone() if mmap else state)


def seconds(call: Callable[[], None], repeats: int) -> float:
    """The fastest of `repeats`."""
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=600, help="mean length of a document")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--folder", type=Path, help="where to write, a temporary folder by default")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    documents = make(args.documents, args.tokens, args.hidden_size)
    tokens = sum(len(document.input_ids) for document in documents)
    order = random.Random(0).sample(range(len(documents)), len(documents))
    states = [
        (document.features.aux_hidden_states, document.features.last_hidden_states)
        for document in documents
    ]
    megabytes = sum(aux.nbytes + last.nbytes for aux, last in states) / 1e6

    def files(sync: bool, mmap: bool) -> tuple:
        def write(path: Path) -> None:
            write_files(path, documents, sync)

        def read(path: Path) -> None:
            read_files(path, order, mmap)

        return write, read

    def store(dtype: str) -> tuple:
        def write(path: Path) -> None:
            write_store(path, documents, dtype)

        def read(path: Path) -> None:
            read_store(path, order)

        return write, read

    contenders = {
        "torch.save files": files(True, False),
        "torch.save files, no fsync, mmap": files(False, True),
        **{f"store, {dtype}": store(dtype) for dtype in args.dtype},
    }
    size = f"{len(documents)} documents, {tokens:,} tokens, H={args.hidden_size}"
    table = Table(title=f"{size}, {megabytes:.0f} MB in bf16")
    table.add_column("")
    for title in (
        "write MB/s",
        "documents/s",
        "ratio",
        "read MB/s",
        "documents/s",
        "ratio",
        "bytes/token",
        "ratio",
    ):
        table.add_column(title, justify="right")
    first = None
    for name, (write, read) in contenders.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder)
            times = (
                seconds(partial(write, path), args.repeats),
                seconds(partial(read, path), args.repeats),
            )
            size = sum(file.stat().st_size for file in path.iterdir()) / tokens
        first = first or (*times, size)
        cells = []
        for taken, reference in zip(times, first):
            cells += [
                f"{megabytes / taken:,.0f}",
                f"{len(documents) / taken:,.1f}",
                f"{reference / taken:.2f}",
            ]
        table.add_row(name, *cells, f"{size:,.0f}", f"{size / first[2]:.2f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
