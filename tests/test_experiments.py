"""Every recipe of conf/experiment: a short file that composes, passes the checks and trains, here
on a tiny target.
"""

import json
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, block_draft, compose_config, losses, run, section, sharegpt_rows, spec_of
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from eagle3.config import flatten
from eagle3.draft.block import DSparkConfig
from eagle3.errors import ConfigError
from eagle3.export.write import portable_config, write_draft
from eagle3.runs.resume import load_config
from eagle3.train import build_draft

FOLDER = ROOT / "conf" / "experiment"
# Those of CPUs and of targets of one's own are no guide's; tests/test_config.py composes them.
OWN = {"tiny", "smollm2-135m", "finetuned"}
EXPERIMENTS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - OWN)
GUIDE = {
    "model.path": "meta-llama/Llama-3.1-8B-Instruct", "data.max_length": 4096,
    "data.chat_template": "auto", "data.system_prompt": "llama2", "train.epochs": 2,
    "train.documents_per_update": 8, "train.max_grad_norm": 0.5, "optimizer.lr": 1e-4,
    "scheduler._target_": "eagle3.optim.cosine", "scheduler.warmup_ratio": 0.015,
    "draft.ttt_steps": 7, "draft.vocab_size": 32000,
    "draft.initial._target_": "eagle3.draft.initial.random",
    "target._target_": "eagle3.target.sglang.target.SGLangTarget", "launch.nproc_per_node": 8,
}  # fmt: skip
QWEN = {"model.path": "Qwen/Qwen3-30B-A3B", "launch.nproc_per_node": 8}
GUIDES = {
    "llama3-8b-sharegpt-online": GUIDE | {"data.path": "Aeala/ShareGPT_Vicuna_unfiltered"},
    "llama3-8b-perfectblend-online": GUIDE | {"data.path": "mlabonne/open-perfectblend"},
    "qwen3-32b-sharegpt-capture": {
        "model.path": "Qwen/Qwen3-32B", "data.max_length": 2048, "data.num_samples": 20,
        "stages": ["prepare", "capture"], "target.tp_size": 8, "launch.nproc_per_node": 8,
    },
    "qwen3-30b-a3b-sharegpt-capture": QWEN | {"target.tp_size": 4},
    "qwen3-30b-a3b-sharegpt-offline": QWEN | {
        "model.embedding_key": "model.embed_tokens.weight", "train.epochs": 4,
        "train.save_every": 1984, "optimizer.lr": 1e-4, "parallel.ulysses": 4, "parallel.ring": 1,
    },
    "llama3.3-70b": {
        "model.path": "meta-llama/Llama-3.3-70B-Instruct", "target.tp_size": 8,
        "benchmark.tp_size": 8, "data.max_length": 4096, "launch.nproc_per_node": 8,
    },
    "qwen3-8b": {"model.path": "Qwen/Qwen3-8B", "target.tp_size": 1, "benchmark.tp_size": 1},
    "qwen3-32b": {"model.path": "Qwen/Qwen3-32B", "target.tp_size": 4, "benchmark.tp_size": 4},
    "qwen3-30b-a3b": QWEN | {"target.tp_size": 4, "benchmark.tp_size": 4},
}  # fmt: skip
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
    "initializer_range": 0.1, "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA, QWEN3 = LlamaConfig(**SHAPE), Qwen3Config(**SHAPE)
