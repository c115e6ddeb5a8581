"""The trainer with `loss/mask=shifted` against numbers of SpecForge's EAGLE3 core (specforge 0.2.0,
fp32, CPU).

A draft of hidden size 256, two documents of 256 tokens of noise, seven steps;
data/specforge/make.py says where the numbers are from. The vocabulary of the target is 4096, that
of the draft 1024.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import soft_target_loss
from reference import relative_error

from eagle3.batch import Document, Features, pack, shifted
from eagle3.draft.flash import Auto
from eagle3.draft.model import Draft, DraftConfig
from eagle3.loss import kl
from eagle3.ttt import unroll

FOLDER = Path(__file__).parent / "data" / "specforge"
TTT_STEPS, GAMMA = 7, 0.8


def fold(gradient: torch.Tensor) -> torch.Tensor:
    """fp32 [256]: sums of the entries under random signs, which keep the norm of an error on
    average.
    """
    signs = np.random.RandomState(0).randint(0, 2, gradient.numel()) * 2 - 1
    return (
        (gradient.detach().double().flatten() * torch.from_numpy(signs))
        .view(-1, 256)
        .sum(0)
        .float()
    )


def bf16(planes: np.ndarray) -> torch.Tensor:
    """High and low bytes uint8 [2, ...] of bf16 numbers -> fp32 [...]."""
    return torch.from_numpy(
        ((planes[0].astype(np.int32) << 24) | (planes[1].astype(np.int32) << 16)).view(np.float32)
    )


class Fixture:
    def __init__(self, name: str, lengths: list[int]):
        self.arrays = arrays = np.load(FOLDER / "case.npz")
        t2d, d2t = torch.from_numpy(arrays["t2d"]), torch.from_numpy(arrays["d2t"]).long()
        config = DraftConfig(
            hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            vocab_size=4096, draft_vocab_size=1024, target_hidden_size=256, max_position_embeddings=2048,
        )  # fmt: skip
        self.draft = Draft(config, Auto, t2d, d2t)
        weights = {key[6:]: bf16(arrays[key]) for key in arrays.files if key.startswith("draft.")}
        self.draft.load_state_dict(weights | {"t2d": t2d, "d2t": d2t})
        self.embedding = torch.zeros(4096, 256)
        self.embedding[torch.from_numpy(arrays["used_ids"]).long()] = bf16(
            arrays["used_embeddings"]
        )
        self.draft_head = bf16(arrays["draft_head"])

        def packed(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])

        ids, mask = (
            torch.from_numpy(arrays["input_ids"]),
            torch.from_numpy(arrays[f"{name}.loss_mask"]),
        )
        documents = [(i, ids[i, :length], mask[i, :length]) for i, length in enumerate(lengths)]
        self.batch = pack([Document(*d) for d in documents], t2d, TTT_STEPS, shifted)
        prenorm = packed(bf16(arrays["last_hidden_prenorm"]))[self.batch.teacher_rows]
        last = torch.nn.functional.rms_norm(prenorm, (256,), bf16(arrays["target_norm"]), 1e-5)
        argmax = packed(torch.from_numpy(arrays["argmax"]).long())[self.batch.teacher_rows]
        self.features = Features(
            packed(bf16(arrays["aux_hidden_states"])), last, argmax, torch.zeros(len(argmax))
        )

    def __call__(self):
        hidden = unroll(self.draft, self.embedding, self.features.aux_hidden_states, self.batch)
        out = soft_target_loss(kl, GAMMA)(
            self.draft, hidden, self.features, self.batch, self.draft_head
        )
        return out, out.loss / self.batch.normaliser


@pytest.fixture(scope="module")
def expected():
    return json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", ["full", "padded"])
def test_losses_and_gradients(expected, name):
    case = expected[name]
    fixture = Fixture(name, case["lengths"])
    out, loss = fixture()
    loss.backward()
    assert (out.step_loss / fixture.batch.normaliser).tolist() == pytest.approx(
        case["step_loss"], rel=1e-5
    )
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert out.step_correct.tolist() == case["correct"]
    assert fixture.batch.pair_counts == case["supervised"]
    for parameter, weight in fixture.draft.named_parameters():
        folded = torch.from_numpy(fixture.arrays[f"{name}.grad.{parameter}"])
        assert relative_error(fold(weight.grad), folded) < 1e-4, parameter


def test_ten_updates_of_adamw(expected):
    fixture = Fixture("full", [256, 256])
    optimizer = torch.optim.AdamW(
        fixture.draft.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    for losses in expected["adamw_trajectory"]:
        out, loss = fixture()
        assert [*(out.step_loss / fixture.batch.normaliser).tolist(), loss.item()] == pytest.approx(
            losses, rel=1e-4
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
