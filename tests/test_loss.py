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


def test_lk_is_zero_where_the_draft_agrees():
    logits = torch.randn(5, 12, dtype=torch.float64)
    assert lk(logits, logits.softmax(-1), eta=3.0)[0].abs().max() < 1e-14


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
    assert torch.allclose(
        out.step_correct / torch.tensor(batch.pair_counts),
        expected.step_accuracy.double(),
        atol=1e-6,
    )

    offsets = torch.tensor([0, *batch.row_counts]).cumsum(0)
    row = batch.rows[batch.pair_index - offsets[batch.pair_step]]
    document = torch.repeat_interleave(torch.tensor(case.lengths))[row]
    assert torch.equal(
        out.correct, expected.correct[document, batch.position_ids[row], batch.pair_step]
    )


def test_gamma_weights_the_steps():
    """The weighted sum, linear in the steps' sums."""
    case = random_case(Auto)
    for gamma in (0.5, 1.0):
        out, _ = case.fast(gamma=gamma)
        assert out.loss.item() == pytest.approx(
            sum(gamma**k * x for k, x in enumerate(out.step_loss.tolist())), rel=1e-13
        )


def test_without_gradients():
    case = random_case(Auto)
    expected, batch = case.fast()
    features = case.features(batch)
    with torch.no_grad():
        hidden = unroll(case.draft, case.embedding, features.aux_hidden_states, batch)
        out = soft_target_loss(kl)(case.draft, hidden, features, batch, case.head[case.draft.t2d])
    assert torch.equal(out.correct, expected.correct) and out.loss.item() == pytest.approx(
        expected.loss.item()
    )


def test_eta_of_lk():
    case = random_case(Auto)
    out, batch = case.fast(pointwise="lk")
    features = case.features(batch)
    hidden = unroll(case.draft, case.embedding, features.aux_hidden_states, batch)
    other = soft_target_loss(partial(lk, eta=0.0))(
        case.draft, hidden, features, batch, case.head[case.draft.t2d]
    )
    assert other.loss.item() != pytest.approx(out.loss.item(), rel=1e-3)
