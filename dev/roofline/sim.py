"""Predicts a training step, or the target's prefill, on an H200 that need not be there.

    python dev/roofline/sim.py --supervised 0.6            # phases and the costliest lines
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fake_cuda

fake_cuda.load()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from prices import IDEAL, likely, play  # noqa: E402
from record import CUDA, Recorder, recording  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.table import Table  # noqa: E402
from torch._subclasses.fake_tensor import unset_fake_temporarily  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from eagle3.batch import Document, Features  # noqa: E402
from eagle3.config import RunConfig  # noqa: E402
from eagle3.draft.model import Draft  # noqa: E402
from eagle3.parallel.ranks import Ranks  # noqa: E402
from eagle3.plan import target_costs  # noqa: E402
from eagle3.target.hf import HFTarget  # noqa: E402
from eagle3.target.spec import TargetSpec, read_spec  # noqa: E402
from eagle3.train import Trainer, build_draft, build_trainer  # noqa: E402
from eagle3.ttt import training_flops  # noqa: E402


class Conversations:
    """Equal documents as a `Supply` has them, each with two answers that are `supervised` of its
    tokens; with features, which take no memory, if `hidden_size` is given.
    """

    def __init__(self, count: int, length: int, supervised: float, hidden_size: int | None):
        self.hidden_size, self.mask = hidden_size, torch.zeros(length, dtype=torch.bool)
        answer = round(length * supervised / 2)
        for end in (length // 2, length):
            self.mask[end - answer : end] = True
        self.lengths = np.full(8 * count, length)
        self.supervised = np.full(8 * count, int(self.mask.sum()))

    def begin(self, epoch: int) -> None: ...

    def load(self, numbers: list[int]) -> list[Document]:
        # Every token lies in the draft vocabulary.
        ids, features = torch.zeros(len(self.mask), dtype=torch.int32), None
        if self.hidden_size:
            teachers = int(self.mask[0]) + int((self.mask[1:] | self.mask[:-1]).sum())
            shapes = (len(self.mask), 3 * self.hidden_size), (teachers, self.hidden_size)
            states = [torch.zeros(1, dtype=torch.bfloat16).expand(shape) for shape in shapes]
            argmax, logsumexp = torch.zeros(teachers, dtype=torch.long), torch.zeros(teachers)
            features = Features(*states, argmax, logsumexp)
        return [Document(number, ids, self.mask, features) for number in numbers]


class Target(HFTarget):
    """With weights that have no values, so that nothing is tried out with them."""

    def check_outputs(self) -> None: ...

    def choose_way(self, automatic: bool) -> None:
        self.way, self.longest_together = "packed", float("inf")
        self.model.config._attn_implementation = "packed"


def make_target(spec: TargetSpec, section: dict) -> Target:
    def without_weights(path, dtype, **others):
        with CUDA:
            return AutoModelForCausalLM.from_config(spec.config, dtype=getattr(torch, dtype))

    settings = {name: value for name, value in section.items() if not name.startswith("_")}
    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", without_weights):
        return Target(spec, CUDA, **settings)


def draft_on_device(*given) -> Draft:
    """Modules of fake tensors cannot be moved, nor can ids without data be looked at."""

    def vocab_tensors(vocab: range, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(vocab_size, dtype=torch.bool), torch.empty(len(vocab), dtype=torch.long)

    with CUDA, mock.patch("eagle3.train.vocab_tensors", vocab_tensors):
        return build_draft(*given)


def make_trainer(config: RunConfig, spec: TargetSpec, source: Conversations, target) -> Trainer:
    vocab_size, size = spec.config.vocab_size, spec.config.hidden_size
    with unset_fake_temporarily():
        every = torch.ones(vocab_size, dtype=torch.bool)

    def load_weights() -> SimpleNamespace:
        pair = torch.empty(2, vocab_size, size, dtype=getattr(torch, spec.dtype), device=CUDA)
        return SimpleNamespace(embedding=pair[0].clone(), head=pair[1].clone())

    source.prepared, source.features = SimpleNamespace(vocab=range(config.draft.vocab_size)), target
    handle = SimpleNamespace(spec=spec, device=CUDA, load_weights=load_weights)
    if target is not None:
        handle.load_weights = lambda: target
    with mock.patch("eagle3.train.build_draft", draft_on_device):
        trainer = build_trainer(config, handle, source, None, Ranks())
    trainer.loader.pack_documents = partial(trainer.loader.pack_documents, in_draft_vocab=every)
    return trainer


@dataclass
class Simulated:
    """What was recorded of `tokens`; `flops` as `plan=true` counts them, without `attention`."""

    recorder: Recorder
    tokens: int
    flops: float
    attention: float


def simulate(options: argparse.Namespace) -> Simulated:
    overrides = ["name=simulated", "model=hf", f"model.path={options.model}", "mode=offline"]
    overrides += [f"loss={options.loss}", f"train.tokens_per_step={options.tokens}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("run", [*overrides, *options.overrides]))
    spec, count = read_spec(config.model), options.tokens // options.length
    runs_target = options.online or options.prefill
    stored = None if runs_target else spec.config.hidden_size
    source, flops = Conversations(count, options.length, options.supervised, stored), 0.0
    with recording([options.length] * count, not options.json or options.operators) as recorder:
        target = make_target(spec, config.target) if runs_target else None
        trainer = make_trainer(config, spec, source, target)
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
        flops += batch.tokens * target_costs(spec, source)[2]
    if not options.prefill:
        flops += training_flops(shape, batch)
        # Each row of each step meets half of its document's keys, forward and backward.
        keys = sum(batch.row_counts) * options.length / 2
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
    console, machine = Console(width=160, highlight=False), likely(options.flash)

    def table(title: str, key, heading: str, most: int) -> None:
        shown, sums = Table(title=title, title_justify="left"), defaultdict(lambda: np.zeros(5))
        for call in recorder.calls:
            if call.cost.kind != "view" and not call.hidden:
                cost, times = call.cost, [call.cost.seconds(m) * 1e3 for m in (IDEAL, machine)]
                sums[key(call)] += [cost.kernels, cost.flops / 1e12, cost.bytes / 1e9, *times]
        shown.add_column(heading, no_wrap=True)
        for name in ("kernels", "TFLOP", "GB", "ideal ms", "likely ms"):
            shown.add_column(name, justify="right")
        for name, row in sorted(sums.items(), key=lambda item: -item[1][4])[:most]:
            shown.add_row(escape(name), f"{row[0]:.0f}", *(f"{value:.2f}" for value in row[1:]))
        total = sum(sums.values())
        shown.add_row("all", f"{total[0]:.0f}", *(f"{value:.2f}" for value in total[1:]))
        console.print(shown)

    def side(call) -> str:
        return "backward" if call.backward else "forward"

    def phase(call) -> str:
        file = call.place.rpartition(":")[0]
        return f"{call.cost.kind:8} {side(call):8} {call.function} ({file})"

    table("Phases", phase, "kind, side, function", 40)
    table("Lines", lambda c: f"{c.place:36} {side(c):8} {c.source[:60]}", "line", options.lines)
    for name, value in found.items():
        console.print(f"{name.replace('_', ' '):28}{value:>12,}")
    console.print("A prediction: nothing of it was measured.")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    parser.add_argument("--model", default=str(HERE / "llama3-8b"), help="folder of a config.json")
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


def main() -> None:
    options = parse()
    simulated = simulate(options)
    found = summary(simulated, options.flash)
    if options.operators:
        found["operators"] = operators(simulated.recorder, options.flash)
    if options.json:
        print(json.dumps(found, indent=None if options.operators else 2))
    else:
        show(simulated.recorder, found, options)


if __name__ == "__main__":
    main()
