"""The plan: the measured step against the formula and against what autograd really keeps, sizes
against published numbers, the sample against all rows.
"""

import gzip
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, compose_config, soft_target_loss
from omegaconf import OmegaConf
from rich.console import Console
from transformers import LlamaConfig, Qwen3MoeConfig

from eagle3 import plan as planning
from eagle3.batch import Document, Features, pack, serving
from eagle3.config import Source
from eagle3.data.chat import Chat
from eagle3.data.prepare import INDEX, Prepared
from eagle3.data.sources import find_files
from eagle3.data.vocab import complete_section
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto
from eagle3.draft.model import DraftConfig
from eagle3.errors import RunError
from eagle3.hidden_states.shards import document_bytes
from eagle3.runs.disk import check_disk, free_bytes, size_text
from eagle3.target.spec import TargetSpec

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


def spec(config) -> TargetSpec:
    return TargetSpec("target", config, "bfloat16", [1, 2, 3])


def synthetic(lengths) -> Prepared:
    """Documents that overlap, so that many take little memory; 60 % supervised."""
    places, lengths = np.arange(len(lengths)), np.array(lengths)
    mask = (np.arange(len(lengths) + 4096) // 20) % 5 > 1
    before = np.concatenate([[0], np.cumsum(mask)])
    index = np.empty(len(lengths), INDEX)
    index["start"], index["length"] = places, lengths
    index["supervised"] = before[places + lengths] - before[places]
    index["teachers"] = index["supervised"] + lengths // 100
    return Prepared(np.zeros(len(mask), np.int32), mask, index, np.arange(32000), [])


def test_costs_of_targets():
    """Published: prefill of Llama-3.1-8B is 14.5 GFLOP a token at 2048 tokens and 1.05 for the
    head; its hidden states of 1.1 G tokens are 26-41 TB in bf16; Qwen3-30B has 3.3 B active.
    """
    one = synthetic([2048])
    total, active, flops = planning.target_costs(spec(LLAMA), one)
    assert total == active == 8_030_261_248
    assert flops == pytest.approx(14.5e9 + 1.05e9, rel=0.01)
    total, active, _ = planning.target_costs(spec(QWEN), one)
    assert (total, active) == (pytest.approx(30.5e9, rel=0.01), pytest.approx(3.3e9, rel=0.02))
    assert 26e12 < 1_420_000 * document_bytes(775, 465, (4096, 3 * 4096), "bf16") < 41e12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("supervised", "ttt_steps", "kind", "variant"),
    [
        (0.3, 7, DraftConfig, {}),
        (0.6, 1, DraftConfig, {"fc_norm": True}),
        (1.0, 3, DraftConfig, {"num_aux_hidden_states": 5}),
        (0.6, 3, DFlashConfig, {"num_hidden_layers": 2, "block_size": 4}),
        (0.3, 5, DSparkConfig, {"num_hidden_layers": 3, "block_size": 5, "markov_rank": 12}),
    ],
)
@pytest.mark.runs
def test_the_measured_step_is_the_real_one(dtype, supervised, ttt_steps, kind, variant):
    """Its FLOPs are those of the formula, to a thousandth; its peak is what autograd keeps of
    a real step, and what the loss works on.
    """
    size = 200 if kind is DraftConfig else 300
    config = kind(96, 320, 6, 2, 16, 300, size, 96, 512, **variant)
    in_vocab, ids = torch.arange(300) < size, torch.zeros(size, dtype=torch.long)
    masks = [torch.arange(n) >= n * (1 - supervised) for n in (150, 60, 200)]
    documents = [Document(0, ids[: len(mask)], mask) for mask in masks]
    batch, loss = pack(documents, in_vocab, ttt_steps, serving), soft_target_loss()
    hollow = planning.draft_without_data(config)
    flops, peak = planning.measure_step(hollow, batch, loss, dtype)
    assert flops == pytest.approx(hollow.training_flops(config, batch), rel=1e-3)
    draft = config.build(Auto, in_vocab, ids)
    length, teachers = len(batch.input_ids), len(batch.teacher_rows)
    embedding = torch.randn(300, 96).to(dtype)
    aux, last = torch.randn(length, config.aux_size).to(dtype), torch.randn(teachers, 96).to(dtype)
    features = Features(aux, last, torch.zeros(teachers).long(), torch.zeros(teachers))
    kept = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = draft.unroll(embedding, aux, batch)
        loss(draft, hidden, features, batch, embedding[:size])
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
    assert [size_text(n) for n in (2e6, 4.1e12)] == ["2.0 MB", "4.1 TB"]


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
    total, some = planning.sample_rows(file, path.stat().st_size / 4, 1 << 62, 3)
    assert total == pytest.approx(16_000, rel=0.05) and 333 <= len(some) < 666
    assert planning.sample_rows(file, 1e12, 1 << 62, 3)[0] == 16_000
    total, some = planning.sample_rows(file, 1e12, 100, 3)
    assert total == len(some) == 100


