"""The stage `check`: what it decodes, what acceptance lengths give away, and what it leaves."""

import ast
import copy
import json
import re
import shutil
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from conftest import block_draft, edit_model, handle_of, section, spec_of

from eagle3.batch import Document, pack, serving
from eagle3.benchmark.check import QUESTIONS, candidates, check, judge, judge_shipped
from eagle3.benchmark.mistakes import NORMS, Reading, compare, other_orders, repairs
from eagle3.benchmark.request import Subject
from eagle3.config import Check
from eagle3.data.chat import Chat, load_chat
from eagle3.data.vocab import vocab_tensors
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto
from eagle3.draft.initial import derive_config
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.errors import ConfigError, RunError
from eagle3.export.read import read_any
from eagle3.export.write import portable_config, write_draft
from eagle3.hidden_states.capture import compute_features
from eagle3.target.hf import HFTarget

LAYERS, ENGINES = [1, 3, 4], ["sglang", "vllm", "trtllm", "official"]
WEIGHTS = ["config.json", "generation_config.json", "model.safetensors"]
NAMED = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def target(target_folder):
    return handle_of(target_folder)


@pytest.fixture
def folder(exported, tmp_path):
    """A portable draft that a test may damage."""
    return shutil.copytree(exported / "portable", tmp_path / "a draft")


def run_check(folder, target, tokenizer, tmp_path, **section):
    """The stage: what it raised, and what it has left in check.json."""
    given = {"engines": ENGINES, "decode": True, "num_prompts": 1, "max_new_tokens": 24} | section
    data, raised = SimpleNamespace(system_prompt=None), ""
    subject = Subject(folder, target, tokenizer and Chat(tokenizer), data, "", 0)
    try:
        check(Check(**given), subject, Auto, 3, tmp_path)
    except RunError as error:
        raised = str(error)
    return raised, json.loads((tmp_path / "check.json").read_text())


def test_it_decodes_and_ends_with_a_line_for_each_thing_wrong(folder, target, tokenizer, tmp_path):
    """The draft is untrained, so its acceptance is exactly 1."""
    edit_model(folder, {"max_position_embeddings": 256})
    raised, content = run_check(folder, target, tokenizer, tmp_path)
    first, second = raised.split("\nerror: ")
    assert first.startswith("SGLang: max_position_embeddings") and "exactly 1.0" in second
    assert content["decoded"]["acceptance_length"]["1,3,4"] == 1.0
    assert content["layers"]["vllm"] == LAYERS and content["draft"] == str(folder)
    assert [f["severity"] for f in content["findings"]] == ["wrong", "wrong"]


def test_what_cannot_be_decoded_is_the_last_line(
    folder, target, target_folder, tokenizer, tmp_path
):
    """Neither a target without weights nor one without a tokenizer passes for a sound draft, unless
    the files alone are to be judged.
    """
    bare, tongueless = tmp_path / "bare", tmp_path / "tongueless"
    for path, names in {bare: ["config.json"], tongueless: WEIGHTS}.items():
        path.mkdir()
        for name in names:
            shutil.copy(target_folder / name, path)
    edit_model(folder, {"max_position_embeddings": 256})
    for path, chat in ((bare, tokenizer), (tongueless, None)):
        given = handle_of(path)
        raised, content = run_check(folder, given, chat, tmp_path)
        last = raised.splitlines()[-1]
        assert last.startswith("error: no prompt was decoded: ") and "check.decode=false" in last
        assert content["decoded"] is None and content["findings"][0]["severity"] == "wrong"
        passed = run_check(folder, given, None, tmp_path, engines=["vllm"], decode=False)
        assert passed[0] == "" and passed[1]["findings"] == []


@pytest.mark.parametrize(
    ("lengths", "severity", "words"),
    [
        ({"1,3,4": 1.0, "0,2,3": 1.0}, "wrong", "exactly 1.0"),
        ({"1,3,4": 1.1}, "warning", "only 1.10"),
    ],
)
def test_what_acceptance_lengths_give_away(lengths, severity, words):
    (finding,) = judge(lengths, {})
    assert finding.severity == severity and words in finding.sentence
    assert not list(judge({"1,3,4": 2.7}, {}))


