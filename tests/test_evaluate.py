"""The anchor walk equals really decoding, for every draft length, on text the target generated: at
temperature 0 round by round, above it in the mean, which is counted out over few tokens.
"""

import collections
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TRAIN_ONLY, fit, flip, handle_of, run, section, soft_target_loss, spec_of
from safetensors.torch import load_file

from eagle3 import evaluate as module
from eagle3 import train
from eagle3.batch import Document, Features
from eagle3.data.vocab import vocab_tensors
from eagle3.decode.speculate import Sampling, speculate
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto, FlashCPU
from eagle3.draft.initial import derive_config
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll
from eagle3.evaluate import (
    HeldOut,
    evaluate,
    generate,
    link,
    load_answers,
    log_p,
    pack_answers,
    walk,
)
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
    section = SimpleNamespace(max_new_tokens=24, batch_size=3, temperature=[0.0])
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
    draft = EAGLE3(derive_config(target.config, len(d2t)), FlashCPU, t2d, d2t)
    batch, _ = pack_answers(answers, t2d, 4, 4096)[0]
    fit(draft, target, batch, updates=40, lr=3e-3)
    return draft


@pytest.mark.parametrize("tokens_per_step", [32, 4096])
@pytest.mark.runs
def test_walk_equals_decoding(target, answers, draft, tokens_per_step):
    packed = pack_answers(answers, draft.t2d, STEPS, tokens_per_step)
    frozen = FrozenWeights(target.embedding, target.head[draft.target_ids])
    evaluation = evaluate(draft, frozen, soft_target_loss(), {0.0: packed}, 4)
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
    chances = torch.zeros(9, 3, dtype=torch.float64)
    chances[2, :2] = 1  # the anchor behind a prompt of 3: two accepted
    chances[5, 0] = 1
    chances[5, 2] = 1  # unreachable: the draft before it missed

    def walked(length, draft_length, at=chances):
        document = Document(0, torch.arange(length), torch.arange(length) >= 3)
        # No draft has a chance beyond the end.
        inside = torch.arange(length)[:, None] + torch.arange(3) + 2 < length
        (answer,) = walk([document], [at[:length] * inside], draft_length)
        return answer.rounds, answer.accepted_at, answer.emitted

    assert walked(9, 3) == (2, [2, 1, 0], [3]) and walked(9, 1) == (3, [2], [2])
    assert walked(5, 3) == (1, [1, 0, 0], [1]), "the answer ends inside the accepted run"
    assert walked(4, 3) == (0, [0, 0, 0], []), "one token, and that is the prefill's"
    # Three tokens: a round of 1, 2 or 3, where 1/2 x 1/4 end at once; then one of 1 (3/4) or 2.
    chances = torch.zeros(9, 3, dtype=torch.float64)
    chances[2, :2], chances[3, 0] = torch.tensor([0.5, 0.25]), 0.25
    rounds = 1 + 0.5 * (1 + 0.75) + 0.5 * 0.75
    assert walked(7, 2, chances) == (rounds, [0.5 + 0.5 * 0.25, 0.125], [1 + 0.5 + 0.125])


class Markov:
    """A target whose next token depends on the newest alone, and a draft for all but one token, or
    one of blocks of four drafted tokens for all.
    """

    eos_token_ids = frozenset()

    def __init__(self, vocab_size, kind=DraftConfig):
        random = torch.Generator().manual_seed(1)
        normal = torch.randn(2, vocab_size, 16, generator=random, dtype=torch.float64)
        self.embedding, self.head = normal[0], 0.2 * normal[1]
        blocks = {}
        if kind is not DraftConfig:
            blocks = {"num_hidden_layers": 1, "block_size": 4 + kind.drafts_from}
        t2d, d2t = vocab_tensors(np.arange(0 if blocks else 1, vocab_size), vocab_size)
        shape = kind(
            hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, vocab_size=vocab_size, draft_vocab_size=len(d2t), target_hidden_size=16,
            max_position_embeddings=64, rms_norm_eps=1e-5, **blocks,
        )  # fmt: skip
        torch.manual_seed(1)
        self.draft = shape.build(Auto, t2d, d2t).double()
        for parameter in self.draft.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)

    def states(self, input_ids, position_ids, cache=None, visible=None):
        last = self.embedding[input_ids]
        return torch.cat([last] * 3, dim=-1), last

    def lm_head(self, last):
        return last @ self.head.T

    def evaluate(self, texts, prompt, temperature, steps, draft_length):
        """Acceptance on texts int64 [n], which begin with `prompt` tokens, and their batch."""
        documents = []
        for number, ids in enumerate(texts):
            aux, last = self.states(ids, None)
            logits = self.lm_head(last)[prompt:]
            features = Features(aux, last[prompt:], logits.argmax(-1), logits.logsumexp(-1))
            document = HeldOut(number, ids, torch.arange(len(ids)) >= prompt, features)
            document.log_p = log_p(document, self.head, temperature)
            documents.append(document)
        packed = pack_answers(documents, self.draft.t2d, steps, 1 << 20)
        frozen = FrozenWeights(self.embedding, self.head[self.draft.target_ids])
        at = {0.0: packed, temperature: packed}
        found = evaluate(self.draft, frozen, soft_target_loss(chunk_rows=50), at, draft_length)
        return found.sampled[f"{temperature:g}"], packed[0][0]


