"""Every recipe of conf/experiment: a short file that composes, passes the checks and trains, here
on a tiny target.
"""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose_config, run
from hydra.utils import get_object
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from eagle3.config import flatten
from eagle3.runs.resume import load_config

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"tiny"})
TRAINED = (  # every architecture and every mode
    "llama3-8b-sharegpt-online",
    "llama3-8b-sharegpt-offline",
    "qwen3-30b-a3b-sharegpt-offline",
    "qwen3-32b-sharegpt-capture",
)
GUIDE = {
    "model.path": "meta-llama/Llama-3.1-8B-Instruct",
    "data.max_length": 4096,
    "data.chat_template": "auto",
    "data.system_prompt": "llama2",
    "train.epochs": 2,
    "train.documents_per_update": 8,
    "train.max_grad_norm": 0.5,
    "optimizer.lr": 1e-4,
    "scheduler._target_": "eagle3.optim.cosine",
    "scheduler.warmup_ratio": 0.015,
    "draft.ttt_steps": 7,
    "draft.vocab_size": 32000,
    "draft.initial._target_": "eagle3.draft.initial.random",
    "target._target_": "eagle3.target.sglang.target.SGLangTarget",
    "launch.nproc_per_node": 8,
}
QWEN = {"model.path": "Qwen/Qwen3-30B-A3B", "launch.nproc_per_node": 8}
GUIDES = {
    "llama3-8b-sharegpt-online": GUIDE | {"data.path": "Aeala/ShareGPT_Vicuna_unfiltered"},
    "llama3-8b-perfectblend-online": GUIDE | {"data.path": "mlabonne/open-perfectblend"},
    "qwen3-32b-sharegpt-capture": {
        "model.path": "Qwen/Qwen3-32B",
        "data.max_length": 2048,
        "data.num_samples": 20,
        "stages": ["prepare", "capture"],
        "target.tp_size": 8,
        "launch.nproc_per_node": 8,
    },
    "qwen3-30b-a3b-sharegpt-capture": QWEN | {"target.tp_size": 4},
    "qwen3-30b-a3b-sharegpt-offline": QWEN
    | {
        "model.embedding_key": "model.embed_tokens.weight",
        "train.epochs": 4,
        "train.save_every": 1984,
        "optimizer.lr": 1e-4,
        "parallel.ulysses": 4,
        "parallel.ring": 1,
    },
}
ONE_STEP = [
    "device=cpu", "stages=[prepare,generate,capture,train,export]", "launch.nproc_per_node=1",
    "target=hf", "target.tp_size=1", "benchmark=builtin", "parallel=ddp", "parallel.ulysses=1",
    "data.subset=null", "data.split=train", "data.num_proc=1", "draft.vocab_size=300",
    "eval.num_prompts=2", "eval.max_new_tokens=8", "eval.batch_size=2",
    "train.tokens_per_step=8192", "train.max_steps=1", "train.log_every=1",
]  # fmt: skip
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 131072,
    "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def targets(tokenizer, tmp_path_factory):
    """An untrained target of every architecture that a recipe names, by the first part of the
    recipe's name.
    """
    folder = tmp_path_factory.mktemp("targets")
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    special["vocab_size"] = len(tokenizer)
    configs = {
        "llama3-8b": LlamaConfig(**SHAPE, **special),
        "qwen3-32b": Qwen3Config(**SHAPE, **special),
        "qwen3-30b-a3b": Qwen3MoeConfig(**SHAPE, **EXPERTS, **special),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def tiny(targets, tmp_path_factory):
    """A function: the recipe's name -> overrides that put a tiny target and a small file in the
    recipe's place.
    """
    folder = tmp_path_factory.mktemp("experiments")
    words = ("alpha", "beta", "gamma", "delta", "open", "file", "return", "value", "list", "path")
    rows = [
        {
            "id": f"row_{i}",
            "conversations": [
                {"from": "human", "value": f"Say {words[i % 10]} and {words[i // 2]} {i}."},
                {"from": "gpt", "value": " ".join(words[(i * j) % 10] for j in range(3, 25))},
            ],
        }
        for i in range(14)
    ]
    (folder / "sharegpt.json").write_text(json.dumps(rows))

    def overrides(experiment):
        name = next(name for name in os.listdir(targets) if experiment.startswith(name))
        return [
            f"experiment={experiment}",
            *ONE_STEP,
            f"model.path={targets / name}",
            f"data.path={folder / 'sharegpt.json'}",
            f"cache_dir={folder / 'cache'}",
        ]

    return overrides


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipes_are_small_deltas_that_compose(experiment):
    lines = (FOLDER / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 15
    config = load_config(compose_config(f"experiment={experiment}"), Path("nowhere"), [])
    stored = "offline" in experiment or "capture" in experiment
    assert get_object(config.mode["_target_"]).captures == stored


@pytest.mark.parametrize("experiment", GUIDES)
def test_recipes_hold_the_values_of_the_guides(experiment):
    values = flatten(compose_config(f"experiment={experiment}"))
    assert {key: values[key] for key in GUIDES[experiment]} == GUIDES[experiment]


def test_the_commands_of_the_guides_page_compose():
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "guides.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ours = [shlex.split(line)[2:] for line in commands if line.startswith("python run.py ")]
    assert len(ours) > 5
    for overrides in ours:
        compose_config(*overrides)
    (written_out,) = (overrides for overrides in ours if "target=sglang" in overrides)
    short = compose_config("experiment=llama3-8b-sharegpt-online")
    assert flatten(compose_config(*written_out)) == flatten(short)


@pytest.mark.runs
@pytest.mark.parametrize("experiment", TRAINED)
def test_recipes_train(experiment, tiny, tmp_path):
    run(tiny(experiment), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (row for row in rows if "loss" in row)
    assert trained["step"] == 1 and trained["supervised_tokens"] > 0
    assert load_file(tmp_path / "draft" / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    shape = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert shape["architectures"] == ["LlamaForCausalLMEagle3"]
    assert shape["max_position_embeddings"] == 131072
