"""The anchor walk equals really decoding, for every draft length, on text the target generated."""

import os
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fit, flip, handle_of, section, soft_target_loss, spec_of
from safetensors.torch import load_file

from eagle3 import evaluate as module
from eagle3.batch import Document
from eagle3.data.vocab import vocab_tensors
from eagle3.decode.speculate import speculate
from eagle3.draft.flash import FlashCPU
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.evaluate import evaluate, generate, link, load_answers, pack_answers, walk
from eagle3.loss import FrozenWeights
from eagle3.runs.artefact import fingerprint, read_facts

STEPS = 6


@pytest.fixture(scope="module")
def handle(target_folder):
    return handle_of(target_folder)


@pytest.fixture(scope="module")
def target(handle):
    return handle.load()


@pytest.fixture(scope="module")
def answers(handle, tmp_path_factory):
    torch.manual_seed(3)
    ids = [torch.randint(9, 2048, (n,)).tolist() for n in (5, 17, 1, 30)]
    prompts = [{"id": str(i), "input_ids": row} for i, row in enumerate(ids)]
    section = SimpleNamespace(max_new_tokens=24, batch_size=3)
    folder = generate(section, prompts, handle, str(tmp_path_factory.mktemp("answers")), True)
    loaded = load_answers(folder)
    assert read_facts(folder)["answers"] == 4 and [a.key for a in loaded] == [0, 1, 2, 3]
    assert [int((~a.loss_mask).sum()) for a in loaded] == [5, 17, 1, 30]
    return loaded


@pytest.fixture(scope="module")
def draft(target, answers):
    """A draft that agrees with the target often enough, by a few updates on the answers."""
    torch.manual_seed(0)
    seen = torch.cat([a.input_ids for a in answers]).unique()[:-4]
    others = torch.arange(0, 2048, 9)
    t2d, d2t = vocab_tensors(torch.cat([seen, others]).unique().numpy(), 2048)
    draft = Draft(derive_config(target.config, len(d2t)), FlashCPU, t2d, d2t)
    batch, _ = pack_answers(answers, t2d, 4, 4096)[0]
    fit(draft, target, batch, updates=40, lr=3e-3)
    return draft


@pytest.mark.parametrize("tokens_per_step", [32, 4096])
@pytest.mark.runs
def test_walk_equals_decoding(target, answers, draft, tokens_per_step):
    packed = pack_answers(answers, draft.t2d, STEPS, tokens_per_step)
    frozen = FrozenWeights(target.embedding, target.head[draft.target_ids])
    evaluation = evaluate(draft, frozen, soft_target_loss(), packed, 4)
    assert 1.3 < evaluation.acceptance_length[4] < 5
    for length in range(1, STEPS + 1):
        decoded = []
        for answer in answers:
            new, prompt = int(answer.loss_mask.sum()), answer.input_ids[~answer.loss_mask]
            generation = speculate(target, draft, [prompt], length, 1, length + 1, new)[0]
            assert generation.ids == answer.input_ids[answer.loss_mask].tolist()
            decoded.append(generation)
        rounds = [tokens for generation in decoded for tokens in generation.emitted]
        assert evaluation.acceptance_length[length] == sum(rounds) / len(rounds)
        if length == 4:
            first = [generation.emitted[0] for generation in decoded if generation.emitted]
            assert evaluation.first_round == sum(first) / len(first)
            accepted = [count for generation in decoded for count in generation.accepted]
            shares = [sum(count > k for count in accepted) / len(accepted) for k in range(4)]
            assert evaluation.accepted_at == shares
            assert evaluation.rounds == [len(generation.emitted) for generation in decoded]
            assert evaluation.tokens == [len(generation.ids) - 1 for generation in decoded]
            prompts = [answer.input_ids[~answer.loss_mask].tolist() for answer in answers]
            assert evaluation.prompts == [fingerprint(prompt) for prompt in prompts]


def test_walk_by_hand():
    accepted = torch.zeros(9, 3, dtype=torch.bool)
    accepted[2, :2] = True  # the anchor behind a prompt of 3: two accepted
    accepted[5, 0] = True
    accepted[5, 2] = True  # unreachable: the draft before it missed

    def emitted(length, draft_length):
        document = Document(0, torch.arange(length), torch.arange(length) >= 3)
        return walk(document, accepted[:length], draft_length).emitted

    assert emitted(9, 3) == [3, 2] and emitted(9, 1) == [2, 1, 2]
    assert emitted(5, 3) == [1], "the answer ends inside the accepted run"
    assert emitted(4, 3) == [], "one token, and that is the prefill's"


