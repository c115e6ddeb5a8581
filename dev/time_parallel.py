"""Layouts of ranks, documents dealt to them, and the seconds of real updates in each: what
`compare_parallel.py` runs.

bf16 at Llama-3.1-8B shapes over nccl where there are GPUs, fp32 at small shapes over gloo where
there are none (which shows that it runs, and no more).
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

root = Path(__file__).parents[1]
sys.path[:0] = [str(root), str(root / "dev")]

from eagle3.batch import Batch, Document, Features, pack, serving, split_by_cost  # noqa: E402
from eagle3.draft.flash import Auto  # noqa: E402
from eagle3.draft.model import EAGLE3, DraftConfig  # noqa: E402
from eagle3.draft.ttt import unroll  # noqa: E402
from eagle3.loader import fill_micro_steps  # noqa: E402
from eagle3.loss import SoftTargetLoss, kl  # noqa: E402
from eagle3.optim import step_if_finite  # noqa: E402
from eagle3.parallel.ranks import Ranks  # noqa: E402
from eagle3.parallel.sequence import Sequence  # noqa: E402

STEPS, TURN_TOKENS, TIMEOUT = 7, 600, timedelta(minutes=10)
LLAMA3_8B = DraftConfig(4096, 14336, 32, 8, 128, 128256, 32000, 4096, 131072, 500000.0)
# Llama-3.1-8B by 32, with enough heads for ulysses 4.
SMALL = DraftConfig(128, 448, 16, 4, 8, 4008, 1000, 128, 16384)


@dataclass(frozen=True)
class Layout:
    replicas: int
    ulysses: int = 1
    ring: int = 1

    @property
    def group(self) -> int:
        return self.ulysses * self.ring

    @property
    def ranks(self) -> int:
        return self.replicas * self.group

    def __str__(self) -> str:
        shape = [f"{n} {size}" for n, size in vars(self).items() if size > 1]
        return " x ".join(shape).replace("replicas", "ddp") or "one rank"


def lognormal(tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents, about 1,500 tokens on average, that have `tokens` together."""
    lengths = (
        np.exp(np.random.default_rng(seed).normal(6.8, 1.0, tokens)).astype(int).clip(32, 16384)
    )
    return lengths[: max(1, int(np.searchsorted(lengths.cumsum(), tokens)))]


def micro_steps(
    lengths: np.ndarray,
    layout: Layout,
    rank: int,
    config: DraftConfig,
    sequence: Sequence | None,
    tokens: int,
) -> list[Batch]:
    """The dealt batches of a rank, cut as `Loader` does, `tokens` a rank; two thirds of each turn
    are answer.
    """
    share = split_by_cost(np.arange(len(lengths)), lengths, layout.replicas)[rank // layout.group]
    in_vocab = torch.arange(config.vocab_size) < config.draft_vocab_size
    batches = []
    for numbers in fill_micro_steps(share, lengths, tokens * layout.group):
        documents = []
        for number in numbers:
            ids = torch.randint(config.draft_vocab_size, (int(lengths[number]),))
            answer = torch.arange(len(ids)) % TURN_TOKENS >= TURN_TOKENS // 3
            documents.append(Document(number, ids, answer))
        batch = replace(pack(documents, in_vocab, STEPS, serving), loaded=documents)
        batches.append(sequence.deal(batch) if sequence else batch)
    return batches


@dataclass
class Model:
    draft: EAGLE3
    embedding: torch.Tensor
    head: torch.Tensor
    loss: SoftTargetLoss

    def forward(self, batch: Batch, features: Features) -> torch.Tensor:
        hidden = unroll(self.draft, self.embedding, features.aux_hidden_states, batch)
        return self.loss(self.draft, hidden, features, batch, self.head).loss


def make_model(config: DraftConfig, device: torch.device, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    ids = torch.arange(config.vocab_size, device=device)
    with device:
        draft = EAGLE3(
            config,
            Auto,
            ids < config.draft_vocab_size,
            torch.zeros_like(ids[: config.draft_vocab_size]),
        )
        embedding = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype)
        head = 0.02 * torch.randn(config.draft_vocab_size, config.target_hidden_size, dtype=dtype)
    return Model(draft, embedding, head, SoftTargetLoss(kl, 0.8, 1024, serving))


def imagine(batch: Batch, config: DraftConfig, dtype: torch.dtype) -> Features:
    """Noise in the place of the target's states."""
    tokens, teachers, device = batch.tokens, len(batch.teacher_rows), batch.input_ids.device
    return Features(
        torch.randn(tokens, 3 * config.target_hidden_size, dtype=dtype, device=device),
        torch.randn(teachers, config.target_hidden_size, dtype=dtype, device=device),
        torch.randint(config.draft_vocab_size, (teachers,), device=device),
        torch.zeros(teachers, device=device),
    )


def connect(rank: int, world_size: int, folder: str, device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left")
    return made


def timed(rank: int, layout: Layout, folder: str, options: argparse.Namespace) -> None:
    """In a process: seconds of real updates, the gradients' exchange and AdamW included."""
    cuda = torch.cuda.is_available()
    device, dtype = (
        (torch.device("cuda", rank), torch.bfloat16)
        if cuda
        else (torch.device("cpu"), torch.float32)
    )
    connect(rank, layout.ranks, folder, device)
    config = LLAMA3_8B if cuda else SMALL
    ranks = Ranks(rank, layout.ranks, rank)
    model = make_model(config, device, dtype)
    sequence = None
    if layout.group > 1:
        shape = layout.ulysses, layout.ring
        sequence = Sequence(*shape, rank, config, TIMEOUT)
    lengths = lognormal(options.tokens * options.processes)
    batches = [
        batch.to(device)
        for batch in micro_steps(lengths, layout, rank, config, sequence, options.tokens)
    ]
    features = [imagine(batch, config, dtype) for batch in batches]
    parameters, seconds = list(model.draft.parameters()), []
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for _ in range(options.repeats + 2):
        dist.barrier()
        began = time.perf_counter()
        for batch, seen in zip(batches, features, strict=True):
            (model.forward(batch, seen) / lengths.sum()).backward()
        ranks.all_reduce_gradients(parameters, torch.float32)
        float(step_if_finite(optimizer, parameters, 0.5)[0])  # waits for the device
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        torch.save((statistics.median(seconds[2:]), int(lengths.sum())), f"{folder}/timed.pt")
    dist.destroy_process_group()


def compare_time(options: argparse.Namespace, console: Console) -> None:
    n, halves = options.processes, options.processes // 2
    layouts = [
        Layout(1),
        Layout(n),
        Layout(1, n),
        Layout(1, 1, n),
        Layout(1, 2, halves),
        Layout(halves, 2),
    ]
    heads = LLAMA3_8B.num_key_value_heads
    shown = table(
        "The same documents in each layout",
        "layout",
        "seconds",
        "tokens/s",
        "times one",
        "efficiency",
    )
    one = None
    for layout in dict.fromkeys(
        layout for layout in layouts if layout.ranks in (1, n) and heads % layout.ulysses == 0
    ):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(timed, (layout, folder, options), nprocs=layout.ranks)
            seconds, tokens = torch.load(f"{folder}/timed.pt")
        one = one or seconds
        row = (
            f"{seconds:.3f}",
            f"{tokens / seconds:,.0f}",
            f"{one / seconds:.2f}",
            f"{one / seconds / layout.ranks:.0%}",
        )
        shown.add_row(str(layout), *row)
    console.print(shown)