def test_a_sample_stands_for_all_rows(tmp_path, tokenizer, monkeypatch):
    """Twice over a source is twice the tokens of an epoch and no more to store; half of it is half
    of both; rows of which none can be used are refused.
    """
    path, chat = str(TINY / "conversations.jsonl"), Chat(tokenizer)
    config = OmegaConf.to_object(compose_config("data.num_samples=1500"))

    def estimate(weight=1.0, path=path):
        files = find_files(Source(path), "")
        documents, stored = planning.estimate([(Source(path, weight=weight), files)], chat, config)
        return documents, float(documents.lengths @ stored)

    every, _ = estimate()
    monkeypatch.setattr(planning, "SAMPLE_ROWS", 300)
    few, _ = estimate()
    assert len(np.unique(few.index["start"])) < len(every) / 2 and len(few) == len(every)
    for name in ("lengths", "supervised", "teachers"):
        assert getattr(few, name).sum() == pytest.approx(getattr(every, name).sum(), rel=0.1)
    config.data.num_samples = 200
    once, tokens = estimate()
    assert tokens == once.lengths.sum()
    for weight in (0.5, 2.0):
        documents, stored = estimate(weight)
        assert documents.lengths.sum() == pytest.approx(weight * tokens, rel=0.1)
        assert stored == pytest.approx(min(1, weight) * tokens, rel=0.1)
    # The second file is empty, and the first has all that is asked for.
    for name in ("1.jsonl", "3.jsonl"):
        shutil.copy(path, tmp_path / name)
    (tmp_path / "2.jsonl").touch()
    assert estimate(path=str(tmp_path))[1] == tokens
    (tmp_path / "a.jsonl").write_text('{"turns": ["?", "and?"]}\n{broken\n')
    remedy = "1 x prompt without an answer; .* has turns; .*: add regenerate to stages"
    with pytest.raises(RunError, match=f"none of 2 rows read can be trained on .*{remedy}"):
        estimate(path=str(tmp_path / "a.jsonl"))
    config.stages, config.regenerate["max_new_tokens"] = ["regenerate", "prepare"], 40
    answered, _ = estimate(path=str(tmp_path / "a.jsonl"))
    assert len(answered) == 1 and 2 * 40 <= answered.supervised[0] <= 2 * 43


