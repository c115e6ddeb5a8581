"""SGLang with the stand-in for its kernels answers as transformers does, for every family that the
stand-in serves.
"""

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Lengths differ, so that requests of one batch are told apart."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(6, 2048, (length,), generator=generator).tolist() for length in (5, 17, 40)
    ]


@torch.inference_mode()
def test_greedy_answers_equal_transformers(random_target, serve_sglang, prompts):
    model = AutoModelForCausalLM.from_pretrained(random_target, dtype="float32")
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        for prompt in prompts
    ]
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    with serve_sglang(random_target) as server:
        body = {"input_ids": prompts, "sampling_params": sampling}
        response = httpx.post(f"{server.url}/generate", json=body, timeout=120, trust_env=False)
    answers = [answer["output_ids"] for answer in response.json()]
    assert answers == [ids[0, len(prompt) :].tolist() for ids, prompt in zip(expected, prompts)]
    assert len({tuple(ids) for ids in answers}) == len(prompts), "equal answers would show nothing"