def test_a_shipped_embedding_is_compared_with_the_targets(folder, target):
    def ship(change):
        shipped = change(target.load_weights().embedding.bfloat16())
        edit_model(folder, tensors=lambda t: t.update({"embed_tokens.weight": shipped}))
        return list(judge_shipped(read_any(folder), target))

    assert list(judge_shipped(read_any(folder), target)) == []
    assert ship(lambda embedding: embedding) == []
    (other,) = ship(lambda embedding: embedding.roll(1, 0))
    (short,) = ship(lambda embedding: embedding[:9])
    own = {"hidden_size": 32, "target_hidden_size": 64}
    edit_model(folder, own, lambda t: t.pop("embed_tokens.weight") is None)
    (own,) = judge_shipped(read_any(folder), target)
    draft = block_draft(DFlashConfig, target.spec)  # whose head is the target's too
    write_draft(draft, folder, portable_config(draft.config, target.spec, "x", 3))
    shipped = target.load_weights().head.roll(1, 0)
    edit_model(folder, tensors=lambda t: t.update({"lm_head.weight": shipped}))
    (head,) = judge_shipped(read_any(folder), target)
    said = {"differs": other, "in 9 of 9 rows": short, "needs its own": own}
    said |= {"lm_head.weight differs": head}
    assert all(f.severity == "wrong" and words in f.sentence for words, f in said.items())


@pytest.fixture(scope="module")
def trained(target_folder, tokenizer, tmp_path_factory):
    return learn_by_heart(target_folder, tokenizer, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained31(target_folder, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained31")
    return learn_by_heart(target_folder, tokenizer, folder, fc_norm=True, norm_output=True)


@pytest.fixture(scope="module")
def trained_block(target_folder, tokenizer, tmp_path_factory):
    return learn_by_heart(target_folder, tokenizer, tmp_path_factory.mktemp("block"), DSparkConfig)


def learn_by_heart(target_folder, tokenizer, folder, block=None, **variant):
    """A draft on disk, a block drafter of the kind `block` or EAGLE3, that has learnt the target's
    answers to the first of QUESTIONS, from layers that differ much.
    """
    chat, spec = Chat(tokenizer), spec_of(target_folder, [0, 3, 6])
    target = HFTarget(spec, torch.device("cpu"))
    prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in QUESTIONS[:2]]
    documents = []
    for prompt, answer in zip(prompts, target.generate(prompts, 48), strict=True):
        ids = torch.tensor(prompt + answer)
        documents.append(Document(0, ids, torch.arange(len(ids)) >= len(prompt)))
    used = torch.cat([one.input_ids[one.loss_mask] for one in documents]).unique()
    t2d, d2t = vocab_tensors(used.numpy(), 2048)
    torch.manual_seed(0)
    if block:
        draft = block_draft(block, spec, num_hidden_layers=1)
        t2d = draft.t2d
    else:
        draft = EAGLE3(replace(derive_config(spec.config, len(used)), **variant), Auto, t2d, d2t)
    head = draft.head_weights(target.head)[0]
    batch = pack(compute_features(target, documents), t2d, 3, serving)
    wanted = torch.searchsorted(draft.target_ids, batch.features.argmax[batch.pair_teacher])
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-2)
    for _ in range(60):
        hidden = draft.unroll(target.embedding, batch.features.aux_hidden_states, batch)
        logits = draft.logits(hidden[batch.pair_index], head)
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    write_draft(draft, folder / "draft", portable_config(draft.config, spec, spec.path, 3))
    return folder / "draft"


def exchanged(one, other):
    return lambda t: t.update({one: t[other], other: t[one]})


def thirds(change):
    return lambda t: t.update({"fc.weight": torch.cat(change(t["fc.weight"].chunk(3, 1)), 1)})


def projections(names, change):
    names = [f"midlayer.self_attn.{name}_proj.weight" for name in names]
    return lambda t: t.update({name: change(t[name]) for name in names})


def side_by_side(weight):
    """Rows of heads of 16 as code that turns neighbours has them."""
    return weight.view(-1, 2, 8, *weight.shape[1:]).transpose(1, 2).reshape_as(weight)


def one_higher(t):
    t.update(d2t=t["d2t"] + 1, t2d=t["t2d"].roll(1))


