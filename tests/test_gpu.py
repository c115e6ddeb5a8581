"""What only a CUDA device can show: bf16 training, shared batches, the packed target; against the
CPU. The attention kernels alone stand in test_attention.
"""

import pytest
import torch
from conftest import soft_target_loss, spec_of
from torch.utils._pytree import tree_map_only

from eagle3.batch import Document, Features, pack, serving
from eagle3.draft.attention import Dense
from eagle3.draft.flash import Auto, FlashAttn, FlashCUDA
from eagle3.draft.model import EAGLE3, DraftConfig
from eagle3.draft.ttt import unroll
from eagle3.kernels.eager import Eager
from eagle3.kernels.fused import Fused
from eagle3.loader import Feed
from eagle3.optim import step_if_finite
from eagle3.parallel.segments import Segmented, segments_of
from eagle3.target.hf import HFTarget

pytestmark = pytest.mark.gpu
LENGTHS, CUDA, CPU = [130, 1, 77, 300], torch.device("cuda"), torch.device("cpu")


def batch_of(vocab_size, ttt_steps, in_vocab):
    torch.manual_seed(0)
    ids = [torch.randint(vocab_size, (n,)) for n in LENGTHS]
    documents = [Document(i, x, torch.arange(len(x)) > len(x) // 3) for i, x in enumerate(ids)]
    return pack(documents, in_vocab, ttt_steps, serving)


def distance(values, reference):
    """Relative, in norm."""
    wide = reference.double().cpu()
    return float((values.double().cpu() - wide).norm() / wide.norm())


@pytest.mark.parametrize("backend", [FlashCUDA, FlashAttn])
def test_segments_of_a_shared_batch_equal_dense(backend):
    """What a rank of a sequence group computes: some blocks of rows against their documents' keys
    so far.
    """
    if backend is FlashAttn:
        pytest.importorskip("flash_attn")
    batch = batch_of(1, 7, torch.ones(1).bool())
    tokens = torch.cat([torch.arange(40, 100), torch.arange(200, 290), torch.arange(400, 500)])
    segments = tree_map_only(torch.Tensor, torch.Tensor.cuda, segments_of(tokens, batch))
    q, grad = torch.randn(2, len(tokens), 8, 64, dtype=torch.bfloat16, device=CUDA)
    k, v = torch.randn(2, sum(LENGTHS), 2, 64, dtype=torch.bfloat16, device=CUDA)
    rows = torch.arange(len(tokens), device=CUDA)
    out, lse = Segmented(backend).forward(q, rows, k, v, segments)
    grads = Segmented(backend).backward(grad, q, rows, k, v, out, lse, segments)
    q, k, v, grad = (x.double().cpu() for x in (q, k, v, grad))
    expected = Dense.forward(q, tokens, k, v, batch.documents)
    expected_grads = Dense.backward(grad, q, tokens, k, v, *expected, batch.documents)
    assert distance(out, expected[0]) < 1e-2 and distance(lse, expected[1]) < 1e-3
    assert all(distance(g, e) < 2e-2 for g, e in zip(grads, expected_grads, strict=True))


def test_bf16_training_step_is_near_fp32():
    config = DraftConfig(256, 512, 4, 2, 64, 1000, 400, 256, 1024)
    t2d = torch.arange(1000) < 400
    batch = batch_of(400, 7, t2d)
    draft = EAGLE3(config, Auto, t2d, torch.zeros(400, dtype=torch.int64))
    embedding, head = torch.randn(1000, 256), torch.randn(400, 256) * 0.1
    n = len(batch.teacher_rows)
    last, argmax = torch.randn(n, 256), torch.randint(400, (n,))
    features = Features(torch.randn(sum(LENGTHS), 768), last, argmax, torch.zeros(n))

    def gradients(device, dtype):
        draft.to(device).zero_grad()
        here, moved = batch.to(device), features.to(device)
        hidden = unroll(draft, embedding.to(device, dtype), moved.aux_hidden_states, here)
        output = soft_target_loss()(draft, hidden, moved, here, head.to(device, dtype))
        (output.loss / batch.normaliser).backward()
        return float(output.loss), [p.grad.cpu().clone() for p in draft.parameters()]

    loss, expected = gradients(CPU, torch.float32)
    assert gradients(CUDA, torch.float32)[0] == pytest.approx(loss, rel=1e-4)
    half_loss, half = gradients(CUDA, torch.bfloat16)
    assert half_loss == pytest.approx(loss, rel=2e-2)
    assert all(distance(h, e) < 0.1 for h, e in zip(half, expected, strict=True))


def test_fused_kernels_equal_the_plain_ones():
    config = DraftConfig(256, 512, 6, 2, 64, 1000, 400, 256, 1024)
    t2d = torch.arange(1000) < 400
    batch = batch_of(400, 7, t2d).to(CUDA)
    draft = EAGLE3(config, Auto, t2d, torch.zeros(400, dtype=torch.int64)).to(CUDA)
    n = len(batch.teacher_rows)
    last, argmax = torch.randn(n, 256, device=CUDA), torch.randint(400, (n,), device=CUDA)
    aux, embedding = torch.randn(sum(LENGTHS), 768, device=CUDA), torch.randn(1000, 256).to(CUDA)
    head = torch.randn(400, 256, device=CUDA) * 0.1

    def run(kernels, dtype):
        draft.kernels, scale = kernels, 1 / batch.normaliser
        draft.zero_grad()
        given = Features(aux.to(dtype), last.to(dtype), argmax, argmax.float())
        hidden = unroll(draft, embedding.to(dtype), given.aux_hidden_states, batch)
        loss = soft_target_loss(chunk_rows=100)
        output = loss(draft, hidden, given, batch, head.to(dtype), scale)
        (output.loss * scale).backward()
        return output.step_loss, *(p.grad.clone() for p in draft.parameters())

    for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 5e-2)):  # fp32 products in TF32
        pairs = zip(run(Fused, dtype), run(Eager, dtype), strict=True)
        assert all(distance(value, expected) < limit for value, expected in pairs)


