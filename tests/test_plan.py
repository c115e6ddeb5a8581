"""The plan's formulas against published numbers, against what autograd keeps, and against the data
once prepared.
"""

import dataclasses
import gzip
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from transformers import LlamaConfig, Qwen3MoeConfig

from eagle3 import plan
from eagle3.batch import Document, Features, pack, serving
from eagle3.config import DraftSection
from eagle3.data import prepare
from eagle3.data.chat import Chat
from eagle3.data.encoder import Preparation
from eagle3.data.sources import Source, find_files
from eagle3.draft.flash import Auto
from eagle3.draft.initial import draft_config
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.hidden_states.shards import document_bytes
from eagle3.job import Run
from eagle3.loss import SoftTargetLoss, kl
from eagle3.plan import estimate as estimated
from eagle3.plan.costs import draft_parameters, prefill_flops, saved_bytes, target_size
from eagle3.plan.estimate import H200_FLOPS, break_even
from eagle3.plan.results import recommend
from eagle3.plan.sample import count, estimate, scan
from eagle3.runs.disk import free_bytes, size_text
from eagle3.ttt import training_flops, unroll

LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    dtype="bfloat16",
)
QWEN = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
LLAMA_DRAFT = draft_config(DraftSection(), LLAMA)
ONE = np.ones(1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: threads only cost where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shown(made) -> str:
    console = Console(width=80, file=io.StringIO())
    plan.show(made, console)
    return console.file.getvalue()


def run_of(folder: Path, *overrides: str, target=None, prepared=None, tokenizer=None):
    """What `make` asks of a Run, from the real config files."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("run", ["name=plan", f"cache_dir={folder}/cache", *overrides])
    config = OmegaConf.to_object(composed)
    sources = (
        [(Source(config.data.path), find_files(Source(config.data.path), config.cache_dir))]
        if tokenizer
        else []
    )
    return SimpleNamespace(
        config=config,
        run_dir=folder / "run",
        device=torch.device("cpu"),
        target_config=target,
        chat=Chat(tokenizer) if tokenizer else None,
        sources=sources,
        given_sources=sources,
        prepared_if_there=lambda: prepared,
        preparation=Run.preparation.fget(SimpleNamespace(config=config, target_config=target))
        if target
        else None,
    )


def synthetic(documents: int, mean: float) -> prepare.Prepared:
    """Documents of exponentially distributed lengths that overlap, so that many take little memory;
    60 % supervised.
    """
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.exponential(mean, documents), 16, 4096).astype(np.int64)
    mask = (np.arange(documents + 4096) // 20) % 5 > 1
    before = np.concatenate([[0], np.cumsum(mask)])
    index = np.empty(documents, prepare.INDEX)
    index["start"], index["length"] = np.arange(documents), lengths
    index["supervised"] = before[np.arange(documents) + lengths] - before[np.arange(documents)]
    index["teachers"] = index["supervised"] + lengths // 100
    return prepare.Prepared(np.zeros(len(mask), np.int32), mask, index, np.arange(32000), [])


def document_of(length: int, supervised: float):
    return (
        0,
        torch.zeros(length, dtype=torch.long),
        torch.arange(length) >= length * (1 - supervised),
    )


def test_sizes_of_published_models():
    llama, qwen = target_size(LLAMA), target_size(QWEN)
    assert llama.parameters == llama.active == 8_030_261_248 and not llama.tied
    assert llama.layers == 8_030_261_248 - 2 * 128256 * 4096
    assert qwen.parameters == pytest.approx(30.5e9, rel=0.005) and qwen.active == pytest.approx(
        3.3e9, rel=0.02
    )
    assert target_size(LlamaConfig(**LLAMA.to_diff_dict() | {"tie_word_embeddings": True})).tied


def test_flops_of_llama_8b():
    """FIELD.md, section 6, at 2048 tokens: prefill 14.5 GFLOP a token, teacher head 1.05, draft
    16.3.

    The draft's are those of a dense trainer, which multiplies the embedding half of q, k, v at
    every step.
    """
    size, lengths = target_size(LLAMA), np.array([2048])
    layers = prefill_flops(size, LLAMA, lengths, ONE, teacher_share=0)
    assert layers == pytest.approx(14.5e9, rel=0.01)
    assert prefill_flops(size, LLAMA, lengths, ONE, 1) - layers == pytest.approx(1.05e9, rel=0.01)
    batch = pack(
        [Document(*d) for d in [document_of(2048, 1.0)]],
        torch.ones(128256, dtype=torch.bool),
        7,
        serving,
    )
    hoisted = 6 * 6 * 4096 * 6144
    assert training_flops(LLAMA_DRAFT, batch) / 2048 + hoisted == pytest.approx(16.3e9, rel=0.01)


def test_break_even_of_llama_8b():
    """FIELD.md, section 6: below 1.8 GB/s, recomputing at the peak rate beats reading 32 KB a
    token.
    """
    prefill = prefill_flops(target_size(LLAMA), LLAMA, np.array([2048]), ONE, 0)
    assert break_even(
        document_bytes(2048, 2048, 4096, "bf16") / 2048, prefill, H200_FLOPS
    ) == pytest.approx(1.8e9, rel=0.05)


@pytest.mark.parametrize(
    "documents, tokens, low, high", [(94_000, 90e6, 2e12, 4e12), (1_420_000, 1.1e9, 26e12, 41e12)]
)
def test_disk_of_sharegpt_and_perfectblend(documents, tokens, low, high):
    """FIELD.md, section 6; ShareGPT at about 90 M and Perfect-Blend at about 1.1 G tokens, 60 % of
    them supervised.
    """
    length = round(tokens / documents)
    assert low < documents * document_bytes(length, round(0.6 * length), 4096, "bf16") < high
    assert document_bytes(length, 0, 4096, "int8") < 0.52 * document_bytes(length, 0, 4096, "bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("supervised, ttt_steps", [(0.3, 7), (0.6, 1), (1.0, 3)])
def test_memory_kept_for_backward(dtype, supervised, ttt_steps):
    """Every storage that autograd keeps, but the parameters, against the formula."""
    config = DraftConfig(96, 320, 6, 2, 16, 300, 200, 96, 512)
    in_vocab = torch.arange(300) < 200
    draft = Draft(config, Auto, in_vocab, torch.zeros(200, dtype=torch.long))
    batch = pack(
        [Document(*d) for d in [document_of(n, supervised) for n in (150, 60, 200)]],
        in_vocab,
        ttt_steps,
        serving,
    )
    length, teachers = len(batch.input_ids), len(batch.teacher_rows)
    embedding = torch.randn(300, 96).to(dtype)
    aux, last = torch.randn(length, 288).to(dtype), torch.randn(teachers, 96).to(dtype)
    features = Features(aux, last, torch.zeros(teachers, dtype=torch.long), torch.zeros(teachers))
    own = {parameter.untyped_storage().data_ptr() for parameter in draft.parameters()}
    kept = {}

    def note(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = unroll(draft, embedding, aux, batch)
        SoftTargetLoss(kl)(draft, hidden, features, batch, embedding[:200])
    measured = sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own
    )
    assert saved_bytes(config, batch, dtype.itemsize, fused_norm=False) == pytest.approx(
        measured, rel=0.1
    )


def test_check_disk(tmp_path, monkeypatch):
    plan.check_disk(1000, tmp_path / "not" / "there")
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.01
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=80e9))
    plan.check_disk(80_000_000_000, tmp_path)
    with pytest.raises(RunError, match=r"need 4\.1 TB, but .* has 80\.0 GB free") as error:
        plan.check_disk(4_100_000_000_000, tmp_path)
    for remedy in (
        "hidden_states.dtype=int8",
        "data.num_samples",
        "hidden_states.path",
        "mode=online",
    ):
        assert remedy in str(error.value)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_sizes_in_words():
    assert [size_text(n) for n in (0, 5e5, 2e6, 350e9, 4.1e12)] == [
        "0 kB",
        "500 kB",
        "2.0 MB",
        "350 GB",
        "4.1 TB",
    ]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
def test_rows_of_a_file_that_is_read_in_part(tmp_path, kind):
    """Also where the file is read in blocks: JSON lists and compressed ones."""
    words = np.random.default_rng(0).integers(0, 1 << 62, 40_000)
    rows = [
        json.dumps({"text": words[i * 2 : i * 2 + 10 + i * 37 % 60].tolist()})
        for i in range(16_000)
    ]
    text = f"[{','.join(rows)}]" if kind == "json" else "\n".join(rows)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(text.encode(), 1) if kind.endswith("gz") else text.encode())
    [file] = find_files(Source(str(path)), "")
    estimated, kept = scan(file, path.stat().st_size / 4, float("inf"), 300)
    assert estimated == pytest.approx(16_000, rel=0.05) and 300 <= len(kept) < 600
    assert 1500 < kept[-1][0] < 15_000
    assert scan(file, 1e12, float("inf"), 300)[0] == 16_000
    rows_read, kept = scan(file, 1e12, 100, 300)
    assert rows_read == 100 and [line for line, _ in kept] == list(range(1, 101))


@pytest.fixture(scope="module")
def tiny(tokenizer, tmp_path_factory):
    """The tiny data, prepared: (facts, Prepared, Preparation, sources)."""
    folder = tmp_path_factory.mktemp("prepared")
    options = Preparation(None, 512, False, None, False, "skip", 48, 2048, 1536)
    sources = [
        (
            Source(str(TINY / "conversations.jsonl")),
            find_files(Source(str(TINY / "conversations.jsonl")), ""),
        )
    ]
    eval_files = find_files(Source(str(TINY / "eval.jsonl")), "")
    learnt = prepare.write(folder, Chat(tokenizer), options, sources, eval_files)
    return learnt, prepare.load(folder), options, sources


def test_estimated_tokens_agree_with_those_prepared(tiny, tokenizer):
    learnt, prepared, options, sources = tiny
    exact, guess = count(prepared), estimate(sources, Chat(tokenizer), options, 0)
    tokens = float(guess.lengths @ guess.weights)
    assert exact.weights.sum() == len(prepared) and exact.lengths.sum() == learnt["tokens"]
    assert abs(tokens - learnt["tokens"]) < 2.5 * guess.standard_error < 0.06 * learnt["tokens"]
    for name in ("supervised", "teachers"):
        expected = float(getattr(exact, name).sum()) / learnt["tokens"]
        assert float(getattr(guess, name) @ guess.weights) / tokens == pytest.approx(
            expected, rel=0.05
        )


def test_weights_and_num_samples(tiny, tokenizer):
    """Twice over a source is twice the tokens of an epoch, and no more to store; half of it is half
    of both.
    """
    _, _, options, [(source, files)] = tiny
    few = dataclasses.replace(options, num_samples=200)
    once = estimate([(source, files)], Chat(tokenizer), few, 0)
    assert once.weights.sum() == pytest.approx(len(once.lengths)) and once.standard_error == 0
    for weight in (0.5, 2.0):
        given = estimate(
            [(dataclasses.replace(source, weight=weight), files)], Chat(tokenizer), few, 0
        )
        assert given.weights.sum() == pytest.approx(weight * once.weights.sum())
        assert given.distinct.sum() == pytest.approx(min(1, weight) * once.weights.sum())
    assert estimate([(source, files)], Chat(tokenizer), few, 20).weights.sum() == pytest.approx(180)


def test_data_that_cannot_be_trained_on(tmp_path, tokenizer, tiny):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n{broken\n')
    source = Source(str(tmp_path / "a.jsonl"))
    with pytest.raises(
        RunError,
        match=r"none of 2 rows looked at can be trained on \(broken JSON, no assistant turn\)",
    ):
        estimate([(source, find_files(source, ""))], Chat(tokenizer), tiny[2], 0)


def test_tiny_end_to_end(tmp_path, tokenizer, tiny):
    """Estimated, then counted, and nothing is written by either."""
    target = LlamaConfig.from_pretrained(TINY / "target")
    guess = plan.make(run_of(tmp_path, target=target, tokenizer=tokenizer))
    exact = plan.make(run_of(tmp_path, target=target, prepared=tiny[1]))
    assert guess.tokens.tokens == pytest.approx(exact.tokens.tokens, rel=0.05)
    assert exact.tokens.exact and not guess.tokens.exact and exact.tokens.standard_error == 0
    assert guess.tokens.updates == 600 and guess.tokens.passes < 1
    assert guess.tokens.updates_per_epoch == pytest.approx(exact.tokens.updates_per_epoch, rel=0.05)
    assert guess.cost.training_flops == pytest.approx(exact.cost.training_flops, rel=0.1)
    assert exact.disk.hidden_states["bf16"] == np.sum(
        document_bytes(tiny[1].lengths, tiny[1].teachers, 256, "bf16")
    )
    assert exact.recommendation.startswith("mode=online") and "once" in exact.recommendation
    json.dumps(dataclasses.asdict(exact))
    text = shown(guess)
    assert (
        max(map(len, text.splitlines())) <= 80
        and "about" in text
        and "Recommended: mode=online" in text
    )
    assert "about" not in shown(exact) and list(tmp_path.iterdir()) == []


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A function: free bytes, overrides -> the plan of Llama-3.1-8B on data like ShareGPT."""
    overrides = ("model=llama3-8b", "data.path=none", "data.max_length=4096")
    prepared = synthetic(60_000, 1400)
    monkeypatch.setattr(estimated, "measured_flops", lambda *unused: 1e11)

    def make(free: float, *more: str):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free)))
        return plan.make(run_of(tmp_path, *overrides, *more, target=LLAMA, prepared=prepared))

    return make


