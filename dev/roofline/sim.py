"""Predicts a training step, or the target's prefill, on an H200 that need not be there.

    python dev/roofline/sim.py --supervised 0.6            # the costliest lines
    python dev/roofline/sim.py --supervised 1.0 --loss lk --json
    python dev/roofline/sim.py --prefill                   # the target alone
    python dev/roofline/sim.py --online                    # the target, then a step
    python dev/roofline/sim.py loss.chunk_rows=2048        # any key of a run

The project's own loader, trainer and target run on fake CUDA tensors (shapes without data) of the
sizes in the model's config.json; every call of an operator gets FLOPs, bytes and a time. The second
update is recorded, as the first makes what the others find. Where torch has no CUDA, guard.cpp is
compiled once. What comes out is a prediction, never a measurement.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import fake_cuda

fake_cuda.load()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from prices import IDEAL, likely, play  # noqa: E402
from record import CUDA, Recorder, recording  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402
from workload import LLAMA, Documents, Work, make_target, make_trainer  # noqa: E402

from eagle3.plan import target_costs  # noqa: E402
from eagle3.target.hf import HFTarget  # noqa: E402


class Target(HFTarget):
    """Nothing can be tried out with weights that have no values: all is found to work."""

    def check_outputs(self) -> None: ...

    def probe(self, documents: list[torch.Tensor]) -> torch.Tensor:
        return self.head.new_empty(1, 1, self.head.shape[1])

    def choose_way(self, automatic: bool) -> None:
        self.way, self.unmasked, self.longest_together = "packed", "documents", float("inf")
        self.probe_ids, self.tolerance = torch.zeros(2, 24, dtype=torch.long), 1.0
        self.model.config._attn_implementation = "packed"


@dataclass
class Simulated:
    """What was recorded of `tokens`; `flops` as `plan=true` counts them, without `attention`."""

    recorder: Recorder
    tokens: int
    flops: float
    attention: float


def simulate(options: argparse.Namespace) -> Simulated:
    runs_target, given = options.online or options.prefill, [f"loss={options.loss}"]
    work = Work(
        options.model, options.tokens, options.length, options.supervised, not runs_target,
        given + options.overrides,
    )  # fmt: skip
    (config, spec), flops = work.config(), 0.0
    places = not options.json or options.operators
    with recording([work.length] * work.count, places) as recorder:
        with unset_fake_temporarily():
            documents = Documents(work, config, spec, random=False)
        target = make_target(config, spec, CUDA, Target) if runs_target else None
        trainer = make_trainer(config, spec, documents, target, CUDA)
        updates = iter(trainer.loader)
        for _ in range(1 if options.prefill else 2):
            [batch] = next(updates)
            recorder.restart()
            if options.prefill:
                batch = batch.to(CUDA)
                recorder.restart()
                target(batch)
            else:
                trainer.train_update([batch], waited=0.0)
    shape, attention = trainer.draft.config, 0.0
    if runs_target:
        flops += batch.tokens * target_costs(spec, documents)[2]
    if not options.prefill:
        flops += trainer.draft.training_flops(shape, batch)
        queries = sum(batch.row_counts)
        if shape.reads_mask_token:
            queries = len(batch.rows) * shape.block_size * shape.num_hidden_layers
        # Each meets half of its document's keys, forward and backward.
        keys = queries * work.length / 2
        attention = 14 * keys * shape.num_attention_heads * shape.head_dim
    return Simulated(recorder, batch.tokens, flops, attention)


def summary(found: Simulated, flash: int) -> dict:
    """What --json prints."""
    recorder, tokens = found.recorder, found.tokens
    ideal, predicted = (play(recorder.calls, machine) for machine in (IDEAL, likely(flash)))
    return {
        "likely_tokens_per_second": round(tokens / predicted.wall),
        "ideal_tokens_per_second": round(tokens / ideal.wall),
        "limit_tokens_per_second": round(tokens * IDEAL.products / (found.flops + found.attention)),
        "likely_milliseconds": round(1e3 * predicted.wall, 2),
        "ideal_milliseconds": round(1e3 * ideal.wall, 2),
        "host_milliseconds": round(1e3 * predicted.host, 2),
        "share_of_products": round(found.flops / (IDEAL.products * predicted.wall), 3),
        "peak_gib": round(recorder.peak / 2**30, 2),
        "gigabytes": round(sum(call.cost.bytes for call in recorder.calls) / 1e9, 1),
        "kernels": predicted.kernels,
        "syncs": predicted.syncs,
        "waits_for_copies": predicted.waits,
    }


def operators(recorder: Recorder, flash: int) -> list[dict]:
    """Calls of one operator at the same shapes together, as a profiler groups them."""
    groups, machine = defaultdict(list), likely(flash)
    for call in recorder.calls:
        groups[call.name, str(call.shapes)].append(call)
    rows = []
    for (name, _), calls in groups.items():
        seconds = sum(call.cost.seconds(machine) for call in calls)
        row = {"name": name, "shapes": calls[0].shapes, "calls": len(calls)}
        rows.append(row | {"milliseconds": round(1e3 * seconds, 4), "place": calls[0].place})
    return rows


def show(recorder: Recorder, found: dict, options) -> None:
    machine, sums = likely(options.flash), defaultdict(lambda: np.zeros(5))
    for call in recorder.calls:
        if call.cost.kind != "view" and not call.hidden:
            cost, times = call.cost, [call.cost.seconds(m) * 1e3 for m in (IDEAL, machine)]
            side = "backward" if call.backward else "forward"
            line = f"{call.place:36} {side:8} {call.source[:60]}"
            for name in (line, "all"):
                sums[name] += [cost.kernels, cost.flops / 1e12, cost.bytes / 1e9, *times]
    shown = Table()
    shown.add_column("line", no_wrap=True)
    for name in ("kernels", "TFLOP", "GB", "ideal ms", "likely ms"):
        shown.add_column(name, justify="right")
    for name, row in sorted(sums.items(), key=lambda item: -item[1][4])[: options.lines + 1]:
        shown.add_row(escape(name), f"{row[0]:.0f}", *(f"{value:.2f}" for value in row[1:]))
    console = Console(width=160, highlight=False)
    console.print(shown)
    for name, value in found.items():
        console.print(f"{name.replace('_', ' '):28}{value:>12,}")
    console.print("A prediction: nothing of it was measured.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--model", type=Path, default=LLAMA, help="folder of a config.json")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--length", type=int, default=2048, help="of a document")
    parser.add_argument("--supervised", type=float, default=0.6, help="share of the tokens")
    parser.add_argument("--loss", default="kl", help="an option of conf/loss")
    parser.add_argument("--flash", type=int, choices=(2, 3), default=2, help="FlashAttention")
    parser.add_argument("--online", action="store_true", help="the target's prefill, then a step")
    parser.add_argument("--prefill", action="store_true", help="the target's prefill alone")
    parser.add_argument("--lines", type=int, default=30, help="source lines shown")
    parser.add_argument("--json", action="store_true", help="one object")
    parser.add_argument("--operators", action="store_true", help="in it also each operator")
    parser.add_argument("overrides", nargs="*", help="keys of a run, as run.py takes them")
    return parser.parse_args(arguments)


def predict(options: argparse.Namespace) -> tuple[Simulated, dict]:
    """What was simulated, and what --json prints of it."""
    with redirect_stdout(sys.stderr):
        simulated = simulate(options)
    found = summary(simulated, options.flash)
    if options.operators:
        found["operators"] = operators(simulated.recorder, options.flash)
    return simulated, found


def main() -> None:
    options = parse()
    simulated, found = predict(options)
    if options.json:
        print(json.dumps(found, indent=None if options.operators else 2))
    else:
        show(simulated.recorder, found, options)


if __name__ == "__main__":
    main()
