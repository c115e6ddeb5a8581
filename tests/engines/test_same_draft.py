"""The same trained draft on the embedded target, greedy and in fp32, prompt by prompt.

Every engine gives the same answer and accepts the same drafts as the built-in decoder.
"""

import json

import httpx
import pytest
import torch
from conftest import TINY, spec_of

from eagle3.decode.speculate import speculate
from eagle3.draft.flash import FlashCPU
from eagle3.engines.engine import Answer, command_line
from eagle3.engines.sglang import SGLang
from eagle3.engines.vllm import VLLM
from eagle3.export.rules import read_draft
from eagle3.export.write import portable_config, speculators_config, write_draft
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
    spec = spec_of(TARGET, LAYERS)
    target, draft = HFTarget(spec, torch.device("cpu")), read_draft(trained_draft, FlashCPU, spec)

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


def ask(engine, server, prompts: list[list[int]], steps: int, **more) -> list[Answer]:
    answers = []
    for prompt in prompts:
        body = engine.request_body(prompt, NEW_TOKENS, (), 0.0) | more
        url = server.url + engine.generate_path
        response = httpx.post(url, json=body, timeout=120, trust_env=False)
        assert response.status_code == 200, response.text
        answers.append(engine.read_reply(response.json(), steps))
    return answers


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
    drafting = command_line(SGLang().draft_options(str(trained_draft), (STEPS, 1, STEPS + 1)))
    with serve_sglang(TARGET, "--enable-metrics", *drafting) as server:
        assert_same(ask(SGLang(), server, prompts, STEPS), chains)


def test_a_tree_in_sglang_accepts_what_the_built_in_tree_accepts(
    serve_sglang, trained_draft, prompts, answer, chains
):
    drafting = command_line(SGLang().draft_options(str(trained_draft), TREE))
    with serve_sglang(TARGET, "--enable-metrics", *drafting) as server:
        trees = answer(*TREE)
        assert_same(ask(SGLang(), server, prompts, TREE[0]), trees, TREE[0])
    assert sum(len(tree.accepted) for tree in trees) < sum(len(chain.accepted) for chain in chains)


METRICS = (
    "--enable-per-request-metrics", "--per-request-spec-decode-metrics", "detailed",
)  # fmt: skip


def test_vllm_accepts_what_the_built_in_decoder_accepts(serve_vllm, trained_draft, prompts, chains):
    drafting = command_line(VLLM().draft_options(str(trained_draft), (STEPS, 1, STEPS + 1)))
    with serve_vllm(TARGET, *METRICS, *drafting) as server:
        assert_same(ask(VLLM(), server, prompts, STEPS, model=str(TARGET)), chains)


def test_vllm_finds_the_target_of_the_speculators_form(
    serve_vllm, trained_draft, prompts, chains, tmp_path
):
    folder, spec = tmp_path / "form", spec_of(TARGET, LAYERS)
    draft = read_draft(trained_draft, FlashCPU, spec)
    portable = portable_config(draft.config, spec, str(TARGET), STEPS)
    write_draft(draft, folder, speculators_config(portable, spec))
    with serve_vllm(folder, *METRICS) as server:
        assert_same(ask(VLLM(), server, prompts, STEPS, model=str(folder)), chains)