def test_llama_8b_on_sharegpt(llama):
    """Hours, memory and updates follow the GPUs, the hybrid mode follows the disk."""
    roomy, narrow = llama(10e12), llama(500e9)
    assert (
        2e12 < roomy.disk.needed < 4e12
        and roomy.disk.kept_share == 1
        and 0.1 < narrow.disk.kept_share < 0.3
    )
    hours = roomy.hours[0]
    assert hours.total["online"] == pytest.approx(2 * hours.epoch_online)
    assert hours.total["hybrid"] == pytest.approx(hours.epoch_online + hours.epoch_offline)
    assert hours.total["offline"] == pytest.approx(hours.capture + 2 * hours.epoch_offline)
    assert hours.total["online"] > narrow.hours[0].total["hybrid"] > hours.total["hybrid"]
    assert "does not fit" in shown(narrow) and "keeps 19%" in shown(narrow)
    eight = llama(10e12, "launch.nproc_per_node=8", "target.tp_size=4")
    assert eight.tokens.replicas == 8 and eight.hours[0].capture == pytest.approx(hours.capture / 8)
    assert eight.tokens.updates_per_epoch == pytest.approx(
        roomy.tokens.updates_per_epoch / 8, rel=0.08
    )
    weights = roomy.memory.parts["train online, hybrid"]["target's weights"]
    assert (
        weights == 2 * 8_030_261_248
        and eight.memory.parts["capture"]["target's weights"] < 0.4 * weights
    )
    assert roomy.memory.total["train offline"] < roomy.memory.total["train online, hybrid"] - 12e9
    assert roomy.disk.checkpoint == 12 * draft_parameters(LLAMA_DRAFT)


def test_recommendations(llama):
    made = llama(10e12)

    def recommended(passes=2.0, allowed=made.disk.allowed, gpu=None):
        disk, memory = (
            dataclasses.replace(made.disk, allowed=allowed),
            dataclasses.replace(made.memory, gpu=gpu),
        )
        tokens = dataclasses.replace(made.tokens, passes=passes)
        changed = dataclasses.replace(made, disk=disk, memory=memory, tokens=tokens)
        changed.hours[0].total["online"] = passes * made.hours[0].epoch_online
        return recommend(changed)

    assert recommended().startswith("mode=hybrid: 2.4 TB of disk save 2")
    assert recommended(allowed=1.8e12).startswith("mode=hybrid hidden_states.dtype=int8: 1.4 TB")
    assert recommended(allowed=80e9).startswith(
        "mode=online: the hidden states need 2.4 TB of disk and 80.0 GB"
    )
    assert recommended(passes=1).startswith("mode=online: the data is passed over once")
    assert recommended(passes=1.1).startswith(
        "mode=online: storing hidden states would save only 5%"
    )
    assert recommended(gpu=32e9).startswith(
        "mode=offline: target and draft do not fit in 32.0 GB together"
    )
    assert recommended(gpu=141e9).startswith("mode=hybrid")
