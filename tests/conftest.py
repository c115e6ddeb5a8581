"""Marks that the default run leaves out, and small targets that several files share."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle3.config import HiddenStates, Model
from eagle3.target.spec import TargetSpec, read_spec

ROOT = Path(__file__).parent.parent
TINY = ROOT / "eagle3" / "tiny"

os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)  # of small tensors a second thread makes nothing faster


def spec_of(path, layers=None, dtype="float32", **model) -> TargetSpec:
    """The target in a folder, as `model.path=...` names it."""
    return read_spec(Model(path=str(path), aux_layer_ids=layers, dtype=dtype, **model))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests that take minutes")
    parser.addoption("--gpu", action="store_true", help="also the tests that need a CUDA device")
    parser.addoption(
        "--engines", action="store_true", help="also the tests that serve with SGLang and vLLM"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in ("slow", "gpu", "engines"):
            if mark in item.keywords and not config.getoption(f"--{mark}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{mark}"))


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "target")


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory, tokenizer) -> Path:
    """An untrained Llama of 8 layers x 64 with the tiny tokenizer, saved as a user's target would
    be.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("target")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
