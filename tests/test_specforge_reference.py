"""The trainer with `loss/mask=shifted` against numbers of SpecForge's EAGLE3 core (specforge 0.2.0,
fp32, CPU).

A draft of hidden size 256, two documents of 256 tokens of noise, seven steps;
data/specforge/make.py says where the numbers are from. The vocabulary of the target is 4096, that
of the draft 1024.
"""

import json

import numpy as np
import pytest
import torch
from reference import relative_error
from specforge_case import FOLDER, Fixture

EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def fold(gradient):
    """fp32 [256]: sums of the entries under random signs, which keep the norm of an error on
    average.
    """
    signs = np.random.RandomState(0).randint(0, 2, gradient.numel()) * 2 - 1
    signed = gradient.detach().double().flatten() * torch.from_numpy(signs)
    return signed.view(-1, 256).sum(0).float()


@pytest.mark.parametrize("name", ["full", "padded"])
def test_losses_and_gradients(name):
    case = EXPECTED[name]
    fixture = Fixture(name, case["lengths"])
    out, loss = fixture()
    loss.backward()
    step_loss = (out.step_loss / fixture.batch.normaliser).tolist()
    assert step_loss == pytest.approx(case["step_loss"], rel=1e-5)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert out.step_correct.tolist() == case["correct"]
    assert fixture.batch.pair_counts == case["supervised"]
    for parameter, weight in fixture.draft.named_parameters():
        folded = torch.from_numpy(fixture.arrays[f"{name}.grad.{parameter}"])
        assert relative_error(fold(weight.grad), folded) < 1e-4, parameter


@pytest.mark.runs
def test_ten_updates_of_adamw():
    fixture = Fixture("full", [256, 256])
    optimizer = torch.optim.AdamW(fixture.draft.parameters(), lr=1e-3, weight_decay=0.0)
    for losses in EXPECTED["adamw_trajectory"]:
        out, loss = fixture()
        step_loss = (out.step_loss / fixture.batch.normaliser).tolist()
        assert [*step_loss, loss.item()] == pytest.approx(losses, rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
