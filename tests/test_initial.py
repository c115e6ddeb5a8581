"""The induction start copies what followed a token earlier in the text, before any training."""

import torch
from conftest import soft_target_loss

from eagle3.batch import Document, Features, pack, serving
from eagle3.draft.flash import Auto
from eagle3.draft.initial import induction, random
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll


def copied_share(initial, layers=3, **variant) -> float:
    """Of a random text said twice, the share of the second half that the untrained draft predicts
    at step 0.
    """
    torch.manual_seed(0)
    size, vocab = 128, 256
    shape = size, 128, 4, 2, 64, vocab, vocab, size, 512
    config = DraftConfig(*shape, num_aux_hidden_states=layers, **variant)
    t2d, d2t = torch.ones(vocab, dtype=torch.bool), torch.zeros(vocab, dtype=torch.int64)
    embedding, head = torch.randn(vocab, size), torch.randn(vocab, size)
    draft = EAGLE3(config, Auto, t2d, d2t)
    initial(draft, embedding, head)
    ids = torch.randperm(vocab)[:60].repeat(2)
    batch = pack([Document(0, ids, torch.arange(120) >= 60)], t2d, 1, serving)
    near = embedding[ids] + 0.5 * torch.randn(120, size)
    aux, rows = torch.cat([near, torch.randn(120, (layers - 1) * size)], dim=-1), batch.teacher_rows
    last = torch.randn(len(rows), size)
    features = Features(aux, last, ids.roll(-1)[rows], torch.zeros(len(rows)))
    with torch.no_grad():
        hidden = unroll(draft, embedding, aux, batch)
        correct = soft_target_loss()(draft, hidden, features, batch, head).correct
    return float(correct.float().mean())


def test_induction_copies_before_training():
    assert copied_share(induction) > 0.25
    assert copied_share(induction, layers=5, fc_norm=True, norm_output=True) > 0.25
    assert copied_share(random) < 0.05


def test_the_head_starts_as_the_targets():
    config = DraftConfig(32, 64, 4, 2, 16, 50, 20, 32, 512)
    t2d = torch.arange(50) % 5 < 2
    d2t = t2d.nonzero()[:, 0] - torch.arange(20)
    head, embedding = torch.randn(50, 32), torch.randn(50, 32)
    for initial in (random, induction):
        draft = EAGLE3(config, Auto, t2d, d2t)
        initial(draft, embedding, head)
        assert torch.equal(draft.lm_head.weight, head[t2d])
