"""The embedded default: the committed target, its tokenizer and its conversations fit together."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, turns
from transformers import AutoModelForCausalLM

from dev.tiny.answers import EVAL_PROMPT_TOKENS, generate
from dev.tiny.corpus import HELD_OUT
from dev.tiny.make import read_rows
from dev.tiny.tokenizer import encode
from eagle3.engines.engine import is_loop

SAID = ("What does `f` return?", "It returns `x_1`.", "And `g`?", "It returns nothing.")
MESSAGES = [{"role": "system", "content": "Be brief."}, *turns(*SAID)]


@pytest.fixture(scope="module")
def conversations():
    return read_rows(TINY / "conversations.jsonl")


def prompt_of(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    "text", [Path(__file__).read_text(), "\tif x:\r\n\n   y = 1234  # naïve ☃\n", "__init__(  )"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_marks_what_the_assistant_says(tokenizer):
    """Indentation is a token, and digits stand alone."""
    assert [len(tokenizer(" " * n)["input_ids"]) for n in (4, 8, 12)] == [1, 1, 1]
    assert tokenizer.tokenize("1234") == list("1234") and tokenizer.eos_token == "<|eot_id|>"
    ids, mask = encode(tokenizer, MESSAGES)
    said = tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])
    assert said == "It returns `x_1`.<|eot_id|>It returns nothing.<|eot_id|>"
    start = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    assert tokenizer.decode(ids).startswith(start)
    prompt = prompt_of(tokenizer, MESSAGES[:-1])
    assert ids[: len(prompt)] == prompt


def test_the_questions_are_a_fair_mix_of_held_out_modules(tokenizer, conversations):
    questions = read_rows(TINY / "eval.jsonl")
    assert HELD_OUT.isdisjoint(row["id"].rsplit("-", 1)[0] for row in conversations)
    assert {row["module"] for row in questions} <= HELD_OUT and len(questions) >= 96
    assert len({row["kind"] for row in questions[:8]}) == 8
    assert all(row["messages"][-1]["role"] == "user" for row in questions)
    lengths = [len(prompt_of(tokenizer, row["messages"])) for row in questions]
    assert max(lengths) <= EVAL_PROMPT_TOKENS


@pytest.mark.runs
def test_training_answers_end_and_do_not_loop(tokenizer, conversations):
    messages = [message for row in conversations for message in row["messages"]]
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert not any(is_loop(ids) for ids in tokenizer(answers)["input_ids"])
    assert all(row["messages"][-1]["role"] == "assistant" for row in conversations)
    assert {row["temperature"] for row in conversations} == {0.0, 0.7, 1.0}
    tokens = sum(len(encode(tokenizer, row["messages"])[0]) for row in conversations)
    assert 500_000 < tokens < 900_000


def test_the_target_is_a_small_llama_whose_greedy_answers_are_the_committed(
    tokenizer, conversations
):
    model = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32).eval()
    config = model.config
    assert config.architectures == ["LlamaForCausalLM"]
    sizes = config.num_hidden_layers, config.hidden_size, config.vocab_size
    assert sizes == (10, 256, 2048) and not model.generation_config.do_sample
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert 7.5e6 < sum(p.numel() for p in model.parameters()) < 8.2e6
    assert (TINY / "target" / "model.safetensors").stat().st_size < 20e6
    assert (TINY / "conversations.jsonl").stat().st_size < 4e6
    rows = [r for r in conversations if r["temperature"] == 0 and len(r["messages"]) == 2][:6]
    prompts = [prompt_of(tokenizer, row["messages"][:1]) for row in rows]
    answers = generate(model, prompts, [0.0] * len(rows), 192, None)
    expected = [row["messages"][1]["content"] for row in rows]
    assert [tokenizer.decode(ids[:-1]) for ids in answers] == expected


def test_a_loop_is_three_equal_blocks_of_24_tokens_in_all():
    assert is_loop([1, 2, 3] * 8) and is_loop([5, 6] + list(range(48)) * 3)
    for ids in ([1, 2, 3] * 7, list(range(49)) * 3, list(range(24)) * 2):
        assert not is_loop(ids)
