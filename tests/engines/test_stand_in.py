"""SGLang with the stand-in for its kernels answers as transformers does, for every family that the
stand-in serves.
"""

import torch
from transformers import AutoModelForCausalLM

from engines.conftest import ask


def test_greedy_answers_equal_transformers(random_target, serve):
    """Lengths differ, so that requests of one batch are told apart."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 2048, (1, n), generator=generator) for n in (5, 17, 40)]
    model = AutoModelForCausalLM.from_pretrained(random_target, dtype="float32")
    greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    whole = [model.generate(prompt, **greedy)[0] for prompt in prompts]
    expected = [ids[prompt.shape[1] :].tolist() for ids, prompt in zip(whole, prompts)]
    sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    body = {"input_ids": [prompt[0].tolist() for prompt in prompts], "sampling_params": sampling}
    with serve("sglang", random_target) as server:
        answers = [answer["output_ids"] for answer in ask(server, "/generate", body)]
    assert answers == expected
    assert len({tuple(ids) for ids in answers}) == len(prompts), "equal answers would show nothing"
