"""target=sglang against a stand-in for the engine that calls our hook: order, parts, faults,
lifetime, memory.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, spec_of
from test_pipeline import SMALL, losses, run, run_command
from transformers import OPTConfig

from eagle3.batch import Document, Features, pack, serving
from eagle3.config import Model
from eagle3.errors import ConfigError, RunError
from eagle3.evaluate import GREEDY, sample
from eagle3.target.hf import HFTarget, head_statistics
from eagle3.target.layers import engines_default, numbered_by
from eagle3.target.sglang import serve
from eagle3.target.sglang import target as target_module
from eagle3.target.sglang.blocks import PREFIX, SHARED, Blocks
from eagle3.target.sglang.hook import ALIVE, Tap, statistics
from eagle3.target.sglang.target import SGLangTarget
from eagle3.target.spec import default_aux_layer_ids

CPU = torch.device("cpu")
FAKE = ROOT / "tests" / "fake_sglang"


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """SGLang for this interpreter is the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKE))
        patch.setattr(target_module, "SILENT_SECONDS", 0.3)
        yield


@pytest.fixture(scope="module")
def reference(target_folder):
    return HFTarget(spec_of(target_folder), CPU)


@pytest.fixture(scope="module")
def target(target_folder, stand_in):
    made = SGLangTarget(spec_of(target_folder), CPU, batch_tokens=64)
    yield made
    made.close()


@pytest.fixture
def behave(target):
    """Set how the stand-in behaves, until the test is over."""
    with httpx.Client(base_url=target.url, trust_env=False) as client:
        yield lambda **how: client.post("/fake", json=how).raise_for_status()
        client.post("/fake", json={"chunk": 1 << 30, "silent": False, "skip": 0})
    target.blocks.clear()


