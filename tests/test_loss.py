"""Losses of pairs, and their sums by step; test_ttt holds the gradients of the whole path."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import compose_config, soft_target_loss
from omegaconf import OmegaConf
from reference import pair_losses, random_case, relative_error

from eagle3 import loss as losses
from eagle3.config import instantiate
from eagle3.draft.flash import Auto
from eagle3.draft.ttt import unroll
from eagle3.loss import Reached, lk, mix

NAMES = ("kl", "tv", "nla", "reverse_kl", "jsd")


@pytest.mark.parametrize("name", ["kl", "lk", "tv", "nla", "reverse_kl", "jsd", "mix"])
def test_value_and_gradient_of_a_pair(name):
    """Of what conf/loss names, with the numbers there."""
    composed = compose_config("model=hf", "model.path=x", f"loss={name}")
    pointwise = instantiate(OmegaConf.to_container(composed.loss.pointwise))
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = (3 * torch.randn(40, 12, generator=generator, dtype=torch.float64)).softmax(-1)
    teacher[0] = torch.eye(12)[0]
    value, gradient = pointwise(logits.detach().clone(), teacher)
    expected = pair_losses(logits, teacher, name)
    assert relative_error(value, expected.detach()) < 1e-13
    assert relative_error(gradient, torch.autograd.grad(expected.sum(), logits)[0]) < 1e-13
    # Probabilities that round to 0 on either side, or that never meet.
    apart = torch.tensor([[0.0, 300.0], [300.0, 0.0]])
    assert all(each.isfinite().all() for each in pointwise(apart, apart.flip(0).softmax(-1)))
    if name == "lk":
        plain = lk(logits.detach().clone(), teacher, eta=0.0)[0]
        assert relative_error(plain, value) > 1e-3, "eta matters"
        agreed = logits.detach().clone()
        assert lk(agreed, agreed.softmax(-1), eta=3.0)[0].abs().max() < 1e-14


@pytest.mark.parametrize("mask", ["serving", "shifted"])
@pytest.mark.parametrize("pointwise", ["kl", "lk"])
@pytest.mark.parametrize("chunk_rows", [1, 3])
def test_chunks_do_not_matter(mask, pointwise, chunk_rows):
    case = random_case(Auto)
    whole, _ = case.fast(mask=mask, pointwise=pointwise, chunk_rows=1000)
    chunked, _ = case.fast(mask=mask, pointwise=pointwise, chunk_rows=chunk_rows)
    assert torch.equal(chunked.correct, whole.correct)
    assert relative_error(chunked.step_loss, whole.step_loss) < 1e-13
    expected = case.gradients(whole.loss)
    for name, gradient in case.gradients(chunked.loss).items():
        assert relative_error(gradient, expected[name]) < 1e-12, name


@pytest.mark.parametrize("mask", ["serving", "shifted"])
def test_correct_pair_by_pair(mask):
    """The draft's head is made the target's, so that it is right now and then; a tenth of the truth
    it cannot say.
    """
    case = random_case(Auto)
    with torch.no_grad():
        case.draft.lm_head.weight.copy_(torch.nn.functional.pad(case.head[case.draft.t2d], (0, 8)))
        case.draft.fc.weight.zero_()[:24, -24:] = 5 * torch.eye(24)
        case.aux[:, :, -24:] = case.last_hidden.roll(-1, dims=1)
    out, batch = case.fast(mask=mask)
    expected = case.dense(mask=mask)
    assert (expected.step_accuracy > 0.2).any() and (expected.step_accuracy < 1).all()
    shares = out.step_correct / torch.tensor(batch.pair_counts)
    assert torch.allclose(shares, expected.step_accuracy.double(), atol=1e-6)
    offsets = torch.tensor([0, *batch.row_counts]).cumsum(0)
    row = batch.rows[batch.pair_index - offsets[batch.pair_step]]
    document = torch.repeat_interleave(torch.tensor(case.lengths))[row]
    pairs = expected.correct[document, batch.position_ids[row], batch.pair_step]
    assert torch.equal(out.correct, pairs)


def test_gamma_weights_the_steps_with_and_without_gradients():
    case = random_case(Auto)
    for gamma in (0.5, 1.0):
        out, batch = case.fast(gamma=gamma)
        weighted = sum(gamma**k * x for k, x in enumerate(out.step_loss.tolist()))
        assert out.loss.item() == pytest.approx(weighted, rel=1e-13)
    features = case.features(batch)
    with torch.no_grad():
        hidden = unroll(case.draft, case.embedding, features.aux_hidden_states, batch)
        rows = case.head[case.draft.t2d]
        bare = soft_target_loss(gamma=1.0)(case.draft, hidden, features, batch, rows)
    assert torch.equal(bare.correct, out.correct)
    assert bare.loss.item() == pytest.approx(out.loss.item())


def test_a_mix_takes_any_of_the_losses():
    logits, teacher = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    shares, teacher = dict(zip(NAMES, (0.5, 0.0, 2.0, 1.0, 3.0))), teacher.softmax(-1)
    mixed = mix(logits, teacher, **shares)
    parts = [(getattr(losses, name)(logits, teacher), share) for name, share in shares.items()]
    for number in (0, 1):
        expected = sum(share * part[number] for part, share in parts)
        assert relative_error(mixed[number], expected) < 1e-14


def test_weights_by_how_often_drafting_gets_to_a_step():
    """Counted pair by pair, over two updates of two ranks; a restored one goes on the same."""
    case, decay, gamma = random_case(Auto), 0.9, 0.7
    batch = case.fast(ttt_steps=4)[1]
    weights = Reached(gamma, decay)
    assert weights(4).tolist() == pytest.approx([1, gamma, gamma**2, gamma**3])
    twice = SimpleNamespace(all_reduce_tensor=lambda tensor: 2 * tensor)
    right, reached = [gamma] * 4, [1.0] * 4
    for _ in range(2):
        correct = torch.rand(len(batch.pair_index)) < 0.8
        offsets = torch.tensor([0, *batch.row_counts]).cumsum(0)[batch.pair_step]
        rows = (batch.pair_index - offsets).tolist()
        found = dict(zip(zip(rows, batch.pair_step.tolist(), strict=True), correct.tolist()))
        right, reached = ([decay * x for x in each] for each in (right, reached))
        for row, step in found:
            if all(found[row, before] for before in range(step)):
                reached[step] += 2
                right[step] += 2 * found[row, step]
        weights.measure(batch, correct)
        again = Reached(gamma, decay)
        again.restore(json.loads(json.dumps(weights.state())))
        again.measure(batch, correct)
        for each in (weights, again):
            each.advance(twice, torch.device("cpu"))
        chance = [1.0]
        for step in range(3):
            chance.append(chance[-1] * right[step] / reached[step])
        assert weights(4).tolist() == pytest.approx(chance) and len(weights(1)) == 1
        assert torch.equal(again(4), weights(4)) and 0 < chance[3] < chance[1] < 1
    loss = soft_target_loss()
    loss.weights = weights
    features = case.features(batch)
    hidden = unroll(case.draft, case.embedding, features.aux_hidden_states, batch)
    out = loss(case.draft, hidden, features, batch, case.head[case.draft.t2d])
    assert out.loss.item() == pytest.approx((out.step_loss * weights(4)).sum().item(), rel=1e-13)
