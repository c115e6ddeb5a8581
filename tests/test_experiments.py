"""Every recipe of conf/experiment: a short file that composes, passes the checks and trains, here
on a tiny target.
"""

import json
import os
import re
import shlex

import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from eagle3 import config as configuration
from eagle3.checks import check
from eagle3.parallel.ranks import launch

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GUIDES = {
    "llama3-8b-sharegpt-online": "Aeala/ShareGPT_Vicuna_unfiltered",
    "llama3-8b-perfectblend-online": "mlabonne/open-perfectblend",
}
ONE_STEP = [
    "name=test",
    "device=cpu",
    "stages=[prepare,generate,capture,train,export]",
    "launch.nproc_per_node=1",
    "target=hf",
    "benchmark=builtin",
    "parallel=ddp",
    "parallel.ulysses=1",
    "target.tp_size=1",
    "data.subset=null",
    "data.split=train",
    "data.num_proc=1",
    "draft.vocab_size=300",
    "eval.num_prompts=2",
    "eval.max_new_tokens=8",
    "eval.batch_size=2",
    "train.tokens_per_step=8192",
    "train.max_steps=1",
    "train.log_every=1",
]


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("run", overrides=["name=test", *overrides])


SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 131072, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def targets(tokenizer, tmp_path_factory):
    """An untrained target of every architecture that a recipe names, by the first part of the
    recipe's name.
    """
    folder = tmp_path_factory.mktemp("targets")
    special = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
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
def test_recipes_are_small_deltas(experiment):
    lines = (FOLDER / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 15


@pytest.mark.parametrize("experiment", GUIDES)
def test_recipes_hold_the_values_of_the_guides(experiment, tmp_path):
    config = configuration.typed(composed(f"experiment={experiment}"), tmp_path, [])
    assert (
        config.model.path == "meta-llama/Llama-3.1-8B-Instruct"
        and config.data.path == GUIDES[experiment]
    )
    assert (config.data.max_length, config.data.chat_template, config.data.system_prompt) == (
        4096,
        "auto",
        "llama2",
    )
    assert (config.train.epochs, config.train.documents_per_update, config.optimizer["lr"]) == (
        2,
        8,
        1e-4,
    )
    assert (config.draft.ttt_steps, config.draft.vocab_size, config.train.max_grad_norm) == (
        7,
        32000,
        0.5,
    )
    assert (config.scheduler["_target_"], config.scheduler["warmup_ratio"]) == (
        "eagle3.optim.cosine",
        0.015,
    )
    assert (
        config.mode["_target_"] == "eagle3.hidden_states.supply.online"
        and config.launch.nproc_per_node == 8
    )
    assert config.target["_target_"] == "eagle3.target.sglang.target.SGLangTarget"
    assert config.draft.initial["_target_"] == "eagle3.draft.initial.random", (
        "nothing of the embedded model stays"
    )


def test_offline_recipes_hold_the_values_of_the_guides(tmp_path):
    config = configuration.typed(composed("experiment=qwen3-32b-sharegpt-capture"), tmp_path, [])
    assert (config.target["tp_size"], config.launch.nproc_per_node, config.data.num_samples) == (
        8,
        8,
        20,
    )
    assert (config.model.path, config.data.max_length, config.stages[-1]) == (
        "Qwen/Qwen3-32B",
        2048,
        "capture",
    )
    config = configuration.typed(
        composed("experiment=qwen3-30b-a3b-sharegpt-offline"), tmp_path, []
    )
    assert (config.model.path, config.model.embedding_key) == (
        "Qwen/Qwen3-30B-A3B",
        "model.embed_tokens.weight",
    )
    assert (config.train.epochs, config.optimizer["lr"], config.train.save_every) == (4, 1e-4, 1984)
    assert (config.parallel.ulysses, config.parallel.ring, config.launch.nproc_per_node) == (
        4,
        1,
        8,
    )
    for experiment in EXPERIMENTS:
        config = configuration.typed(composed(f"experiment={experiment}"), tmp_path, [])
        named = "offline" if "offline" in experiment or "capture" in experiment else "online"
        assert config.mode["_target_"] == f"eagle3.hidden_states.supply.{named}"


def test_the_commands_of_the_guides_page_compose():
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "guides.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ours = [shlex.split(line)[2:] for line in commands if line.startswith("python run.py ")]
    assert len(ours) > 5
    for overrides in ours:
        composed(*overrides)
    (written_out,) = (overrides for overrides in ours if "target=sglang" in overrides)
    long, short = composed(*written_out), composed("experiment=llama3-8b-sharegpt-online")
    assert configuration.flat(long) == configuration.flat(short)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipes_train(experiment, tiny, tmp_path):
    overrides = tiny(experiment)
    config = configuration.typed(composed(*overrides), tmp_path, overrides)
    check(config)
    launch(config, tmp_path, overrides)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (row for row in rows if "loss" in row)
    assert trained["step"] == 1 and trained["supervised_tokens"] > 0
    assert load_file(tmp_path / "draft" / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    shape = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (
        shape["architectures"] == ["LlamaForCausalLMEagle3"]
        and shape["max_position_embeddings"] == 131072
    )