MIXTURE = Qwen3MoeConfig(**SHAPE, **EXPERTS)
# By command line: every architecture and every mode, and the others too where there is time.
TRAINED = {
    "llama3-8b-sharegpt-online": LLAMA,
    "llama3-8b-sharegpt-offline": LLAMA,
    "qwen3-30b-a3b-sharegpt-offline": MIXTURE,
    "qwen3-32b-sharegpt-capture": QWEN3,
}
SLOWLY = {
    "llama3-8b-perfectblend-online": LLAMA,
    "llama3-8b-perfectblend-online mode=offline": LLAMA,
    "llama3-8b-speedrun": LLAMA,
    "llama3.3-70b": LLAMA,
    "llama3.3-70b mode=offline data=perfectblend-llama3.3-70b-instruct": LLAMA,
    "qwen3-8b": QWEN3,
    "qwen3-8b mode=offline data=perfectblend": QWEN3,
    "qwen3-32b": QWEN3,
    "qwen3-32b mode=offline data=perfectblend": QWEN3,
    "qwen3-30b-a3b": MIXTURE,
    "qwen3-30b-a3b data=perfectblend": MIXTURE,
    "qwen3-30b-a3b mode=offline model=qwen3-30b-a3b-instruct-2507": MIXTURE,
    "qwen3-30b-a3b model=qwen3-30b-a3b-thinking-2507": MIXTURE,
    "qwen3-30b-a3b-sharegpt-capture": MIXTURE,
}
RECIPES = [*TRAINED, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOWLY)]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipes_are_small_deltas_that_compose(experiment):
    """And hold the values of the guides."""
    lines = (FOLDER / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 15
    composed = compose_config(f"experiment={experiment}")
    captures = get_object(load_config(composed, Path("nowhere"), []).mode["_target_"]).captures
    assert captures == ("offline" in experiment or "capture" in experiment)
    assert experiment in [recipe.split()[0] for recipe in (TRAINED | SLOWLY)]
    values, expected = flatten(composed), GUIDES.get(experiment, {})
    assert {key: values[key] for key in expected} == expected


def test_the_commands_of_the_guides_page_compose():
    assert set(EXPERIMENTS) >= GUIDES.keys() | TRAINED.keys()
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
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train(recipe, tokenizer, tmp_path):
    """A tiny target and a small file stand in the recipe's place."""
    torch.manual_seed(0)
    config, target = (TRAINED | SLOWLY)[recipe], tmp_path / "target"
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    (tmp_path / "sharegpt.json").write_text(json.dumps(list(sharegpt_rows(14))))
    paths = [f"model.path={target}", f"data.path={tmp_path / 'sharegpt.json'}"]
    given = [*f"experiment={recipe}".split(), *ONE_STEP, *paths, f"cache_dir={tmp_path / 'cache'}"]
    run(given, tmp_path / "run")
    assert losses(tmp_path / "run").keys() == {1}
    draft = tmp_path / "run" / "draft"
    assert load_file(draft / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    shape = json.loads((draft / "config.json").read_text())
    assert shape["architectures"] == ["LlamaForCausalLMEagle3"]
    assert shape["max_position_embeddings"] == 131072


def write_cell(folder, rounds, sampled):
    """As training leaves it: 20 answers of 30 tokens behind the first, whose rounds these are."""
    folder.mkdir(parents=True)
    tokens = {"tokens": [30] * 20}
    content = tokens | {"rounds": rounds, "sampled": {"1": tokens | {"rounds": sampled}}}
    (folder / "evaluation.json").write_text(json.dumps(content))


def test_recipes_are_compared_over_seeds_and_prompts(tmp_path):
    """By hand, where all answers of a run take as many rounds; prompts that differ widen it."""
    recipes = runpy.run_path(str(ROOT / "dev" / "compare_recipes.py"))
    for seed, (base, other) in enumerate([(15, 12), (12, 10), (10, 7.5)]):
        write_cell(tmp_path / "default" / str(seed), [base] * 20, [20] * 20)
        write_cell(tmp_path / "tv" / str(seed), [other] * 20, [10, 20] * 10)
    write_cell(tmp_path / "tv" / "3", [1] * 20, [1] * 20)  # without a pair
    named = {"default": "", "tv": "loss=tv", "lk": "loss=lk"}
    rows = recipes["table"](tmp_path, named, "default").splitlines()
    assert len(rows) == 4 and rows[2].startswith("| default |  | 3 | 2.500 |  | 1.500 |  | 0.600 |")
    # Differences of 0.5, 0.5 and 1.0: a mean of 2/3, and 4.30 x 0.2887 / sqrt(3) around it.
    assert "| tv | `loss=tv` | 3 | 3.167 | +0.667 ± 0.717 (+26.7%) | 2.000 | +0.500 ± " in rows[3]
    spread = float(re.findall(r"± ([0-9.]+)", rows[3])[1])
    # A round's share of 30/15 changes by 1/3 of it from prompt to prompt.
    assert spread == pytest.approx(1.96 * 2 / 3 / 20**0.5, rel=0.1)


def test_every_recipe_composes():
    """But those of a single option of `loss`, as tests/test_config.py composes every option."""
    recipes = runpy.run_path(str(ROOT / "dev" / "compare_recipes.py"))
    shared, five = recipes["shared_overrides"]([])
    assert shared == ["stages=[prepare,generate,capture,train]"]
    assert five == "model.aux_layer_ids=[1,2,4,6,7]"
    for overrides in recipes["RECIPES"].values():
        if not overrides.startswith("loss="):
            compose_config(*overrides.replace("LAYERS5", five).split())


@pytest.mark.parametrize("name", ["fc_norm", "norm_output"])
def test_a_start_that_is_no_draft_of_the_kind_asked_for_is_refused(exported, target_folder, name):
    start, target = str(exported / "portable"), SimpleNamespace(spec=spec_of(target_folder))
    with pytest.raises(ConfigError, match=f"draft.{name}=true, but draft.init_from=.*=false; "):
        build_draft(section("draft", init_from=start, **{name: True}), target, None, None)


@pytest.mark.parametrize("option, changed, words", [
    ("dflash", {}, "is of draft=dspark, not draft=dflash; set it to that"),
    ("eagle3", {}, "is of draft=dspark, not draft=eagle3"),
    ("dspark", {"ttt_steps": 7}, "has blocks of 4 slots; set draft.block=4"),
    ("dspark", {"ttt_steps": 4}, None),
])  # fmt: skip
def test_a_block_drafter_goes_on_as_one(target_folder, tmp_path, option, changed, words):
    target = SimpleNamespace(spec=spec_of(target_folder))
    draft = block_draft(DSparkConfig, target.spec, markov_rank=8)
    write_draft(draft, tmp_path / "D", portable_config(draft.config, target.spec, "x", 3))
    chosen = OmegaConf.to_object(compose_config(f"draft={option}").draft)
    chosen = replace(chosen, init_from=str(tmp_path / "D"), **changed)
    if words is None:
        return assert_same(build_draft(chosen, target, None, None), draft)
    with pytest.raises(ConfigError, match=words):
        build_draft(chosen, target, None, None)


def assert_same(found, draft):
    assert found.config == draft.config
    assert torch.equal(found.fc.weight, draft.fc.weight.bfloat16().float())


@pytest.mark.runs
def test_a_finetuned_target_goes_on_with_a_draft(exported, target_folder, tmp_path, capsys):
    """Of the same vocabulary, whatever the conversations have, and from its weights."""
    (tmp_path / "sharegpt.json").write_text(json.dumps(list(sharegpt_rows(14))))
    changed = ["draft.vocab_size=2048", "optimizer.lr=1e-9"]
    given = ["experiment=finetuned", *ONE_STEP, *changed, f"model.path={target_folder}"]
    given += [f"draft.init_from={exported / 'portable'}", f"cache_dir={tmp_path / 'cache'}"]
    run([*given, "data.max_length=96", f"data.path={tmp_path / 'sharegpt.json'}"], tmp_path / "run")
    assert "draft.config and draft.initial are not used" in capsys.readouterr().out
    before = load_file(exported / "portable" / "model.safetensors")
    after = load_file(tmp_path / "run" / "draft" / "model.safetensors")
    assert torch.equal(after["d2t"], before["d2t"]) and len(after["d2t"]) == 300
    assert torch.allclose(after["fc.weight"].float(), before["fc.weight"].float(), atol=1e-3)
