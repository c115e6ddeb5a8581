"""The Triton kernels behind the operators of `fused.py`, and their launches.

Sums are in fp32, whatever dtype the tensors have. Blocks and warps: sm_90 needs no spills.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle3.kernels.fused import NORM_ROWS

SWIGLU_BLOCK, SWIGLU_WARPS = 1024, 4
NORM_WARPS = 8
HEADS_BLOCK, HEADS_WARPS = 16, 4
MERGE_WARPS = 1
LOSS_BLOCK, LOSS_WARPS = 8192, 16  # so large that the rows in work at a time stay in the cache


@triton.jit
def swiglu_kernel(gate_up, out, inner, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    gate = tl.load(gate_up + row * 2 * inner + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + at, mask=inside, other=0.0).to(tl.float32)
    activated = gate * tl.sigmoid(gate) * up
    tl.store(out + row * inner + at, activated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad, gate_up, grad_gate_up, out, inner, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < inner
    kind = out.dtype.element_ty
    here, behind = row * 2 * inner + at, row * 2 * inner + inner + at
    g = tl.load(grad + row * inner + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + behind, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    tl.store(out + row * inner + at, (silu * up).to(kind), mask=inside)
    tl.store(grad_gate_up + here, (g * up * slope).to(kind), mask=inside)
    tl.store(grad_gate_up + behind, (g * silu).to(kind), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows:
        grid = (rows, triton.cdiv(inner, SWIGLU_BLOCK))
        swiglu_kernel[grid](gate_up, out, inner, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    rows, inner = grad.shape
    out, grad_gate_up = torch.empty_like(grad), torch.empty_like(gate_up)
    if rows:
        grid = (rows, triton.cdiv(inner, SWIGLU_BLOCK))
        swiglu_backward_kernel[grid](
            grad, gate_up, grad_gate_up, out, inner, BLOCK=SWIGLU_BLOCK, num_warps=SWIGLU_WARPS
        )
    return grad_gate_up, out


@triton.jit
def heads_kernel(
    projected, tokens, places, cos, sin, q, k, v, width, stride, first,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HEADS of the H + G + W heads of q, k and v in a row, by the halves that are rotated."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, HALF)[None]
    inside = (head < H + G + W) & (at < D // 2)
    place = tl.load(places + row)
    mine, read = projected + row * width + head * D + at, tokens + place * stride + first
    read += head * D + at
    x = tl.load(mine, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(read, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(mine + D // 2, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(read + D // 2, mask=inside, other=0.0).to(tl.float32)
    turned = inside & (head < H + G)
    c = tl.load(cos + row * (D // 2) + at + 0 * head, mask=turned, other=1.0)
    s = tl.load(sin + row * (D // 2) + at + 0 * head, mask=turned, other=0.0)
    kind = q.dtype.element_ty
    x, y = (x * c - y * s).to(kind), (y * c + x * s).to(kind)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + G), head >= H + G
    to_q, to_k = q + (row * H + head) * D + at, k + (row * G + head - H) * D + at
    to_v = v + (row * W + head - H - G) * D + at
    tl.store(to_q, x, mask=inside & is_q)
    tl.store(to_q + D // 2, y, mask=inside & is_q)
    tl.store(to_k, x, mask=inside & is_k)
    tl.store(to_k + D // 2, y, mask=inside & is_k)
    tl.store(to_v, x, mask=inside & is_v)
    tl.store(to_v + D // 2, y, mask=inside & is_v)


@triton.jit
def heads_backward_kernel(
    q, k, v, places, cos, sin, total, out, width, stride, first, last,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """q, k and v are the gradients; no two rows have a place but `last` in common."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, HALF)[None]
    inside = (head < H + G + W) & (at < D // 2)
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + G), head >= H + G
    of_q, of_k = q + (row * H + head) * D + at, k + (row * G + head - H) * D + at
    of_v = v + (row * W + head - H - G) * D + at
    x = tl.load(of_q, mask=inside & is_q, other=0.0) + tl.load(of_k, mask=inside & is_k, other=0.0)
    x = (x + tl.load(of_v, mask=inside & is_v, other=0.0)).to(tl.float32)
    y = tl.load(of_q + D // 2, mask=inside & is_q, other=0.0)
    y += tl.load(of_k + D // 2, mask=inside & is_k, other=0.0)
    y = (y + tl.load(of_v + D // 2, mask=inside & is_v, other=0.0)).to(tl.float32)
    turned = inside & (head < H + G)
    c = tl.load(cos + row * (D // 2) + at + 0 * head, mask=turned, other=1.0)
    s = tl.load(sin + row * (D // 2) + at + 0 * head, mask=turned, other=0.0)
    kind = out.dtype.element_ty
    x, y = x * c + y * s, y * c - x * s
    mine = out + row * width + head * D + at
    tl.store(mine, x.to(kind), mask=inside)
    tl.store(mine + D // 2, y.to(kind), mask=inside)
    place = tl.load(places + row)
    added = inside & (place + 0 * head < last)
    to = total + place * stride + first + head * D + at
    tl.store(to, (x + tl.load(to, mask=added, other=0.0).to(tl.float32)).to(kind), mask=added)
    to += D // 2
    tl.store(to, (y + tl.load(to, mask=added, other=0.0).to(tl.float32)).to(kind), mask=added)


def launch_heads(kernel, tensors: list[Tensor], sizes: list[int], counts: list[int], size: int):
    rows, blocks = len(tensors[0]), triton.cdiv(sum(counts), HEADS_BLOCK)
    if rows:
        kernel[(rows, blocks)](
            *tensors, *sizes, *counts, D=size, HEADS=HEADS_BLOCK,
            HALF=triton.next_power_of_2(size // 2), num_warps=HEADS_WARPS,
        )  # fmt: skip


def heads(projected, tokens, places, cos, sin, counts: list[int]):
    (rows, width), stride = projected.shape, tokens.shape[1]
    size = width // sum(counts)
    first = stride - width if counts[0] == 0 else 0
    q, k, v = (projected.new_empty(rows, count, size) for count in counts)
    tensors = [projected, tokens, places, cos, sin, q, k, v]
    launch_heads(heads_kernel, tensors, [width, stride, first], counts, size)
    return q, k, v


def heads_backward(grad_q, grad_k, grad_v, places, cos, sin, total):
    grads = [grad_q, grad_k, grad_v]
    counts, size = [grad.shape[1] for grad in grads], grad_q.shape[2]
    width, stride = sum(counts) * size, total.shape[1]
    first = stride - width if counts[0] == 0 else 0
    out = grad_q.new_empty(len(grad_q), width)
    tensors = [*grads, places, cos, sin, total, out]
    sizes = [width, stride, first, len(total) - 1]
    launch_heads(heads_backward_kernel, tensors, sizes, counts, size)
    return out


@triton.jit
def merge_kernel(
    q, out, lse, keys, values, merged, merged_lse, scale,
    S: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The R query heads of a group in a row, and its S later keys and values."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, at = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside, within = (r[:, None] < R) & (at[None] < D), at < D
    head = (row * G + group) * R + r
    place = head[:, None] * D + at[None]
    mine = (row * G + group) * D + at
    x = tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    top = tl.load(lse + head, mask=r < R, other=0.0)
    weight = tl.full([HEADS], 1.0, tl.float32)
    for i in tl.static_range(S):
        key = tl.load(keys[i] + mine, mask=within, other=0.0).to(tl.float32)
        value = tl.load(values[i] + mine, mask=within, other=0.0).to(tl.float32)
        score = tl.sum(x * key[None], 1) * scale
        new = tl.maximum(top, score)
        old, own = tl.exp(top - new), tl.exp(score - new)
        total = total * old[:, None] + own[:, None] * value[None]
        weight = weight * old + own
        top = new
    total /= weight[:, None]
    tl.store(merged + place, total.to(merged.dtype.element_ty), mask=inside)
    tl.store(merged_lse + head, top + tl.log(weight), mask=r < R)


@triton.jit
def merge_backward_kernel(
    grad_out, q, out, lse, keys, values, grad_q, grad_keys, grad_values, scale,
    S: tl.constexpr, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, at = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside, within = (r[:, None] < R) & (at[None] < D), at < D
    head = (row * G + group) * R + r
    place = head[:, None] * D + at[None]
    mine = (row * G + group) * D + at
    kind = grad_q.dtype.element_ty
    x = tl.load(q + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_out + place, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(g * tl.load(out + place, mask=inside, other=0.0).to(tl.float32), 1)
    total = tl.load(lse + head, mask=r < R, other=0.0)
    grad_x = tl.load(grad_q + place, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(S):
        key = tl.load(keys[i] + mine, mask=within, other=0.0).to(tl.float32)
        value = tl.load(values[i] + mine, mask=within, other=0.0).to(tl.float32)
        p = tl.exp(tl.sum(x * key[None], 1) * scale - total)
        grad_score = p * (tl.sum(g * value[None], 1) - delta) * scale
        grad_x += grad_score[:, None] * key[None]
        to_key, to_value = grad_keys[i] + mine, grad_values[i] + mine
        grad_key = tl.load(to_key, mask=within, other=0.0) + tl.sum(grad_score[:, None] * x, 0)
        grad_value = tl.load(to_value, mask=within, other=0.0) + tl.sum(p[:, None] * g, 0)
        tl.store(to_key, grad_key.to(kind), mask=within)
        tl.store(to_value, grad_value.to(kind), mask=within)
    tl.store(grad_q + place, grad_x.to(kind), mask=inside)


def launch_merge(kernel, q: Tensor, later: list[Tensor], *arguments) -> None:
    (rows, heads, size), groups = q.shape, later[0].shape[1]
    block = triton.next_power_of_2(heads // groups), triton.next_power_of_2(size)
    if rows:
        kernel[(rows, groups)](
            *arguments, size**-0.5, S=len(later) // 2, G=groups, R=heads // groups, D=size,
            HEADS=block[0], SIZE=block[1], num_warps=merge_warps(*block),
        )  # fmt: skip


def merge_warps(heads: int, size: int) -> int:
    """More than 512 numbers of each tensor do not fit into the registers of a warp."""
    return MERGE_WARPS * min(16, max(1, heads * size // 512))


def merge(q: Tensor, out: Tensor, lse: Tensor, later: list[Tensor]) -> tuple[Tensor, Tensor]:
    merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)
    keys, values = tuple(later[::2]), tuple(later[1::2])
    launch_merge(merge_kernel, q, later, q, out, lse, keys, values, merged, merged_lse)
    return merged, merged_lse


def merge_backward(grad_out, q, out, lse, later: list[Tensor], grad_q, totals: list[Tensor]):
    pairs = tuple(later[::2]), tuple(later[1::2]), grad_q, tuple(totals[::2]), tuple(totals[1::2])
    launch_merge(merge_backward_kernel, q, later, grad_out, q, out, lse, *pairs)


@triton.jit
def norm_backward_kernel(
    grad_x, grad_first, grad_normed, x, weight, out, parts, rows, count, eps,
    D: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows, whose gradients of the weight are added up; `grad_x` is read if KEPT."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    at = tl.arange(0, BLOCK)
    kind = out.dtype.element_ty
    scale = tl.load(weight + at, mask=at < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        row = first + i
        inside, within = (at < D) & (row + 0 * at < rows), (at < D) & (row + 0 * at < count)
        place = row * D + at
        values = tl.load(x + place, mask=within, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
        normed = values * inverse
        g = tl.load(grad_normed + place, mask=within, other=0.0).to(tl.float32)
        grad_weight += g * normed
        g *= scale
        total = inverse * (g - normed * (tl.sum(g * normed, 0) / D))
        total += tl.load(grad_first + place, mask=within, other=0.0).to(tl.float32)
        if KEPT:
            total += tl.load(grad_x + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, total.to(kind), mask=inside)
    tl.store(parts + tl.program_id(0) * D + at, grad_weight, mask=at < D)


def norm_backward(grad_x, grad_first, grad_normed, x, weight, eps: float):
    (rows, size), kept = x.shape, grad_x is not None
    out, programs = torch.empty_like(x), triton.cdiv(rows, NORM_ROWS)
    parts = x.new_empty(programs, size, dtype=torch.float32)
    if rows:
        tensors = grad_x.contiguous() if kept else x, grad_first, grad_normed, x, weight, out, parts
        norm_backward_kernel[(programs,)](
            *tensors, rows, len(grad_first), eps, D=size, ROWS=NORM_ROWS, KEPT=kept,
            BLOCK=triton.next_power_of_2(size), num_warps=NORM_WARPS,
        )  # fmt: skip
    return out, parts


@triton.jit
def exp(x):
    """A product and one instruction; tl.exp has three more, for numbers below 1e-38."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def numbers(x, at, size):
    return tl.load(x + at, mask=at < size, other=float("-inf")).to(tl.float32)


@triton.jit
def statistics(x, here, size, LANES: tl.constexpr):
    """logsumexp and argmax of a row by blocks of numbers `here` [LANES,8], a lane to a thread."""
    # Not -inf, from which the -inf of a lane without numbers would be no distance.
    top, total = tl.full([LANES], -1e38, tl.float32), tl.zeros([LANES], tl.float32)
    first = tl.zeros([LANES], tl.int32)  # the block in which a lane's largest number came first
    for start in range(0, size, LANES * 8):
        block = numbers(x, start + here, size)
        new = tl.maximum(top, tl.max(block, 1))
        total = total * exp(top - new) + tl.sum(exp(block - new[:, None]), 1)
        first, top = tl.where(new > top, start, first), new
    highest, at = tl.max(top, 0), first[:, None] + here
    best = tl.min(tl.where(numbers(x, at, size) == highest, at, size - 1))
    return highest + tl.log(tl.sum(total * exp(top - highest), 0)), best


@triton.jit
def logsumexp_kernel(x, out, size, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None]
    tl.store(out + row, statistics(x + row * size, here, size, LANES)[0])


@triton.jit
def loss_kernel(
    logits, teacher, rows, teacher_lse, weights, values, best, grads, size, kl, tv, nla, eta,
    ACCEPTANCE: tl.constexpr, LK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A pair, whose logits are read once from memory, then from the cache. With probabilities q of
    the draft, p of the teacher, its gradient is kl (q - p) + tv q (sum of q below p - [q < p]).
    """
    pair = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None]
    row = tl.load(rows + pair)
    logits, teacher, grads = logits + pair * size, teacher + row * size, grads + pair * size
    lse_q, place = statistics(logits, here, size, LANES)
    tl.store(best + pair, place)
    lse_p, weight = tl.load(teacher_lse + row), tl.load(weights + pair)
    accepted, below = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    if ACCEPTANCE:
        for start in range(0, size, LANES * 8):
            q = exp(numbers(logits, start + here, size) - lse_q)
            p = exp(numbers(teacher, start + here, size) - lse_p)
            accepted += tl.sum(tl.minimum(q, p), 1)
            below += tl.sum(tl.where(q < p, q, 0.0), 1)
    chance, rate = tl.maximum(tl.sum(accepted, 0), 1.1754943508222875e-38), tl.sum(below, 0)
    chance += 0 * (lse_q + lse_p)  # NaN where one is not finite, which minima pass over
    if LK:
        kl = exp(-eta * chance)
        tv = 1 - kl
    of_kl, of_tv = kl * weight, (tv + nla / chance) * weight
    dot = tl.zeros([LANES], tl.float32)
    for start in range(0, size, LANES * 8):
        at = start + here
        s, log_p = numbers(logits, at, size), numbers(teacher, at, size) - lse_p
        q, p = exp(s - lse_q), exp(log_p)
        dot += tl.sum(tl.where(p > 0, p * (s - log_p if LK else s), 0.0), 1)
        grad = of_kl * (q - p)
        if ACCEPTANCE:
            grad += q * tl.where(q < p, of_tv * (rate - 1), of_tv * rate)
        tl.store(grads + at, grad.to(grads.dtype.element_ty), mask=at < size)
    value = tl.where(kl > 0, kl * (lse_q - tl.sum(dot, 0)), 0.0)
    tl.store(values + pair, value + tv * (1 - chance) - nla * tl.log(chance))


def loss_terms(logits: Tensor, teacher: Tensor, rows: Tensor, weights: Tensor, kl, tv, nla, eta):
    value, best, grad = (torch.empty_like(x) for x in (weights, rows, logits))
    teacher_lse, size, is_lk = weights.new_empty(len(teacher)), logits.shape[1], eta is not None
    shape = {"LANES": LOSS_BLOCK // 8, "num_warps": LOSS_WARPS}
    flags = {"ACCEPTANCE": is_lk or tv + nla > 0, "LK": is_lk}
    logsumexp_kernel[(len(teacher),)](teacher, teacher_lse, size, **shape)
    tensors = logits, teacher, rows, teacher_lse, weights, value, best, grad
    loss_kernel[(len(logits),)](*tensors, size, kl, tv, nla, eta or 0.0, **flags, **shape)
    return value, best, grad
