"""Answers of many prompts side by side: each is what the model generates alone."""

import pytest
import torch
from conftest import SHAPE, spec_of
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from eagle3.target import packed_attention
from eagle3.target.generation import Sampler, Text
from eagle3.target.hf import HFTarget

LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 16}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=8),
    "gemma3-window": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=8),
    "gpt2-learned-positions": GPT2Config(**SHAPE, n_inner=128),
    "nemotron-attends-seldom": NemotronHConfig(**SHAPE, layers_block_type=["mlp", "attention"] * 4),
    "qwen3.5-recurrent": Qwen3_5TextConfig(**SHAPE, **LINEAR),
}
ENDS = set(range(0, 96, 9))  # so that some answers end early
SAMPLING = {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 3}


@pytest.fixture(scope="module", params=FAMILIES)
def target(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(folder)
    target = HFTarget(spec_of(folder), torch.device("cpu"))
    target.eos_token_ids = ENDS
    assert target.keeps_rows == (request.param != "qwen3.5-recurrent")
    return target


def prompts(count=11):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(96, (n,), generator=generator).tolist() for n in lengths]


def generated_alone(target, prompt, length):
    """What whole passes over the text so far give, token by token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + length and (len(ids) == len(prompt) or ids[-1] not in ENDS):
        ids.append(int(target.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_greedy_answers_equal_those_without_a_cache(target, monkeypatch):
    monkeypatch.setattr(packed_attention, "NEIGHBOURS", 3)  # rows, so that there are several groups
    asked = prompts(7)
    expected = [generated_alone(target, prompt, 70) for prompt in asked]
    assert len({len(answer) for answer in expected}) > 1, "some end early"
    assert target.generate(asked, 70) == expected
    for size in (1, 3):
        waiting = iter(enumerate(asked))
        found = dict(target.answer(lambda it=waiting: next(it, None), size, 70))
        assert [found[key] for key in range(len(asked))] == expected


def test_a_sample_depends_on_its_prompt_and_the_seed_alone(target):
    asked = prompts()
    together = target.generate(asked, 12, SAMPLING)
    assert together == [target.generate([prompt], 12, SAMPLING)[0] for prompt in asked]
    assert together[::-1] == target.generate(asked[::-1], 12, SAMPLING)
    assert together != target.generate(asked, 12, SAMPLING | {"seed": 4})


def test_a_text_that_ends_leaves_its_place_to_the_next(target):
    asked, passes, answers = dict(enumerate(prompts())), [], {}
    waiting = list(asked)

    def take():
        return (waiting[-1], asked[waiting.pop()]) if waiting else None

    for key, ids in target.answer(take, 3, 40, count=passes.append):
        answers[key] = ids
        if len(answers) < 5:  # an answer may bring a new prompt, as the next turn of a dialogue
            turn = len(asked)
            asked[turn] = asked[key] + ids + [5]
            waiting.append(turn)
    assert answers == {key: target.generate([prompt], 40)[0] for key, prompt in asked.items()}
    tokens = sum(map(len, answers.values()))
    assert len(answers) == 15 and max(passes) <= 3
    assert sum(passes) == tokens, "what is computed for texts that have ended does not count"
    if target.keeps_rows:
        assert len(passes) < 0.6 * tokens, "places are seldom empty"


def test_an_answer_ends_with_the_context(target):
    lengths = [len(ids) for ids in target.generate([[7] * 255, [7] * 254], 70)]
    assert lengths[0] == 1 and lengths[1] <= 2


def test_what_is_drawn_is_distributed_as_asked():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    options = {"temperature": 2.0, "top_p": 1.0, "top_k": 0}
    for changed in ({}, {"top_k": 2}, {"top_p": 0.6}):
        kept = {"top_k": [0, 2], "top_p": [0, 2]}.get(next(iter(changed), None), [0, 1, 2, 3])
        right = torch.zeros(4)
        right[kept] = (logits[0, kept] / 2).softmax(-1)
        sampler = Sampler(options | changed | {"seed": 0})
        texts = [Text(None, [n]) for n in range(4000)]
        drawn = sampler(logits.expand(4000, -1), texts)
        shares = drawn.bincount(minlength=4) / 4000
        assert shares[right == 0].sum() == 0
        torch.testing.assert_close(shares, right, atol=0.03, rtol=0)
