"""Losses of pairs, and their sums by step; test_ttt holds the gradients of the whole path."""

from functools import partial

import pytest
import torch
from conftest import soft_target_loss
from reference import pair_losses, random_case, relative_error

from eagle3.draft.flash import Auto
from eagle3.loss import kl, lk
from eagle3.ttt import unroll


@pytest.mark.parametrize(("name", "pointwise"), [("kl", kl), ("lk", partial(lk, eta=3.0))])
def test_value_and_gradient_of_a_pair(name, pointwise):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(40, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    teacher = (3 * torch.randn(40, 12, generator=generator, dtype=torch.float64)).softmax(-1)
    teacher[0] = torch.eye(12)[0]
    value, gradient = pointwise(logits.detach().clone(), teacher)
    expected = pair_losses(logits, teacher, name)
    assert relative_error(value, expected.detach()) < 1e-13
    assert relative_error(gradient, torch.autograd.grad(expected.sum(), logits)[0]) < 1e-13
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
