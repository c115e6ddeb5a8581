"""What only a CUDA device can show: attention kernels, bf16 training, the packed target; against
fp32 on the CPU.
"""

import pytest
import torch
from conftest import soft_target_loss, spec_of
from reference import attend
from torch.utils._pytree import tree_map_only

from eagle3.batch import Document, DocumentSpans, Features, pack, serving
from eagle3.draft.attention import Dense
from eagle3.draft.flash import Auto, FlashAttn, FlashCUDA
from eagle3.draft.model import Draft, DraftConfig
from eagle3.loss import kl
from eagle3.parallel.segments import Segmented, segments_of
from eagle3.target.hf import HFTarget
from eagle3.ttt import unroll

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [130, 1, 77, 300]


def closeness(values, reference):
    """Relative distance in norm."""
    return float(
        (values.double().cpu() - reference.double().cpu()).norm() / reference.double().norm()
    )


@pytest.mark.parametrize("backend", [FlashCUDA, FlashAttn, Auto])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_kernels_equal_dense(backend, head_dim):
    if backend is FlashAttn:
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    total = sum(LENGTHS)
    rows = torch.randperm(total)[: total // 2].cuda()
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    documents = DocumentSpans(cu, LENGTHS)

    def tensors(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    n = len(rows)
    inputs = [tensors(n, 8, head_dim), tensors(total, 2, head_dim), tensors(total, 2, head_dim)]
    later = [(tensors(n + 5, 2, head_dim), tensors(n + 5, 2, head_dim)) for _ in range(2)]
    grad = torch.randn(n, 8, head_dim, device="cuda", dtype=torch.bfloat16)
    flat = [*inputs, *(x for pair in later for x in pair)]
    out = attend(backend, documents, rows, *inputs, later)
    grads = torch.autograd.grad(out, flat, grad)
    wide = [x.detach().double().requires_grad_() for x in flat]
    pairs = list(zip(wide[3::2], wide[4::2], strict=True))
    expected = attend(Dense, documents, rows, *wide[:3], pairs)
    expected_grads = torch.autograd.grad(expected, wide, grad.double())
    assert closeness(out, expected) < 1e-2
    assert all(closeness(g, e) < 2e-2 for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("backend", [FlashCUDA, FlashAttn])
def test_segments_of_a_shared_batch_equal_dense(backend):
    """What a rank of a sequence group computes: some blocks of rows against their documents' keys
    so far.
    """
    if backend is FlashAttn:
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    documents = [Document(i, torch.zeros(n), torch.ones(n)) for i, n in enumerate(LENGTHS)]
    batch = pack(documents, torch.ones(1).bool(), 7, serving)
    tokens = torch.cat([torch.arange(40, 100), torch.arange(200, 290), torch.arange(400, 500)])
    segments = tree_map_only(torch.Tensor, torch.Tensor.cuda, segments_of(tokens, batch))
    q, grad = torch.randn(2, len(tokens), 8, 64, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, sum(LENGTHS), 2, 64, dtype=torch.bfloat16, device="cuda")
    rows = torch.arange(len(tokens), device="cuda")
    out, lse = Segmented(backend).forward(q, rows, k, v, segments)
    grads = Segmented(backend).backward(grad, q, rows, k, v, out, lse, segments)
    wide = [x.double().cpu() for x in (q, k, v, grad)]
    expected, expected_lse = Dense.forward(wide[0], tokens, *wide[1:3], batch.documents)
    expected_grads = Dense.backward(
        wide[3], wide[0], tokens, *wide[1:3], expected, expected_lse, batch.documents
    )
    assert closeness(out, expected) < 1e-2 and closeness(lse, expected_lse) < 1e-3
    assert all(closeness(g, e) < 2e-2 for g, e in zip(grads, expected_grads, strict=True))


def test_bf16_training_step_is_near_fp32():
    torch.manual_seed(0)
    config = DraftConfig(256, 512, 4, 2, 64, 1000, 400, 256, 1024)
    t2d = torch.arange(1000) < 400
    draft = Draft(config, Auto, t2d, torch.zeros(400, dtype=torch.int64))
    documents = [
        (i, torch.randint(400, (n,)), torch.arange(n) > n // 3) for i, n in enumerate(LENGTHS)
    ]
    batch = pack([Document(*d) for d in documents], t2d, 7, serving)
    embedding, head = torch.randn(1000, 256), torch.randn(400, 256) * 0.1
    teachers = len(batch.teacher_rows)
    features = Features(
        torch.randn(sum(LENGTHS), 768),
        torch.randn(teachers, 256),
        torch.randint(400, (teachers,)),
        torch.zeros(teachers),
    )

    def gradients(device, dtype):
        draft.to(device).zero_grad()
        here, moved = batch.to(torch.device(device)), features.to(torch.device(device))
        table, rows = embedding.to(device, dtype), head.to(device, dtype)
        hidden = unroll(draft, table, moved.aux_hidden_states, here)
        output = soft_target_loss(kl)(draft, hidden, moved, here, rows)
        (output.loss / batch.normaliser).backward()
        return float(output.loss), {
            name: p.grad.cpu().clone() for name, p in draft.named_parameters()
        }

    loss, expected = gradients("cpu", torch.float32)
    assert gradients("cuda", torch.float32)[0] == pytest.approx(loss, rel=1e-4)
    half_loss, half = gradients("cuda", torch.bfloat16)
    assert half_loss == pytest.approx(loss, rel=2e-2)
    assert all(closeness(half[name], expected[name]) < 0.1 for name in expected)


def test_packed_target_on_cuda(target_folder):
    documents = [
        (i, torch.randint(2048, (n,)), torch.arange(n) > n // 3) for i, n in enumerate(LENGTHS)
    ]
    batch = pack([Document(*d) for d in documents], torch.ones(2048, dtype=torch.bool), 3, serving)
    expected = HFTarget(spec_of(target_folder), torch.device("cpu"))(batch)
    device = torch.device("cuda")
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 3e-2)):
        features = HFTarget(spec_of(target_folder, dtype=dtype), device)(batch.to(device))
        assert closeness(features.aux_hidden_states, expected.aux_hidden_states) < tolerance
        assert closeness(features.last_hidden_states, expected.last_hidden_states) < tolerance
