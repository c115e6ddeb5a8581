"""target=sglang against a stand-in for the engine that calls our hook."""

import copy
import os
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TRAIN_ONLY, losses, run_command, spec_of
from transformers import OPTConfig

from eagle3.batch import Document, Features, pack, serving
from eagle3.errors import ConfigError, RunError
from eagle3.target.handle import TargetHandle
from eagle3.target.hf import HFTarget, head_statistics
from eagle3.target.layers import engines_default, numbered_by
from eagle3.target.sglang import blocks as blocks_module
from eagle3.target.sglang import hook
from eagle3.target.sglang import target as target_module
from eagle3.target.sglang.blocks import ALIVE, PREFIX, SHARED, Blocks
from eagle3.target.sglang.hook import Hook, statistics
from eagle3.target.sglang.target import SGLangTarget, log_path
from eagle3.target.weights import load_weights

pytestmark = pytest.mark.runs
CPU = torch.device("cpu")
FAKE = ROOT / "tests" / "fake_sglang"


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """SGLang for this interpreter is the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKE))
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
    for block in target.blocks.folder.glob("*.safetensors"):
        block.unlink()


def answered():
    """The reply to a request that is over."""
    reply = Future()
    reply.set_result(None)
    return reply


def random_prompts(target, lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(target.config.vocab_size, (n,), generator=generator) for n in lengths]


def batch_of(target, lengths):
    prompts = enumerate(random_prompts(target, lengths))
    documents = [Document(i, ids, torch.arange(len(ids)) >= len(ids) // 2) for i, ids in prompts]
    return pack(documents, torch.ones(target.config.vocab_size, dtype=torch.bool), 7, serving)


def assert_equal(features, expected):
    for name in ("aux_hidden_states", "last_hidden_states", "logsumexp"):
        ours, theirs = getattr(features, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(features.argmax, expected.argmax)


@pytest.mark.parametrize("chunk", [1 << 30, 7], ids=["whole", "in parts"])
def test_features_equal_those_of_transformers(target, reference, behave, chunk):
    behave(chunk=chunk)
    batch = batch_of(target, [13, 1, 30, 7, 64, 2, 90, 21])
    assert_equal(target(batch), reference(batch))
    assert not list(target.blocks.folder.glob("*.safetensors")), "what was read is deleted"


def test_generation_equals_transformers(target, reference):
    prompts = [ids.tolist() for ids in random_prompts(target, [5, 12, 9])]
    expected = reference.generate(prompts, 10)
    assert target.generate(prompts, 10) == expected
    waiting, passes = iter(enumerate(prompts)), []
    found = dict(target.answer(lambda: next(waiting, None), 2, 10, count=passes.append))
    assert [found[key] for key in range(3)] == expected
    assert sum(passes) == sum(map(len, expected))
    assert target.eos_token_ids == reference.eos_token_ids


def test_a_request_that_was_broken_off_is_no_answer(target, monkeypatch):
    meta = {"finish_reason": {"type": "abort", "message": "no room"}}
    monkeypatch.setattr(target, "post", lambda body: [{"output_ids": [5], "meta_info": meta}])
    with pytest.raises(RunError, match=r"^SGLang broke off a request: no room$"):
        target.generate([[1, 2]], 4)


FAULTS = [
    ({"silent": True}, r"no hidden states came .* forward hook does not fire"),
    ({"skip": 3}, r"computed tokens 3 to .* prefix cache is on"),
    ({}, r"HTTP 400.*out of the vocabulary"),
]


@pytest.mark.parametrize("how, sentence", FAULTS)
def test_faults_of_the_server(target, behave, monkeypatch, how, sentence):
    behave(**how)
    monkeypatch.setattr(blocks_module, "SILENT_SECONDS", 0.3)
    batch = batch_of(target, [9, 14])
    if not how:
        batch.input_ids[3] = 10**6
    with pytest.raises(RunError, match=sentence):
        target(batch)


def test_another_client_uses_the_server(target, target_folder, reference):
    other = SGLangTarget(spec_of(target_folder), CPU, url=target.url)
    batch = batch_of(target, [13, 30, 7])
    assert_equal(other(batch), reference(batch))
    with pytest.raises(RunError, match=r"captures layers \[1, 3, 4\], not \[0, 2, 6\]"):
        SGLangTarget(spec_of(target_folder, [0, 2, 6]), CPU, url=target.url)
    folder = other.blocks.folder
    other.close()
    assert not folder.exists() and target.server.process.poll() is None


def test_a_server_started_by_hand(target_folder, reference):
    """It is ended in order by SIGTERM."""
    command = [sys.executable, "-m", "eagle3.target.sglang.serve", str(target_folder)]
    command += ["--port", "0", "--device", "cpu", "--dtype", "float32", "--python", sys.executable]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        ready = server.stdout.readline()
        assert ready.startswith("ready: python run.py target=sglang target.url=")
        url = ready.partition("target.url=")[2].split()[0]
        client = SGLangTarget(spec_of(target_folder), CPU, url=url)
        batch = batch_of(client, [13, 30])
        assert_equal(client(batch), reference(batch))
        client.close()
        server.terminate()
    assert server.returncode == 143
    log_path(httpx.URL(url).port).unlink()


def test_another_head_or_layer_is_found(target, target_folder, monkeypatch):
    def negated(*args):
        weights = load_weights(*args)
        weights.head = -weights.head
        return weights

    with monkeypatch.context() as patch, pytest.raises(RunError, match="are not its logits"):
        patch.setattr(target_module, "load_weights", negated)
        target.verify()
    monkeypatch.setattr(target, "spec", spec_of(target_folder, [2, 3, 4]))
    monkeypatch.setattr(target_module, "verify_server", lambda *_: None)
    with pytest.raises(RunError, match="captured the output of layer 1 where layer 2 was asked"):
        target.verify()


COPIES = [(2, 3, 8, 3), (2, None, 8, 4), (2, None, 1, 1), (1, None, 4, 4), (16, None, 8, 1)]


@pytest.mark.parametrize("tp_size, given, processes, copies", COPIES)
def test_copies_of_the_model(target, monkeypatch, tp_size, given, processes, copies):
    """As many as the GPUs of the processes hold, where the config does not say."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    section = {"_target_": "eagle3.target.sglang.target.SGLangTarget"}
    section |= {"tp_size": tp_size, "dp_size": given}
    handle = TargetHandle(target.spec, section, CPU, processes)
    assert handle.section["dp_size"] == copies


