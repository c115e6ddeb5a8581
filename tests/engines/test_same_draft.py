"""The same trained draft on the embedded target, greedy and in fp32, prompt by prompt: EAGLE-3, 3.1
and 3.1 that reads five layers.

Every engine gives the same answer and accepts the same drafts as the built-in decoder.
"""

import json

import pytest
import torch
from conftest import TINY, spec_of

from eagle3.decode.speculate import speculate
from eagle3.draft.flash import FlashCPU
from eagle3.engines.engine import UNSHAPED, command_line
from eagle3.engines.sglang import SGLang
from eagle3.engines.vllm import VLLM
from eagle3.export.rules import read_draft
from eagle3.export.write import portable_config, speculators_config, write_draft
from eagle3.target.hf import HFTarget
from engines.conftest import ask, train_draft

TARGET, LAYERS, FIVE = TINY / "target", [1, 4, 6], [0, 2, 4, 6, 8]
STEPS, NEW_TOKENS, GREEDY = 3, 64, UNSHAPED | {"temperature": 0.0, "stop": []}
CHAIN, TREE = (STEPS, 1, STEPS + 1), (4, 3, 10)
VLLM_METRICS = ["--enable-per-request-metrics", "--per-request-spec-decode-metrics", "detailed"]


@pytest.fixture(scope="module")
def prompts(tokenizer):
    lines = (TINY / "eval.jsonl").read_text().splitlines()[:6]
    first = [json.loads(line)["messages"][:1] for line in lines]
    how = {"add_generation_prompt": True, "return_dict": False}
    return [tokenizer.apply_chat_template(messages, **how) for messages in first]


@pytest.fixture(scope="module", params=["eagle3", "eagle31", "eagle31 of five layers"])
def trained(request, tmp_path_factory):
    """(a draft's folder, the target with the layers that it reads)"""
    kind, _, more = request.param.partition(" ")
    spec = spec_of(TARGET, FIVE if more else LAYERS)
    asked = f"draft={kind}", f"model.aux_layer_ids={spec.aux_layer_ids}".replace(" ", "")
    return train_draft(tmp_path_factory.mktemp("trained"), *asked), spec


@pytest.fixture(scope="module")
def generations(trained, prompts):
    """By tree, the built-in decoder's Generations, a prompt after the other."""
    trained_draft, spec = trained
    target, draft = HFTarget(spec, torch.device("cpu")), read_draft(trained_draft, FlashCPU, spec)
    made = {}
    for tree in (CHAIN, TREE):
        decoded = [speculate(target, draft, [torch.tensor(p)], *tree, NEW_TOKENS) for p in prompts]
        made[tree] = [generation for (generation,) in decoded]
    rounds = [count for generation in made[CHAIN] for count in generation.accepted]
    right = sum(count == STEPS for count in rounds)
    assert 0 < right < len(rounds), "a draft that is always wrong or right shows nothing"
    assert sum(len(g.accepted) for g in made[TREE]) < len(rounds)
    return made


def assert_same(engine, server, prompts, expected, steps=STEPS, **more):
    for prompt, generation in zip(prompts, expected, strict=True):
        body = engine.request_body(prompt, NEW_TOKENS, GREEDY) | more
        answer = engine.read_reply(ask(server, engine.generate_path, body), steps)
        accepted = generation.accepted
        assert answer.ids == generation.ids and answer.rounds == len(accepted)
        at = [sum(count >= place for count in accepted) for place in range(1, steps + 1)]
        assert answer.accepted_at == at


@pytest.mark.parametrize("tree", [CHAIN, TREE])
def test_sglang_accepts_what_the_built_in_decoder_accepts(
    serve, trained, prompts, generations, tree
):
    drafting = command_line(SGLang().draft_options(str(trained[0]), "eagle3", tree))
    with serve("sglang", TARGET, "--enable-metrics", *drafting) as server:
        assert_same(SGLang(), server, prompts, generations[tree], tree[0])


@pytest.mark.parametrize("form", ["portable", "speculators"])
def test_vllm_accepts_what_the_built_in_decoder_accepts(
    serve, trained, prompts, generations, form, tmp_path
):
    """It finds the target of the speculators form by itself."""
    model, (trained_draft, spec) = TARGET, trained
    drafting = command_line(VLLM().draft_options(str(trained_draft), "eagle3", CHAIN))
    if form == "speculators":
        model, drafting = tmp_path / "form", []
        draft = read_draft(trained_draft, FlashCPU, spec)
        portable = portable_config(draft.config, spec, str(TARGET), STEPS)
        write_draft(draft, model, speculators_config(portable, spec))
    with serve("vllm", model, *VLLM_METRICS, *drafting) as server:
        assert_same(VLLM(), server, prompts, generations[CHAIN], model=str(model))
