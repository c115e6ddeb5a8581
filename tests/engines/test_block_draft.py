"""DFlash and DSpark drafts in the engines, on the embedded target in fp32.

vLLM serves DFlash on CPUs: there it accepts what the evaluation counts. Of the rest, which they
serve on GPUs only, their own classes give our logits at every slot.
"""

import copy
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import TINY, soft_target_loss, spec_of
from reference import relative_error
from safetensors.torch import load_file, save_file

from eagle3.batch import Document, by_step, pack, serving
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import FlashCPU
from eagle3.draft.initial import derive_config
from eagle3.engines.engine import UNSHAPED
from eagle3.engines.vllm import VLLM
from eagle3.evaluate import read_answer, walk
from eagle3.export.write import write_draft
from eagle3.target.hf import HFTarget
from engines.conftest import CPU_ENVIRONMENT, ask, interpreter

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
    config = {
        "architectures": [kind.architecture],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
    }
    config |= shape | layer_ids | {"tie_word_embeddings": False, "attention_bias": False}
    if kind is DSparkConfig:
        return config | {
            "markov_head_type": "vanilla", "enable_confidence_head": True,
            "confidence_head_with_markov": True, "sample_from_anchor": True,
        }  # fmt: skip
    return config | {"dflash_config": {"mask_token_id": MASK, **layer_ids}}


METHODS = {"dflash": DFlashConfig, "dspark": DSparkConfig}


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def draft(method, target, documents):
    return fitted(METHODS[method], target, documents)


def write(draft, parent):
    write_draft(draft, parent / "draft", config_of(draft))
    return str(parent / "draft")


@pytest.mark.parametrize("method", ["dflash"], indirect=True)
@pytest.mark.parametrize("steps", [BLOCK - 1, 2])
def test_vllm_accepts_what_the_evaluation_counts(serve, draft, target, documents, steps, tmp_path):
    """With fewer drafted tokens its blocks are shorter, whatever `block_size` says."""
    draft = copy.deepcopy(draft)
    for layer in draft.layers:  # its norm for CPUs takes the first layer's for all
        layer.self_attn.k_norm = draft.layers[0].self_attn.k_norm
    drafting = {
        "method": "dflash",
        "model": write(draft, tmp_path),
        "num_speculative_tokens": steps,
    }
    draft.config.block_size = steps + 1
    with torch.no_grad():
        expected, engine = counted(draft, target, documents), VLLM()
    right, rounds = (sum(n) for n in zip(*((a.accepted_at[-1], a.rounds) for a in expected)))
    assert 0 < right < rounds, "a draft that is always wrong or right shows nothing"
    given = [*VLLM_METRICS, "--speculative-config", json.dumps(drafting)]
    with serve("vllm", TARGET, *given) as server:
        for document, own in zip(documents, expected, strict=True):
            prompt = document.input_ids[~document.loss_mask].tolist()
            body = engine.request_body(prompt, NEW_TOKENS, GREEDY) | {"model": str(TARGET)}
            answer = engine.read_reply(ask(server, engine.generate_path, body), steps)
            assert (answer.ids, answer.rounds) == (own.ids, own.rounds)
            assert answer.accepted_at == own.accepted_at


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@torch.no_grad()
def test_the_classes_of_an_engine_give_our_logits(
    engine, method, draft, target, documents, tmp_path
):
    """At every slot that drafts, behind little and much context; and the confidences of DSpark."""
    steps, ids = BLOCK - draft.config.drafts_from, documents[2].input_ids
    aux = target(pack([Document(0, ids, torch.ones(len(ids)).bool())], draft.t2d, 1, serving))
    rows = torch.tensor([0, 1, 20, len(ids) - 8])
    given = {"ids": ids, "aux": aux.aux_hidden_states.contiguous(), "rows": rows}
    save_file(given, tmp_path / "in")
    script = Path(__file__).parent / "drafting" / f"in_{engine}.py"
    words = [TARGET, write(draft, tmp_path), method, tmp_path / "in", tmp_path / "out"]
    command = [interpreter(engine), str(script), *map(str, words)]
    environment = os.environ | CPU_ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out")
    batch = pack([Document(0, ids, torch.ones(len(ids)).bool())], draft.t2d, steps, serving)
    by_slot = draft.unroll(target.embedding, given["aux"], batch).split(batch.row_counts)
    places = torch.searchsorted(batch.rows, rows)
    hidden = torch.stack([states[places] for states in by_slot], dim=1)
    logits = draft.logits(hidden.flatten(0, 1), target.head).unflatten(0, hidden.shape[:2])
    assert relative_error(found["logits"][:, draft.config.drafts_from :], logits) < 1e-5
    if method == "dspark":
        sure = draft.confidence(draft.head_input(hidden.flatten(0, 1))).sigmoid()
        assert relative_error(found["confidence"].flatten(), sure) < 1e-5
        assert sure.std() > 1e-3, "equal confidences would show nothing"
