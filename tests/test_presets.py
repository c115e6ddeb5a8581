"""The named datasets: what each preset names, how its rows are read, and mixes of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, compose_config
from omegaconf import OmegaConf

from eagle3.checks import check_data
from eagle3.config import Source
from eagle3.data.sources import find_files, may_be_remote, read_rows

ASKED, ANSWERED = "What is 2 + 3?", "It is 5."
PLAIN = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
NAMED = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]
REWRITTEN = {"id": 7, "conversations": PLAIN, "status": "success"}
# One row of each dataset with its columns, and the kind of file it comes in.
# fmt: off
ROWS = {
    "sharegpt": ("json", {"id": "QWJhYvA_0", "conversations": [
        {"from": "human", "value": ASKED, "markdown": None, "text": None},
        {"from": "gpt", "value": ANSWERED, "markdown": None, "text": None},
        {"from": "human", "value": "And 3 + 4?", "markdown": None, "text": None},
        {"from": "bing", "value": "7.", "markdown": None, "text": None},
    ]}),
    "perfectblend": ("parquet", {
        "conversations": [{"from": "system", "value": "Calculate."}, *NAMED],
        "source": "meta-math/MetaMathQA",
    }),
    "perfectblend-llama3.1-8b-instruct": ("jsonl", REWRITTEN),
    "ultrachat": ("parquet", {"prompt": ASKED, "prompt_id": "f0e37e9f7800", "messages": PLAIN}),
    "magpie": ("parquet", {
        "uuid": "9a2b", "model": "Qwen/Qwen2.5-72B-Instruct",
        "gen_input_configs": {"temperature": 1.0, "input_generator": "vllm", "seed": None},
        "instruction": "not this one", "response": "nor this one", "conversations": NAMED,
        "task_category": "Math", "llama_guard_2": "safe",
    }),
    "gsm8k": ("jsonl", {"question": ASKED, "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}),
    "codealpaca": ("json", {
        "instruction": "Add the numbers.", "input": "2, 3", "output": ANSWERED,
    }),
    "opc": ("jsonl", {"instruction": ASKED, "output": ANSWERED, "tag": "algorithm"}),
    "magicoder": ("jsonl", {"instruction": ASKED, "response": ANSWERED}),
}
# fmt: on
EXPECTED = dict.fromkeys(ROWS, PLAIN) | {
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
    data = OmegaConf.to_object(compose_config(*overrides)).data
    check_data(data, ["prepare"])
    return data


def named(source):
    return source.path, source.subset, source.split


def write(path, kind, rows):
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_preset_has_a_row():
    """Those that Perfect-Blend was answered again for have the same columns."""
    presets = {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
    again = {name for name in presets if name.startswith("perfectblend-")}
    assert presets - {"none", "tiny", "jsonl", "mix"} == ROWS.keys() | again


@pytest.mark.parametrize("preset", ROWS)
def test_presets_name_a_hub_dataset_and_nothing_else(preset):
    data, none = data_of(f"data={preset}"), compose_config("data=none").data
    assert may_be_remote(data.path) and "/" in data.path
    different = {key for key in none if none[key] != getattr(data, key)}
    assert different <= {"path", "subset", "split"}


@pytest.mark.parametrize("preset", ROWS)
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
        assert named(source) == named(data_of(f"data={name}"))
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
    weights = {name: source.weight for name, source in data.sources.items()}
    assert weights == {"sharegpt": 1, "gsm8k": 1, "ultrachat": 0.5, "mine": 1, "folder": 3}
    for name in ("gsm8k", "ultrachat"):
        assert named(data.sources[name]) == named(data_of(f"data={name}"))


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
    weights = {name: source.weight for name, source in data.sources.items()}
    assert weights == {"code": 2, "mathematics": 1, "chat": 0.25}
    assert data.sources["mathematics"].subset == "main"
    assert data.sources["chat"].path == str(tmp_path)
