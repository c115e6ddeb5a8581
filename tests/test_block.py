"""DFlash and DSpark against themselves written a second time: one block after the other, dense."""

import math

import numpy as np
import pytest
import torch
from reference import block_case, block_loss, dense_teacher, relative_error, rotate_half
from torch.nn import functional as F

from eagle3.batch import Document, draw_anchors
from eagle3.draft.attention import Dense
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto


def block_states(case, document: int, row: int) -> torch.Tensor:
    """[B,D]: the states behind the layers of the block behind a row, from whole matrices."""
    draft, config = case.draft, case.draft.config
    weights = dict(draft.named_parameters())
    ids, aux = case.input_ids[document], case.aux[document, : row + 1]

    def rms(x, name):
        return F.rms_norm(x, (x.shape[-1],), weights[name + ".weight"], config.rms_norm_eps)

    def turned(x, name, positions):
        x = rms(x.unflatten(-1, (-1, config.head_dim)), name)
        frequencies = config.rope_theta ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angles = torch.outer(positions.double(), frequencies.repeat(2))
        cos, sin = (f().float().to(x.dtype)[:, None] for f in (angles.cos, angles.sin))
        return x * cos + rotate_half(x) * sin

    context = rms(aux @ weights["fc.weight"].T, "hidden_norm")
    z = case.embedding[[int(ids[row + 1]), *[config.mask_token_id] * (config.block_size - 1)]]
    before, slots = torch.arange(row + 1), torch.arange(row + 1, row + 1 + config.block_size)
    groups = config.num_attention_heads // config.num_key_value_heads
    for number in range(config.num_hidden_layers):
        name = f"layers.{number}.self_attn."
        x = rms(z, f"layers.{number}.input_layernorm")
        q = turned(x @ weights[name + "q_proj.weight"].T, name + "q_norm", slots)
        both, places = torch.cat([context, x]), torch.cat([before, slots])
        k = turned(both @ weights[name + "k_proj.weight"].T, name + "k_norm", places)
        v = (both @ weights[name + "v_proj.weight"].T).unflatten(-1, (-1, config.head_dim))
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        p = (torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(config.head_dim)).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", p, v).flatten(1)
        z = z + attended @ weights[name + "o_proj.weight"].T
        x = rms(z, f"layers.{number}.post_attention_layernorm")
        gate, up, down = (
            weights[f"layers.{number}.mlp.{each}_proj.weight"] for each in ("gate", "up", "down")
        )
        z = z + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return rms(z, "norm")


def dense_loss(case, batch, gamma: float):
    """The loss of all pairs of `batch`, one by one; and whether each was right."""
    draft, config = case.draft, case.draft.config
    teacher, argmax = dense_teacher(case.last_hidden, case.head, draft.t2d)
    total, right, ends = 0.0, {}, batch.documents.cu_seqlens.tolist()
    for row in batch.rows.tolist():
        document = int(torch.bucketize(torch.tensor(row), torch.tensor(ends), right=True)) - 1
        place = row - ends[document]
        states, ids = block_states(case, document, place), case.input_ids[document]
        depth = [row in batch.rows[:count].tolist() for count in batch.row_counts]
        for step in (k for k, needed in enumerate(depth) if needed):
            state = states[step + config.drafts_from]
            logits = case.head @ state
            if isinstance(config, DSparkConfig):
                w1, w2 = (draft.markov_head[f"markov_w{i}"].weight for i in (1, 2))
                bias = w1[ids[place + step + 1]]
                logits = logits + w2 @ bias
            p, q = teacher[document, place + step + 1], logits.softmax(-1)
            chance = torch.minimum(p, q).sum()
            each = -0.1 * (p * q.log()).sum() + 0.9 * (1 - chance)
            if isinstance(config, DSparkConfig):
                proj = draft.confidence_head["proj"]
                sure = (proj.weight[0] @ torch.cat([state, bias]) + proj.bias[0]).sigmoid()
                known = chance.detach()
                each = each - known * sure.log() - (1 - known) * (1 - sure).log()
            total = total + gamma**step * each
            right[row, step] = logits.argmax() == argmax[document, place + step + 1]
    return total, right


@pytest.mark.parametrize("attention", [Auto, Dense])
@pytest.mark.parametrize("kind", [DFlashConfig, DSparkConfig])
def test_equals_one_block_after_the_other(kind, attention):
    case = block_case(kind, attention)
    output, batch = block_loss(case)
    expected, right = dense_loss(case, batch, 0.8)
    assert relative_error(output.loss, expected) < 1e-12
    starts = torch.tensor([0, *batch.row_counts]).cumsum(0)
    rows = batch.rows[batch.pair_index - starts[batch.pair_step]].tolist()
    found = [right[pair] for pair in zip(rows, batch.pair_step.tolist(), strict=True)]
    assert output.correct.tolist() == [bool(each) for each in found]
    wanted = case.gradients(expected)
    for name, gradient in case.gradients(output.loss).items():
        assert relative_error(gradient, wanted[name]) < 1e-11, name


def test_anchors_are_drawn_anew_in_each_epoch_and_alike_in_every_layout():
    documents = [Document(*d) for d in block_case(DFlashConfig, Auto).documents()]
    lengths = [len(document.input_ids) for document in documents]
    rows = torch.ones(sum(lengths), dtype=torch.bool)
    drawn = draw_anchors(documents, rows, lengths, 4)
    counts = [int(part.sum()) for part in drawn.split(lengths)]
    assert counts == [min(4, length) for length in lengths]
    backwards = draw_anchors(documents[::-1], rows, lengths[::-1], 4).split(lengths[::-1])
    assert torch.equal(torch.cat(backwards[::-1]), drawn)
    for document in documents:
        document.epoch = 1
    assert not torch.equal(draw_anchors(documents, rows, lengths, 4), drawn)


def test_fewer_anchors_are_the_loss_of_these_rows():
    case = block_case(DFlashConfig, Auto)
    output, batch = block_loss(case, anchors=3)
    whole = block_loss(case)[1]
    assert np.isin(batch.rows.tolist(), whole.rows.tolist()).all()
    assert batch.normaliser == batch.pair_counts[0] < whole.normaliser
    assert relative_error(output.loss, dense_loss(case, batch, 0.8)[0]) < 1e-12
