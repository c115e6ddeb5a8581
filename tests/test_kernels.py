"""The fused kernels against the plain ones: in Triton's interpreter, and as its compiler sees
them. `TRITON_INTERPRET=1 pytest tests/test_kernels.py`, with Triton of the version that torch for
CUDA pins.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from conftest import ROOT
from reference import block_case, block_loss, random_case, relative_error

from eagle3 import loss
from eagle3.batch import DocumentSpans
from eagle3.config import instantiate
from eagle3.draft.attention import Attend, Dense
from eagle3.draft.block import DFlashConfig, DSparkConfig
from eagle3.draft.flash import Auto as AutoFlash
from eagle3.errors import ConfigError
from eagle3.kernels import fused
from eagle3.kernels.eager import Eager
from eagle3.kernels.fused import Auto, Fused, terms_of

TRITON = pytest.mark.triton
LIMITS = pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"]
)


@pytest.fixture(autouse=True)
def needs_triton(request):
    if "triton" in request.keywords:
        pytest.importorskip("triton", reason="Triton is not installed")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(values, expected, limit):
    """Each to its own limit in relative norm; what is expected is computed in float64."""
    for value, wide in zip(values, expected, strict=True):
        assert value.shape == wide.shape
        assert torch.equal(value.double(), wide) or relative_error(value, wide) < limit


@TRITON
@LIMITS
@pytest.mark.parametrize("rows, inner", [(9, 200), (1, 7), (0, 64), (3, 1500)])
def test_swiglu(dtype, limit, rows, inner):
    gate_up, grad = normal(rows, 2 * inner).to(dtype), normal(rows, inner, seed=1).to(dtype)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    (wide_grad,) = torch.autograd.grad(expected, wide, grad.double())
    grad_gate_up, activated = fused.swiglu_backward(grad, gate_up)
    values = fused.swiglu(gate_up), activated, grad_gate_up
    close(values, (expected, expected, wide_grad), limit)


@TRITON
@LIMITS
@pytest.mark.parametrize("counts", [(6, 2, 2), (0, 2, 2), (6, 0, 0)], ids=str)
@pytest.mark.parametrize("rows, size", [(11, 16), (1, 8), (0, 8), (5, 12), (4, 2)])
def test_heads(dtype, limit, counts, rows, size):
    """Some rows read what follows the end of a document, together."""
    length, width = 20, sum(counts) * size
    all_columns = width if sum(counts) == 10 else 10 * size
    places = torch.randperm(length, generator=torch.Generator().manual_seed(0))[:rows]
    places[::4] = length
    angles = normal(rows, 1, size // 2)
    inputs = normal(rows, width).to(dtype), normal(length + 1, all_columns, seed=1).to(dtype)
    weights = [normal(rows, count, size, seed=2).to(dtype) for count in counts]

    def run(kernels, projected, tokens):
        leaves = projected.clone().requires_grad_(), tokens.clone().requires_grad_()
        read = kernels.share(leaves[1])
        rotation = angles.cos().to(wide_of(projected)), angles.sin().to(wide_of(projected))
        outputs = kernels.heads(leaves[0], read, places, *rotation, counts)
        total = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
        return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]

    close(run(Fused, *inputs), run(Eager, *(x.double() for x in inputs)), limit)


def wide_of(x):
    return torch.promote_types(x.dtype, torch.float32)


@TRITON
@LIMITS
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("rows, groups, ratio, size", [(13, 2, 4, 16), (1, 1, 1, 8), (5, 2, 3, 12)])
def test_later_keys(dtype, limit, steps, rows, groups, ratio, size):
    q, out, grad_out, grad_q = normal(4, rows, groups * ratio, size).to(dtype)
    lse = normal(rows, groups * ratio, seed=1)
    later = [
        normal(rows + 2 * steps - i // 2, groups, size, seed=2 + i).to(dtype)
        for i in range(2 * steps)
    ]

    shared = [Fused.share(x) for x in later]
    merged, total = Fused.merge(q, out, lse, shared)
    wide = [x.double() for x in later]
    close((merged, total), Eager.merge(q.double(), out.double(), lse.double(), wide), limit)
    # Both from what forward has kept.
    inputs = grad_out, q, merged, total
    added, expected = grad_q.clone(), grad_q.double()
    Fused.merge_backward(*inputs, shared, added)
    grads = [each.total() for each in shared]
    wide_grads = Eager.merge_backward(*(x.double() for x in inputs), wide, expected)
    close([added, *grads], [expected, *wide_grads], limit)


@TRITON
def test_gradients_that_a_backend_gives_head_by_head():
    """As Dense does where each head has keys of its own."""
    rows = torch.arange(7)

    def run(kernels, dtype):
        leaves = [normal(7, 4, 8, seed=i).to(dtype).requires_grad_() for i in range(5)]
        later = [kernels.share(x) for x in leaves[3:]]
        given = kernels, Dense, DocumentSpans(rows, [7]), rows, later, *leaves[:3]
        out = Attend.apply(*given, *kernels.anchors(later))
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    close(run(Fused, torch.float32), run(Eager, torch.float64), 2e-6)


@TRITON
@LIMITS
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rows, count, size", [(37, 35, 96), (16, 16, 7), (1, 1, 8), (3, 0, 8)])
def test_norm(dtype, limit, kept, rows, count, size):
    norm = torch.nn.RMSNorm(size, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = normal(rows, size).to(dtype)
    weights = normal(3, rows, size, seed=1).to(dtype)

    def run(kernels, norm, x):
        leaf = x.clone().requires_grad_()
        outputs = kernels.norm(norm, leaf, count)[0 if kept else 1 :]
        own = weights[-len(outputs) :].to(x.dtype)
        total = sum((y * w[: len(y)]).sum() for y, w in zip(outputs, own, strict=True))
        grads = torch.autograd.grad(total, (leaf, norm.weight))
        return [*(y.detach() for y in outputs), *grads]

    values = run(Fused, norm, x)
    close(values, run(Eager, norm.to(dtype).double(), x.double()), limit)


NODES = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob("conf/loss/*.yaml")}
LOSSES = {name: instantiate(x["pointwise"] | {"_partial_": True}) for name, x in NODES.items()}
LOSSES["mix of three"] = partial(loss.mix, kl=0.1, tv=0.7, nla=0.2, reverse_kl=0, jsd=0)
COMPILED = {name: pointwise for name, pointwise in LOSSES.items() if not terms_of(pointwise)}
BY_HAND = {name: pointwise for name, pointwise in LOSSES.items() if name not in COMPILED}


@TRITON
@pytest.mark.runs
@pytest.mark.parametrize("losses", [[], list(COMPILED)], ids=["own", "losses"])
def test_compiled_for_every_gpu_without_spills(losses):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "dev" / "compile_kernels.py", *losses]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def check_loss_chunk(pointwise, pairs, teachers, vocab, dtype, limit):
    """Of equals, the first is the argmax, be they in other lanes, blocks or both."""
    logits = (2 * normal(pairs, vocab)).to(dtype)
    if pairs > 1:
        # Much higher, and the gradient of some losses would be nothing but rounding.
        logits[0, [7, 400]] = logits[1, [400, 8 - vocab % 8192]] = 9.5
    teacher = (3 * normal(teachers, vocab, seed=1)).to(dtype)
    teacher[-1] = 0  # the uniform one, of rows beyond a document
    rows = torch.arange(pairs) * teachers // max(1, pairs)
    weights = torch.rand(pairs, generator=torch.Generator().manual_seed(2))
    given = logits.clone(), teacher, rows, weights
    value, best, grad = Fused.loss_chunk(pointwise, *given)
    wide = logits.double(), teacher.double(), rows, weights.double()
    expected = Eager.loss_chunk(pointwise, *wide)
    close((value, grad), (expected[0], expected[2]), limit)
    assert grad.dtype == dtype and torch.equal(best, expected[1]) and torch.equal(given[0], logits)


@TRITON
@pytest.mark.runs
@LIMITS
@pytest.mark.parametrize("name", COMPILED)
def test_loss_chunk_that_torch_compiles(dtype, limit, name):
    """Once for chunks of any size."""
    torch._dynamo.reset()
    for pairs, teachers in ((23, 5), (8, 3), (1, 1)):
        check_loss_chunk(COMPILED[name], pairs, teachers, 777, dtype, limit)


@TRITON
@LIMITS
@pytest.mark.parametrize(
    "pairs, teachers, vocab", [(23, 5, 777), (3, 2, 8201), (1, 1, 777), (0, 2, 777)]
)
@pytest.mark.parametrize("name", BY_HAND)
def test_loss_chunk_by_hand(dtype, limit, name, pairs, teachers, vocab):
    check_loss_chunk(BY_HAND[name], pairs, teachers, vocab, dtype, limit)


def test_which_losses_are_by_hand():
    """By where a function is, not by its name, and with all that it adds up."""

    def kl(logits, teacher): ...

    assert set(COMPILED) == {"jsd", "reverse_kl"}
    shares = {"kl": 0.4, "tv": 0.2, "nla": 0.2, "reverse_kl": 0.0, "jsd": 0.2}
    assert terms_of(kl) is None and terms_of(partial(loss.mix, **shares)) is None


@TRITON
@pytest.mark.parametrize("name", BY_HAND)
def test_loss_of_extreme_logits(name):
    """NaN where the logits are, and else only where the plain form is; argmaxes stay tokens."""
    logits, teacher = normal(6, 777), normal(6, 777, seed=1)
    logits[0, 5], logits[1, :300], logits[2, 300:] = 1e30, -3e38, float("-inf")
    logits[3] = torch.inf
    logits[4] = torch.nan
    teacher[0, 5:700], teacher[1, 500:], teacher[5, 9] = float("-inf"), -3e38, 3e38
    given = logits, teacher, torch.arange(6), torch.ones(6)
    expected = Eager.loss_chunk(BY_HAND[name], *given)
    value, best, grad = Fused.loss_chunk(BY_HAND[name], *given)
    assert ((best >= 0) & (best < 777)).all() and torch.equal(best[:3], expected[1][:3])
    for found, plain in ((value, expected[0]), (grad, expected[2])):
        known = ~plain.isnan()
        assert found[3:5].isnan().all()
        torch.testing.assert_close(found[known], plain[known], rtol=1e-5, atol=1e-6)


def step(case, kernels, pointwise="kl"):
    """Losses of the steps, and gradients by name."""
    case.draft.kernels = kernels
    out, batch = case.fast(pointwise=pointwise)
    return out.step_loss.detach(), case.gradients(out.loss / batch.normaliser)


@TRITON
@pytest.mark.parametrize("pointwise", ["kl", "lk"])
def test_whole_step(pointwise):
    """Chunks, row sets, documents of one token and rows beyond them, as in test_ttt."""
    case = random_case(AutoFlash, dtype=torch.float32)
    losses, gradients = step(case, Fused, pointwise)
    expected, expected_gradients = step(case.to(torch.float64), Eager, pointwise)
    assert relative_error(losses, expected) < 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


@TRITON
@pytest.mark.parametrize("kind", [DFlashConfig, DSparkConfig])
def test_whole_step_of_block_drafters(kind):
    def step(case, kernels):
        case.draft.kernels = kernels
        _, batch = block_loss(case, anchors=9)
        out, _ = block_loss(case, anchors=9, scale=1 / batch.normaliser)
        return out.step_loss.detach(), case.gradients(out.loss / batch.normaliser)

    case = block_case(kind, AutoFlash, torch.float32)
    losses, gradients = step(case, Fused)
    expected, expected_gradients = step(case.to(torch.float64), Eager)
    assert relative_error(losses, expected) < 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected_gradients[name]) < 1e-5, name


@TRITON
def test_gradients_of_a_step_in_bf16_are_as_near_to_exact_as_the_plain_ones():
    case = random_case(AutoFlash, dtype=torch.float32, lengths=(23, 9, 17))
    for name in ("embedding", "head", "aux", "last_hidden"):
        setattr(case, name, getattr(case, name).bfloat16())
    wide = case.to(torch.float64)
    with torch.no_grad():  # what both compute with
        for parameter in wide.draft.parameters():
            parameter.copy_(parameter.bfloat16())
    _, exact = step(wide, Eager)
    errors = []
    for kernels in (Fused, Eager):
        _, gradients = step(case, kernels)
        errors.append(sum(relative_error(x, exact[name]) for name, x in gradients.items()))
    assert errors[0] < 1.1 * errors[1]


def test_gradients_of_weights_are_summed_exactly_where_the_plain_ones_round():
    """What a weight gets from the steps of an unroll in bf16, against float64."""
    weights = [normal(8, 16, seed=i).requires_grad_() for i in range(8)]
    fc, *qkv, o, gate, up, down = (x.bfloat16().float().detach() for x in weights)
    down = down.T.contiguous()
    leaves = [x.requires_grad_() for x in (fc, *qkv, o, gate, up, down)]
    inputs, grads = normal(7, 64, 8, seed=8).bfloat16(), normal(7, 64, 24, seed=9).bfloat16()

    def run(kernels, dtype):
        given = kernels.weights(leaves[0], leaves[1:4], *leaves[4:], dtype)
        hidden = [kernels.linear(x.to(dtype), given.hidden) for x in inputs]
        embedded = [kernels.linear(x.to(dtype), given.embedded[8:]) for x in inputs]
        product = sum((y * g.to(dtype)).sum() for y, g in zip(hidden, grads, strict=True))
        product += sum(
            (y * g[:, :16].to(dtype)).sum() for y, g in zip(embedded, grads, strict=True)
        )
        return torch.autograd.grad(product, leaves[1:4])

    exact = run(Eager, torch.float64)
    for value, plain, wide in zip(
        run(Fused, torch.bfloat16), run(Eager, torch.bfloat16), exact, strict=True
    ):
        assert value.dtype == torch.float32 and relative_error(value, wide) < 1e-6
        assert relative_error(plain, wide) > 1e-3


def test_cpus_and_gpus_without_triton_run_the_plain_kernels(monkeypatch, capsys):
    assert Auto.pick(torch.zeros(1)) is Eager
    fused.without_triton.cache_clear()
    monkeypatch.setattr(fused, "has_triton", lambda: False)

    class OnCUDA:
        is_cuda, dtype = True, torch.bfloat16

    assert Auto.pick(OnCUDA) is Eager and Auto.pick(OnCUDA) is Eager
    assert capsys.readouterr().out.count("no Triton for CUDA") == 1
    with pytest.raises(ConfigError, match="fused needs Triton"):
        Fused()
    monkeypatch.undo()
    has_triton = fused.has_triton.__wrapped__
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: name == "triton")
    for version, found in ((None, True), ("7.0", False)):  # ROCm's Triton alone is not enough
        monkeypatch.setattr(torch.version, "hip", version)
        assert has_triton() is found
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        Fused().pick(torch.zeros(1))
    assert Auto.pick(OnCUDA) is Fused and Fused().pick(OnCUDA) is Fused
    OnCUDA.dtype = torch.float64
    assert Auto.pick(OnCUDA) is Eager


def test_backward_must_begin_with_the_scale_that_the_loss_was_given():
    case = random_case(AutoFlash, dtype=torch.float32)
    case.draft.kernels = type("Scaled", (Eager,), {"scales_first": True})
    plain, batch = case.fast()
    expected = case.gradients(plain.loss / batch.normaliser)
    scaled, _ = case.fast(scale=1 / batch.normaliser)
    assert torch.equal(scaled.loss, plain.loss)
    for name, gradient in case.gradients(scaled.loss / batch.normaliser).items():
        assert relative_error(gradient, expected[name]) < 1e-6, name
    wrong, _ = case.fast(scale=1 / batch.normaliser)
    with pytest.raises(RuntimeError):
        case.gradients(wrong.loss)