def reduce_on(rank, folder, shards):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    last, head = torch.load(folder / "inputs.pt")
    first, size, padding = shards[rank]  # a tensor parallel head, padded with rows of no token
    weight = torch.cat([head[first : first + size], head.new_full((padding, 8), 9.0)])
    indices = SimpleNamespace(org_vocab_start_index=first, num_org_elements=size)
    split = SimpleNamespace(weight=weight, tp_size=2, shard_indices=indices)
    torch.save(statistics(last, split, dist.group.WORLD), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_statistics_of_a_split_head(tmp_path):
    """Also where the best logit stands twice."""
    torch.manual_seed(0)
    head, last = torch.randn(100, 8), torch.randn(17, 8)
    head[70] = head[5] = 3 * last[0]
    torch.save((last, head), tmp_path / "inputs.pt")
    arguments = tmp_path, [(0, 64, 0), (64, 36, 28)]
    torch.multiprocessing.start_processes(reduce_on, arguments, nprocs=2, start_method="fork")
    argmax, logsumexp = head_statistics(last, head)
    assert argmax[0] == 5
    for rank in range(2):
        token, lse = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(token, argmax)
        torch.testing.assert_close(lse, logsumexp)


def forward_batch(rids, lengths):
    mode, before = SimpleNamespace(is_extend=lambda: True), [0] * len(lengths)
    lengths = {"extend_seq_lens_cpu": lengths, "extend_prefix_lens_cpu": before}
    return SimpleNamespace(forward_mode=mode, rids=rids, **lengths)


def test_the_hook_never_raises_and_reports():
    """Requests of others are passed over; what is wrong with ours is the client's to hear."""
    blocks = Blocks()
    call = Hook({"root": SHARED, "num_layers": 3})
    head, last = SimpleNamespace(weight=torch.randn(9, 4)), torch.randn(5, 4)
    strangers = forward_batch(["HEALTH_CHECK_1", "eagle3-nobody:3"], [2, 3])
    call(None, (None, last, head, strangers, [last] * 3), None)
    call(None, (None, None), None)
    for aux in (None, [last] * 2):
        ours = forward_batch(["other", blocks.request_id(0)], [2, 3])
        call(None, (None, last, head, ours, aux), None)
        with pytest.raises(RunError, match="auxiliary hidden states"):
            blocks.wait(answered())
    blocks.close()


def test_a_block_that_cannot_be_written_is_reported(monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hook, "save_file", full)
    blocks = Blocks()
    hook.write_block(blocks.folder / "1.safetensors", {}, [], None)
    with pytest.raises(RunError, match="no space left"):
        blocks.wait(answered())
    blocks.close()
    hook.write_block(blocks.folder / "1.safetensors", {}, [], None)
    assert not blocks.folder.exists()


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_one_pass_may_serve_two_clients(layers):
    """Neither sees rows of the other, or of nobody's requests; bf16 arrives bit for bit."""
    first, second = Blocks(), Blocks()
    rids = [first.request_id(0), second.request_id(0), "other", first.request_id(1)]
    torch.manual_seed(0)
    head = SimpleNamespace(weight=torch.randn(9, 4).bfloat16())
    last, *aux = torch.randn(1 + layers, 10, 4).bfloat16()
    batch = forward_batch(rids, [2, 3, 1, 4])
    Hook({"root": SHARED, "num_layers": layers})(None, (None, last, head, batch, aux), None)
    argmax, logsumexp = head_statistics(last, head.weight)
    for blocks, prompts, rows in (
        (first, {1: range(0, 4), 0: range(4, 6)}, [6, 7, 8, 9, 0, 1]),
        (second, {0: range(0, 3)}, [2, 3, 4]),
    ):
        sizes = (torch.empty(len(rows), n, dtype=last.dtype) for n in (4 * layers, 4))
        argmaxes, sums = torch.empty(len(rows), dtype=torch.int64), torch.empty(len(rows))
        features = Features(*sizes, argmaxes, sums)
        blocks.receive(prompts, features, answered())
        assert torch.equal(features.aux_hidden_states, torch.cat(aux, 1)[rows])
        assert torch.equal(features.last_hidden_states, last[rows])
        assert torch.equal(features.argmax, argmax[rows])
        assert torch.allclose(features.logsumexp, logsumexp[rows])
        blocks.close()


def test_layers_in_every_convention():
    """The numbers for 32 layers, as each tool writes them."""
    ours = engines_default(32)
    assert ours == numbered_by("sglang", ours) == numbered_by("tensorrt_llm", ours) == [1, 15, 28]
    assert numbered_by("vllm", ours) == numbered_by("hidden_states", ours) == [2, 16, 29]
    assert len(set(engines_default(6))) == 2, "such targets must be asked explicitly"


@pytest.mark.parametrize(
    "layers, flagged",
    [([1, 3, 4], ""), ([0, 3, 4], "0 3 4"), ([0, 1, 3, 4, 6], "0 1 3 4 6"), ([4], "4")],
)
def test_explicit_layers_only_where_the_default_is_not_meant(target, tmp_path, layers, flagged):
    asked = copy.copy(target)
    asked.aux_layer_ids, asked.blocks = layers, SimpleNamespace(folder=tmp_path)
    command = " ".join(asked.describe_server().command)
    _, _, after = command.partition("--return-aux-hidden-state-layer-ids ")
    assert after.partition(" --")[0] == flagged and f'"num_layers": {len(layers)}' in command


def test_what_cannot_work_is_refused_before_anything_starts(target_folder, tmp_path, monkeypatch):
    spec, check = spec_of(target_folder), SGLangTarget.check_settings
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    layers = spec_of(target_folder, [0, 1, 7])
    for words, refused in {
        "server_args: --pp-size=2": lambda: SGLangTarget(spec, CPU, server_args=["--pp-size=2"]),
        r"batch_tokens=.* GB of /dev/shm": lambda: SGLangTarget(spec, CPU, batch_tokens=10**12),
        "hides the hidden states of OPTForCausalLM": lambda: check({}, spec_of(tmp_path)),
        "choose layers below 7": lambda: check({}, layers),
        r"target\.python": lambda: monkeypatch.delenv("PYTHONPATH") or check({}, spec),
    }.items():
        with pytest.raises(ConfigError, match=words):
            refused()
    check({"url": "http://127.0.0.1:1"}, spec)


def test_folders_of_the_dead_are_deleted_and_those_of_the_living_kept(tmp_path):
    mine = Blocks(tmp_path)
    (dead := tmp_path / f"{PREFIX}dead").mkdir()
    (dead / ALIVE).touch()
    (tmp_path / "other").mkdir()
    again = Blocks(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine.folder, again.folder, tmp_path / "other"])
    del again
    assert sorted(tmp_path.iterdir()) == sorted([mine.folder, tmp_path / "other"])