ORDER, SGLANG = "the layers of fc in the order", {"eagle_config": {NAMED: [5, 6, 7]}}
MISTAKES = {
    "reversed": ({}, thirds(lambda parts: parts[::-1]), rf"{ORDER} \(3, 2, 1\)"),
    "transposed": (
        {},
        thirds(lambda parts: [part.T for part in parts]),
        "layer's part of .* transposed",
    ),
    "halves": ({}, projections("qkv", lambda w: w.roll(64, 1)), "halves of the columns of q, k"),
    "rotary": ({}, projections("qk", side_by_side), "reordered from rotary pairs to halves"),
    "norms": ({}, exchanged(*NORMS[2:]), r"layernorm\.weight and norm\.weight exchanged"),
    "ids": ({}, one_higher, "with ids one lower it accepts"),
    "theta": ({"rope_theta": 100.0}, None, "with rope_theta=10000 it accepts"),
    "one key": (SGLANG, None, r"layers \[5, 6, 7\], vLLM's key those of \[0, 3, 6\]: one of them"),
}


def turned_heads(t):
    names = [name for name in t if re.search(r"\.[qk]_(proj|norm)\.", name)]
    t.update({name: side_by_side(t[name]) for name in names})


OF_BLOCKS = {"order": MISTAKES["reversed"], "rotary": ({}, turned_heads, MISTAKES["rotary"][2])}
FORGOTTEN = {"norm_output": None}, None, "with norm_output=true it accepts"
ANSWERED = {"num_prompts": 2, "max_new_tokens": 48}  # as `trained` has learnt them


@pytest.mark.runs
@pytest.mark.parametrize("made, count", [("trained", 20), ("trained_block", 12)])
def test_a_sound_draft_passes(request, target, tokenizer, tmp_path, capsys, made, count):
    """What other layers would give is of no concern then, and is kept in check.json alone."""
    asked, folder = {"engines": ["sglang", "vllm"]} | ANSWERED, request.getfixturevalue(made)
    capsys.readouterr()
    raised, content = run_check(folder, target, tokenizer, tmp_path, **asked)
    assert raised == "" and content["findings"] == []
    assert len(content["decoded"]["other_ways"]) > count
    assert content["decoded"]["acceptance_length"]["0,3,6"] > 3
    assert len(content["decoded"]["acceptance_length"]) > 1
    said = capsys.readouterr().out
    assert said.count("check: acceptance length ") == said.count("fed by layers 0,3,6") == 1


@pytest.mark.parametrize(
    "made, mistake",
    [
        *(("trained", row) for row in MISTAKES.values()),
        ("trained31", FORGOTTEN),
        *(("trained_block", row) for row in OF_BLOCKS.values()),
    ],
    ids=[*MISTAKES, "a flag forgotten", *(f"{name} of a block drafter" for name in OF_BLOCKS)],
)
@pytest.mark.runs
def test_a_wrong_draft_of_the_right_shape_is_named(
    request, target, tokenizer, tmp_path, made, mistake
):
    config, tensors, words = mistake
    folder = shutil.copytree(request.getfixturevalue(made), tmp_path / "draft")
    edit_model(folder, config, tensors)
    raised, _ = run_check(folder, target, tokenizer, tmp_path, engines=["sglang"], **ANSWERED)
    assert re.search(words, raised)


@pytest.mark.parametrize("kind", [DFlashConfig, DSparkConfig])
def test_each_mistake_of_a_block_drafter_is_undone(kind, target):
    """Each way to read it is the undoing of one of them."""
    draft = block_draft(kind, target.spec)
    own = copy.deepcopy(draft.state_dict())
    ways = dict(repairs(own, draft.config))
    for words, changed in ways.items():
        mistaken = own | changed
        undone = (mistaken | fix for _, fix in repairs(mistaken, draft.config))
        assert any(all(torch.equal(own[name], found[name]) for name in own) for found in undone)
        assert not all(torch.equal(own[name], mistaken[name]) for name in own), words
    pairs = "hidden_norm.weight and norm.weight", "q_norm.weight and k_norm.weight"
    assert {f"{pair} exchanged" for pair in pairs} < ways.keys() and len(ways) == 11


def test_a_block_drafter_is_not_asked_for_more_than_its_block(target, tokenizer, tmp_path):
    draft = block_draft(DFlashConfig, target.spec, block_size=3)
    config = portable_config(draft.config, target.spec, "x", 3)
    write_draft(draft, tmp_path / "draft", config)
    raised, _ = run_check(tmp_path / "draft", target, tokenizer, tmp_path, engines=["vllm"])
    assert "at most 2 tokens a round: set eval.draft_length=2; set check.decode=false" in raised