def documents(lengths, vocab_size):
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]
    return [(i, ids, torch.arange(len(ids)) >= len(ids) // 2) for i, ids in enumerate(made)]


def batch_of(target, lengths):
    everything = torch.ones(target.config.vocab_size, dtype=torch.bool)
    return pack(
        [Document(*d) for d in documents(lengths, target.config.vocab_size)], everything, 7, serving
    )


def assert_equal(features, expected):
    torch.testing.assert_close(
        features.aux_hidden_states, expected.aux_hidden_states, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        features.last_hidden_states, expected.last_hidden_states, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(features.logsumexp, expected.logsumexp, rtol=1e-4, atol=1e-5)
    assert torch.equal(features.argmax, expected.argmax)


@pytest.mark.parametrize("chunk", [1 << 30, 7], ids=["whole", "in parts"])
def test_features_equal_those_of_transformers(target, reference, behave, chunk):
    behave(chunk=chunk)
    batch = batch_of(target, [13, 1, 30, 7, 64, 2, 90, 21])
    assert_equal(target(batch), reference(batch))
    assert not list(target.blocks.folder.glob("*.safetensors")), "what was read is deleted"


def test_at_most_batch_tokens_are_in_flight(target, monkeypatch):
    asked = []
    ask = target.ask
    monkeypatch.setattr(
        target, "ask", lambda body: asked.append(list(map(len, body["input_ids"]))) or ask(body)
    )
    target(batch_of(target, [40, 20, 30, 90, 5, 6]))
    assert asked == [[40, 20], [30], [90], [5, 6]]


def test_generation_equals_transformers(target, reference):
    prompts = [ids.tolist() for _, ids, _ in documents([5, 12, 9], target.config.vocab_size)]
    assert sample(target, prompts, 10, GREEDY) == sample(reference, prompts, 10, GREEDY)
    assert target.eos_token_ids == reference.eos_token_ids
    assert torch.equal(target.embedding, reference.embedding) and torch.equal(
        target.head, reference.head
    )


def test_a_silent_hook_is_told(target, behave):
    behave(silent=True)
    with pytest.raises(RunError, match=r"no hidden states came .* forward hook does not fire"):
        target(batch_of(target, [9, 4]))


def test_a_prefix_cache_is_told(target, behave):
    behave(skip=3)
    with pytest.raises(RunError, match=r"computed tokens 3 to .* prefix cache is on"):
        target(batch_of(target, [9, 14]))


def test_a_refused_request_is_told(target):
    batch = batch_of(target, [9])
    batch.input_ids[3] = 10**6
    with pytest.raises(RunError, match=r"HTTP 400.*out of the vocabulary"):
        target(batch)


def test_another_client_shares_the_server(target, target_folder, reference):
    other = SGLangTarget(spec_of(target_folder), CPU, url=target.url)
    batch = batch_of(target, [13, 30, 7])
    assert_equal(other(batch), reference(batch))
    with pytest.raises(RunError, match=r"captures layers \[1, 3, 4\], not \[0, 2, 6\]"):
        SGLangTarget(spec_of(target_folder, [0, 2, 6]), CPU, url=target.url)
    folder = other.blocks.folder
    other.close()
    assert not folder.exists() and target.server.process.poll() is None


def test_processes_of_one_launcher_share_a_server(target, target_folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    (target.blocks.folder / f"serves-{os.getppid()}").write_text(target.url)
    second = SGLangTarget(spec_of(target_folder), CPU)
    assert second.url == target.url and second.server is None
    second.close()


@pytest.mark.parametrize("wrong", ["head", "layer"])
def test_the_probe_finds(target, target_folder, monkeypatch, wrong):
    if wrong == "head":
        monkeypatch.setattr(SGLangTarget, "head", property(lambda self: -self.weights.head))
        with pytest.raises(RunError, match="are not its logits"):
            target.prove()
    else:
        monkeypatch.setattr(target, "aux_layer_ids", [2, 3, 4])
        with pytest.raises(
            RunError, match="captured the output of layer 1 where layer 2 was asked for"
        ):
            target.prove()


def write_chat(folder):
    turns = [(f"Say {i}", f"{i} " * 12) for i in range(24)]
    rows = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in turns
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={folder / 'chat.jsonl'}"


@pytest.mark.slow
def test_two_processes_start_one_server_and_leave_nothing(target_folder, tmp_path):
    before = set(SHARED.iterdir())
    own = [
        "target=sglang",
        "mode=offline",
        "launch.nproc_per_node=2",
        "stages=[prepare,generate,capture]",
    ]
    settings = [
        *SMALL,
        f"model.path={target_folder}",
        write_chat(tmp_path),
        f"cache_dir={tmp_path / 'cache'}",
    ]
    done = run_command(*settings, *own, f"hydra.run.dir={tmp_path / 'run'}", timeout=500)
    assert done.returncode == 0, done.stderr
    assert "capture: 2" in done.stdout
    assert not [path for path in set(SHARED.iterdir()) - before if path.name.startswith(PREFIX)]


def test_online_and_offline_train_as_with_transformers(target, target_folder, tmp_path):
    settings = [*SMALL, f"model.path={target_folder}", write_chat(tmp_path), "train.max_steps=2"]
    settings += ["hidden_states.dtype=fp32", "eval.num_prompts=1", "benchmark=builtin"]
    online, offline = "stages=[prepare,generate,train]", "stages=[prepare,generate,capture,train]"
    theirs = ["target=sglang", f"target.url={target.url}", f"cache_dir={tmp_path / 'sglang'}"]
    run([*settings, f"cache_dir={tmp_path / 'hf'}", online], tmp_path / "a")
    run([*settings, *theirs, online], tmp_path / "b")
    run([*settings, *theirs, "mode=offline", offline], tmp_path / "c")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-4)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "c"), rel=1e-4)
    with pytest.raises(
        ConfigError, match=r"the built-in benchmark needs .* target=hf .* benchmark=sglang"
    ):
        run([*settings, *theirs], tmp_path / "d")


def head_shard(head, first, size, padding):
    """A tensor parallel head's rows [first, first + size), padded with rows that are no tokens."""
    weight = torch.cat([head[first : first + size], head.new_full((padding, head.shape[1]), 9.0)])
    shard = SimpleNamespace(org_vocab_start_index=first, num_org_elements=size)
    return SimpleNamespace(weight=weight, tp_size=2, shard_indices=shard)


def reduce_on(rank, folder, shards):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    last, head = torch.load(folder / "inputs.pt")
    for number, (first, size, padding) in enumerate(shards[rank]):
        found = statistics(last, head_shard(head, first, size, padding), dist.group.WORLD)
        torch.save(found, folder / f"{number}_{rank}.pt")
    dist.destroy_process_group()


def test_statistics_of_a_split_head(tmp_path):
    """Also where a process has no token at all, and where the best logit stands twice."""
    torch.manual_seed(0)
    head, last = torch.randn(100, 8), torch.randn(17, 8)
    head[70] = head[5] = 3 * last[0]
    torch.save((last, head), tmp_path / "inputs.pt")
    shards = [[(0, 64, 0), (0, 100, 28)], [(64, 36, 28), (100, 0, 64)]]
    torch.multiprocessing.start_processes(
        reduce_on, (tmp_path, shards), nprocs=2, start_method="fork"
    )
    argmax, logsumexp = head_statistics(last, head)
    assert argmax[0] == 5
    for number in range(2):
        for rank in range(2):
            token, lse = torch.load(tmp_path / f"{number}_{rank}.pt")
            assert torch.equal(token, argmax)
            torch.testing.assert_close(lse, logsumexp)


def test_the_hook_never_raises_and_reports():
    """Requests of others are passed over; what is wrong with ours is the client's to hear."""
    blocks = Blocks()
    tap = Tap(SHARED, lambda: None)
    forward = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        rids=["HEALTH_CHECK_1", "eagle3-nobody:3"],
        extend_seq_lens_cpu=[2, 3],
        extend_prefix_lens_cpu=[0, 0],
    )
    head = SimpleNamespace(weight=torch.randn(9, 4))
    last = torch.randn(5, 4)
    tap(None, (None, last, head, forward, [last] * 3), None)
    tap(None, (None, None), None)
    for aux, sentence in (
        (None, "gave no auxiliary"),
        ([last] * 2, "captured 2 auxiliary hidden states, not 3"),
    ):
        forward.rids = ["other", blocks.rid(0)]
        tap(None, (None, last, head, forward, aux), None)
        with pytest.raises(RunError, match=sentence):
            blocks.wait(lambda: pytest.fail("nothing was reported"))
    blocks.close()


