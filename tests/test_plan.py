"""The plan: the measured step against the formula and against what autograd really keeps, sizes
against published numbers, the sample against all rows.
"""

import dataclasses
import gzip
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from transformers import LlamaConfig, Qwen3MoeConfig

from eagle3 import plan as planning
from eagle3.batch import Document, Features, pack, serving
from eagle3.config import Source
from eagle3.data.chat import Chat
from eagle3.data.prepare import INDEX, Prepared
from eagle3.data.sources import find_files
from eagle3.draft.flash import Auto
from eagle3.draft.model import Draft, DraftConfig
from eagle3.errors import RunError
from eagle3.hidden_states.int8 import document_bytes
from eagle3.loss import SoftTargetLoss, kl
from eagle3.runs.disk import check_disk, free_bytes, size_text
from eagle3.target.spec import TargetSpec
from eagle3.ttt import training_flops, unroll

LLAMA = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    dtype="bfloat16",
)  # fmt: skip
QWEN = Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip


def spec(config, dtype="bfloat16") -> TargetSpec:
    return TargetSpec("target", config, dtype, [1, 2, 3])


def composed(folder, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = ["name=plan", f"cache_dir={folder}/cache", *overrides]
        return OmegaConf.to_object(compose("run", given))


def synthetic(documents: int, mean: float) -> Prepared:
    """Documents of exponentially distributed lengths that overlap, so that many take little memory;
    60 % supervised.
    """
    generator, places = np.random.default_rng(0), np.arange(documents)
    lengths = np.clip(generator.exponential(mean, documents), 16, 4096).astype(np.int64)
    mask = (np.arange(documents + 4096) // 20) % 5 > 1
    before = np.concatenate([[0], np.cumsum(mask)])
    index = np.empty(documents, INDEX)
    index["start"], index["length"] = places, lengths
    index["supervised"] = before[places + lengths] - before[places]
    index["teachers"] = index["supervised"] + lengths // 100
    return Prepared(np.zeros(len(mask), np.int32), mask, index, np.arange(32000), [])


def batch_of(lengths, supervised: float, ttt_steps: int, in_vocab: torch.Tensor):
    documents = [
        Document(0, torch.zeros(n, dtype=torch.long), torch.arange(n) >= n * (1 - supervised))
        for n in lengths
    ]
    return pack(documents, in_vocab, ttt_steps, serving)


def test_size_of_targets():
    size = planning.target_size(spec(LLAMA))
    assert size.parameters == size.active == 8_030_261_248 and size.ends == 2 * size.head
    tied = LlamaConfig(**LLAMA.to_diff_dict() | {"tie_word_embeddings": True})
    assert planning.target_size(spec(tied)).ends == size.head
    mixture = planning.target_size(spec(QWEN))
    assert mixture.parameters == pytest.approx(30.5e9, rel=0.01)
    assert mixture.active == pytest.approx(3.3e9, rel=0.02)


def test_flops_and_disk_of_llama_8b():
    """Published: prefill 14.5 GFLOP a token at 2048 tokens, teacher head 1.05, 26-41 TB for 1.1 G
    tokens in bf16.
    """
    one = np.array([2048])
    sample = planning.Sample(True, one, one, one, np.ones(1), np.ones(1), None)
    with_head = planning.prefill_flops(planning.target_size(spec(LLAMA)), LLAMA, sample)
    assert with_head == pytest.approx(14.5e9 + 1.05e9, rel=0.01)
    assert 26e12 < 1_420_000 * document_bytes(775, 465, 4096, "bf16") < 41e12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("supervised", "ttt_steps"), [(0.3, 7), (0.6, 1), (1.0, 3)])
def test_the_measured_step_is_the_real_one(dtype, supervised, ttt_steps):
    """Its FLOPs are those of the formula, which counts gradients of the frozen inputs too; its peak
    is what autograd keeps of a real step, and what the loss works on.
    """
    config = DraftConfig(96, 320, 6, 2, 16, 300, 200, 96, 512)
    in_vocab = torch.arange(300) < 200
    batch = batch_of((150, 60, 200), supervised, ttt_steps, in_vocab)
    flops, peak = planning.measure_step(config, batch, SoftTargetLoss(kl), dtype)
    assert flops == pytest.approx(training_flops(config, batch), rel=0.1)
    draft = Draft(config, Auto, in_vocab, torch.zeros(200, dtype=torch.long))
    length, teachers = len(batch.input_ids), len(batch.teacher_rows)
    embedding = torch.randn(300, 96).to(dtype)
    aux, last = torch.randn(length, 288).to(dtype), torch.randn(teachers, 96).to(dtype)
    features = Features(aux, last, torch.zeros(teachers, dtype=torch.long), torch.zeros(teachers))
    kept = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = unroll(draft, embedding, aux, batch)
        SoftTargetLoss(kl)(draft, hidden, features, batch, embedding[:200])
    own = {parameter.untyped_storage().data_ptr() for parameter in draft.parameters()}
    sizes = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in own]
    assert 0.7 * sum(sizes) < peak < 2 * sum(sizes)


