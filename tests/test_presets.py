"""The named datasets: what each preset names, that rows of its shape are read, and mixes of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from eagle3.checks import check_data
from eagle3.config import RunConfig  # also registers the schema
from eagle3.data.sources import Source, find_files, read_rows

REGENERATED = "frankleeeee/PerfectBlend-Regenerated-Llama"
PRESETS = {
    "sharegpt": ("Aeala/ShareGPT_Vicuna_unfiltered", None, "train"),
    "perfectblend": ("mlabonne/open-perfectblend", None, "train"),
    "perfectblend-llama3.1-8b-instruct": (f"{REGENERATED}-3.1-8B-Instruct", None, "train"),
    "perfectblend-llama3.3-70b-instruct": (f"{REGENERATED}-3.3-70B-Instruct", None, "train"),
    "perfectblend-llama4-scout-instruct": (
        f"{REGENERATED}-4-Scout-17B-16E-Instruct",
        None,
        "train",
    ),
    "perfectblend-llama4-maverick-instruct": (
        f"{REGENERATED}-4-Maverick-17B-128E-Instruct",
        None,
        "train",
    ),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "magpie": ("Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1", None, "train"),
    "gsm8k": ("openai/gsm8k", "main", "train"),
    "codealpaca": ("sahil2801/CodeAlpaca-20k", None, "train"),
    "opc": ("OpenCoder-LLM/opc-sft-stage1", "largescale_diverse_instruct", "train"),
    "magicoder": ("ise-uiuc/Magicoder-Evol-Instruct-110K", None, "train"),
}

ASKED, ANSWERED = "What is 2 + 3?", "It is 5."
PLAIN = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
NAMED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
REWRITTEN = {"id": 7, "conversations": PLAIN, "status": "success"}
# One row of each dataset with its columns, and the kind of file it comes in.
ROWS = {
    "sharegpt": (
        "json",
        {
            "id": "QWJhYvA_0",
            "conversations": [
                {"from": "human", "value": ASKED, "markdown": None, "text": None},
                {"from": "gpt", "value": ANSWERED, "markdown": None, "text": None},
                {"from": "human", "value": "And 3 + 4?", "markdown": None, "text": None},
                {"from": "bing", "value": "7.", "markdown": None, "text": None},
            ],
        },
    ),
    "perfectblend": (
        "parquet",
        {
            "conversations": [{"from": "system", "value": "Calculate."}, *NAMED],
            "source": "meta-math/MetaMathQA",
        },
    ),
    "perfectblend-llama3.1-8b-instruct": ("jsonl", REWRITTEN),
    "perfectblend-llama3.3-70b-instruct": ("jsonl", REWRITTEN),
    "perfectblend-llama4-scout-instruct": ("jsonl", REWRITTEN),
    "perfectblend-llama4-maverick-instruct": ("jsonl", REWRITTEN),
    "ultrachat": ("parquet", {"prompt": ASKED, "prompt_id": "f0e37e9f7800", "messages": PLAIN}),
    "magpie": (
        "parquet",
        {
            "uuid": "9a2b",
            "model": "Qwen/Qwen2.5-72B-Instruct",
            "gen_input_configs": {
                "temperature": 1.0,
                "top_p": 1.0,
                "input_generator": "vllm",
                "seed": None,
            },
            "instruction": "not this one",
            "response": "nor this one",
            "conversations": NAMED,
            "task_category": "Math",
            "llama_guard_2": "safe",
        },
    ),
    "gsm8k": ("jsonl", {"question": ASKED, "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}),
    "codealpaca": (
        "json",
        {"instruction": "Add the numbers.", "input": "2, 3", "output": ANSWERED},
    ),
    "opc": ("jsonl", {"instruction": ASKED, "output": ANSWERED, "tag": "algorithm"}),
    "magicoder": ("jsonl", {"instruction": ASKED, "response": ANSWERED}),
}
EXPECTED = dict.fromkeys(PRESETS, PLAIN) | {
    "sharegpt": [
        *PLAIN,
        {"role": "user", "content": "And 3 + 4?"},
        {"role": "assistant", "content": "7."},
    ],
    "perfectblend": [{"role": "system", "content": "Calculate."}, *PLAIN],
    "gsm8k": [PLAIN[0], {"role": "assistant", "content": "2 + 3 = <<2+3=5>>5\n#### 5"}],
    "codealpaca": [{"role": "user", "content": "Add the numbers.\n\n2, 3"}, PLAIN[1]],
}


def data_of(*overrides):
    """The typed `data` section of a command line."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("run", overrides=["name=test", *overrides]))
    assert isinstance(config, RunConfig)
    check_data(config.data)
    return config.data


def write(path, kind, rows):
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_preset_is_listed():
    named = {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
    assert named - {"tiny", "jsonl", "mix"} == PRESETS.keys() == ROWS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compose(preset):
    data = data_of(f"data={preset}")
    assert (data.path, data.subset, data.split) == PRESETS[preset]
    assert data.sources == {} and data.eval_path is None


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_every_preset_are_read(preset, tmp_path):
    kind, row = ROWS[preset]
    local = tmp_path / preset
    local.mkdir()
    write(local / f"train.{kind}", kind, [row, row])
    data = data_of(f"data={preset}", f"data.path={local}", "data.subset=null", "data.split=train")
    files = find_files(Source(data.path, data.subset, data.split), str(tmp_path / "cache"))
    assert [file.name for file in files] == [str(local / f"train.{kind}")]
    for read in read_rows(files):
        assert read.reason is None and read.conversation.messages == EXPECTED[preset]
        assert read.conversation.tools is None and read.conversation.repaired is None
    assert read.line == 2


def test_the_mix_weighs_its_sources():
    data = data_of("data=mix")
    assert data.path is None and list(data.sources) == ["sharegpt", "perfectblend"]
    for name, source in data.sources.items():
        assert (source.path, source.subset, source.split) == PRESETS[name]
    assert [source.weight for source in data.sources.values()] == [1.0, 0.1]


def test_a_mix_grows_and_shrinks_on_the_command_line():
    data = data_of(
        "data=mix",
        "+data@data.sources.gsm8k=gsm8k",
        "+data@data.sources.ultrachat=ultrachat",
        "data.sources.ultrachat.weight=0.5",
        "~data.sources.perfectblend",
        "+data@data.sources.mine=jsonl",
        "data.sources.mine.path=README.md",
        "+data.sources={folder:{path:tests,weight:3}}",
    )
    assert {name: source.weight for name, source in data.sources.items()} == {
        "sharegpt": 1.0,
        "gsm8k": 1.0,
        "ultrachat": 0.5,
        "mine": 1.0,
        "folder": 3.0,
    }
    for name in ("gsm8k", "ultrachat"):
        source = data.sources[name]
        assert (source.path, source.subset, source.split) == PRESETS[name]


def test_a_mix_of_ones_own(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "defaults:\n"
        "  - magicoder@sources.code\n"
        "  - gsm8k@sources.mathematics\n"
        "  - _self_\n"
        "path: null\n"
        "num_samples: 100\n"
        "sources:\n"
        "  code: {weight: 2}\n"
        f"  chat: {{path: {tmp_path}, weight: 0.25}}\n"
    )
    data = data_of(f"hydra.searchpath=[file://{tmp_path}]", "data=mine")
    assert data.num_samples == 100
    assert {name: source.weight for name, source in data.sources.items()} == {
        "code": 2.0,
        "mathematics": 1.0,
        "chat": 0.25,
    }
    assert data.sources["mathematics"].subset == "main" and data.sources["chat"].path == str(
        tmp_path
    )
