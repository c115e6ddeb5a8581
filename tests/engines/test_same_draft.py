"""The same trained draft on the embedded target, greedy and in fp32: every engine gives the same
answer and accepts the same drafts as the built-in decoder, prompt by prompt.
"""

import json
from collections.abc import Callable

import httpx
import pytest
import torch
from conftest import TINY, spec_of

from eagle3.benchmark import sglang, vllm
from eagle3.benchmark.statistics import Answer
from eagle3.decode.speculate import speculate
from eagle3.draft.flash import FlashCPU
from eagle3.export.rules import read_draft
from eagle3.export.write import MadeFor, write_speculators
from eagle3.target.hf import HFTarget

TARGET = TINY / "target"
LAYERS = [1, 4, 6]
STEPS, NEW_TOKENS = 3, 64
TREE = (4, 3, 10)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    conversations = [
        json.loads(line)["messages"] for line in (TINY / "eval.jsonl").read_text().splitlines()[:6]
    ]
    return [
        tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        for messages in conversations
    ]


@pytest.fixture(scope="module")
def answer(trained_draft, prompts):
    """answer(steps, topk, verify_tokens): the built-in decoder's Generations, a prompt after the
    other.
    """
    target = HFTarget(spec_of(TARGET, LAYERS), torch.device("cpu"))
    draft = read_draft(trained_draft, FlashCPU, spec_of(TARGET, LAYERS))

    def answer(*tree: int):
        return [
            speculate(target, draft, [torch.tensor(prompt)], *tree, NEW_TOKENS)[0]
            for prompt in prompts
        ]

    return answer


@pytest.fixture(scope="module")
def chains(answer):
    generations = answer(STEPS, 1, STEPS + 1)
    rounds = sum(len(generation.accepted) for generation in generations)
    assert 0 < accepted(generations, STEPS) < rounds, (
        "a draft that is always wrong or right shows nothing"
    )
    return generations


def accepted(generations, position: int) -> int:
    return sum(count >= position for generation in generations for count in generation.accepted)


def ask(url: str, path: str, body: dict, read: Callable[[dict, int], Answer], steps: int) -> Answer:
    response = httpx.post(url + path, json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return read(response.json(), steps)


def in_sglang(server, prompts: list[list[int]], steps: int) -> list[Answer]:
    bodies = [sglang.body(0.0, prompt, NEW_TOKENS, ()) for prompt in prompts]
    return [ask(server.url, "/generate", body, sglang.read, steps) for body in bodies]


def in_vllm(server, prompts: list[list[int]], steps: int, model: str) -> list[Answer]:
    bodies = [vllm.body(0.0, prompt, NEW_TOKENS, ()) | {"model": model} for prompt in prompts]
    return [ask(server.url, "/v1/completions", body, vllm.read, steps) for body in bodies]


def assert_same(answers: list[Answer], generations, steps: int = STEPS) -> None:
    for answer, generation in zip(answers, generations, strict=True):
        assert answer.ids == generation.ids
        assert answer.rounds == len(generation.accepted)
        assert answer.accepted_at == [
            accepted([generation], position) for position in range(1, steps + 1)
        ]


def test_sglang_accepts_what_the_built_in_decoder_accepts(
    serve_sglang, trained_draft, prompts, chains
):
    drafting = sglang.drafting_options(str(trained_draft), STEPS, 1, STEPS + 1)
    with serve_sglang(TARGET, "--enable-metrics", *drafting) as server:
        assert_same(in_sglang(server, prompts, STEPS), chains)


def test_a_tree_in_sglang_accepts_what_the_built_in_tree_accepts(
    serve_sglang, trained_draft, prompts, answer, chains
):
    drafting = sglang.drafting_options(str(trained_draft), *TREE)
    with serve_sglang(TARGET, "--enable-metrics", *drafting) as server:
        trees = answer(*TREE)
        assert_same(in_sglang(server, prompts, TREE[0]), trees, TREE[0])
    assert sum(len(tree.accepted) for tree in trees) < sum(len(chain.accepted) for chain in chains)


def test_vllm_accepts_what_the_built_in_decoder_accepts(serve_vllm, trained_draft, prompts, chains):
    drafting = vllm.drafting_options(str(trained_draft), STEPS)
    with serve_vllm(TARGET, "--enable-per-request-metrics", *drafting) as server:
        assert_same(in_vllm(server, prompts, STEPS, str(TARGET)), chains)


def test_vllm_serves_the_speculators_form_without_being_told_its_target(
    serve_vllm, trained_draft, prompts, chains, tmp_path
):
    folder, draft = (
        tmp_path / "speculators",
        read_draft(trained_draft, FlashCPU, spec_of(TARGET, LAYERS)),
    )
    write_speculators(draft, folder, spec_of(TARGET, LAYERS), MadeFor(str(TARGET), STEPS))
    metrics = ("--enable-per-request-metrics", "--per-request-spec-decode-metrics", "detailed")
    with serve_vllm(folder, *metrics) as server:
        assert_same(in_vllm(server, prompts, STEPS, str(folder)), chains)
