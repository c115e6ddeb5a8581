"""The named datasets: what each preset names, how its rows are read, and mixes of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, compose_config, turns
from omegaconf import OmegaConf

from eagle3.checks import check_data
from eagle3.config import Source
from eagle3.data.sources import find_files, may_be_remote, read_rows

ASKED, ANSWERED = "What is 2 + 3?", "It is 5."


def sharegpt(*texts, **more):
    names = ("human", "gpt")
    return [{"from": names[i % 2], "value": text, **more} for i, text in enumerate(texts)]


PLAIN, THIRD = turns(ASKED, ANSWERED), ("And 3 + 4?", "7.")
# One row of each dataset with its columns, the kind of file it comes in, and what it says.
# fmt: off
ROWS = {
    "sharegpt": ("json", {
        "id": "QWJhYvA_0",
        "conversations": sharegpt(ASKED, ANSWERED, *THIRD, markdown=None, text=None),
    }, turns(ASKED, ANSWERED, *THIRD)),
    "perfectblend": ("parquet", {
        "conversations": [{"from": "system", "value": "Calculate."}, *sharegpt(ASKED, ANSWERED)],
        "source": "meta-math/MetaMathQA",
    }, [{"role": "system", "content": "Calculate."}, *PLAIN]),
    "perfectblend-llama3.1-8b-instruct": (
        "jsonl", {"id": 7, "conversations": PLAIN, "status": "success"}, PLAIN
    ),
    "ultrachat": ("parquet", {"prompt": ASKED, "prompt_id": "f0e37e", "messages": PLAIN}, PLAIN),
    "magpie": ("parquet", {
        "uuid": "9a2b", "model": "Qwen/Qwen2.5-72B-Instruct",
        "gen_input_configs": {"temperature": 1.0, "input_generator": "vllm", "seed": None},
        "instruction": "not this one", "response": "nor this one",
        "conversations": sharegpt(ASKED, ANSWERED), "task_category": "Math",
    }, PLAIN),
    "gsm8k": ("jsonl", {"question": ASKED, "answer": "<<2+3=5>>5\n#### 5"},
              turns(ASKED, "<<2+3=5>>5\n#### 5")),
    "codealpaca": ("json", {"instruction": "Add.", "input": "2, 3", "output": ANSWERED},
                   turns("Add.\n\n2, 3", ANSWERED)),
    "opc": ("jsonl", {"instruction": ASKED, "output": ANSWERED, "tag": "algorithm"}, PLAIN),
    "magicoder": ("jsonl", {"instruction": ASKED, "response": ANSWERED}, PLAIN),
}
# fmt: on
PRESETS = {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}


def data_of(*overrides):
    """The typed `data` section of a command line."""
    data = OmegaConf.to_object(compose_config(*overrides)).data
    check_data(data, ["prepare"])
    return data


def named(source):
    return source.path, source.subset, source.split


def weights(data):
    return {name: source.weight for name, source in data.sources.items()}


def test_every_preset_has_a_row():
    """Those that Perfect-Blend was answered again for have the same columns."""
    again = {name for name in PRESETS if name.startswith("perfectblend-")}
    assert PRESETS - {"none", "tiny", "jsonl", "mix"} == ROWS.keys() | again


@pytest.mark.parametrize("preset", ROWS)
def test_a_preset_names_a_hub_dataset_whose_rows_are_read(preset, tmp_path):
    data, none = data_of(f"data={preset}"), compose_config("data=none").data
    assert may_be_remote(data.path) and "/" in data.path
    different = {key for key in none if none[key] != getattr(data, key)}
    assert different <= {"path", "subset", "split"}
    kind, row, expected = ROWS[preset]
    path = tmp_path / preset / f"train.{kind}"
    path.parent.mkdir()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    else:
        line = json.dumps(row)
        path.write_text(f"[\n{line},\n{line}]" if kind == "json" else f"{line}\n{line}\n")
    files = find_files(Source(str(path.parent), None, "train"), str(tmp_path / "cache"))
    assert [file.name for file in files] == [str(path)]
    for read in read_rows(files):
        assert read.reason is None and read.conversation.messages == expected
        assert read.conversation.tools is None and read.conversation.repaired is None
    assert read.line == 2


def test_a_mix_grows_and_shrinks_on_the_command_line():
    data = data_of("data=mix")
    assert data.path is None and weights(data) == {"sharegpt": 1.0, "perfectblend": 0.1}
    changes = """data=mix +data@data.sources.gsm8k=gsm8k +data@data.sources.ultrachat=ultrachat
        data.sources.ultrachat.weight=0.5 ~data.sources.perfectblend +data@data.sources.mine=jsonl
        data.sources.mine.path=README.md +data.sources={folder:{path:tests,weight:3}}"""
    grown = data_of(*changes.split())
    expected = {"sharegpt": 1, "gsm8k": 1, "ultrachat": 0.5, "mine": 1, "folder": 3}
    assert weights(grown) == expected
    for name, source in (data.sources | grown.sources).items():
        assert name not in PRESETS or named(source) == named(data_of(f"data={name}"))


def test_a_mix_of_ones_own(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(
        "defaults: [magicoder@sources.code, gsm8k@sources.mathematics, _self_]\n"
        "path: null\nnum_samples: 100\nsources:\n  code: {weight: 2}\n"
        f"  chat: {{path: {tmp_path}, weight: 0.25}}\n"
    )
    data = data_of(f"hydra.searchpath=[file://{tmp_path}]", "data=mine")
    assert data.num_samples == 100 and data.sources["chat"].path == str(tmp_path)
    assert weights(data) == {"code": 2, "mathematics": 1, "chat": 0.25}
    assert data.sources["mathematics"].subset == "main"
