"""Batched answers of a target in this process."""

from typing import Any

import torch

from eagle3.target.hf import HFTarget

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()
def sample(
    target: HFTarget, prompts: list[list[int]], max_new_tokens: int, sampling: dict[str, Any]
) -> list[list[int]]:
    """Answers to a batch of prompts; the end-of-turn token is kept where the target produced it.

    `sampling`: GREEDY, or what transformers' `generate` takes in its place.
    """
    eos = sorted(target.eos_token_ids)
    pad = eos[0] if eos else 0
    width = max(map(len, prompts))
    padded = [[pad] * (width - len(p)) + p for p in prompts]  # left, so that all end together
    attended = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    output = target.generate(
        torch.tensor(padded, device=target.device),
        attention_mask=torch.tensor(attended, device=target.device),
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=pad,
        **sampling,
    )
    answers = []
    for row in output[:, width:].tolist():
        ends = (i + 1 for i, token in enumerate(row) if token in target.eos_token_ids)
        answers.append(row[: next(ends, len(row))])
    return answers