def test_layers_in_another_order_are_read_so():
    """With their norms; of three all orders, of five the likely ones."""
    config = DraftConfig(8, 8, 2, 2, 4, 9, 9, 8, 64, num_aux_hidden_states=5, fc_norm=True)
    draft = EAGLE3(config, Auto, torch.ones(9, dtype=torch.bool), torch.zeros(9, dtype=torch.int64))
    for norm in draft.fc_norm:
        torch.nn.init.normal_(norm.weight)
    own, parts, orders = copy.deepcopy(draft.state_dict()), torch.randn(5, 3, 8), []
    expected = draft.fc(draft.fc_norm(torch.cat([*parts], -1)))
    for words, tensors in repairs(own, config):
        _, found, order = words.partition("the layers of fc in the order ")
        if found:
            orders.append(ast.literal_eval(order))
            draft.load_state_dict(own | tensors)
            fed = torch.cat([parts[number - 1] for number in orders[-1]], -1)
            torch.testing.assert_close(draft.fc(draft.fc_norm(fed)), expected)
    assert {(5, 4, 3, 2, 1), (2, 3, 4, 5, 1), (1, 4, 3, 2, 5)} <= {*orders}
    assert {(0, 1, 2), *other_orders(3)} == {*permutations(range(3))}


def test_the_layers_a_draft_was_made_for_are_found_by_decoding(
    folder, target, tokenizer, tmp_path, monkeypatch
):
    """A stand-in finds answers likelier by layers 1, 3, 4 than by those that config.json names."""
    right = HFTarget(spec_of(target.spec.path, LAYERS), target.device)

    def stand_in(draft, embedding, packed, columns, draft_length):
        ((batch, _),) = packed
        aux, _ = right.states(batch.input_ids, batch.position_ids)
        fits = torch.allclose(batch.features.aux_hidden_states[:, columns], aux, atol=1e-4)
        return Reading(1.0 + 2 * fits, torch.full((20,), -4.0 + 2 * fits))

    monkeypatch.setattr("eagle3.benchmark.check.read_with", stand_in)
    edit_model(folder, {"eagle_config": {NAMED: [2, 4, 5]}, NAMED: [3, 5, 6]})
    raised, content = run_check(folder, target, tokenizer, tmp_path, engines=["sglang"])
    assert re.search(r"fed by layers 1,3,4 it accepts 3\.00 tokens .* it is 1\.00", raised)
    assert content["decoded"]["acceptance_length"] == {"2,4,5": 1.0, "1,3,4": 3.0, "3,5,6": 1.0}


def test_layers_of_a_shallow_target(folder):
    edit_model(folder, {"eagle_config": None, NAMED: None})
    files, shallow = read_any(folder), SimpleNamespace(num_layers=4, aux_layer_ids=[0, 1, 3])
    assert candidates(files, shallow) == [[0, 1, 3]]


def test_what_is_clear():
    """Many small gains and few large ones, of more accepted; config.json's own doubts need less."""
    as_it_is = Reading(2.0, torch.zeros(400))
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    noise = noise - noise.mean()
    for length, gain, scale, clear, with_suspicion in [
        (2.1, 0.2, 0.5, True, True),
        (2.0, 0.2, 0.5, False, True),  # a sound draft on text of another kind
        (2.1, 0.2, 5.0, False, False),
        (2.1, 0.02, 0.05, False, True),
        (2.1, -0.2, 0.5, False, False),
    ]:
        reading = Reading(length, gain + scale * noise)
        found = [compare(reading, as_it_is, suspect).is_clear for suspect in (False, True)]
        assert found == [clear, with_suspicion]


@pytest.mark.parametrize("kind", ["no template", "no offsets"])
def test_targets_without_a_chat_are_decoded_on_plain_text(
    folder, target_folder, target, tokenizer, tmp_path, capsys, kind
):
    """A tokenizer in Python stands in for one of SentencePiece: neither gives offsets."""
    path = shutil.copytree(target_folder, tmp_path / "target")
    (path / "chat_template.jinja").unlink()
    if kind == "no offsets":
        (path / "tokenizer.json").unlink()
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    given = handle_of(path)
    with pytest.raises(ConfigError):
        load_chat(given.spec, section("data"))
    raised, content = run_check(folder, given, None, tmp_path, engines=["vllm"])
    assert "exactly 1.0" in raised and "plain text was decoded" in capsys.readouterr().out
    assert content["decoded"]["acceptance_length"]["1,3,4"] == 1.0