ASKED = {"num_prompts": 4, "max_new_tokens": 6, "batch_size": 2, "aux_layer_ids": [1, 3, 5]}
# What changes from one call to the next, and which of the prompts are then answered.
CHANGES = {
    "nothing": ({}, []),
    "more prompts": ({"num_prompts": 6}, [4, 5]),
    "fewer prompts": ({"num_prompts": 2}, []),
    "another batch": ({"batch_size": 3, "num_prompts": 5}, [4]),
    "longer answers": ({"max_new_tokens": 7}, [0, 1, 2, 3]),
    "other layers": ({"aux_layer_ids": [1, 2, 5]}, [0, 1, 2, 3]),
    "a damaged answer": ({"damaged": 1}, [1]),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.runs
def test_an_answer_is_kept_by_what_it_depends_on(target, tmp_path, monkeypatch, what):
    taken, original = [], target.answer

    def answer(take, *given):
        def noted():
            if (found := take()) is not None:
                taken.append(found[1][0] - 9)
            return found

        return original(noted, *given)

    def ask(num_prompts, aux_layer_ids, damaged=None, **limits):
        prompts = [{"id": str(i), "input_ids": [9 + i, 30, 40]} for i in range(num_prompts)]
        known = {"target": "weights", "aux_layer_ids": aux_layer_ids}
        handle = SimpleNamespace(identity=known, load=lambda: target)
        return generate(SimpleNamespace(**limits), prompts, handle, str(tmp_path), True)

    monkeypatch.setattr(target, "answer", answer)
    folder, (changes, again) = ask(**ASKED), CHANGES[what]
    first = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    if "damaged" in changes:
        flip(folder / f"answer_{changes['damaged']:05d}.safetensors", -1)
        shutil.rmtree(folder)
    assert sorted(taken) == [0, 1, 2, 3]
    taken.clear()
    folder = ask(**ASKED | changes)
    assert sorted(taken) == again
    found = load_answers(folder)
    assert len(found) == changes.get("num_prompts", 4)
    for document, tensors in zip(found, first, strict=False):
        if "max_new_tokens" not in changes:
            assert torch.equal(document.input_ids, tensors["input_ids"])


def test_an_interrupted_generation_keeps_what_is_finished(target, tmp_path, monkeypatch, capsys):
    original, prompts = target.answer, [{"input_ids": [9 + i, 30, 40]} for i in range(4)]
    handle = SimpleNamespace(identity={}, load=lambda: target)
    asked = SimpleNamespace(max_new_tokens=4, batch_size=2), prompts, handle, str(tmp_path), True

    def interrupted(*given):
        yield from islice(original(*given), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(*asked)
    assert "0 of 4 answers are in " in capsys.readouterr().out
    monkeypatch.setattr(target, "answer", original)
    assert len(load_answers(generate(*asked))) == 4
    assert "3 of 4 answers are in " in capsys.readouterr().out


def test_answers_are_copied_where_nothing_can_be_linked(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("answer")
    monkeypatch.setattr(Path, "hardlink_to", lambda *given: os.link(tmp_path, tmp_path))
    for _ in range(2):
        link(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "b").read_text() == "answer"


def test_what_a_draft_vocabulary_allows(monkeypatch, capsys, exported, target_folder):
    """A round of 3 drafted and 1, then one that stops at the answer's end, around a token that no
    draft can propose; a draft that is gone on with brings its own vocabulary.
    """
    ids = torch.tensor([1, 2, 3, 10, 11, 12, 13, 99, 10, 11])
    answers = [Document(0, ids, torch.arange(10) >= 3)]
    monkeypatch.setattr(module, "load_answers", lambda folder: answers)
    given = section("draft"), spec_of(target_folder), 3
    facts = module.cover(None, np.arange(10, 14), *given)
    assert facts == {"vocab_coverage": pytest.approx(6 / 7), "acceptance_at_most": 3}
    words = "only 85.7% of the target's answers is in the draft vocabulary: at best 3.00 tokens a"
    warning = capsys.readouterr().out
    assert warning.startswith(f"generate: warning: {words}") and "draft.vocab_size" in warning
    assert module.cover(None, np.arange(100), *given) == {"vocab_coverage": 1}
    given[0].init_from = str(exported / "portable")
    assert module.cover(None, np.arange(100), *given)["vocab_coverage"] < 0.9
