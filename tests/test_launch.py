"""Several processes through the one launcher, as users start them: what they write, and who is
heard when one fails.
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from eagle3.hidden_states.store import Store
from eagle3.runs.artefact import read_facts


@pytest.fixture(scope="module")
def experts(tokenizer, tmp_path_factory):
    """An untrained Qwen3-MoE that two processes can share."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def command(experts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    rows = [
        {"question": f"What is {i}?", "answer": "It is a number " * (1 + i % 5)} for i in range(24)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*overrides):
        given = [
            "model=hf", f"model.path={experts}", "model.dtype=float32",
            "data=jsonl", f"data.path={folder / 'chat.jsonl'}",
            "data.max_length=96", "data.num_proc=1", "draft.vocab_size=300", "eval.num_prompts=3", "eval.batch_size=3",
            "eval.max_new_tokens=8", "mode=offline", "hidden_states.dtype=fp32", "target.batch_tokens=200",
            f"cache_dir={folder / 'cache'}", "launch.threads=1", "name=test",
        ]  # fmt: skip
        return subprocess.run(
            [sys.executable, "run.py", *given, *overrides],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


def test_a_target_shared_by_two_processes_is_captured_alike(command, tmp_path):
    """One command for prepare, generate and capture; states of the shared target equal those of one
    process.
    """
    stages, stores = "stages=[prepare,generate,capture]", {}
    for name, more in {"one": [], "two": ["target.tp_size=2", "launch.nproc_per_node=2"]}.items():
        done = command(
            stages,
            f"hidden_states.path={tmp_path / name}",
            f"hydra.run.dir={tmp_path / name}_run",
            *more,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("capture: ") == 1, "one process speaks"
        stores[name] = Store(tmp_path / name)
    assert read_facts(tmp_path / "one") == read_facts(tmp_path / "two") and len(stores["one"]) == 21
    keys = stores["one"].keys.tolist()
    for one, two in zip(stores["one"].load(keys), stores["two"].load(keys), strict=True):
        assert torch.equal(one.input_ids, two.input_ids)
        assert torch.equal(one.features.argmax, two.features.argmax)
        for name in ("aux_hidden_states", "last_hidden_states", "logsumexp"):
            torch.testing.assert_close(
                getattr(one.features, name), getattr(two.features, name), rtol=1e-4, atol=1e-5
            )


@pytest.mark.slow
def test_two_processes_capture_what_one_does(command, tmp_path):
    for name, processes in {"one": 1, "two": 2}.items():
        done = command(
            "stages=[prepare,capture]",
            f"hidden_states.path={tmp_path / name}",
            f"launch.nproc_per_node={processes}",
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_first_error_is_what_users_see(command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    done = command(
        "stages=[prepare,capture]",
        f"hidden_states.path={tmp_path / 'other'}",
        "launch.nproc_per_node=2",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: hidden_states.path=")
