"""The stage `check`: findings about any EAGLE3 draft, by engine, then a few prompts decoded with
it.

It needs neither data nor training; without the target's weights it says so and judges the files
alone.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from hydra.utils import instantiate
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig

from eagle3.data.chat import with_system
from eagle3.decode.speculate import speculate
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.export.formats import DraftFiles, read_any
from eagle3.export.rules import ALL, ENGINES, NOTE, WARNING, WRONG, Finding, find_all, readings
from eagle3.export.write import build, shape_of
from eagle3.job import Run
from eagle3.target.hf import HFTarget
from eagle3.target.layers import meant_by

QUESTIONS = (
    "Explain in a few sentences how a refrigerator keeps food cold.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 13:05. How long does it take? Show your steps.",
    "List five things to check before buying a used bicycle.",
    "Write a short, polite email that moves a meeting from Monday to Wednesday.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise how rain forms, for a ten-year-old.",
    "Translate into French: the library opens at eight and closes at noon.",
)
CLEARLY = (
    1.5  # an acceptance length that a draft fed with the wrong layers has not been seen to reach
)
LITTLE = 1.2


@dataclass
class Decoded:
    """`acceptance_length` of greedy chains of `draft_length`, by the layers fed to the draft, such
    as `1,15,28`.
    """

    num_prompts: int
    max_new_tokens: int
    draft_length: int
    acceptance_length: dict[str, float]


def check(run: Run, console: Console) -> None:
    """Print and write (check.json) what was found; raises RunError with a line for each thing that
    is wrong.
    """
    asked = run.config.check
    files = read_any(run.draft_folder)
    findings = find_all(files, run.target_config) + list(embedding(files, run))
    decoded, more = decode(files, run) if asked.decode else (None, [])
    named = [f for f in findings + more if not f.engines or set(f.engines) & set(asked.engines)]
    named.sort(key=lambda finding: (WRONG, WARNING, NOTE).index(finding.severity))
    content = {
        "draft": str(run.config.draft_path or files.folder),
        "target": run.config.model.path,
        "weights": files.weights,
        "speculators_form": files.is_speculators,
        "engines": asked.engines,
        "layers": readings(files, run.target_config.num_hidden_layers),
        "findings": [asdict(finding) for finding in named],
        "decoded": asdict(decoded) if decoded else None,
    }
    (run.run_dir / "check.json").write_text(json.dumps(content, indent=1))
    show(named, decoded, asked.engines, console)
    wrong = [f"{engines_of(f, asked.engines)}: {f.sentence}" for f in named if f.severity == WRONG]
    if wrong:
        raise RunError("\nerror: ".join(wrong))  # run.py puts the first `error: `


def engines_of(finding: Finding, asked: list[str]) -> str:
    return ", ".join(ENGINES[name] for name in finding.engines if name in asked)


def show(
    findings: list[Finding], decoded: Decoded | None, asked: list[str], console: Console
) -> None:
    table = Table("check", "engines", "finding", box=SIMPLE_HEAD)
    for finding in findings:
        table.add_row(finding.severity, engines_of(finding, asked), Text(finding.sentence))
    console.print(
        table
        if findings
        else f"check: nothing found that matters in {', '.join(map(ENGINES.get, asked))}"
    )
    for layers, length in decoded.acceptance_length.items() if decoded else ():
        console.print(
            f"check: acceptance length {length:.2f} with chains of {decoded.draft_length} drafts on "
            f"{decoded.num_prompts} prompts, fed by layers {layers}",
            soft_wrap=True,
        )


def embedding(files: DraftFiles, run: Run) -> Iterator[Finding]:
    """An embedding in the file: vLLM and the official code use it, SGLang and TensorRT-LLM the
    target's.
    """
    shipped = files.tensors.get("embed_tokens.weight")
    own = files.config.get("target_hidden_size") not in (None, files.config.get("hidden_size"))
    if own and shipped is None:
        yield Finding(
            WRONG,
            ALL,
            "its hidden_size is not the target's, so it needs embed_tokens.weight of its own",
        )
    if own or shipped is None:
        return
    try:
        target = run.load_weights().embedding
    except (ConfigError, RunError, torch.OutOfMemoryError) as error:
        yield Finding(
            NOTE,
            ALL,
            f"embed_tokens.weight is there, but was not compared with the target's: {error}",
        )
        return
    if shipped.shape != target.shape:
        sentence = f"embed_tokens.weight is {list(shipped.shape)}, but the target's is {list(target.shape)}"
        yield Finding(WRONG, ALL, sentence)
        return
    rows = differing_rows(shipped, target)
    if rows:
        sentence = (
            f"embed_tokens.weight differs from the target's in {rows:,} of {len(target):,} rows: vLLM and the official "
            "code draft with it, SGLang and TensorRT-LLM with the target's"
        )
        yield Finding(WRONG, ALL, sentence)
    else:
        size = shipped.nbytes / 1e6
        yield Finding(
            NOTE,
            ALL,
            f"embed_tokens.weight is a copy of the target's, {size:,.0f} MB that nobody needs",
        )


def differing_rows(one: torch.Tensor, other: torch.Tensor) -> int:
    """Rows of two [V,D] that differ by more than rounding to bf16 explains, a part at a time."""
    count = 0
    for a, b in zip(one.split(8192), other.split(8192), strict=True):
        a, b = a.float(), b.to(a.device).float()
        count += int(((a - b).abs() > 2**-7 * b.abs() + 1e-6).any(1).sum())
    return count


def portable_draft(files: DraftFiles, run: Run) -> Draft:
    """The draft for the built-in decoder, which uses the target's embedding. Raises RunError where
    it cannot.
    """
    tensors = {
        n: t
        for n, t in files.tensors.items()
        if n != "embed_tokens.weight" and not n.endswith("inv_freq")
    }
    shape, target = shape_of(files), run.target_config
    if (shape.vocab_size, shape.target_hidden_size) != (target.vocab_size, target.hidden_size):
        raise RunError("it is another target's draft")
    if shape.hidden_size != target.hidden_size:
        raise RunError(
            "its hidden_size is not the target's, which the built-in decoder does not support"
        )
    d2t = tensors.get("d2t")
    if d2t is not None and "t2d" not in tensors:
        ids = d2t.long() + torch.arange(len(d2t))
        tensors["t2d"] = torch.isin(torch.arange(shape.vocab_size), ids)
    return build(replace(files, tensors=tensors), shape, instantiate(run.config.draft.attention))


def candidates(files: DraftFiles, target: PretrainedConfig) -> list[list[int]]:
    """What the draft may have been made for, the likeliest first: the layers it names, and how else
    they are read.
    """
    read = readings(files, target.num_hidden_layers)
    named = files.named_layers or read["official"]
    every = [named, *read.values(), meant_by("vllm", named)]
    valid = [
        ids
        for ids in every
        if len(set(ids)) == 3 and 0 <= min(ids) <= max(ids) < target.num_hidden_layers
    ]
    return [ids for place, ids in enumerate(valid) if ids not in valid[:place]]


def decode(files: DraftFiles, run: Run) -> tuple[Decoded | None, list[Finding]]:
    """Greedy answers to a few built-in questions: the acceptance length, and what it gives away.

    Where it is low, the other layers that the draft may have been made for are tried too.
    """
    asked, config = run.config.check, run.config
    try:
        draft = portable_draft(files, run).to(run.device).eval()
        choices = candidates(files, run.target_config)
        layers = sorted({i for ids in choices for i in ids})
        run.let_go_of_target()
        target = HFTarget(run.spec.with_layers(layers), run.device)
        messages = [
            [{"role": "user", "content": question}] for question in QUESTIONS[: asked.num_prompts]
        ]
        encoded = [
            run.chat.encode_prompt(with_system(m, config.data.system_prompt)) for m in messages
        ]
        prompts = [torch.tensor(ids, device=run.device) for ids in encoded]
    except (ConfigError, RunError, torch.OutOfMemoryError) as error:
        return None, [Finding(NOTE, (), f"no prompt was decoded: {error}")]
    decoded = Decoded(len(prompts), asked.max_new_tokens, config.eval.draft_length, {})
    for ids in choices:
        target.aux_layer_ids = ids
        steps = decoded.draft_length
        answers = speculate(target, draft, prompts, steps, 1, steps + 1, asked.max_new_tokens)
        rounds = sum(len(answer.emitted) for answer in answers)
        length = sum(sum(answer.emitted) for answer in answers) / max(rounds, 1)
        decoded.acceptance_length[",".join(map(str, ids))] = length
        if length >= CLEARLY:
            break
    return decoded, list(judge(decoded))


def judge(decoded: Decoded) -> Iterator[Finding]:
    """What the acceptance lengths say; the first is that of the layers which the draft names."""
    (named, length), *others = decoded.acceptance_length.items()
    best, most = max(others, key=lambda pair: pair[1], default=(named, length))
    if most > 1.1 * length and most > LITTLE:
        sentence = f"fed by layers {best} it accepts {most:.2f} tokens a round, by the named {named} only {length:.2f}"
        yield Finding(WRONG, ALL, sentence)
    elif length == 1:
        sentence = (
            "not one draft was accepted (acceptance length exactly 1.0): the draft of another target or other weights "
            "of it, other layers than it was trained on, a wrong d2t, or an untrained draft"
        )
        yield Finding(WRONG, ALL, sentence)
    elif length < LITTLE:
        yield Finding(
            WARNING,
            ALL,
            f"acceptance length is only {length:.2f}: little trained, or on other layers or text",
        )
