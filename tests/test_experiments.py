"""Every recipe of conf/experiment: a short file that composes, passes the checks and trains, here on a tiny target."""

import json
import re
import shlex
import shutil

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from eagle3 import config as configuration
from eagle3.checks import check
from eagle3.distributed import launch

FOLDER = ROOT / "conf" / "experiment"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GUIDES = {
    "llama3-8b-sharegpt-online": "Aeala/ShareGPT_Vicuna_unfiltered",
    "llama3-8b-perfectblend-online": "mlabonne/open-perfectblend",
}
ONE_STEP = [
    "name=test",
    "device=cpu",
    "stages=[prepare,generate,train,export]",
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


@pytest.fixture(scope="module")
def tiny(target_folder, tmp_path_factory):
    """Overrides that put a tiny Llama with long positions and a file of ShareGPT's shape in a recipe's place."""
    folder = tmp_path_factory.mktemp("experiments")
    shutil.copytree(target_folder, folder / "target")
    shape = json.loads((folder / "target" / "config.json").read_text())
    (folder / "target" / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 131072}))
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
    return [
        *ONE_STEP,
        f"model.path={folder / 'target'}",
        f"data.path={folder / 'sharegpt.json'}",
        f"cache_dir={folder / 'cache'}",
    ]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipes_are_small_deltas(experiment):
    lines = (FOLDER / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert len([line for line in lines if line.strip() and not line.lstrip().startswith("#")]) <= 15


@pytest.mark.parametrize("experiment", GUIDES)
def test_recipes_hold_the_values_of_the_guides(experiment, tmp_path):
    config = configuration.typed(composed(f"experiment={experiment}"), tmp_path, [])
    assert config.model.path == "meta-llama/Llama-3.1-8B-Instruct" and config.data.path == GUIDES[experiment]
    assert (config.data.max_length, config.data.chat_template, config.data.system_prompt) == (4096, "auto", "llama2")
    assert (config.train.epochs, config.train.documents_per_update, config.optimizer["lr"]) == (2, 8, 1e-4)
    assert (config.draft.ttt_steps, config.draft.vocab_size, config.train.max_grad_norm) == (7, 32000, 0.5)
    assert (config.scheduler["_target_"], config.scheduler["warmup_ratio"]) == ("eagle3.optim.cosine", 0.015)
    assert (
        config.mode["_target_"] == "eagle3.pipeline.online" and config.target["_target_"] == "eagle3.target.hf.HFTarget"
    )
    assert config.draft.initial["_target_"] == "eagle3.draft.initial.random", "nothing of the embedded model stays"


def test_the_commands_of_the_guides_page_compose():
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "guides.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ours = [shlex.split(line)[2:] for line in commands if line.startswith("python run.py ")]
    assert len(ours) > 5
    for overrides in ours:
        composed(*overrides)
    (written_out,) = (overrides for overrides in ours if "target=hf" in overrides)
    long, short = composed(*written_out), composed("experiment=llama3-8b-sharegpt-online")
    assert configuration.flat(long) == configuration.flat(short)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_recipes_train(experiment, tiny, tmp_path):
    overrides = [f"experiment={experiment}", *tiny]
    config = configuration.typed(composed(*overrides), tmp_path, overrides)
    check(config)
    launch(config, tmp_path, overrides)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (row for row in rows if "loss" in row)
    assert trained["step"] == 1 and trained["supervised_tokens"] > 0
    assert load_file(tmp_path / "draft" / "model.safetensors")["lm_head.weight"].shape == (300, 64)
    shape = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert shape["architectures"] == ["LlamaForCausalLMEagle3"] and shape["max_position_embeddings"] == 131072
