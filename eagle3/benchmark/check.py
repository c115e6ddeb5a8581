"""The stage `check`: what is wrong with any EAGLE3 draft, by engine; needs no data or training."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from eagle3.config import Check
from eagle3.data.chat import Chat, with_system
from eagle3.decode.speculate import speculate
from eagle3.draft.attention import Backend
from eagle3.errors import ConfigError, RunError
from eagle3.export.read import DraftFiles, locate, named_layers, read_any
from eagle3.export.rules import ALL, ENGINES, Finding, find_all, read_draft, readings
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import HFTarget
from eagle3.target.layers import meant_by
from eagle3.target.spec import TargetSpec

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
CLEARLY = 1.5  # an acceptance length that a draft fed with the wrong layers was never seen to reach
LITTLE = 1.2
CANNOT = (ConfigError, RunError, torch.OutOfMemoryError)
console = Console(markup=False, soft_wrap=True)


def check(
    section: Check,
    draft_path: str | None,
    target: TargetHandle,
    chat: Chat | None,
    system_prompt: str | None,
    attention: Backend,
    draft_length: int,
    run_dir: Path,
) -> None:
    """Print and write (check.json) what is found about a draft. RunError has all that is wrong."""
    folder = locate(draft_path) if draft_path else run_dir / "draft"
    if not folder.exists():
        raise ConfigError(f"no draft to check at {folder}; set draft_path=<folder or hub id>")
    files = read_any(folder)
    findings = [*find_all(files, target.spec), *judge_embedding(files, target)]
    lengths = {}
    if section.decode:
        try:
            if chat is None:
                raise RunError("the target has no tokenizer")
            turns = [{"role": "user", "content": text} for text in QUESTIONS[: section.num_prompts]]
            tokens = [chat.encode_prompt(with_system([turn], system_prompt)) for turn in turns]
            lengths = decode(files, target, attention, tokens, draft_length, section.max_new_tokens)
            findings += judge(lengths)
        except CANNOT as error:
            findings.append(Finding((), f"no prompt was decoded: {error}", "note"))
    asked = set(section.engines)
    findings = [found for found in findings if not found.engines or asked & {*found.engines}]
    findings.sort(key=lambda finding: ("wrong", "warning", "note").index(finding.severity))
    decoded = {"num_prompts": section.num_prompts, "max_new_tokens": section.max_new_tokens}
    decoded |= {"draft_length": draft_length, "acceptance_length": lengths}
    content = {
        "draft": draft_path or str(folder),
        "target": target.spec.path,
        "weights": files.weights,
        "speculators_form": files.is_speculators,
        "engines": section.engines,
        "layers": readings(files, target.spec.num_layers),
        "findings": [asdict(finding) for finding in findings],
        "decoded": decoded if lengths else None,
    }
    (run_dir / "check.json").write_text(json.dumps(content, indent=1))
    errors = []
    for finding in findings:
        engines = ", ".join(ENGINES[name] for name in finding.engines if name in asked)
        sentence = f"{engines}: {finding.sentence}" if engines else finding.sentence
        if finding.severity == "wrong":
            errors.append(sentence)
        else:
            console.print(f"check: {finding.severity}: {sentence}")
    if not findings:
        console.print("check: nothing found that matters in these engines")
    for layers, length in lengths.items():
        console.print(f"check: acceptance length {length:.2f}, fed by layers {layers}")
    if errors:
        raise RunError("\nerror: ".join(errors))  # run.py puts the first `error: `


def judge_embedding(files: DraftFiles, target: TargetHandle) -> Iterator[Finding]:
    """Of an embedding in the file; SGLang and TensorRT-LLM take the target's all the same."""
    name = "embed_tokens.weight"
    shipped, shape = files.tensors.get(name), files.shape
    if shape.target_hidden_size != shape.hidden_size:
        if shipped is None:
            yield Finding(ALL, f"its hidden_size is not the target's: it needs its own {name}")
    elif shipped is not None:
        try:
            embedding = target.load_weights().embedding.to("cpu", torch.bfloat16)
        except CANNOT as error:
            yield Finding(ALL, f"{name} was not compared with the target's: {error}", "note")
            return
        rows = len(shipped)
        if shipped.shape == embedding.shape:
            # Rounding either to bf16 is no difference.
            close = torch.isclose(shipped.bfloat16(), embedding, rtol=2**-7, atol=1e-6)
            rows = int((~close).any(1).sum())
        if rows:
            sentence = f"{name} differs from the target's in {rows:,} of {len(shipped):,} rows"
            yield Finding(ALL, f"{sentence}: vLLM and the official code draft with it, others not")


def candidates(files: DraftFiles, target: TargetSpec) -> list[list[int]]:
    """Layers it may have been made for: first those that it names, then how else they are read."""
    count = target.num_layers
    read = readings(files, count)
    named = named_layers(files.config) or read["official"]
    different = dict.fromkeys(map(tuple, (named, *read.values(), meant_by("vllm", named))))
    return [[*ids] for ids in different if len(set(ids)) == 3 and {*ids} <= {*range(count)}]


def decode(
    files: DraftFiles,
    target: TargetHandle,
    attention: Backend,
    prompts: list[list[int]],
    draft_length: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Acceptance of greedy chains by the layers fed (`1,15,28`), all candidates if it is low."""
    choices = candidates(files, target.spec)
    # Which layers are right is what decoding shows; and SGLang too drafts with the target's
    # embedding, whatever the file has.
    own = {name: t for name, t in files.tensors.items() if name != "embed_tokens.weight"}
    spec = target.spec.with_layers(named_layers(files.config) or target.spec.aux_layer_ids)
    draft = read_draft(replace(files, tensors=own), attention, spec).to(target.device).eval()
    target.close()  # two at once may not fit
    # One target reads the layers of all choices, so that it is loaded once.
    layers = sorted({layer for ids in choices for layer in ids})
    model = HFTarget(target.spec.with_layers(layers), target.device)
    model.check_decoding()
    inputs = [torch.tensor(prompt, device=target.device) for prompt in prompts]
    tree, lengths = (draft_length, 1, draft_length + 1), {}
    for ids in choices:
        model.aux_layer_ids = ids
        answers = speculate(model, draft, inputs, *tree, max_new_tokens)
        rounds = sum(len(answer.emitted) for answer in answers)
        length = sum(sum(answer.emitted) for answer in answers) / max(rounds, 1)
        lengths[",".join(map(str, ids))] = length
        if length >= CLEARLY:
            break
    return lengths


def judge(lengths: dict[str, float]) -> Iterator[Finding]:
    """What the acceptance lengths say; the first is that of the layers which the draft names."""
    (named, length), *others = lengths.items()
    best, most = max(others, key=lambda pair: pair[1], default=(named, length))
    if most > 1.1 * length and most > LITTLE:
        sentence = f"fed by layers {best} it accepts {most:.2f} tokens a round"
        yield Finding(ALL, f"{sentence}, by the named {named} only {length:.2f}")
    elif length == 1:
        # A draft that is merely poor is right now and then: none at all is a mistake somewhere.
        sentence = "no draft was accepted (acceptance length exactly 1.0): it is untrained, or of"
        yield Finding(ALL, f"{sentence} another target, other layers or a wrong d2t")
    elif length < LITTLE:
        yield Finding(ALL, f"acceptance length is only {length:.2f}: little trained", "warning")
