"""The embedded default: the committed target, its tokenizer and its conversations fit together."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dev.tiny.answers import EVAL_PROMPT_TOKENS, generate
from dev.tiny.corpus import HELD_OUT
from dev.tiny.make import read_rows
from dev.tiny.tokenizer import encode
from eagle3 import tiny
from eagle3.evaluate import is_loop

HERE = Path(tiny.__path__[0])
TARGET = HERE / "target"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does `f` return?"},
    {"role": "assistant", "content": "It returns `x_1`."},
    {"role": "user", "content": "And `g`?"},
    {"role": "assistant", "content": "It returns nothing."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def conversations():
    return read_rows(HERE / "conversations.jsonl")


@pytest.fixture(scope="module")
def questions():
    return read_rows(HERE / "eval.jsonl")


def test_the_target_is_a_small_llama(model):
    config = json.loads((TARGET / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (
        10,
        256,
        2048,
    )
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert 7.5e6 < sum(p.numel() for p in model.parameters()) < 8.2e6
    assert not model.generation_config.do_sample


def test_files_stay_small():
    assert (TARGET / "model.safetensors").stat().st_size < 20e6
    assert (HERE / "conversations.jsonl").stat().st_size < 4e6


@pytest.mark.parametrize(
    "text", [Path(__file__).read_text(), "\tif x:\r\n\n   y = 1234  # naïve ☃\n", "__init__(  )"]
)
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_indentation_is_a_token_and_digits_stand_alone(tokenizer):
    assert [len(tokenizer(" " * n)["input_ids"]) for n in (4, 8, 12)] == [1, 1, 1]
    assert tokenizer.tokenize("1234") == list("1234")


def test_the_template_marks_what_the_assistant_says(tokenizer):
    ids, mask = encode(tokenizer, MESSAGES)
    said = tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])
    assert said == "It returns `x_1`.<|eot_id|>It returns nothing.<|eot_id|>"
    text = tokenizer.decode(ids)
    assert text.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    )
    prompt = tokenizer.apply_chat_template(
        MESSAGES[:-1], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    assert tokenizer.eos_token == "<|eot_id|>"


def test_no_training_conversation_is_about_a_held_out_module(conversations, questions):
    assert HELD_OUT.isdisjoint(row["id"].rsplit("-", 1)[0] for row in conversations)
    assert {row["module"] for row in questions} <= HELD_OUT


def test_the_questions_are_a_fair_mix(tokenizer, questions):
    assert len(questions) >= 96
    assert len({row["kind"] for row in questions[:8]}) == 8
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=False
        )
        for row in questions
    ]
    assert all(row["messages"][-1]["role"] == "user" for row in questions)
    assert max(map(len, prompts)) <= EVAL_PROMPT_TOKENS


def test_training_answers_end_and_do_not_loop(tokenizer, conversations):
    answers = [
        m["content"] for row in conversations for m in row["messages"] if m["role"] == "assistant"
    ]
    encoded = tokenizer(answers)["input_ids"]
    assert not any(is_loop(ids) for ids in encoded)
    assert all(row["messages"][-1]["role"] == "assistant" for row in conversations)
    assert {row["temperature"] for row in conversations} == {0.0, 0.7, 1.0}
    assert (
        500_000 < sum(len(encode(tokenizer, row["messages"])[0]) for row in conversations) < 900_000
    )


def test_greedy_decoding_gives_the_committed_answers(tokenizer, model, conversations):
    rows = [r for r in conversations if r["temperature"] == 0 and len(r["messages"]) == 2][:6]
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    answers = generate(model, prompts, [0.0] * len(rows), 192, None)
    assert [tokenizer.decode(ids[:-1]) for ids in answers] == [
        row["messages"][1]["content"] for row in rows
    ]


def test_a_loop_is_three_equal_blocks_of_24_tokens_in_all():
    assert is_loop([1, 2, 3] * 8)
    assert is_loop([5, 6] + list(range(48)) * 3)
    assert not is_loop([1, 2, 3] * 7)
    assert not is_loop(list(range(49)) * 3)
    assert not is_loop(list(range(24)) * 2)
