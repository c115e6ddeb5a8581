"""The target's own answers to held-out prompts, with their Features: made once, so that evaluation is exact.

An artefact is a folder of parts (one generation batch each, so an interrupted call goes on where it stopped); a part
holds flat tensors of its documents, in order.
"""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from eagle3.data.packing import pack
from eagle3.data.supervision import serving
from eagle3.target.features import Features
from eagle3.target.hf import HFTarget


@dataclass
class Answer:
    """A prompt and the target's greedy answer: `input_ids` [n], of which the first `prompt_length` are the prompt."""

    id: str
    input_ids: torch.Tensor
    prompt_length: int
    features: Features

    @property
    def loss_mask(self) -> torch.Tensor:
        return torch.arange(len(self.input_ids)) >= self.prompt_length


def write(folder: Path, target: HFTarget, prompts: list[dict], max_new_tokens: int, batch_size: int) -> dict:
    """Answer `prompts` ({"id", "input_ids"}) greedily, shortest first; returns the facts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    shortened = answered = 0
    for number, indices in enumerate(track(batches, description="generate", transient=True)):
        path = folder / f"part_{number:05d}.safetensors"
        if not path.exists():
            tensors = answer_batch(target, [prompts[i]["input_ids"] for i in indices], max_new_tokens)
            tensors["index"] = torch.tensor(indices)
            save_file(tensors, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        lengths = load_file(path)
        shortened += int(lengths["shortened"].sum())
        answered += int((lengths["lengths"] - lengths["prompt_lengths"]).sum())
    return {"answers": len(prompts), "answer_tokens": answered, "shortened_at_ties": shortened}


def answer_batch(target: HFTarget, prompts: list[list[int]], max_new_tokens: int) -> dict[str, torch.Tensor]:
    """Flat tensors of one part. An answer ends before the first token that is not the packed pass's argmax.

    Batched generation and the packed pass round differently, so a near tie may go either way; cutting there (counted
    as shortened) leaves text on which the walk over anchors is exact.
    """
    documents = [
        torch.tensor(prompt + answer)
        for prompt, answer in zip(prompts, sample(target, prompts, max_new_tokens, GREEDY), strict=True)
    ]
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    parts: dict[str, list[torch.Tensor]] = {f.name: [] for f in fields(Features)} | {"input_ids": []}
    lengths, shortened = [], []
    for document, prompt in zip(documents, prompts, strict=True):
        mask = torch.arange(len(document)) >= len(prompt)
        batch = pack([(0, document, mask)], everything, 1, serving).to(target.device)
        features = target(batch).to(torch.device("cpu"))
        wrong = (features.argmax[:-1] != document[len(prompt) + 1 :]).nonzero()
        keep = len(document) if len(wrong) == 0 else len(prompt) + int(wrong[0]) + 1
        parts["input_ids"].append(document[:keep])
        parts["aux_hidden_states"].append(features.aux_hidden_states[:keep])
        for name in ("last_hidden_states", "argmax", "logsumexp"):
            parts[name].append(getattr(features, name)[: keep - len(prompt)])
        lengths.append(keep)
        shortened.append(keep < len(document))
    flat = {name: torch.cat(tensors).contiguous() for name, tensors in parts.items()}
    flat["lengths"], flat["prompt_lengths"] = torch.tensor(lengths), torch.tensor([len(p) for p in prompts])
    return flat | {"shortened": torch.tensor(shortened)}


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def sample(
    target: HFTarget, prompts: list[list[int]], max_new_tokens: int, sampling: dict[str, Any]
) -> list[list[int]]:
    """Answers to a batch of prompts; the end-of-turn token is kept where the target produced it.

    `sampling`: GREEDY, or what transformers' `generate` takes in its place.
    """
    eos = sorted(target.eos_token_ids)
    width = max(map(len, prompts))
    pad = eos[0] if eos else 0
    output = target.generate(
        torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=target.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
        **sampling,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in target.eos_token_ids), len(row))
        answers.append(row[:end])
    return answers


def load(folder: Path, prompts: list[dict]) -> list[Answer]:
    """The answers of an artefact, in order of their prompts."""
    answers: dict[int, Answer] = {}
    for path in sorted(folder.glob("part_*.safetensors")):
        tensors = load_file(path)
        lengths, prompt_lengths = tensors["lengths"].tolist(), tensors["prompt_lengths"].tolist()
        teachers = [n - p for n, p in zip(lengths, prompt_lengths, strict=True)]
        ids, aux = tensors["input_ids"].split(lengths), tensors["aux_hidden_states"].split(lengths)
        last, argmax, lse = (tensors[k].split(teachers) for k in ("last_hidden_states", "argmax", "logsumexp"))
        for i, index in enumerate(tensors["index"].tolist()):
            features = Features(aux[i], last[i], argmax[i], lse[i])
            answers[index] = Answer(prompts[index]["id"], ids[i], prompt_lengths[i], features)
    assert sorted(answers) == list(range(len(prompts))), "a generated artefact must answer every prompt"
    return [answers[index] for index in sorted(answers)]
