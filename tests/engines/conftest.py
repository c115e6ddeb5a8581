"""Servers of SGLang and vLLM on this CPU in fp32, the targets they serve and a trained draft."""

import os
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, run_command
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from eagle3.engines.server import Server, choose_port

# Without these SGLang takes most of the memory, or plain attention that cannot draft.
SGLANG_ON_CPU = [
    "--device", "cpu", "--mem-fraction-static", "0.2", "--max-total-tokens", "8192",
    "--context-length", "2048", "--disable-cuda-graph", "--prefill-attention-backend", "intel_amx",
    "--decode-attention-backend", "intel_amx", "--speculative-draft-attention-backend", "intel_amx",
]  # fmt: skip
VLLM_ON_CPU = ["--max-model-len", "2048", "--enforce-eager"]
CPU_ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/engines/sgl_kernel_cpu'}",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engines)
            item.add_marker(pytest.mark.runs)


def interpreter(engine):
    python = Path(os.environ.get("ENGINES_DIR", ROOT)) / f".venv-{engine}" / "bin" / "python"
    if not python.exists():
        how = f"make it with launch/engines.sh {engine}, or set ENGINES_DIR"
        pytest.fail(f"{python} does not exist: {how}")
    return str(python)


@pytest.fixture(scope="session")
def sglang_python():
    return interpreter("sglang")


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """serve(engine, model, *options): a context with the running server, which has a `url`."""

    @contextmanager
    def serve(engine, model, *options):
        port, log = str(choose_port(None, "port")), tmp_path_factory.mktemp(engine) / "server.log"
        command = [interpreter(engine), "-m"]
        if engine == "sglang":
            command += ["sglang.launch_server", "--model-path", str(model), *SGLANG_ON_CPU]
        else:
            command += ["vllm.entrypoints.openai.api_server", "--model", str(model), *VLLM_ON_CPU]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", port, *options]
        url = f"http://127.0.0.1:{port}"
        with Server(command, url, CPU_ENVIRONMENT, log, 900, engine) as server:
            yield server

    return serve


def ask(server, path, body):
    response = httpx.post(server.url + path, json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()


SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}


@pytest.fixture(scope="session", params=CONFIGS)
def random_target(request, tokenizer, tmp_path_factory):
    """An untrained target of each family, 8 layers x 64 in fp32: fewer than 7 would give two
    auxiliary layers.
    """
    torch.manual_seed(0)
    shape = SHAPE | (EXPERTS if request.param == "qwen3_moe" else {})
    shape |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CONFIGS[request.param](**shape, bos_token_id=None)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained_draft(tmp_path_factory):
    return train_draft(tmp_path_factory.mktemp("trained"))


def train_draft(folder, *overrides):
    """A draft of 60 updates on the embedded target, which the induction start makes useful."""
    few = ["train.max_steps=60", "train.eval_every=60"]
    few += ["eval.num_prompts=2", "eval.max_new_tokens=32"]
    folders = [f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}"]
    done = run_command(
        "stages=[prepare,generate,train,export]", *few, *folders, *overrides, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run" / "draft"
