"""The anchor walk equals really decoding, for every draft length, on text the target generated."""

import pytest
import torch
from conftest import spec_of

from eagle3 import evaluate as generate
from eagle3.data.vocab import vocab_tensors
from eagle3.decode.speculate import speculate
from eagle3.draft.flash import FlashCPU
from eagle3.draft.initial import derive_config
from eagle3.draft.model import Draft
from eagle3.evaluate import batches, evaluate, walk
from eagle3.loss import SoftTargetLoss, kl
from eagle3.target.hf import HFTarget

STEPS = 6


@pytest.fixture(scope="module")
def target(target_folder):
    return HFTarget(spec_of(target_folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def answers(target, tmp_path_factory):
    torch.manual_seed(3)
    prompts = [
        {"id": str(i), "input_ids": torch.randint(9, 2048, (n,)).tolist()}
        for i, n in enumerate([5, 17, 1, 30])
    ]
    folder = tmp_path_factory.mktemp("answers")
    learnt = generate.write_answers(folder, target, prompts, max_new_tokens=24, batch_size=3)
    loaded = generate.load_answers(folder, prompts)
    assert learnt["answers"] == 4 and [a.id for a in loaded] == ["0", "1", "2", "3"]
    assert [a.prompt_length for a in loaded] == [5, 17, 1, 30]
    return loaded


@pytest.fixture(scope="module")
def draft(target, answers):
    """A draft that agrees with the target often enough, by a few updates on the answers themselves."""
    torch.manual_seed(0)
    seen = torch.cat([a.input_ids for a in answers]).unique()[:-4]
    others = torch.arange(0, 2048, 9)
    t2d, d2t = vocab_tensors(torch.cat([seen, others]).unique().numpy(), 2048)
    draft = Draft(derive_config(target.config, len(d2t)), FlashCPU, t2d, d2t)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    item = batches(answers, t2d, 4, 4096)[0]
    from eagle3.ttt import unroll

    for _ in range(40):
        hidden = unroll(draft, target.embedding, item.features.aux_hidden_states, item.batch)
        output = SoftTargetLoss(kl)(
            draft, hidden, item.features, item.batch, target.head[draft.target_ids]
        )
        (output.loss / item.batch.normaliser).backward()
        optimizer.step()
        optimizer.zero_grad()
    return draft


@pytest.mark.parametrize("tokens_per_step", [32, 4096])
def test_walk_equals_decoding(target, answers, draft, tokens_per_step):
    packed = batches(answers, draft.t2d, STEPS, tokens_per_step)
    evaluation = evaluate(
        draft, target.embedding, target.head[draft.target_ids], SoftTargetLoss(kl), packed, 4
    )
    assert 1.3 < evaluation.acceptance_length[4] < 5
    for length in range(1, STEPS + 1):
        emitted = []
        for answer in answers:
            new = len(answer.input_ids) - answer.prompt_length
            prompt = answer.input_ids[: answer.prompt_length]
            generation = speculate(target, draft, [prompt], length, 1, length + 1, new)[0]
            assert generation.ids == answer.input_ids[answer.prompt_length :].tolist()
            emitted += [generation.emitted]
        rounds = [tokens for each in emitted for tokens in each]
        assert evaluation.acceptance_length[length] == sum(rounds) / len(rounds)
        if length == 4:
            first = [each[0] for each in emitted if each]
            assert evaluation.first_round == sum(first) / len(first)


def test_walk_by_hand():
    accepted = torch.zeros(9, 3, dtype=torch.bool)
    accepted[2, :2] = True  # the anchor behind a prompt of 3: two accepted
    accepted[5, 0] = True
    accepted[5, 2] = True  # unreachable: the draft before it missed
    assert walk(accepted, 3, 3) == [3, 2]
    assert walk(accepted, 3, 1) == [2, 1, 2]
    assert walk(accepted[:5], 3, 3) == [1], "the answer ends inside the accepted run"
    assert walk(accepted[:4], 3, 3) == [], "one token, and that is the prefill's"


def test_an_interrupted_generation_goes_on(target, tmp_path, monkeypatch):
    prompts = [{"id": str(i), "input_ids": [9 + i, 30, 40]} for i in range(4)]
    generate.write_answers(tmp_path, target, prompts, max_new_tokens=4, batch_size=2)
    whole = [a.input_ids for a in generate.load_answers(tmp_path, prompts)]
    (tmp_path / "part_00001.safetensors").unlink()
    calls = []
    original = generate.answer_batch
    monkeypatch.setattr(
        generate, "answer_batch", lambda *args: calls.append(args) or original(*args)
    )
    generate.write_answers(tmp_path, target, prompts, max_new_tokens=4, batch_size=2)
    assert len(calls) == 1
    assert all(
        torch.equal(a.input_ids, b)
        for a, b in zip(generate.load_answers(tmp_path, prompts), whole, strict=True)
    )
