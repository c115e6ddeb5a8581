"""DFlash and DSpark drafts in the engines, on the embedded target in fp32."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, soft_target_loss, spec_of

from eagle3.batch import by_step, pack, serving
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import FlashCPU
from eagle3.draft.initial import derive_config
from eagle3.engines.engine import UNSHAPED
from eagle3.engines.vllm import VLLM
from eagle3.evaluate import read_answer, walk
from eagle3.export.write import write_draft
from eagle3.target.hf import HFTarget
from engines.conftest import ask

TARGET, LAYERS, BLOCK, MASK = TINY / "target", [1, 4, 6], 5, 7
NEW_TOKENS, GREEDY = 64, UNSHAPED | {"temperature": 0.0, "stop": []}
VLLM_METRICS = ["--enable-per-request-metrics", "--per-request-spec-decode-metrics", "detailed"]


@pytest.fixture(scope="module")
def target():
    return HFTarget(spec_of(TARGET, LAYERS), torch.device("cpu"))


@pytest.fixture(scope="module")
def documents(target, tokenizer):
    """The target's own greedy answers to six prompts."""
    lines = (TINY / "eval.jsonl").read_text().splitlines()[:6]
    first = [json.loads(line)["messages"][:1] for line in lines]
    how = {"add_generation_prompt": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(messages, **how) for messages in first]
    answers = target.generate(prompts, NEW_TOKENS)
    return [read_answer(target, *pair) for pair in zip(prompts, answers, strict=True)]


def fitted(kind, target, documents):
    """A draft of two layers that knows half of these answers by heart, in weights that bf16 has."""
    shape = asdict(derive_config(target.config, target.config.vocab_size))
    sizes = {"num_hidden_layers": 2, "block_size": BLOCK, "mask_token_id": MASK}
    sizes |= {"markov_rank": 16} if kind is DSparkConfig else {}
    torch.manual_seed(0)
    t2d = torch.ones(target.config.vocab_size, dtype=torch.bool)
    d2t = torch.zeros(target.config.vocab_size, dtype=torch.int64)
    draft = kind(**shape | sizes).build(FlashCPU, t2d, d2t)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=2e-3)
    batch = pack(documents[::2], t2d, BLOCK - kind.drafts_from, serving)
    for _ in range(60):
        loss = measure(draft, target, batch).loss / batch.normaliser
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(parameter.bfloat16())
    return draft


def measure(draft, target, batch):
    features = batch.features
    hidden = draft.unroll(target.embedding, features.aux_hidden_states, batch)
    return soft_target_loss()(draft, hidden, features, batch, target.head)


def counted(draft, target, documents):
    """By the walk of the evaluation, an Answer for each document."""
    steps = draft.config.block_size - draft.config.drafts_from
    batch = pack(documents, draft.t2d, steps, serving)
    correct = by_step(batch, measure(draft, target, batch).correct.double())
    return walk(documents, correct.split(batch.documents.lengths), steps)


def config_of(draft):
    """config.json as both engines read it; they count the layers whose outputs are read from 0."""
    shape, layer_ids = asdict(draft.config), {"target_layer_ids": LAYERS}
    kind = type(draft.config)
    config = {"architectures": [kind.architecture], "model_type": "qwen3", "torch_dtype": "bfloat16"}
    config |= shape | layer_ids | {"tie_word_embeddings": False, "attention_bias": False}
    if kind is DSparkConfig:
        return config | {
            "markov_head_type": "vanilla", "enable_confidence_head": True,
            "confidence_head_with_markov": True, "sample_from_anchor": True,
        }  # fmt: skip
    return config | {"dflash_config": {"mask_token_id": MASK, **layer_ids}}


@pytest.fixture(scope="module", params=[DFlashConfig, DSparkConfig])
def draft(request, target, documents):
    return fitted(request.param, target, documents)


@pytest.fixture(scope="module")
def folder(draft, tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "draft"
    write_draft(draft, folder, config_of(draft))
    return folder


@pytest.mark.parametrize("draft", [DFlashConfig], indirect=True)
def test_vllm_accepts_what_the_evaluation_counts(serve, draft, folder, target, documents):
    steps = BLOCK - 1
    drafting = {"method": "dflash", "model": str(folder), "num_speculative_tokens": steps}
    expected, engine = counted(draft, target, documents), VLLM()
    with serve("vllm", TARGET, *VLLM_METRICS, "--speculative-config", json.dumps(drafting)) as up:
        for document, own in zip(documents, expected, strict=True):
            prompt = document.input_ids[~document.loss_mask].tolist()
            body = engine.request_body(prompt, NEW_TOKENS, GREEDY)
            answer = engine.read_reply(ask(up, engine.generate_path, body | {"model": str(TARGET)}), steps)
            assert (answer.ids, answer.rounds) == (own.ids, own.rounds)
            assert answer.accepted_at == own.accepted_at
