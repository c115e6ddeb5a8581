"""Every backend against the plain form, a row at a time."""

from itertools import pairwise

import pytest
import torch
from reference import attend, relative_error

from eagle3.batch import DocumentSpans
from eagle3.draft import flash
from eagle3.draft.attention import Dense
from eagle3.draft.flash import Auto, FlashAttn, FlashCPU, FlashCUDA, Varlen

LENGTHS, QUERIES = [5, 1, 12, 3], [5, 1, 12, 1]  # the last of these tokens may have queries
# Rows in the order of need, not of place; none from the document of one token.
ROWS = torch.tensor([16, 3, 4, 20, 9, 6, 0, 17])


def inputs(dtype, heads, kv_heads, steps, head_dim=8):
    """q [N,H,d], k and v [T,G,d], and later keys and values, each longer than the next."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, head_dim, generator=generator).to(dtype).requires_grad_()

    length, counts = sum(LENGTHS), [len(ROWS) + steps - i for i in range(steps)]
    later = [(normal(count, kv_heads), normal(count, kv_heads)) for count in counts]
    return normal(len(ROWS), heads), normal(length, kv_heads), normal(length, kv_heads), later


def plain(q, k, v, later):
    """A row at a time, over exactly the keys it may see."""
    groups, starts = q.shape[1] // k.shape[1], [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    outputs = []
    for n, row in enumerate(ROWS.tolist()):
        start = max(s for s in starts if s <= row)
        keys, values = (
            torch.cat([first[start : row + 1], *(pair[side][n : n + 1] for pair in later)])
            for side, first in enumerate((k, v))
        )
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        probabilities = (torch.einsum("hd,jhd->hj", q[n], keys) * q.shape[-1] ** -0.5).softmax(-1)
        outputs.append(torch.einsum("hj,jhd->hd", probabilities, values))
    return torch.stack(outputs)


def errors(backend, dtype, heads=4, kv_heads=2, steps=3, head_dim=8, device="cpu"):
    """Relative errors of the output and of every gradient, against the plain form in float64."""
    documents = DocumentSpans(torch.tensor([0, *LENGTHS]).cumsum(0).int(), LENGTHS)
    documents = documents.with_queries(torch.tensor(QUERIES)).to(torch.device(device))

    def merged(q, k, v, later):
        rows, q, k, v = (x.to(device) for x in (ROWS, q, k, v))
        moved = [(key.to(device), value.to(device)) for key, value in later]
        return attend(backend, documents, rows, q, k, v, moved).cpu()

    results = []
    for form, kind in ((merged, dtype), (plain, torch.float64)):
        q, k, v, later = inputs(kind, heads, kv_heads, steps, head_dim)
        out = form(q, k, v, later)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        leaves = [q, k, v, *(x for pair in later for x in pair)]
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)])
    return [relative_error(*pair) for pair in zip(*results, strict=True)]


class PlainVarlen(Varlen):
    """What the flash kernels for CUDA are taken to do."""

    @staticmethod
    def parts(spans):
        """By document: its queries, its keys, and which of these a query does not see."""
        queries, keys = (pairwise(x.tolist()) for x in spans[:2])
        for (start, stop), (first, last) in zip(queries, keys, strict=True):
            hidden = torch.ones(stop - start, last - first).triu(1 + last - first - stop + start)
            yield slice(start, stop), slice(first, last), hidden.bool()

    @staticmethod
    def scores(q, k, hidden):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = torch.einsum("nhd,thd->hnt", q, k).double() * q.shape[-1] ** -0.5
        return scores.masked_fill(hidden, float("-inf"))

    @staticmethod
    def kernel(q, k, v, spans):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float64)
        for queries, keys, hidden in PlainVarlen.parts(spans):
            scores = PlainVarlen.scores(q[queries], k[keys], hidden)
            values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
            out[queries] = torch.einsum("hnt,thd->nhd", scores.softmax(-1), values).to(out.dtype)
            lse[:, queries] = scores.logsumexp(-1)
        return out, lse

    @staticmethod
    def kernel_backward(grad_out, q, k, v, out, lse, spans):
        dtype = q.dtype
        grad_out, q, k, v, out = (x.double() for x in (grad_out, q, k, v, out))
        grads, ratio = [torch.zeros_like(x) for x in (q, k, v)], q.shape[1] // k.shape[1]
        delta = (grad_out * out).sum(-1).T
        for queries, keys, hidden in PlainVarlen.parts(spans):
            p = (PlainVarlen.scores(q[queries], k[keys], hidden) - lse[:, queries, None]).exp()
            own_k, own_v = (x[keys].repeat_interleave(ratio, dim=1) for x in (k, v))
            grad_p = torch.einsum("nhd,thd->hnt", grad_out[queries], own_v)
            grad_scores = p * (grad_p - delta[:, queries, None]) * q.shape[-1] ** -0.5
            grads[0][queries] = torch.einsum("hnt,thd->nhd", grad_scores, own_k)
            for grad, weight, x in ((grads[1], grad_scores, q), (grads[2], p, grad_out)):
                each = torch.einsum("hnt,nhd->thd", weight, x[queries])
                grad[keys] = each.unflatten(1, (-1, ratio)).sum(2)
        return [grad.to(dtype) for grad in grads]


@pytest.mark.parametrize("backend", [Dense, FlashCPU, Auto, PlainVarlen])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("steps", [0, 1, 6])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 3e-2)]
)
def test_output_and_every_gradient(backend, heads, kv_heads, steps, dtype, tolerance):
    assert max(errors(backend, dtype, heads, kv_heads, steps)) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [FlashCUDA, FlashAttn, Auto])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_on_a_gpu(backend, dtype, heads, kv_heads, head_dim):
    if backend is FlashAttn:
        pytest.importorskip("flash_attn")
    assert max(errors(backend, dtype, heads, kv_heads, 6, head_dim, "cuda")) < 3e-2


def test_the_total_matters_in_backward():
    """A backward that normalises over the causal keys alone, as if d(lse) were zero, is far off:
    this suite sees it.
    """

    class Unmerged(Dense):
        @staticmethod
        def backward(grad_out, q, rows, k, v, out, lse, documents):
            own_out, own_lse = Dense.forward(q, rows, k, v, documents)
            share = (own_lse - lse).exp()[..., None].to(q.dtype)
            return Dense.backward(grad_out * share, q, rows, k, v, own_out, own_lse, documents)

    out, grad_q, grad_k, grad_v, *later = errors(Unmerged, torch.float64)
    assert max(out, grad_v, *later) < 1e-12
    assert grad_q > 0.05 and grad_k > 0.05


@pytest.mark.parametrize(
    "installed, capability, calls",
    [(True, (9, 0), ["FA3"]), (True, (8, 0), []), (False, (9, 0), [])],
)
def test_flash_attention_3_where_it_runs(monkeypatch, installed, capability, calls):
    found = []
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", found.append)
    flash.use_flash_attention_3.cache_clear()
    flash.use_flash_attention_3()
    flash.use_flash_attention_3()
    assert found == calls
    flash.use_flash_attention_3.cache_clear()