@pytest.mark.parametrize("draft_length", [1, 2])
def test_acceptance_at_a_temperature_counted_out(draft_length):
    """All that speculative sampling can do for four tokens over a vocabulary of four: of each text
    the chance, and the rounds that it takes on average.
    """
    target, prompt, temperature = Markov(4), [2, 1], 0.7
    texts = [torch.tensor([*prompt, *ids]) for ids in itertools.product(range(4), repeat=4)]
    found, batch = target.evaluate(texts, 2, temperature, 2, draft_length)
    with torch.no_grad():
        aux = batch.features.aux_hidden_states
        hidden = unroll(target.draft, target.embedding, aux, batch)
        logits = target.draft.logits(hidden, None).split(batch.row_counts)
    q = {}  # by what the draft has read, and its step
    for step, (count, rows) in enumerate(zip(batch.row_counts, logits, strict=True)):
        for row, one in zip(batch.rows[:count].tolist(), rows, strict=True):
            read = batch.input_ids[row // 6 * 6 : row + step + 2]
            q[tuple(read.tolist()), step] = [0.0, *(one / temperature).softmax(-1).tolist()]
    p = (target.lm_head(target.embedding) / temperature).softmax(-1).tolist()
    outcomes = collections.defaultdict(lambda: [0.0, 0.0])

    def go_on(text, rounds, step, chance):
        """`step` drafts of a round, which began before, were accepted."""
        if len(text) == 6:
            outcomes[text][0] += chance
            outcomes[text][1] += chance * rounds
            return
        says = p[text[-1]]
        if step == draft_length:
            residual, refused = says, 1.0
        else:
            drafts, refused = q[text, step], 0.0
            residual = [max(0.0, one - other) for one, other in zip(says, drafts)]
            for token, drawn in enumerate(drafts):
                kept = min(1.0, says[token] / drawn) if drawn else 0.0
                refused += drawn * (1 - kept)
                if drawn:
                    go_on((*text, token), rounds, step + 1, chance * drawn * kept)
        for token, share in enumerate(residual):
            own = chance * refused * share / sum(residual)
            ends = len(text) == 5
            go_on((*text, token), rounds + (not ends), 0, own)

    for token in range(4):
        go_on((*prompt, token), 1, 0, p[prompt[-1]][token])
    assert sum(chance for chance, _ in outcomes.values()) == pytest.approx(1)
    for text, rounds in zip(texts, found.rounds, strict=True):
        said = [p[one][other] for one, other in zip(text.tolist()[1:], text.tolist()[2:])]
        chance, weighted = outcomes[tuple(text.tolist())]
        assert chance == pytest.approx(np.prod(said))
        assert rounds == pytest.approx(weighted / chance, rel=1e-5)
    assert max(found.rounds) - min(found.rounds) > 0.5


@pytest.mark.parametrize("kind, steps", [(DraftConfig, 4), (DFlashConfig, 4), (DSparkConfig, 3)])
@pytest.mark.runs
def test_acceptance_at_a_temperature_is_that_of_sampling(kind, steps):
    """On answers that the decoder sampled, its rounds are as expected, by a z-test."""
    target, temperature = Markov(24, kind), 0.8
    prompts = list(torch.randint(24, (600, 3), generator=torch.Generator().manual_seed(0)))
    rule = Sampling(temperature, torch.Generator().manual_seed(0))
    decoded = speculate(target, target.draft, prompts, steps, 1, steps + 1, 20, rule)
    texts = [torch.cat([prompt, torch.tensor(g.ids)]) for prompt, g in zip(prompts, decoded)]
    found, _ = target.evaluate(texts, 3, temperature, steps, steps)
    rounds = torch.tensor([len(generation.emitted) for generation in decoded]).double()
    apart = rounds - torch.tensor(found.rounds)
    assert abs(apart.mean()) < 4 * apart.std() / len(apart) ** 0.5
    accepted = [count for generation in decoded for count in generation.accepted]
    shares = [sum(count > k for count in accepted) / len(accepted) for k in range(steps)]
    assert found.accepted_at == pytest.approx(shares, abs=0.02) and shares[1] > 0.08
    assert found.acceptance_length[steps] == pytest.approx(600 * 19 / rounds.sum().item(), rel=0.02)


@pytest.mark.runs
def test_a_run_evaluates_blocks_as_they_are_served(settings, tmp_path, monkeypatch):
    """Of 1 + 3 slots for three drafted tokens, all of them within the tokens of a step."""
    packed = []
    monkeypatch.setattr(
        train, "pack_answers", lambda *given: packed.append(given[2:]) or pack_answers(*given)
    )
    shape = ["draft=dflash", "draft.block=8", "draft.layers=1", "draft.mask_token_id=1"]
    run([*settings, TRAIN_ONLY, *shape, "train.max_steps=1"], tmp_path / "run")
    assert packed == [(3, 192 // 4)] * 2, "at both temperatures"
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [*evaluation["acceptance_length"]] == ["1", "2", "3"]


ASKED = {"num_prompts": 4, "max_new_tokens": 6, "batch_size": 2, "aux_layer_ids": [1, 3, 5]}
ASKED |= {"temperature": [0.0, 1.0]}
# What changes from one call to the next, and which of the prompts are then answered.
CHANGES = {
    "nothing": ({}, []),
    "more prompts": ({"num_prompts": 6}, [4, 4, 5, 5]),
    "fewer prompts": ({"num_prompts": 2}, []),
    "another batch": ({"batch_size": 3, "num_prompts": 5}, [4, 4]),
    "longer answers": ({"max_new_tokens": 7}, [0, 0, 1, 1, 2, 2, 3, 3]),
    "other layers": ({"aux_layer_ids": [1, 2, 5]}, [0, 0, 1, 1, 2, 2, 3, 3]),
    "a damaged answer": ({"damaged": 1}, [1]),
    "another temperature": ({"temperature": [0.0, 0.5, 1.0]}, [0, 1, 2, 3]),
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
        handle = SimpleNamespace(identity=known, load=lambda: target, load_weights=lambda: target)
        return generate(SimpleNamespace(**limits), prompts, handle, str(tmp_path), True)

    monkeypatch.setattr(target, "answer", answer)
    folder, (changes, again) = ask(**ASKED), CHANGES[what]
    first = [load_file(path) for path in sorted(folder.glob("answer_?????.safetensors"))]
    if "damaged" in changes:
        flip(folder / f"answer_{changes['damaged']:05d}.safetensors", -1)
        shutil.rmtree(folder)
    assert sorted(taken) == [0, 0, 1, 1, 2, 2, 3, 3]
    taken.clear()
    folder = ask(**ASKED | changes)
    assert sorted(taken) == again
    found, sampled = load_answers(folder), load_answers(folder, 1.0)
    assert len(found) == len(sampled) == changes.get("num_prompts", 4)
    assert all(len(a.log_p) == len(a.features.argmax) and a.log_p.max() <= 0 for a in sampled)
    assert [*found[0].input_ids] != [*sampled[0].input_ids]
    for document, tensors in zip(found, first, strict=False):
        if "max_new_tokens" not in changes:
            assert torch.equal(document.input_ids, tensors["input_ids"])


def test_an_interrupted_generation_keeps_what_is_finished(target, tmp_path, monkeypatch, capsys):
    original, prompts = target.answer, [{"input_ids": [9 + i, 30, 40]} for i in range(4)]
    handle = SimpleNamespace(identity={}, load=lambda: target, load_weights=lambda: target)
    section = SimpleNamespace(max_new_tokens=4, batch_size=2, temperature=[0.0])
    asked = section, prompts, handle, str(tmp_path), True

    def interrupted(*given):
        yield from itertools.islice(original(*given), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(*asked)
    assert "0 of 4 answers are in " in capsys.readouterr().out
    monkeypatch.setattr(target, "answer", original)
    assert len(load_answers(generate(*asked))) == 4
    assert "3 of 4 answers are in " in capsys.readouterr().out


@pytest.mark.runs
def test_what_was_decoded_counts_at_near_ties(answers, target, tmp_path, monkeypatch, capsys):
    """Whatever the packed pass would choose there; that it chooses so often is said."""
    original = target.answer
    prompts = [{"input_ids": a.input_ids[~a.loss_mask].tolist()} for a in answers]
    handle = SimpleNamespace(identity={}, load=lambda: target)
    asked = SimpleNamespace(max_new_tokens=24, batch_size=3, temperature=[0.0]), prompts, handle

    generate(*asked, str(tmp_path / "same"), True)
    assert "warning" not in capsys.readouterr().out

    def rounded(take, *given):  # otherwise at the third token of each answer
        for key, ids in original(take, *given):
            yield key, [*ids[:2], *(token ^ 1 for token in ids[2:3]), *ids[3:]]

    monkeypatch.setattr(target, "answer", rounded)
    for found, exact in zip(load_answers(generate(*asked, str(tmp_path), True)), answers):
        ids, wanted = found.input_ids[found.loss_mask], exact.input_ids[exact.loss_mask]
        assert (ids != wanted).nonzero().tolist() == [[2]]
        assert found.features.argmax[:-1].tolist() == ids[1:].tolist()
    assert "generate: warning: decoding chose " in capsys.readouterr().out


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
