"""target=sglang in the real engine: the hidden states, and the losses of whole runs, are those of
target=hf.
"""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, losses, run_command, spec_of

from eagle3.batch import Document, pack, serving
from eagle3.engines.server import choose_port
from eagle3.errors import RunError
from eagle3.hidden_states.store import Store
from eagle3.target.hf import HFTarget
from eagle3.target.sglang.target import SGLangTarget

CPU, CLOSE = torch.device("cpu"), {"rtol": 1e-4, "atol": 2e-5}
SMALL_POOLS = ["--max-total-tokens", "8192", "--max-running-requests", "16"]
SMALL_POOLS += ["--context-length", "2048"]
ONE_FAMILY = pytest.mark.parametrize("random_target", ["llama"], indirect=True)
LENGTHS = [13, 1, 300, 7, 128, 200, 3, 500, 64]


@pytest.fixture
def open_target(sglang_python, monkeypatch):
    """open_target(folder, layers, ...) starts a server; all are ended with the test."""
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # one core for each of two processes
    opened = []

    def open_target(folder, layer_ids=None, tp_size=1, server_args=()):
        if tp_size == 1:
            monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND")
        given = {"tp_size": tp_size, "mem_fraction_static": 0.2, "batch_tokens": 600}
        given |= {"python": sglang_python, "server_args": [*SMALL_POOLS, *server_args]}
        opened.append(SGLangTarget(spec_of(folder, layer_ids), CPU, **given))
        return opened[-1]

    yield open_target
    for target in opened:
        target.close()


def batch_of(vocab_size):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, vocab_size, (n,), generator=generator) for n in LENGTHS]
    documents = [Document(i, row, torch.ones(len(row)).bool()) for i, row in enumerate(ids)]
    return pack(documents, torch.ones(vocab_size, dtype=torch.bool), 7, serving)


def assert_equal(target, reference):
    """At every position of every document."""
    batch = batch_of(reference.config.vocab_size)
    found, expected = target(batch), reference(batch)
    assert len(found.argmax) == sum(LENGTHS)
    for name in ("aux_hidden_states", "last_hidden_states", "logsumexp"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **CLOSE)
    assert torch.equal(found.argmax, expected.argmax)


# Together every layer whose output SGLang can take; each id is wrong by one if any convention is.
@pytest.mark.parametrize(
    ("layer_ids", "tp_size"),
    [(None, 1), ([0, 2, 5], 1), ([0, 1, 4, 5, 6], 2)],
    ids=["default", "0,2,5", "five layers over two processes"],
)
def test_states_equal_those_of_transformers(random_target, open_target, layer_ids, tp_size):
    target = open_target(random_target, layer_ids, tp_size)
    reference = HFTarget(spec_of(random_target, layer_ids), CPU)
    assert_equal(target, reference)
    prompts = [list(range(3, 3 + n)) for n in (5, 12, 9)]
    assert target.generate(prompts, 16) == reference.generate(prompts, 16)


@ONE_FAMILY
def test_chunked_prefill_is_stitched(random_target, open_target):
    target = open_target(random_target, server_args=["--chunked-prefill-size", "48"])
    assert_equal(target, HFTarget(spec_of(random_target), CPU))


@ONE_FAMILY
def test_a_killed_model_process_is_noticed(random_target, open_target):
    target = open_target(random_target)
    listed = subprocess.run(["ps", "-eo", "pid,sid,args"], capture_output=True, text=True)
    lines = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    mine = [(pid, args) for pid, sid, args in lines if sid == str(target.server.process.pid)]
    scheduler = next(int(pid) for pid, args in mine if "sglang::scheduler" in args)
    os.kill(scheduler, signal.SIGKILL)
    with pytest.raises(RunError, match="SGLang ended with exit code"):
        target(batch_of(target.config.vocab_size))


def run(folder, name, target, *settings):
    common = [
        "model=hf", f"model.path={target}", "model.dtype=float32", "data.max_length=256",
        "data.num_samples=60", "draft.vocab_size=300", "draft.ttt_steps=3", "eval.num_prompts=4",
        "eval.max_new_tokens=16", "train.epochs=9", "train.tokens_per_step=4096",
        "train.max_steps=6", "train.log_every=1", "hidden_states.dtype=fp32",
        f"hydra.run.dir={folder / name}",
    ]  # fmt: skip
    done = run_command(*common, *settings, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / name


@ONE_FAMILY
def test_runs_have_the_losses_of_target_hf(random_target, sglang_python, tmp_path):
    engine = [
        "target=sglang", f"target.python={sglang_python}", "target.mem_fraction_static=0.2",
        f"target.server_args=[{','.join(SMALL_POOLS)}]", "target.batch_tokens=1024",
        f"cache_dir={tmp_path / 'engine.cache'}",
    ]  # fmt: skip
    stages = "stages=[prepare,generate,train]"
    own_cache = f"cache_dir={tmp_path / 'hf.cache'}"
    expected = losses(run(tmp_path, "hf", random_target, stages, own_cache))
    assert len(expected) == 6
    captured = "stages=[prepare,generate,capture,train]"
    for mode, listed in (("online", stages), ("offline", captured), ("hybrid", stages)):
        found = losses(run(tmp_path, mode, random_target, listed, f"mode={mode}", *engine))
        assert found == pytest.approx(expected, rel=1e-4)


@ONE_FAMILY
def test_two_processes_capture_through_a_server_started_by_hand(
    random_target, sglang_python, tmp_path
):
    """The store is that of one process with target=hf."""
    port = choose_port(None, "port")
    command = [sys.executable, "-m", "eagle3.target.sglang.serve", str(random_target)]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32", *SMALL_POOLS]
    command += ["--python", sglang_python, "--mem-fraction-static", "0.2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline().startswith("ready: python run.py target=sglang")
        engine = [f"target.url=http://127.0.0.1:{port}", "launch.nproc_per_node=2"]
        for name, own in (("hf", []), ("sglang", ["target=sglang", *engine])):
            folders = [f"cache_dir={tmp_path / name}.cache"]
            folders += [f"hidden_states.path={tmp_path / name}.store"]
            settings = ["stages=[prepare,capture]", "mode=offline", "target.batch_tokens=512"]
            run(tmp_path, name, random_target, *settings, *own, *folders)
        server.terminate()
    assert server.returncode == 143
    ours, theirs = Store(tmp_path / "sglang.store"), Store(tmp_path / "hf.store")
    assert ours.keys.tolist() == theirs.keys.tolist()
    for a, b in zip(ours.load(ours.keys.tolist()), theirs.load(ours.keys.tolist()), strict=True):
        for name in ("aux_hidden_states", "last_hidden_states"):
            found, expected = getattr(a.features, name), getattr(b.features, name)
            torch.testing.assert_close(found, expected, **CLOSE)
        assert torch.equal(a.features.argmax, b.features.argmax)
