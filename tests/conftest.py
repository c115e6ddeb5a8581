"""Marks that the default run leaves out, small targets, and runs as users start them."""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle3.batch import serving
from eagle3.checks import check
from eagle3.config import HiddenStates, Model
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import EAGLE3
from eagle3.export.write import portable_config, speculators_config, write_draft
from eagle3.loss import Powers, SoftTargetLoss, kl
from eagle3.parallel.ranks import set_up_process
from eagle3.pipeline import run_pipeline
from eagle3.runs.progress import Progress
from eagle3.runs.resume import load_config
from eagle3.target.handle import TargetHandle
from eagle3.target.spec import TargetSpec, read_spec

ROOT = Path(__file__).parent.parent
TINY = ROOT / "eagle3" / "tiny"
TRAIN_ONLY = "stages=[prepare,generate,train]"
SMALL = [
    "model=hf", "model.dtype=float32", "data=jsonl", "data.max_length=96", "draft.vocab_size=300",
    "draft.ttt_steps=3", "eval.num_prompts=3", "eval.max_new_tokens=12", "eval.draft_length=3",
    "train.tokens_per_step=192", "train.max_steps=6", "train.epochs=9", "train.log_every=1",
    "train.eval_every=2", "train.save_every=2", "optimizer.lr=1e-3", "benchmark.max_new_tokens=8",
    "benchmark.suites=[heldout:2]", "benchmark.configs=[[1,3,1,4]]",
]  # fmt: skip
SHAPE = {  # of a tiny target
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # of small tensors a second thread makes nothing faster
UNSHOWN = Progress("regenerate", None, "rows", shown=False)


def pytest_addoption(parser):
    for option, what in (
        ("--fast", "only what starts no run and no process"),
        ("--slow", "also the tests that take minutes"),
        ("--gpu", "also the tests that need a CUDA device"),
        ("--engines", "also the tests that serve with SGLang and vLLM"),
    ):
        parser.addoption(option, action="store_true", help=what)


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in ("slow", "gpu", "engines"):
            if mark in item.keywords and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{mark}"))
        # Read where triton is imported, which torch does by itself.
        if "triton" in item.keywords and "TRITON_INTERPRET" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs Triton, and TRITON_INTERPRET=1"))
    if config.getoption("--fast"):
        config.hook.pytest_deselected(items=[item for item in items if "runs" in item.keywords])
        items[:] = [item for item in items if "runs" not in item.keywords]


@pytest.fixture(autouse=True)
def no_processes_unless_marked(request, monkeypatch):
    """What starts a process carries the mark `runs`, or --fast would not be what it says."""
    if "runs" in request.keywords:
        return

    def refuse(*args, **kwargs):
        pytest.fail("this test starts a process: give it the mark `runs`")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


def spec_of(path, layers=None, dtype="float32", **model) -> TargetSpec:
    """The target in a folder, as `model.path=...` names it."""
    given = {"revision": None, "trust_remote_code": False, "embedding_key": None}
    given |= {"lm_head_key": None} | model
    return read_spec(Model(path=str(path), aux_layer_ids=layers, dtype=dtype, **given))


def soft_target_loss(
    pointwise=kl, gamma=0.8, chunk_rows=1024, mask=serving, weights=Powers
) -> SoftTargetLoss:
    """The loss with the values that conf/loss has."""
    return SoftTargetLoss(pointwise, gamma, chunk_rows, mask, weights)


def handle_of(folder, layers=None, **section) -> TargetHandle:
    """The target in a folder by target=hf on the CPU."""
    section |= {"_target_": "eagle3.target.hf.HFTarget", "_partial_": True}
    return TargetHandle(spec_of(folder, layers), section, torch.device("cpu"))


def fit(draft, target, batch, updates, lr) -> None:
    """Train a draft on a batch with features of the target."""
    optimizer = torch.optim.AdamW(draft.parameters(), lr=lr)
    features, head = batch.features, target.head[draft.target_ids]
    for _ in range(updates):
        hidden = draft.unroll(target.embedding, features.aux_hidden_states, batch)
        output = soft_target_loss()(draft, hidden, features, batch, head)
        (output.loss / batch.normaliser).backward()
        optimizer.step()
        optimizer.zero_grad()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory, tokenizer) -> Path:
    """An untrained Llama of 8 layers x 64 with the tiny tokenizer, saved as a user's would be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(target_folder, tmp_path_factory):
    """Overrides for a run of seconds; the cache is shared, as it is between a user's runs."""
    folder = tmp_path_factory.mktemp("settings")
    path = write_jsonl(folder / "chat.jsonl", *sharegpt_rows(40))
    data = [f"data.path={path}", f"cache_dir={folder / 'cache'}"]
    return [*SMALL, f"model.path={target_folder}", *data]


def sharegpt_rows(count):
    words = ("alpha", "beta", "gamma", "delta", "open", "file", "return", "value", "list", "path")
    for i in range(count):
        question = f"Say {words[i % 10]} and {words[i // 4]} {i}."
        answer = " ".join(words[(i * j) % 10] for j in range(3, 25))
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield {"id": f"row_{i}", "conversations": said}


def compose_config(*overrides: str) -> DictConfig:
    """What a command line comes to; `name`, which asks the running hydra, is `test`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("run", overrides=["name=test", *overrides])


@functools.cache
def default_config() -> DictConfig:
    return compose_config("model=hf", "model.path=x")


def section(name: str, **changes):
    """A typed section with its defaults of conf/, such as section("data", max_length=160)."""
    composed = default_config()
    return dataclasses.replace(OmegaConf.to_object(composed[name]), **changes)


def make_config(overrides, run_dir):
    """The config of a run in `run_dir`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    return load_config(compose_config(*overrides), run_dir, overrides)