@pytest.mark.slow
def test_two_processes_train_as_with_transformers(settings, tmp_path):
    """Offline, from one server of the launcher; nothing is left in shared memory."""
    fewer = ["train.max_steps=2", "hidden_states.dtype=fp32", "train.documents_per_update=4"]
    engine = ["target=sglang", "mode=offline", "launch.nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{FAKE}"}
    before = set(SHARED.iterdir())
    capturing = [*engine, "stages=[prepare,generate,capture,train]"]
    for name, own in (("hf", [TRAIN_ONLY]), ("sglang", capturing)):
        folders = [f"cache_dir={tmp_path / name}.cache", f"hydra.run.dir={tmp_path / name}"]
        done = run_command(*settings, *fewer, *own, *folders, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "sglang") == pytest.approx(losses(tmp_path / "hf"), rel=1e-4)
    assert not [path for path in set(SHARED.iterdir()) - before if path.name.startswith(PREFIX)]


def test_a_server_that_dies_is_noticed(target, target_folder, monkeypatch):
    """The last one here, as it ends the server: told with the cause, and by another client."""
    monkeypatch.setattr(target_module, "DYING_SECONDS", 60)
    other = SGLangTarget(spec_of(target_folder), CPU, url=target.url)
    pid = target.server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    os.kill(int(children.split()[0]), signal.SIGKILL)
    batch = batch_of(target, [9, 30])
    with pytest.raises(RunError, match=r"does not answer any more .* its log is "):
        other(batch)
    other.close()
    try:
        target(batch)
        pytest.fail("nothing was noticed")
    except RunError as error:
        assert "exit code 137" in str(error) and "the stand-in is ready" in str(error)
        target.close()
    assert not target.blocks.folder.exists()
    log = log_path(httpx.URL(target.url).port)
    assert log.exists(), "the error names it"
    log.unlink()