def test_one_pass_may_serve_two_clients():
    """Neither sees the other's rows, nor those of requests that are nobody's; bf16 arrives bit for
    bit.
    """
    first, second = Blocks(), Blocks()
    lengths = [2, 3, 1, 4]
    forward = SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        rids=[first.rid(0), second.rid(0), "other", first.rid(1)],
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=[0, 0, 0, 0],
    )
    torch.manual_seed(0)
    head = SimpleNamespace(weight=torch.randn(9, 4).bfloat16())
    last, *aux = torch.randn(4, 10, 4).bfloat16()
    Tap(SHARED, lambda: None)(None, (None, last, head, forward, aux), None)
    argmax, logsumexp = head_statistics(last, head.weight)
    for blocks, rows in ((first, [6, 7, 8, 9, 0, 1]), (second, [2, 3, 4])):
        features = Features(
            torch.empty(len(rows), 12).bfloat16(), torch.empty(len(rows), 4).bfloat16(),
            torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows)),
        )  # fmt: skip
        blocks.collect(
            {1: slice(0, 4), 0: slice(4, 6)} if blocks is first else {0: slice(0, 3)},
            features,
            list,
        )
        assert torch.equal(features.aux_hidden_states, torch.cat(aux, 1)[rows])
        assert torch.equal(features.last_hidden_states, last[rows])
        assert torch.equal(features.argmax, argmax[rows]) and torch.allclose(
            features.logsumexp, logsumexp[rows]
        )
        blocks.close()


def test_layers_in_every_convention():
    """The numbers for 32 layers, as each tool writes them."""
    ours = default_aux_layer_ids(32)
    assert ours == numbered_by("sglang", ours) == numbered_by("tensorrt_llm", ours) == [1, 15, 28]
    assert numbered_by("vllm", ours) == numbered_by("hidden_states", ours) == [2, 16, 29]
    assert len(set(engines_default(6))) == 2, (
        "two of the three coincide: such targets must be asked explicitly"
    )


