"""The stage `check`: what it decodes, what acceptance lengths give away, and what it leaves."""

import json
import shutil

import pytest
import torch
from conftest import edit_draft, spec_of

from eagle3.benchmark.check import candidates, check, judge, judge_embedding
from eagle3.config import Check
from eagle3.data.chat import Chat
from eagle3.decode.speculate import Generation
from eagle3.draft.flash import Auto
from eagle3.errors import ConfigError, RunError
from eagle3.export.read import read_any
from eagle3.target.handle import TargetHandle

LAYERS, ENGINES = [1, 3, 4], ["sglang", "vllm", "trtllm", "official"]
NAMED = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def target(target_folder):
    section = {"_target_": "eagle3.target.hf.HFTarget", "_partial_": True}
    return TargetHandle(spec_of(target_folder), section, torch.device("cpu"))


@pytest.fixture
def folder(exported, tmp_path):
    """A portable draft that a test may damage."""
    return shutil.copytree(exported / "portable", tmp_path / "a draft")


def run_check(folder, target, tokenizer, tmp_path, **section):
    """The stage, and what it has left in check.json where it did not raise."""
    given = {"engines": ENGINES, "decode": True, "num_prompts": 1, "max_new_tokens": 24} | section
    chat = tokenizer and Chat(tokenizer)
    check(Check(**given), folder and str(folder), target, chat, None, Auto, 3, tmp_path)
    return json.loads((tmp_path / "check.json").read_text())


def test_it_decodes_and_ends_with_a_line_for_each_thing_wrong(folder, target, tokenizer, tmp_path):
    """The draft is untrained, so its acceptance is exactly 1."""
    edit_draft(folder, {"max_position_embeddings": 256})
    with pytest.raises(RunError) as caught:
        run_check(folder, target, tokenizer, tmp_path)
    first, second = str(caught.value).split("\nerror: ")
    assert first.startswith("SGLang: max_position_embeddings") and "exactly 1.0" in second
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["decoded"]["acceptance_length"]["1,3,4"] == 1.0
    assert content["layers"]["vllm"] == LAYERS and content["draft"] == str(folder)
    assert [f["severity"] for f in content["findings"]] == ["wrong", "wrong"]


def test_without_weights_or_tokenizer_only_the_files_are_judged(
    folder, target, target_folder, tokenizer, tmp_path, capsys
):
    """And no draft at all is a mistake of the config."""
    (tmp_path / "bare").mkdir()
    shutil.copy(target_folder / "config.json", tmp_path / "bare")
    bare = TargetHandle(spec_of(tmp_path / "bare"), target.section, target.device)
    edit_draft(folder, {"max_position_embeddings": 256})
    for given, text in ((bare, tokenizer), (target, None)):
        content = run_check(folder, given, text, tmp_path, engines=["vllm", "official"])
        assert content["decoded"] is None and content["findings"][0]["severity"] == "note"
        assert "no prompt was decoded" in capsys.readouterr().out
    content = run_check(folder, target, None, tmp_path, engines=["vllm"], decode=False)
    assert content["findings"] == []
    assert "nothing found that matters" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="draft_path="):
        run_check(None, target, None, tmp_path)


def test_the_layers_a_draft_was_made_for_are_found_by_decoding(
    folder, target, tokenizer, tmp_path, monkeypatch
):
    """A stand-in decoder accepts 3 tokens a round from layers 1, 3, 4, and none from those that
    config.json names.
    """

    def stand_in(model, draft, prompts, *tree_and_length):
        aux, _ = model.states(prompts[0], torch.arange(len(prompts[0])))
        assert aux.shape == (len(prompts[0]), 3 * 64)
        tokens = 3 if model.aux_layer_ids == LAYERS else 1
        return [Generation([1], emitted=[tokens] * 4) for _ in prompts]

    monkeypatch.setattr("eagle3.benchmark.check.speculate", stand_in)
    edit_draft(folder, {"eagle_config": {NAMED: [2, 4, 5]}, NAMED: [3, 5, 6]})
    assert candidates(read_any(folder), target.spec) == [[2, 4, 5], LAYERS]
    with pytest.raises(RunError, match=r"fed by layers 1,3,4 it accepts 3\.00"):
        run_check(folder, target, tokenizer, tmp_path)
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["decoded"]["acceptance_length"] == {"2,4,5": 1.0, "1,3,4": 3.0}


@pytest.mark.parametrize(
    ("lengths", "severity", "words"),
    [
        ({"1,3,4": 1.0, "0,2,3": 1.0}, "wrong", "exactly 1.0"),
        ({"1,3,4": 1.1}, "warning", "only 1.10"),
        ({"2,4,5": 1.04, "1,3,4": 2.77}, "wrong", "fed by layers 1,3,4 it accepts 2.77"),
    ],
)
def test_what_acceptance_lengths_give_away(lengths, severity, words):
    (finding,) = judge(lengths)
    assert finding.severity == severity and words in finding.sentence
    assert not list(judge({"1,3,4": 2.7}))


def test_a_shipped_embedding_is_compared_with_the_targets(folder, target):
    def ship(change):
        shipped = change(target.load_weights().embedding.bfloat16())
        edit_draft(folder, tensors=lambda t: t.update({"embed_tokens.weight": shipped}))
        return list(judge_embedding(read_any(folder), target))

    assert list(judge_embedding(read_any(folder), target)) == []
    assert ship(lambda embedding: embedding) == []
    (other,) = ship(lambda embedding: embedding.roll(1, 0))
    (short,) = ship(lambda embedding: embedding[:9])
    own = {"hidden_size": 32, "target_hidden_size": 64}
    edit_draft(folder, own, lambda t: t.pop("embed_tokens.weight") is None)
    (own,) = judge_embedding(read_any(folder), target)
    said = {"differs": other, "in 9 of 9 rows": short, "needs its own": own}
    assert all(f.severity == "wrong" and words in f.sentence for words, f in said.items())