def test_clipping_within_the_optimiser():
    weights = [torch.ones(50, device=device).requires_grad_() for device in (CPU, CUDA)]
    for weight in weights:
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        for factor in (3.0, 0.01, float("inf"), 1.0):
            weight.grad = (torch.arange(50.0) * factor).to(weight.device)
            step_if_finite(optimizer, [weight], 0.5)
    assert distance(weights[1], weights[0]) < 1e-5


def test_packed_target_on_cuda(target_folder):
    batch = batch_of(2048, 3, torch.ones(2048, dtype=torch.bool))
    expected = HFTarget(spec_of(target_folder), CPU)(batch)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 3e-2)):
        target = HFTarget(spec_of(target_folder, dtype=dtype), CUDA, kernels="fused")
        features = target(batch.to(CUDA))
        assert distance(features.logsumexp, expected.logsumexp) < tolerance
        assert distance(features.aux_hidden_states, expected.aux_hidden_states) < tolerance
        assert distance(features.last_hidden_states, expected.last_hidden_states) < tolerance


def test_a_step_on_a_fed_batch_does_not_wait_for_the_device():
    """From the third on, when everything has been compiled and every table made."""
    config = DraftConfig(256, 512, 4, 2, 64, 1000, 400, 256, 1024)
    t2d, losses = torch.arange(1000) < 400, []
    batch = batch_of(400, 7, t2d)
    draft = EAGLE3(config, Auto, t2d, torch.zeros(400, dtype=torch.int64)).to(CUDA)
    embedding, head = (torch.randn(n, 256, dtype=torch.bfloat16, device=CUDA) for n in (1000, 400))
    n = len(batch.teacher_rows)
    states = torch.randn(sum(LENGTHS), 768), torch.randn(n, 256)
    features = Features(*states, torch.randint(400, (n,)), torch.zeros(n))
    batch.features = features.select(torch.arange(sum(LENGTHS)), torch.arange(n))
    assert all(x.is_pinned() for x in vars(batch.features).values())
    try:
        for moved in Feed(CUDA)([batch] * 4):
            hidden = unroll(draft, embedding, moved.features.aux_hidden_states, moved)
            output = soft_target_loss()(draft, hidden, moved.features, moved, head)
            (output.loss / batch.normaliser).backward()
            losses.append(output.loss.detach())
            torch.cuda.set_sync_debug_mode("error" if len(losses) > 1 else "default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({float(loss) for loss in losses}) == 1
