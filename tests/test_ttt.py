"""The whole fast path, from documents to gradients, against tests/reference.py."""

import pytest
import torch
from reference import random_case, relative_error

from eagle3.draft.attention import Dense
from eagle3.draft.flash import Auto, FlashCPU

MASKS = pytest.mark.parametrize("mask", ["serving", "shifted"])


def worst(gradients, expected):
    return max(relative_error(gradients[name], expected[name]) for name in gradients)


def compare(case, **options):
    """Largest relative errors of the losses and of the gradients, those expected being computed in
    float64.
    """
    out, batch = case.fast(**options)
    gradients = case.gradients(out.loss / batch.normaliser)
    wide = case.to(torch.float64)
    expected = wide.dense(**options)
    assert out.step_correct.tolist() == expected.correct.sum((0, 1)).tolist()
    loss = relative_error(out.loss.detach() / batch.normaliser, expected.loss.detach())
    steps = relative_error(out.step_loss / batch.normaliser, expected.step_loss)
    return max(loss, steps), worst(gradients, wide.gradients(expected.loss))


@pytest.mark.parametrize("backend", [Dense, FlashCPU, Auto])
@MASKS
@pytest.mark.parametrize("pointwise", ["kl", "lk"])
@pytest.mark.parametrize("draft_vocab_size", [30, 50])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_losses_and_gradients(backend, mask, pointwise, draft_vocab_size, dtype, tolerance):
    case = random_case(backend, dtype=dtype, draft_vocab_size=draft_vocab_size)
    losses, gradients = compare(case, mask=mask, pointwise=pointwise)
    assert losses < tolerance / 2 and gradients < tolerance


@MASKS
@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("norms", [(), ("fc_norm",), ("norm_output",), ("fc_norm", "norm_output")])
def test_norms_of_eagle31_and_any_number_of_layers(mask, layers, norms):
    case = random_case(Auto, layers=layers, **dict.fromkeys(norms, True))
    assert max(compare(case, mask=mask)) < 1e-12


@MASKS
@pytest.mark.parametrize("ttt_steps", [1, 2, 9])
def test_any_number_of_steps(mask, ttt_steps):
    """With nine steps, no document has a token left to supervise at the last ones."""
    case = random_case(Auto, lengths=(6, 9, 4), seed=3)
    assert max(compare(case, mask=mask, ttt_steps=ttt_steps)) < 1e-12


@MASKS
def test_documents_add_up_in_any_order(mask):
    """Sums before the division, so micro-steps and replicas can be added."""
    case = random_case(Auto)
    together, batch = case.fast(mask=mask)
    alone = [case.fast(mask=mask, order=[i]) for i in (4, 0, 6, 2, 5, 1, 3)]
    other, _ = case.fast(mask=mask, order=[4, 0, 6, 2, 5, 1, 3])
    assert sum(torch.tensor(one.pair_counts) for _, one in alone).tolist() == batch.pair_counts
    expected = case.gradients(together.loss)
    for loss, steps in (
        (sum(out.loss for out, _ in alone), sum(out.step_loss for out, _ in alone)),
        (other.loss, other.step_loss),
    ):
        assert relative_error(steps, together.step_loss) < 1e-13
        assert worst(case.gradients(loss), expected) < 1e-12


def test_nothing_to_supervise():
    """A batch of prompts alone gives a loss of zero that can still be differentiated."""
    case = random_case(Auto)
    case.loss_mask[:] = False
    out, batch = case.fast()
    assert out.loss.item() == 0 and batch.pair_counts == [0] * 5
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in case.draft.parameters())


def test_bfloat16_keeps_gradients_in_float32():
    case = random_case(Auto, dtype=torch.float32)
    expected, _ = case.fast()
    expected_gradients = case.gradients(expected.loss)
    for name in ("embedding", "head", "aux", "last_hidden"):
        setattr(case, name, getattr(case, name).bfloat16())
    out, _ = case.fast()
    gradients = case.gradients(out.loss)
    assert relative_error(out.loss.detach(), expected.loss.detach()) < 0.02
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert worst(gradients, expected_gradients) < 0.1