def test_sizes_on_disk(tmp_path, monkeypatch):
    there = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "not" / "there") == pytest.approx(there, rel=0.01)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=80e9))
    check_disk(80_000_000_000, tmp_path)
    with pytest.raises(RunError, match=r"need 4\.1 TB, but .* has 80\.0 GB free"):
        check_disk(4_100_000_000_000, tmp_path)
    sizes = ["0 kB", "500 kB", "2.0 MB", "350 GB", "4.1 TB"]
    assert [size_text(n) for n in (0, 5e5, 2e6, 350e9, 4.1e12)] == sizes


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
def test_rows_of_a_file_that_is_read_in_part(tmp_path, kind):
    """Also where the file is read in blocks: JSON lists and compressed ones."""
    words = np.random.default_rng(0).integers(0, 1 << 62, 40_000)
    lengths = [10 + i * 37 % 60 for i in range(16_000)]
    rows = [json.dumps({"text": words[2 * i : 2 * i + n].tolist()}) for i, n in enumerate(lengths)]
    text = (f"[{','.join(rows)}]" if kind == "json" else "\n".join(rows)).encode()
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(text, 1) if kind.endswith("gz") else text)
    [file] = find_files(Source(str(path)), "")
    total, kept = planning.sample_rows(file, path.stat().st_size / 4, float("inf"), 300)
    assert total == pytest.approx(16_000, rel=0.05) and 300 <= len(kept) < 600
    assert planning.sample_rows(file, 1e12, float("inf"), 300)[0] == 16_000
    total, kept = planning.sample_rows(file, 1e12, 100, 300)
    assert total == len(kept) == 100


def test_a_sample_stands_for_all_rows(tmp_path, tokenizer, monkeypatch):
    """Twice over a source is twice the tokens of an epoch and no more to store; half of it is half
    of both; held-out prompts are left out.
    """
    path, config = str(TINY / "conversations.jsonl"), composed(tmp_path)
    files, chat = find_files(Source(path), ""), Chat(tokenizer)
    config.data.num_samples = 1500
    every = planning.estimate([(Source(path), files)], chat, config)
    monkeypatch.setattr(planning, "SAMPLE_ROWS", 300)
    few = planning.estimate([(Source(path), files)], chat, config)
    assert len(few.lengths) < len(every.lengths) / 2
    assert few.tokens == pytest.approx(every.tokens, rel=0.1)
    for name in ("supervised", "teachers"):
        expected = float(getattr(every, name).sum()) / every.tokens
        assert getattr(few, name) @ few.weights / few.tokens == pytest.approx(expected, rel=0.1)
    config.data.num_samples = 200
    once = planning.estimate([(Source(path), files)], chat, config)
    assert once.weights.sum() == len(once.lengths)
    for weight in (0.5, 2.0):
        made = planning.estimate([(Source(path, weight=weight), files)], chat, config)
        assert made.tokens == pytest.approx(weight * once.tokens)
        assert made.different == pytest.approx(min(1, weight) * once.tokens)
    config.data.eval_path, config.eval.num_prompts = None, 20
    made = planning.estimate([(Source(path), files)], chat, config)
    assert made.weights.sum() == pytest.approx(once.weights.sum() - 20)


