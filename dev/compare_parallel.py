"""How training spreads over ranks: work, balance, bytes sent and memory per rank, layout by layout.

    python dev/compare_parallel.py          # computed at Llama-3.1-8B shapes, checked in processes
    python dev/compare_parallel.py --time   # real updates; the default where there are several GPUs

Work is FLOPs of a rank's products and attention, forward and backward (7 products of 2 d for each
pair of a query and a key of a head: 2 forward, 5 backward, as flash kernels do). Sent bytes are
those that leave a rank in a forward and backward pass; `online` are features on their way from the
rank that prefilled a document, beside these. Public trainers are counted by their scheme: at each
of the K steps all tokens' k and v go round the ring, and in backward k, v and their gradients; with
ulysses, q, k, v and the output of all tokens swap places. Gradients of weights are left out.
"""

import argparse
import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare_step import saved_bytes
from rich.console import Console
from time_parallel import (
    LLAMA3_8B,
    SMALL,
    STEPS,
    TIMEOUT,
    Layout,
    compare_time,
    connect,
    imagine,
    lognormal,
    make_model,
    micro_steps,
    table,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from eagle3.batch import Batch
from eagle3.draft.model import DraftConfig
from eagle3.draft.ttt import training_flops
from eagle3.parallel.sequence import Sequence

PER_RANK = 16384
LAYOUTS = [Layout(1), Layout(8), Layout(2, 4), Layout(1, 1, 8), Layout(1, 2, 4), Layout(1, 8)]
CHECKED = [Layout(1, 1, 4), Layout(1, 4), Layout(1, 2, 2), Layout(2, 2)]


def imagined(layout: Layout, rank: int, config: DraftConfig) -> Sequence | None:
    """The Sequence of a rank, without processes: it deals, and can't send."""
    if layout.group == 1:
        return None
    return Sequence(layout.ulysses, layout.ring, rank, config, None)


def causal_pairs(batch: Batch) -> int:
    """Pairs of a row and a key that it attends to, over all steps, of the rows held here."""
    places = batch.position_ids[batch.own[batch.rows]] + 1
    return sum(
        int(places[:count].sum()) + step * count for step, count in enumerate(batch.row_counts)
    )


def sent_bytes(batch: Batch, layout: Layout, config: DraftConfig, element: int) -> int:
    """What `Exchange` sends to other ranks, forward and backward."""
    if layout.group == 1:
        return 0
    exchange, u = batch.exchange, layout.ulysses
    q = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    own, length = batch.tokens, sum(exchange.tokens_of_rank)
    numbers = (own * (layout.group - 1) + length - own) * kv // u
    for step in range(max(1, batch.num_steps)):
        own, everyone = batch.row_counts[step], sum(exchange.row_counts[step])
        moved = own * (u - 1) + everyone - own  # one way, and back as gradients or as rows
        numbers += moved * (2 * q + (kv if step else 0)) // u
    return numbers * element


def public_bytes(length: int, layout: Layout, config: DraftConfig, element: int) -> float:
    """The same of a rank in the scheme of public trainers (see the top)."""
    q = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    around = 3 * (layout.ring - 1) * (length / layout.ring) * kv / layout.ulysses
    swapped = 2 * (length / layout.group) * (2 * q + kv) * (layout.ulysses - 1) / layout.ulysses
    return STEPS * (around + swapped) * element


def routed_bytes(batch: Batch, layout: Layout, config: DraftConfig, element: int) -> int:
    """Online: features that a rank has prefilled and others of its group need."""
    if layout.group == 1:
        return 0
    rank, width = batch.exchange.sequence.rank, config.target_hidden_size * element
    _, *routes = batch.routes
    tokens, teachers = (sum(route.sent) - route.sent[rank] for route in routes)
    return tokens * 3 * width + teachers * (width + 8 + 4)


def compare_work(title: str, lengths: np.ndarray, console: Console) -> None:
    """Prints a row a layout."""
    config, length = LLAMA3_8B, int(lengths.sum())
    title = f"{title}, {length:,} tokens, Llama-3.1-8B shapes in bf16: the busiest rank; MB: mean"
    columns = ("layout", "tokens", "rows", "pairs", "TFLOP", "/ mean", "sent MB")
    shown = table(title, *columns, "public scheme MB", "ratio", "kB a token", "online MB")
    for layout in LAYOUTS:
        dealt = [
            micro_steps(lengths, layout, rank, config, imagined(layout, rank, config), PER_RANK)
            for rank in range(layout.ranks)
        ]
        pairs = np.array([sum(map(causal_pairs, batches)) for batches in dealt], dtype=float)
        # Ulysses ranks share their heads.
        pairs = pairs.reshape(-1, layout.ulysses).mean(1).repeat(layout.ulysses)
        flops = np.array([sum(training_flops(config, b) for b in batches) for batches in dealt])
        flops = flops + 14 * config.num_attention_heads * config.head_dim * pairs
        sent, routed = (
            sum(count(b, layout, config, 2) for batches in dealt for b in batches) / layout.ranks
            for count in (sent_bytes, routed_bytes)
        )
        public = public_bytes(length / layout.replicas, layout, config, 2)
        counts = [
            [(b.tokens, sum(b.row_counts), len(b.pair_index)) for b in batches] for batches in dealt
        ]
        most = np.max([np.sum(batches or [(0, 0, 0)], axis=0) for batches in counts], axis=0)
        row = [f"{count:,}" for count in most]
        row += [f"{flops.max() / 1e12:.0f}", f"{flops.max() / flops.mean():.3f}"]
        row += [f"{sent / 1e6:.0f}", f"{public / 1e6:.0f}", f"{public / sent:.1f}" if sent else ""]
        row += [f"{sent * layout.ranks / length / 1e3:.1f}", f"{routed / 1e6:.0f}"]
        shown.add_row(str(layout), *row)
    console.print(shown)


class Sent(TorchDispatchMode):
    """Counts the bytes that all-to-all hands to others, forward and backward."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            tensor, _, splits, _ = args
            others = sum(splits) - splits[dist.get_rank() % len(splits)]
            self.bytes += others * tensor[0].nbytes if len(tensor) else 0
        return function(*args, **(kwargs or {}))


def check(rank: int, world_size: int, folder: str) -> None:
    """In a process: bytes counted and computed by layout, and bytes kept for backward measured."""
    cpu = torch.device("cpu")
    connect(rank, world_size, folder, cpu)
    model, sent, kept = make_model(SMALL, cpu, torch.float32), {}, {}
    for layout in CHECKED:
        shape = layout.ulysses, layout.ring
        sequence = Sequence(*shape, rank, SMALL, TIMEOUT)
        batches = micro_steps(lognormal(2000), layout, rank, SMALL, sequence, 1000)
        with Sent() as counter:
            for batch in batches:
                model.forward(batch, imagine(batch, SMALL, torch.float32)).backward()
        sent[str(layout)] = (
            counter.bytes,
            sum(sent_bytes(batch, layout, SMALL, 4) for batch in batches),
        )
    layout = CHECKED[0]
    sequence = Sequence(layout.ulysses, layout.ring, rank, SMALL, TIMEOUT)
    for length in (2048, 4096, 8192):
        (batch,) = micro_steps(np.array([length]), layout, rank, SMALL, sequence, length)
        features, exchange = imagine(batch, SMALL, torch.float32), batch.exchange
        tensors = [model.embedding, model.head]
        given, _ = tree_flatten([vars(batch), exchange, vars(features), tensors])
        _, kept[length] = saved_bytes(
            lambda b=batch, f=features: model.forward(b, f), model.draft, given
        )
    everyone = [None] * world_size
    dist.all_gather_object(everyone, (sent, kept))
    if rank == 0:
        torch.save(everyone, f"{folder}/checked.pt")
    dist.destroy_process_group()


def compare_sent(everyone: list[tuple[dict, dict]], console: Console) -> None:
    """What all-to-all was seen to send in each process, and what is computed: the same numbers."""
    shown = table(
        "Checked in 4 gloo processes, 2,000 tokens, small shapes",
        "layout",
        "kB seen, by rank",
        "computed",
    )
    for layout in map(str, CHECKED):
        seen, computed = zip(*(sent[layout] for sent, _ in everyone), strict=True)
        shown.add_row(
            layout,
            *(", ".join(f"{count / 1e3:.1f}" for count in counts) for counts in (seen, computed)),
        )
        if seen != computed:
            raise SystemExit(f"error: {layout} sends {seen} bytes, computed are {computed}")
    console.print(shown)


def compare_memory(kept: list[dict[int, int]], console: Console) -> None:
    """Bytes kept for backward, which grow with the tokens and not with their square."""
    title = (
        f"Kept for backward, mean of the ranks: {CHECKED[0]} in gloo processes, small shapes, fp32"
    )
    shown = table(title, "tokens", "MB", "bytes a token", "of those added")
    before, shorter = 0.0, 0
    for length in kept[0]:
        measured = np.mean([of_rank[length] for of_rank in kept])
        added = f"{(measured - before) / (length - shorter):,.0f}" if shorter else ""
        row = f"{measured / 1e6:.2f}", f"{measured / length:,.0f}", added
        shown.add_row(f"{length:,}", *row)
        before, shorter = measured, length
    console.print(shown)


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--time", action="store_true", default=gpus > 1, help="real updates; on CPUs to see it run"
    )
    parser.add_argument("--processes", type=int, default=gpus if gpus > 1 else 2)
    parser.add_argument(
        "--tokens",
        type=int,
        default=PER_RANK if gpus else 1024,
        help="of a micro-step on each rank",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--length", type=int, default=131072, help="of the long document")
    options = parser.parse_args()
    console = Console(width=170)
    if options.time:
        return compare_time(options, console)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(check, (4, folder), nprocs=4)
        everyone = torch.load(f"{folder}/checked.pt")
    compare_sent(everyone, console)
    compare_work("Documents of about 1,500 tokens", lognormal(options.length), console)
    compare_work("One document", np.array([options.length]), console)
    compare_memory([kept for _, kept in everyone], console)


if __name__ == "__main__":
    os.nice(5)
    main()
