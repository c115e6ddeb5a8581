"""The stage `check`: what is wrong with any draft, by engine; needs no data or training."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from eagle3.benchmark.mistakes import Reading, Way, compare, mended, read_with
from eagle3.benchmark.request import Subject
from eagle3.config import Check
from eagle3.data.chat import load_tokenizer, with_system
from eagle3.draft.attention import Backend
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import pack_answers, read_answer
from eagle3.export.read import DraftFiles, named_layers, read_any
from eagle3.export.rules import ALL, ENGINES, Finding, find_all, narrow, read_draft, readings
from eagle3.loss import FrozenWeights
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import HFTarget
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
LITTLE = 1.2  # an acceptance length that a trained draft exceeds
CANNOT = (ConfigError, RunError, torch.OutOfMemoryError)
console = Console(markup=False, soft_wrap=True)


def check(
    section: Check, subject: Subject, attention: Backend, draft_length: int, run_dir: Path
) -> None:
    """Print and write (check.json) what is found about a draft. RunError has all that is wrong."""
    folder, target = subject.draft_folder, subject.target
    files = read_any(folder)
    findings = [*find_all(files, target.spec), *narrow(judge_shipped(files, target), files)]
    lengths, ways = {}, {}
    if section.decode:
        try:
            lengths, ways = decode(section, files, subject, attention, draft_length)
            findings += narrow(judge(lengths, ways), files)
            if subject.chat is None:
                reason = "the target has no chat template, or its tokenizer no offsets"
                findings.append(Finding((), f"{reason}: plain text was decoded", "note"))
        except CANNOT as error:
            # Last, as nothing else that is said here was seen in decoding.
            remedy = "set check.decode=false to judge the files alone"
            findings.append(Finding((), f"no prompt was decoded: {error}; {remedy}"))
    asked = set(section.engines)
    findings = [found for found in findings if not found.engines or asked & {*found.engines}]
    findings.sort(key=lambda finding: ("wrong", "warning", "note").index(finding.severity))
    decoded = {"num_prompts": section.num_prompts, "max_new_tokens": section.max_new_tokens}
    decoded |= {"draft_length": draft_length, "acceptance_length": lengths, "other_ways": ways}
    content = {"draft": str(folder), "target": target.spec.path, "weights": files.weights}
    content |= {"speculators_form": files.is_speculators, "engines": section.engines}
    content |= {"layers": readings(files, target.spec.num_layers), "findings": findings}
    content["decoded"] = decoded if lengths else None
    (run_dir / "check.json").write_text(json.dumps(content, indent=1, default=asdict))
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
    # The first are those that it names; how others would do matters only where something is wrong.
    for layers, length in islice(lengths.items(), None if errors else 1):
        console.print(f"check: acceptance length {length:.2f}, fed by layers {layers}")
    if errors:
        raise RunError("\nerror: ".join(errors))  # run.py puts the first `error: `


def judge_shipped(files: DraftFiles, target: TargetHandle) -> Iterator[Finding]:
    """Of an embedding in the file, and a block drafter's head; SGLang and TensorRT-LLM take the
    target's all the same.
    """
    shape, name = files.shape, "embed_tokens.weight"
    if shape.target_hidden_size != shape.hidden_size:
        if name not in files.tensors:
            yield Finding(ALL, f"its hidden_size is not the target's: it needs its own {name}")
        return
    for name in (name for name in shape.from_target if name in files.tensors):
        shipped = files.tensors[name]
        try:
            weights = target.load_weights()
        except CANNOT as error:
            yield Finding(ALL, f"{name} was not compared with the target's: {error}", "note")
            return
        rows, own = len(shipped), weights.head if name == "lm_head.weight" else weights.embedding
        if shipped.shape == own.shape:
            # Rounding either to bf16 is no difference.
            pair = shipped.bfloat16(), own.to("cpu", torch.bfloat16)
            rows = int((~torch.isclose(*pair, rtol=2**-7, atol=1e-6)).any(1).sum())
        if rows:
            sentence = f"{name} differs from the target's in {rows:,} of {len(shipped):,} rows"
            yield Finding(ALL, f"{sentence}: vLLM and the official code draft with it, others not")


def encode_questions(subject: Subject) -> list[list[int]]:
    """The ids of QUESTIONS, as plain text where there is no chat. Raises ConfigError."""
    chat, system_prompt = subject.chat, subject.data.system_prompt
    if chat is None:
        return load_tokenizer(subject.target.spec)(list(QUESTIONS)).input_ids
    turns = [{"role": "user", "content": text} for text in QUESTIONS]
    return [chat.encode_prompt(with_system([turn], system_prompt)) for turn in turns]


def candidates(files: DraftFiles, target: TargetSpec) -> list[list[int]]:
    """Layers it may have been made for: first those that it names, then how else they are read."""
    count = target.num_layers
    read = readings(files, count)
    named = named_layers(files.config) or read["official"]
    off_by_one = [[layer + shift for layer in named] for shift in (-1, 1)]
    likely = named, *read.values(), *off_by_one, target.aux_layer_ids
    different = dict.fromkeys(map(tuple, likely))
    number, known = files.shape.num_aux_hidden_states, {*range(count)}
    return [[*ids] for ids in different if len(set(ids)) == number and {*ids} <= known]


def decode(
    section: Check, files: DraftFiles, subject: Subject, attention: Backend, draft_length: int
) -> tuple[dict[str, float], dict[str, Way]]:
    """Acceptance lengths of greedy chains by the layers fed (`1,15,28`), first the named ones, and
    by words all other ways to read the draft. Raises ConfigError and RunError.
    """
    prompts, target = encode_questions(subject)[: section.num_prompts], subject.target
    choices = candidates(files, target.spec)
    if not choices:
        raise RunError("it names no layers, or others than it reads; see model.aux_layer_ids")
    most = files.shape.most_drafts or draft_length
    if draft_length > most:
        raise ConfigError(f"it drafts at most {most} tokens a round: set eval.draft_length={most}")
    # Which layers are right is what decoding shows; and SGLang too drafts with the target's
    # embedding, whatever the file has.
    own = {name: t for name, t in files.tensors.items() if name not in files.shape.from_target}
    files, spec = replace(files, tensors=own), target.spec.with_layers(choices[0])
    draft = read_draft(files, attention, spec).to(target.device).eval()
    target.close()  # two at once may not fit
    # One target reads the layers of all choices, so that it is loaded once.
    layers = sorted({layer for ids in choices for layer in ids})
    model = HFTarget(target.spec.with_layers(layers), target.device)
    answers = zip(prompts, model.generate(prompts, section.max_new_tokens), strict=True)
    documents = [read_answer(model, prompt, answer) for prompt, answer in answers]
    documents = [document for document in documents if document.loss_mask.sum() > 2]
    if not documents:
        raise RunError("the target ends its answers at once")
    any_token = torch.ones(draft.config.vocab_size, dtype=torch.bool)
    packed = pack_answers(documents, any_token, draft_length, 1)
    packed = [(batch.to(target.device), answers) for batch, answers in packed]
    frozen = FrozenWeights(model.embedding, model.head)
    columns = torch.arange(len(layers) * model.config.hidden_size).view(len(layers), -1)

    def read(draft: Draft, ids: list[int]) -> Reading:
        chosen = columns[[layers.index(layer) for layer in ids]].flatten()
        return read_with(draft, frozen, packed, chosen, draft_length)

    named, *others = choices
    as_it_is = read(draft, named)
    lengths, ways = {",".join(map(str, named)): as_it_is.acceptance_length}, {}
    for ids in others:
        words, reading = ",".join(map(str, ids)), read(draft, ids)
        lengths[words] = reading.acceptance_length
        ways[f"fed by layers {words}"] = compare(reading, as_it_is)
    theta = derive_config(target.spec.config, 1).rope_theta
    for words, changed in mended(draft, theta):
        suspect = draft.config.rope_theta != changed.rope.theta == theta
        ways[f"with {words}"] = compare(read(changed, named), as_it_is, suspect)
    return lengths, ways


def judge(lengths: dict[str, float], ways: dict[str, Way]) -> Iterator[Finding]:
    """What decoding says; the first length is that of the layers which the draft names."""
    length = next(iter(lengths.values()))
    clear = {words: way for words, way in ways.items() if way.is_clear and way.length > LITTLE}
    if clear:
        words, way = max(clear.items(), key=lambda pair: pair[1].likelier)
        sentence = f"{words} it accepts {way.length:.2f} tokens a round, as it is {length:.2f}"
        likelier = f"and finds the target's tokens {way.likelier:.2f} times as likely"
        yield Finding(ALL, f"{sentence}, {likelier}")
    elif length == 1:
        # A draft that is merely poor is right now and then: none at all is a mistake somewhere.
        sentence = "no draft was accepted (acceptance length exactly 1.0): it is untrained, or of"
        yield Finding(ALL, f"{sentence} another target, other layers or a wrong d2t")
    elif length < LITTLE:
        yield Finding(ALL, f"acceptance length is only {length:.2f}: little trained", "warning")