def test_data_that_cannot_be_trained_on(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "?"}]}\n{broken\n')
    source = Source(str(tmp_path / "a.jsonl"))
    with pytest.raises(RunError, match="none of 2 rows looked at can be trained on"):
        files = find_files(source, "")
        planning.estimate([(source, files)], Chat(tokenizer), composed(tmp_path))


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A function: free bytes, overrides -> the plan of Llama-3.1-8B on data like ShareGPT."""
    prepared = synthetic(60_000, 1400)
    monkeypatch.setattr(planning, "rates", lambda *unused: {"H200": 790e12, planning.CPU: 1e11})
    monkeypatch.setattr(planning, "MEASURED_STEPS", 1)

    def made(free: float, *more: str):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free)))
        config = composed(tmp_path, "model=llama3-8b", "data.max_length=4096", *more)
        device = torch.device("cpu")
        return planning.plan(config, spec(LLAMA), [], None, prepared, device, tmp_path / "run")

    return made


def test_llama_8b_on_sharegpt(llama, tmp_path):
    """Hours, memory and updates follow the GPUs, the hybrid mode follows the disk; 80 columns."""
    roomy, narrow = llama(10e12), llama(500e9)
    assert 2e12 < roomy.hidden_states["bf16"] < 4e12
    assert roomy.kept_share == 1 and 0.1 < narrow.kept_share < 0.3
    hours = roomy.hours["H200"]
    online, offline = hours["an epoch online"], hours["an epoch offline"]
    assert hours["all of mode=online"] == pytest.approx(2 * online)
    assert hours["all of mode=hybrid"] == pytest.approx(online + offline)
    assert hours["all of mode=offline"] == pytest.approx(hours["capture"] + 2 * offline)
    assert narrow.hours["H200"]["all of mode=hybrid"] > hours["all of mode=hybrid"]
    eight = llama(10e12, "launch.nproc_per_node=8", "++target.tp_size=4")
    assert eight.replicas == 8
    assert eight.hours["H200"]["capture"] == pytest.approx(hours["capture"] / 8)
    assert eight.updates_per_epoch == pytest.approx(roomy.updates_per_epoch / 8, rel=0.08)
    together = roomy.memory[planning.ONLINE]
    weights = together["target's weights"]
    assert weights == 2 * 8_030_261_248
    assert eight.memory[planning.CAPTURE]["target's weights"] < 0.4 * weights
    assert roomy.memory[planning.OFFLINE]["at once"] < together["at once"] - 12e9
    assert roomy.disk["checkpoints"][0] == 4 * 12 * roomy.trained
    console = Console(width=80, file=io.StringIO())
    planning.show(narrow, console)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80 and "about" not in shown
    assert "mode=hybrid keeps 19%" in " ".join(shown.split()) and list(tmp_path.iterdir()) == []


def test_recommendations(llama):
    made = llama(10e12)

    def recommended(passes=2.0, allowed=made.allowed, gpu=None):
        updates = round(passes * made.updates_per_epoch)
        changed = {"updates": updates, "allowed": allowed, "gpu_memory": gpu}
        made.hours["H200"]["all of mode=online"] = passes * made.hours["H200"]["an epoch online"]
        return planning.recommend(dataclasses.replace(made, **changed))

    assert recommended().startswith("mode=hybrid: 2.4 TB of disk save 2")
    assert recommended(allowed=1.8e12).startswith("mode=hybrid hidden_states.dtype=int8: 1.4 TB")
    assert recommended(allowed=80e9).startswith("mode=online: the hidden states need 2.4 TB")
    assert recommended(passes=1).startswith("mode=online: the data is passed over once")
    assert recommended(passes=1.1).startswith("mode=online: storing hidden states would save only")
    assert recommended(gpu=32e9).startswith("mode=offline: target and draft do not fit in 32.0 GB")
    assert recommended(gpu=141e9).startswith("mode=hybrid")