def asked_for(server_args=(), layer_ids=(1, 15, 28)):
    return serve.command(
        "model", 1, list(layer_ids), 32, CPU, "float32", server_args=tuple(server_args)
    )


def test_explicit_layers_only_where_the_default_is_not_meant():
    flag = "--return-aux-hidden-state-layer-ids"
    assert flag not in asked_for()
    line = asked_for(layer_ids=(0, 15, 28))
    assert line[line.index(flag) + 1 :][:3] == ["0", "15", "28"]


def test_what_cannot_work_is_told_before_anything_starts(target_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"server_args: --pp-size=2 does not go with"):
        asked_for(["--pp-size=2"])
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"hides the hidden states of OPTForCausalLM"):
        serve.check_capturable(str(tmp_path), None, False, [1, 3, 4])
    with pytest.raises(ConfigError, match=r"behind layer 7 is none"):
        serve.check_capturable(str(target_folder), None, False, [0, 1, 7])
    with pytest.raises(ConfigError, match=r"batch_tokens=\d+ needs .* GB of shared memory"):
        SGLangTarget(spec_of(target_folder, dtype="auto"), CPU, batch_tokens=10**12)
    monkeypatch.delenv("PYTHONPATH")
    with pytest.raises(ConfigError, match=r"sglang is not installed .* target\.python"):
        SGLangTarget.check_settings({}, Model(path=str(target_folder)))


HOLDER = """
import sys, time
from pathlib import Path
from eagle3.engines.server import Server, choose_port
from eagle3.target.sglang.blocks import Blocks
blocks, port = Blocks(), choose_port(None, "port")
command = [sys.executable, "-c", sys.argv[1], str(port), str(blocks.folder)]
(blocks.folder / "00-1.safetensors").write_bytes(bytes(10**6))
with Server(command, f"http://127.0.0.1:{port}", {}, Path(sys.argv[2]), 100, "/") as server:
    print(blocks.folder, server.process.pid, flush=True)
    time.sleep(1000)
"""
ENGINE = """
import http.server, pathlib, sys
from eagle3.target.sglang.hook import Tap, sglang_group
folder = pathlib.Path(sys.argv[2])
Tap(folder.parent, sglang_group).watch(folder)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def gone_within(seconds, what):
    until = time.monotonic() + seconds
    while what():
        assert time.monotonic() < until, "still there"
        time.sleep(0.05)


def test_nothing_outlives_a_killed_run(tmp_path):
    """SIGKILL: the engine ends and the shared memory is free, though nobody could clean up."""
    command = [sys.executable, "-c", HOLDER, ENGINE, str(tmp_path / "log")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as holder:
        folder, pid = holder.stdout.readline().split()
        assert Path(folder).is_dir() and Path("/proc", pid).exists()
        holder.send_signal(signal.SIGKILL)
    gone_within(3, Path(folder).exists)
    gone_within(15, Path("/proc", pid).exists)


def test_folders_of_the_dead_are_deleted_and_those_of_the_living_kept(tmp_path):
    mine = Blocks(tmp_path)
    (dead := tmp_path / f"{PREFIX}dead").mkdir()
    (dead / ALIVE).touch()
    (tmp_path / "other").mkdir()
    again = Blocks(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine.folder, again.folder, tmp_path / "other"])
    del again
    assert sorted(tmp_path.iterdir()) == sorted([mine.folder, tmp_path / "other"])


def test_a_server_that_dies_is_noticed(target):
    """The last one here, for it ends the server that all share."""
    children = Path(
        f"/proc/{target.server.process.pid}/task/{target.server.process.pid}/children"
    ).read_text()
    os.kill(int(children.split()[0]), signal.SIGKILL)
    began = time.monotonic()
    try:
        target(batch_of(target, [9, 30]))
        pytest.fail("nothing was noticed")
    except RunError as error:
        assert re.search(r"SGLang ended with exit code 137[\s\S]*the stand-in is ready", str(error))
        assert time.monotonic() - began < 5
        target.close()
    assert not target.blocks.folder.exists()
    assert target.server.log.exists(), "the error names it"
    target.server.log.unlink()