def as_sent(run_dir, *overrides, **changes):
    """A run folder with a checkpoint, whose run.json has other values, by dotted key."""
    config = dataclasses.asdict(load_config(compose_config(*overrides), run_dir, []))
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = value
    (run_dir / "checkpoints" / "last").mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"config": config}))


def run(overrides, run_dir):
    """A run in this process; returns its acceptance length."""
    config = make_config(overrides, run_dir)
    check(config)
    set_up_process(config)
    return run_pipeline(config, run_dir, overrides, begin=lambda: None)


def run_command(*overrides, script=ROOT / "run.py", **options):
    """A run as a command, to its end."""
    command = [sys.executable, str(script), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    given = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment} | options
    return subprocess.run(command, **given)


# run.py, whose ranks wait before the update after `{0}` until a signal comes: however slow those
# who send it are, the run is not over before.
PAUSED = """
import time
from contextlib import contextmanager
from eagle3 import train

note_signals, train_update = train.note_signals, train.Trainer.train_update

@contextmanager
def noted(*given):
    with note_signals(*given) as noted.received:
        yield noted.received

def paused(self, *given, **named):
    while self.update >= {0} and not noted.received["signal"]:
        time.sleep(0.02)
    return train_update(self, *given, **named)

train.note_signals, train.Trainer.train_update = noted, paused
if __name__ == "__main__":
    exec(compile(open("run.py").read(), "run.py", "exec"))
"""


def start_command(overrides, run_dir, pause_at=None):
    """A run in the background, whose processes are a group of their own."""
    script = ROOT / "run.py"
    if pause_at is not None:
        script = run_dir.parent / f"{run_dir.name}_paused.py"
        script.write_text(PAUSED.format(pause_at))
    command = [sys.executable, str(script), *overrides, f"hydra.run.dir={run_dir}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment, **pipes)


def wait_for(condition, process, seconds=400):
    """Until `condition()` holds; fails when the process ends before, and leaves none behind."""
    give_up = time.monotonic() + seconds
    running = (None, -signal.SIGKILL)
    while not condition() and process.poll() in running and time.monotonic() < give_up:
        time.sleep(0.05)
    if not condition():
        kill_group(process)
        pytest.fail(process.communicate()[1][-3000:])


def kill_group(process):
    """End a started command and all of its processes, stopped ones too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def losses(run_dir):
    """Loss by update."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def stop_after(update, monkeypatch):
    """SIGINT arrives during the given update, as Ctrl-C would."""
    from eagle3.train import Trainer

    original = Trainer.train_update

    def train_update(self, *args, **kwargs):
        if self.update + 1 == update:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train_update", train_update)


@pytest.fixture(scope="session")
def exported(target_folder, tmp_path_factory) -> Path:
    """An untrained draft of `target_folder` on disk, as `portable` and as `speculators`."""
    target = spec_of(target_folder)
    torch.manual_seed(0)
    t2d, d2t = vocab_tensors(torch.randperm(2048)[:300].sort().values.numpy(), 2048)
    draft = EAGLE3(derive_config(target.config, 300), Auto, t2d, d2t)
    folder = tmp_path_factory.mktemp("exported")
    portable = portable_config(draft.config, target, str(target_folder), 3)
    write_draft(draft, folder / "portable", portable)
    write_draft(draft, folder / "speculators", speculators_config(portable, target))
    return folder


def block_draft(kind, target, **changed):
    """A drawn drafter of blocks of four for a small target."""
    whole = target.config.vocab_size
    shape = dataclasses.asdict(derive_config(target.config, whole))
    shape |= {"num_hidden_layers": 2, "block_size": 4, "mask_token_id": 7} | changed
    torch.manual_seed(2)
    maps = torch.ones(whole, dtype=torch.bool), torch.zeros(whole, dtype=torch.int64)
    draft = kind(**shape).build(Auto, *maps)
    for parameter in draft.parameters():  # which may start as zeros
        torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.1)
    return draft


def edit_model(folder, config=None, tensors=None) -> None:
    """Change config.json and the tensors of a draft or target in place; None removes a key of the
    config, "null" makes it null; `tensors` changes a dict of them, or returns another.
    """
    values = json.loads((folder / "config.json").read_text())
    for name, value in (config or {}).items():
        values.pop(name, None)
        if value is not None:
            values[name] = None if value == "null" else value
    (folder / "config.json").write_text(json.dumps(values))
    if tensors:
        named = load_file(folder / "model.safetensors")
        named = tensors(named) or named
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def in_another_process(function, *arguments) -> multiprocessing.Process:
    """Forked, as importing torch takes seconds; on one thread, as OpenMP's do not survive that."""

    def run():
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def hidden_states_section(path=None, dtype="fp32", max_disk=None, on_damage="fail"):
    return HiddenStates(path and str(path), dtype, max_disk, on_damage)


def flip(path: Path, place: float = 0.5) -> None:
    """Change a bit of the byte at an offset, or at a share (a float) of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)


def cut(path: Path, missing: int = 3) -> None:
    path.write_bytes(path.read_bytes()[:-missing])


def turns(*contents):
    """What a user and an assistant say in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


def write_jsonl(path, *rows) -> Path:
    """Rows, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_jsonl(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]