@pytest.mark.runs
def test_llama_8b_on_sharegpt(tmp_path, monkeypatch):
    """Hours, memory and updates follow the GPUs, the hybrid mode the disk, and the recommendation
    all of them; nothing is written; 80 columns.
    """
    lengths = np.random.default_rng(0).exponential(1400, 60_000).clip(16, 4096)
    prepared, cpu = synthetic(lengths.astype(int)), torch.device("cpu")
    monkeypatch.setattr(planning, "MEASURED_STEPS", 1)
    timed = {}

    def timer(statement, globals, num_threads):
        timed.update(globals | {"num_threads": num_threads})
        taken = SimpleNamespace(median=0.5)
        return SimpleNamespace(blocked_autorange=lambda min_run_time: taken)

    monkeypatch.setattr(planning, "Timer", timer)

    def made(free: float, *overrides: str):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=int(free)))
        given = ["model=llama3-8b", "data.max_length=4096", "hidden_states.dtype=bf16"]
        given += [f"cache_dir={tmp_path}", *overrides]
        config = OmegaConf.to_object(compose_config(*given))
        config.draft = complete_section(config.draft, spec(LLAMA))
        return planning.plan(config, spec(LLAMA), [], None, prepared, cpu, tmp_path)

    roomy, narrow = made(10e12), made(500e9)
    needed = roomy.disk["hidden states, bf16"][0]
    assert 2e12 < needed < 4e12 and roomy.disk[planning.KEPT][0] == needed
    assert 0.1 < narrow.disk[planning.KEPT][0] / needed < 0.3
    hours, less = roomy.hours["1 x H200"], narrow.hours["1 x H200"]
    # What is timed are products of the target's own sizes and dtype, with the threads of the run.
    assert timed["b"].shape == (4096, 14336) and timed["b"].dtype == torch.bfloat16
    assert timed["num_threads"] == torch.get_num_threads()
    here = 2 * timed["a"].numel() * 14336 / 0.5
    assert roomy.speeds == {"1 x H200": planning.H200_FLOPS, "this machine": here}
    slower = roomy.hours["this machine"]["capture"] / hours["capture"]
    in_prefill = planning.IN_PREFILL / planning.ON_CPU[0]
    assert slower == pytest.approx(planning.H200_FLOPS / here * in_prefill)
    # Between the shares at 30 % and at all supervised, as 60 % of these are.
    share = planning.IN_TRAINING[0.6]
    assert roomy.shares["1 x H200"] == (planning.IN_PREFILL, pytest.approx(share, rel=0.02))
    train, capture = hours["train, mode=offline"], hours["capture"]
    assert hours["train, mode=online"] == pytest.approx(train + 2 * capture, rel=1e-3)
    assert hours["train, mode=hybrid"] == pytest.approx(train + capture, rel=1e-3)
    assert hours["train, mode=hybrid"] < less["train, mode=hybrid"] < hours["train, mode=online"]
    eight = made(10e12, "launch.nproc_per_node=8", "++target.tp_size=4")
    assert eight.hours["8 x H200"]["capture"] == pytest.approx(capture / 8)
    updates = roomy.data["updates an epoch"]
    assert eight.data["updates an epoch"] == pytest.approx(updates / 8, rel=0.08)
    weights, at_once = roomy.memory["target's weights"], roomy.memory["at once"]
    assert weights[0] == 2 * 8_030_261_248 and at_once[1] < at_once[0] - 12e9
    assert eight.memory["target's weights"][2] < 0.4 * weights[0]
    assert roomy.disk["checkpoints"][0] == 4 * 12 * roomy.data["parameters of the draft"]
    saved = 1 - hours["train, mode=hybrid"] / hours["train, mode=online"]
    assert roomy.recommended.startswith(f"mode=hybrid: 2.4 TB of hidden states save {saved:.0%}")
    assert narrow.recommended.startswith("mode=online: 450.0 GB")
    assert made(10e12, "train.epochs=1").recommended.startswith("mode=online: 2.4 TB")
    assert made(10e12, "hidden_states.max_disk=2TB").disk[planning.KEPT] == (2e12, 2e12)
    block = "draft=dflash", "draft.layers=1", "draft.block=4", "draft.mask_token_id=0"
    few, many = made(10e12, *block, "draft.anchors=8"), made(10e12, *block)
    assert (
        few.hours["1 x H200"]["train, mode=offline"]
        < 0.3 * many.hours["1 x H200"]["train, mode=offline"]
    )
    # The head is the target's own.
    of_weights = 16 * many.data["parameters of the draft"]
    assert many.memory["draft, gradients, optimiser"][0] == of_weights
    memory = roomy.memory | {planning.GPU: [int(32e9)] * 3}
    assert planning.recommend(roomy.disk, memory, hours).startswith("mode=offline")
    console = Console(width=80, file=io.StringIO(), markup=False, soft_wrap=True)
    planning.show(narrow, console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[-1].startswith("Recommended: mode=online")
    assert list(tmp_path.iterdir()) == []
