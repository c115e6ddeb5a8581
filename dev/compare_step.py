"""What one training step costs (forward and backward of the draft, features given), all contenders
in one run.

    python dev/compare_step.py                            # against plain padded dense attention
    python dev/compare_step.py --peer specforge           # against SpecForge, document by document
    python dev/compare_step.py --peer dense specforge --supervised 0.3 0.6 0.92 --repeats 5

`--peer specforge` wants `pip install --no-deps specforge==0.2.0`. Its core needs triton for the
loss alone, which has a torch reference beside it: that one runs here, compiled when `--compile` is
given. SpecForge is handed the target's logits, as its online mode is; the other two are handed what
`Features` holds.

CPU-seconds are those of one thread, the contenders taking turns, the median of the repeats. "By
document" is this trainer with `train.tokens_per_step` so small that each document has a micro-step
of its own. Saved bytes are the distinct storages that autograd keeps for backward, without
parameters and inputs. Peak memory is how far the resident memory of a fresh process rises during
the step (Linux).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

root = Path(__file__).parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

from reference import Case, dense_loss, relative_error  # noqa: E402

from eagle3 import batch as supervision  # noqa: E402
from eagle3.batch import Batch, Document, fill, pack, split_features  # noqa: E402
from eagle3.draft.flash import Auto  # noqa: E402
from eagle3.draft.model import EAGLE3, DraftConfig  # noqa: E402
from eagle3.draft.ttt import unroll  # noqa: E402
from eagle3.loss import SoftTargetLoss, kl  # noqa: E402

TTT_STEPS, GAMMA, TURN_TOKENS = 7, 0.8, 200
aten = torch.ops.aten


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
def flash_forward_flops(q, k, v, *args, **kwargs) -> int:
    return sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))


@register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def flash_backward_flops(grad_out, q, k, v, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))


def draw_case(share: float, documents: int, seed: int) -> Case:
    """Documents of lognormal length (mean 300, at most 1024) in turns of 200 tokens, of which
    `share` are answers.

    Of the draws whose own mean is within 30 of that, the one with the median share of padding. 98 %
    of the tokens lie in the draft vocabulary, as in chat data. The rest is noise.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, draft_vocab_size, size = 16384, 4096, 512
    config = DraftConfig(
        hidden_size=size, intermediate_size=3 * size, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size, target_hidden_size=size, max_position_embeddings=2048,
    )  # fmt: skip

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    target_ids = torch.randperm(vocab_size, generator=generator)[:draft_vocab_size].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[target_ids] = True
    torch.manual_seed(seed)
    draft = EAGLE3(config, Auto, t2d, target_ids - torch.arange(draft_vocab_size))
    draws = (5.46 + 0.7 * normal(1000, documents)).exp().long().clamp(32, 1024)
    draws = draws[(draws.float().mean(1) - 300).abs() < 30]
    by_padding = (draws.amax(1) / draws.float().mean(1)).argsort()
    lengths = draws[by_padding[len(draws) // 2]].tolist()
    places = torch.arange(max(lengths))
    within = places < torch.tensor(lengths)[:, None]
    turns = torch.tensor([max(1, round(length / TURN_TOKENS)) for length in lengths])[:, None]
    place_in_turn = (places * turns / torch.tensor(lengths)[:, None]) % 1
    common = target_ids[torch.randint(0, draft_vocab_size, within.shape, generator=generator)]
    rare = torch.randint(0, vocab_size, within.shape, generator=generator)
    input_ids = (
        torch.where(torch.rand(within.shape, generator=generator) < 0.98, common, rare) * within
    )
    head = normal(vocab_size, size) / size**0.5
    head[target_ids] *= 1.5
    loss_mask, embedding = (place_in_turn >= 1 - share) & within, normal(vocab_size, size)
    aux = normal(*within.shape, 3 * size) * within[..., None]
    last_hidden = normal(*within.shape, size) * within[..., None]
    return Case(draft, embedding, head, lengths, input_ids, loss_mask, aux, last_hidden)


def this_trainer(case: Case, mask: str, tokens_per_step: int = 1 << 30):
    """In micro-steps of at most so many tokens, or of one document."""
    mask = getattr(supervision, mask)
    loss, draft_head = SoftTargetLoss(kl, GAMMA, 1024, mask), case.head[case.draft.t2d]

    def packed(documents: list[Document]) -> Batch:
        return pack(documents, case.draft.t2d, TTT_STEPS, mask)

    documents = [Document(*d) for d in case.documents()]
    whole, batches = packed(documents), []
    features = split_features(whole, case.features(whole))
    documents = [replace(d, features=f) for d, f in zip(documents, features, strict=True)]
    for group in fill(documents, case.lengths, tokens_per_step):
        batches.append(packed(group))

    def step() -> float:
        total = 0.0
        for batch in batches:
            hidden = unroll(case.draft, case.embedding, batch.features.aux_hidden_states, batch)
            output = loss(case.draft, hidden, batch.features, batch, draft_head)
            (output.loss / whole.normaliser).backward()
            total += output.loss.item() / whole.normaliser
        return total

    inputs = [case.embedding, draft_head]
    for batch in batches:
        inputs += [*vars(batch.features).values(), *vars(batch).values()]
        inputs.append(batch.documents.cu_seqlens)
    return step, case.draft, inputs


def dense(case: Case, mask: str):
    draft_head, argmax = case.head[case.draft.t2d], (case.last_hidden @ case.head.T).argmax(-1)

    def step() -> float:
        teacher = (case.last_hidden @ draft_head.T).softmax(-1)
        total = dense_loss(
            case.draft,
            case.embedding,
            case.aux,
            teacher,
            argmax,
            case.input_ids,
            case.loss_mask,
            GAMMA,
            TTT_STEPS,
            mask,
        ).loss
        total.backward()
        return total.item()

    return (
        step,
        case.draft,
        [case.embedding, case.aux, case.last_hidden, draft_head, argmax, case.input_ids],
    )


def specforge(case: Case, mask: str):
    """A document at a time, the losses weighted such that their sum is what `mask=shifted` computes
    for all.
    """
    assert mask == "shifted"
    import torch._inductor.compile_fx
    from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

    if importlib.util.find_spec("triton") is None:
        sys.modules["triton"] = MagicMock(jit=lambda function: function)
        sys.modules["triton.language"] = sys.modules["triton"].language
    import specforge.core.loss

    if isinstance(sys.modules["triton"], MagicMock):
        del sys.modules["triton"], sys.modules["triton.language"]
    from specforge.algorithms.eagle3 import model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

    model.LogSoftmaxLoss.apply = specforge.core.loss._compute_loss
    shape = dict(vars(case.draft.config))
    # `norm_output` means something else there, and layers are always three.
    for name in ("initializer_range", "num_aux_hidden_states", "fc_norm", "norm_output"):
        del shape[name]
    theirs = LlamaForCausalLMEagle3(LlamaConfig(**shape, pad_token_id=0), attention_backend="sdpa")
    names = theirs.load_state_dict(
        case.draft.state_dict() | {"embed_tokens.weight": case.embedding}, strict=False
    )
    assert not names.missing_keys and not names.unexpected_keys, names
    theirs.embed_tokens.requires_grad_(False)
    trainer = model.OnlineEagle3Model(theirs, length=TTT_STEPS, attention_backend="sdpa")

    inputs = []
    for i, length in enumerate(case.lengths):
        row = slice(i, i + 1), slice(0, length)
        shifted_hidden = torch.nn.functional.pad(case.last_hidden[row][:, 1:], (0, 0, 0, 1))
        inputs.append(
            {
                "input_ids": torch.nn.functional.pad(case.input_ids[row][:, 1:], (0, 1)),
                "attention_mask": torch.ones(1, length, dtype=torch.long),
                "target": shifted_hidden @ case.head.T,
                "loss_mask": case.loss_mask[row].long()[..., None],
                "hidden_states": case.aux[row].contiguous(),
            }
        )

    def step() -> float:
        total = 0.0
        for length, one in zip(case.lengths, inputs, strict=True):
            losses = trainer(**one)[0]
            loss = (
                sum(GAMMA**k * loss for k, loss in enumerate(losses))
                * length
                / case.loss_mask.numel()
            )
            loss.backward()
            total += loss.item()
        return total

    return step, theirs, [tensor for one in inputs for tensor in one.values()]


CONTENDERS = {
    "this trainer": (this_trainer, "serving"),
    "this trainer, by document": (partial(this_trainer, tokens_per_step=1), "serving"),
    "padded dense": (dense, "serving"),
    "this trainer, shifted": (this_trainer, "shifted"),
    "this trainer, shifted, by document": (partial(this_trainer, tokens_per_step=1), "shifted"),
    "SpecForge": (specforge, "shifted"),
}
PEERS = {
    "dense": ["this trainer", "this trainer, by document", "padded dense"],
    "specforge": ["this trainer, shifted", "this trainer, shifted, by document", "SpecForge"],
}


def saved_bytes(step, module: torch.nn.Module, inputs: list) -> tuple[float, int]:
    """What `step` returns, and the most bytes kept for backward at one time.

    Contenders that go through the documents one by one free them in between.
    """
    tensors = [
        *module.parameters(),
        *module.buffers(),
        *(x for x in inputs if isinstance(x, torch.Tensor)),
    ]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    alive, most = {}, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = None if storage.data_ptr() in known else storage.data_ptr()
            if self.key is not None:
                count = alive.get(self.key, (0, 0))[0]
                alive[self.key] = count + 1, storage.nbytes()
                most = max(most, sum(size for _, size in alive.values()))

        def __del__(self):
            if self.key is not None:
                count, size = alive.pop(self.key)
                if count > 1:
                    alive[self.key] = count - 1, size

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        loss = step()
    return loss, most


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_bytes(name: str, share: float, options: argparse.Namespace) -> int:
    """Measured by a process that runs nothing else."""
    command = [sys.executable, __file__, "--peak_of", name, "--supervised", str(share)]
    command += ["--documents", str(options.documents), "--seed", str(options.seed)]
    command += ["--compile"] if options.compile else []
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def measure(share: float, options: argparse.Namespace, console: Console) -> None:
    case = draw_case(share, options.documents, options.seed)
    names = list(
        dict.fromkeys(["this trainer", *(name for peer in options.peer for name in PEERS[peer])])
    )
    prepared = {name: CONTENDERS[name][0](case, CONTENDERS[name][1]) for name in names}

    losses, gradients, flops, saved = {}, {}, {}, {}
    for name, (step, module, inputs) in prepared.items():
        module.zero_grad()
        with FlopCounterMode(display=False) as counter:
            losses[name], saved[name] = saved_bytes(step, module, inputs)
        flops[name] = counter.get_total_flops()
        gradients[name] = {
            n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None
        }
    seconds = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, (step, module, _) in prepared.items():
            module.zero_grad()
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)

    supervised = float(case.loss_mask.sum()) / sum(case.lengths)
    table = Table(
        title=f"{len(case.lengths)} documents, {sum(case.lengths)} tokens, "
        f"longest {max(case.lengths)}, {supervised:.0%} supervised"
    )
    columns = ("", "loss", "CPU s", "TFLOP", "saved MB", "peak MB")
    columns += ("CPU x", "FLOPs x", "saved x", "peak x")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    own = "this trainer"
    peaks = {name: peak_bytes(name, share, options) for name in names}
    for name in names:
        own = name if name in ("this trainer", "this trainer, shifted") else own
        median = statistics.median(seconds[name])
        cpu = median / statistics.median(seconds[own])
        row = [f"{losses[name]:.6f}", f"{median:.2f}", f"{flops[name] / 1e12:.3f}"]
        row += [f"{saved[name] / 2**20:.0f}", f"{peaks[name] / 2**20:.0f}", f"{cpu:.2f}"]
        row += [f"{costs[name] / costs[own]:.2f}" for costs in (flops, saved, peaks)]
        table.add_row(name, *row)
    console.print(table)
    for ours, *_, theirs in (PEERS[peer] for peer in options.peer):
        worst = max(relative_error(gradients[theirs][n], g) for n, g in gradients[ours].items())
        factor = statistics.median(seconds[theirs]) / statistics.median(seconds["this trainer"])
        console.print(
            f"{theirs} against {ours}: loss differs by "
            f"{abs(losses[theirs] / losses[ours] - 1):.1e}, "
            f"gradients by at most {worst:.1e}; it takes {factor:.2f} times the CPU-seconds of "
            "this trainer with its own mask"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--supervised", type=float, nargs="+", default=[0.6], help="share of tokens in answers"
    )
    parser.add_argument("--peer", choices=list(PEERS), nargs="+", default=["dense"])
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let SpecForge compile what it marks with torch.compile",
    )
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak_of", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("default" if options.compile else "force_eager")
    if options.peak_of:
        build, mask = CONTENDERS[options.peak_of]
        step, _, _ = build(draw_case(options.supervised[0], options.documents, options.seed), mask)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step()
        print(resident("VmHWM") - before)
        return
    for share in options.supervised:
        measure(share, options, Console(width=140))


if __name__ == "__main__":
    os.nice(5)
    main()
