"""Marks that the default run leaves out, and small targets that several files share."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from eagle3.config import Model
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.export.write import MadeFor, write_draft, write_speculators
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


@pytest.fixture(scope="session")
def exported(target_folder, tmp_path_factory) -> Path:
    """An untrained draft of `target_folder` on disk, as `portable` and as `speculators`."""
    target = spec_of(target_folder)
    torch.manual_seed(0)
    t2d, d2t = vocab_tensors(torch.randperm(2048)[:300].sort().values.numpy(), 2048)
    draft = Draft(derive_config(target.config, 300), Auto, t2d, d2t)
    folder = tmp_path_factory.mktemp("exported")
    made_for = MadeFor(str(target_folder), 3)
    write_draft(draft, folder / "portable", target, made_for)
    write_speculators(draft, folder / "speculators", target, made_for)
    return folder


def edit_draft(folder, config=None, tensors=None) -> None:
    """Change config.json and the tensors of a draft in place; None removes a key of the config,
    "null" makes it null; `tensors` changes a dict of them, or returns another.
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
        save_file(contiguous, folder / "model.safetensors")
