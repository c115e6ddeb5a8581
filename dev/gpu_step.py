"""One training step of a draft for Llama-3.1-8B (random weights, packed tokens): tokens/s, TFLOP/s,
peak memory.
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from eagle3.batch import Batch, Document, Features, pack, serving
from eagle3.draft.flash import Auto
from eagle3.draft.model import Draft, DraftConfig
from eagle3.loss import SoftTargetLoss, kl
from eagle3.optim import step_if_finite
from eagle3.runs.metrics import peak_flops, peak_memory_bytes
from eagle3.ttt import unroll

SHAPES = {
    "llama3-8b": DraftConfig(4096, 14336, 32, 8, 128, 128256, 32000, 4096, 131072, 500000.0),
    "tiny": DraftConfig(256, 640, 4, 2, 64, 2048, 1024, 256, 2048),
}


def make_batch(
    tokens: int, length: int, supervised: float, config: DraftConfig, steps: int
) -> Batch:
    """Documents of `length` tokens whose last `supervised` share is one assistant turn."""
    mask = torch.arange(length) >= round(length * (1 - supervised))
    documents = [
        (i, torch.randint(config.draft_vocab_size, (length,)), mask)
        for i in range(tokens // length)
    ]
    in_vocab = torch.arange(config.vocab_size) < config.draft_vocab_size
    return pack([Document(*d) for d in documents], in_vocab, steps, serving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--supervised", type=float, default=0.6)
    parser.add_argument("--ttt-steps", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = SHAPES[options.shape]
    torch.manual_seed(0)
    torch.set_default_device(device)
    t2d = torch.arange(config.vocab_size) < config.draft_vocab_size
    draft = Draft(config, Auto, t2d, torch.zeros(config.draft_vocab_size, dtype=torch.int64))
    embedding = torch.randn(config.vocab_size, config.hidden_size, dtype=dtype)
    head = torch.randn(config.draft_vocab_size, config.hidden_size, dtype=dtype) * 0.02
    torch.set_default_device("cpu")
    batch = make_batch(
        options.tokens, options.length, options.supervised, config, options.ttt_steps
    ).to(device)
    rows, teachers = len(batch.input_ids), len(batch.teacher_rows)
    features = Features(
        torch.randn(rows, 3 * config.target_hidden_size, dtype=dtype, device=device),
        torch.randn(teachers, config.target_hidden_size, dtype=dtype, device=device),
        torch.randint(config.draft_vocab_size, (teachers,), device=device),
        torch.zeros(teachers, device=device),
    )
    loss = SoftTargetLoss(kl, 0.8, 4096, serving)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def step() -> torch.Tensor:
        hidden = unroll(draft, embedding, features.aux_hidden_states, batch)
        output = loss(draft, hidden, features, batch, head)
        (output.loss / batch.normaliser).backward()
        return step_if_finite(optimizer, list(draft.parameters()), 0.5)[0]

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    for _ in range(options.repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        norm = float(step())
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[len(seconds) // 2]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(
        title=f"{options.shape}, {rows} tokens, {options.supervised:.0%} supervised, {name}"
    )
    for column in (
        "tokens/s",
        "ms a step",
        "TFLOP/s",
        "share of peak",
        "peak memory GiB",
        "gradient norm",
    ):
        table.add_column(column, justify="right")
    rate, peak = counter.get_total_flops() / median, peak_flops(name)
    table.add_row(
        f"{rows / median:,.0f}",
        f"{1000 * median:.1f}",
        f"{rate / 1e12:.2f}",
        f"{rate / peak:.0%}" if peak else "-",
        f"{peak_memory_bytes(device) / 2**30:.1f}",
        f"{norm:.3g}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
