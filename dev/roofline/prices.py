"""What a call of an operator costs on a GPU, and how long a sequence of calls takes.

A kernel takes max(FLOPs / rate, bytes / bandwidth). All of it is a prediction: the ideal machine
reaches what was measured on an H200 for large products and copies, the likely one assumes how far
each kind of kernel usually stays below that.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from eagle3.kernels import fused

SMALL = 1 << 16  # bytes: copies of so many do not wait, and how so many lie does not matter


@dataclass(frozen=True)
class Machine:
    """Rates in FLOP/s and bytes/s; `shares` of the bandwidth by kind; seconds of the host."""

    name: str
    products: float = 790e12  # bf16; fp32 has `wide`
    wide: float = 60e12
    instructions: float = 29.6e12  # 132 multiprocessors, 4 warps of 32 each, 1.75 GHz
    flash: dict[str, float] = field(default_factory=lambda: {"forward": 790e12, "backward": 790e12})
    bandwidth: float = 4.3e12
    shares: dict[str, float] = field(default_factory=dict)
    ramp: float = 0.0  # what a kernel loses at its begin and end
    pageable: float = 8e9  # copies from the host
    pinned: float = 50e9
    host_call: float = 5e-6  # to issue a call's first kernel, `host_kernel` each further one
    host_kernel: float = 2.5e-6
    host_own: float = 4e-5  # an operator written in Python, and its launch by Triton
    host_view: float = 1e-6
    launch: float = 5e-6  # from issue to start, where the device waits
    sync: float = 1e-5


IDEAL = Machine("ideal")
# FlashAttention 2 on Hopper reaches about 400 and 320 TFLOP/s (causal, d = 128), 3 about 650 and
# 550; large products 85 % of the best; kernels that index or broadcast 2-byte numbers do not read
# them in vectors.
SHARES = {"plain": 0.88, "strided": 0.5, "index": 0.4}
FLASH = {2: {"forward": 400e12, "backward": 320e12}, 3: {"forward": 650e12, "backward": 550e12}}


def likely(flash: int) -> Machine:
    """`flash`: the version of FlashAttention that is installed."""
    return Machine("likely", products=670e12, flash=FLASH[flash], shares=SHARES, ramp=1.5e-6)


@dataclass(frozen=True)
class Cost:
    """`kind`: product, flash, plain, strided, index; copy (from the host), host, view, sync.
    `temporary` bytes live only within the call.
    """

    kind: str
    bytes: float = 0
    flops: float = 0
    kernels: int = 1
    rate: str = "products"  # by what the FLOPs are done; of flash, and of copies, which
    temporary: float = 0

    def seconds(self, machine: Machine) -> float:
        """On the device."""
        if self.kind in ("view", "sync", "host"):
            return 0.0
        if self.kind == "copy":
            return self.bytes / getattr(machine, self.rate)
        rate = machine.flash[self.rate] if self.kind == "flash" else getattr(machine, self.rate)
        share = machine.shares.get(self.kind, machine.shares.get("plain", 1.0))
        moved = self.bytes / (machine.bandwidth * share)
        return max(self.flops / rate, moved) + machine.ramp * self.kernels


@dataclass
class Played:
    """Seconds until both are done, and of host and device alone; what the host waited for."""

    wall: float = 0.0
    host: float = 0.0
    busy: float = 0.0
    kernels: int = 0
    syncs: int = 0
    waits: int = 0


def play(calls: list, machine: Machine) -> Played:
    """Recorded calls on two clocks: the host issues, the device works in order, and beside it what
    is hidden on a side stream; a copy from pageable memory, or a sync, makes the host wait.
    """
    total, device = Played(), 0.0
    for call in calls:
        cost = call.cost
        if cost.kind == "view":
            total.host += machine.host_view
        elif cost.kind == "host":
            total.host += cost.bytes / machine.pageable
        elif cost.kind == "sync":
            total.host = max(total.host, device) + machine.sync
            total.syncs += 1
        else:
            first = machine.host_own if call.name.startswith("eagle3::") else machine.host_call
            total.host += first + (cost.kernels - 1) * machine.host_kernel
            if call.hidden:
                continue
            seconds = cost.seconds(machine)
            device = max(device, total.host + machine.launch) + seconds
            total.busy += seconds
            total.kernels += cost.kernels
            if (cost.kind, cost.rate) == ("copy", "pageable") and cost.bytes > SMALL:
                total.host = max(total.host, device)
                total.waits += 1
    total.wall = max(total.host, device)
    return total


def size(tensor: torch.Tensor) -> int:
    """Bytes that exist: a broadcast dimension has stride 0."""
    lengths = zip(tensor.shape, tensor.stride())
    return tensor.element_size() * math.prod(n for n, stride in lengths if stride or not n)


@dataclass
class Call:
    """An operator's arguments and results, as the rules below read them."""

    name: str  # aten::mm, as the profiler has it
    args: tuple
    kwargs: dict[str, Any]
    ins: list[torch.Tensor]
    outs: list[torch.Tensor]
    documents: list[int]  # lengths, which attention works on
    written: list[int]  # which arguments it writes into
    pinned: bool  # whether it reads pinned memory

    @property
    def reads(self) -> int:
        different = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in self.ins}
        return sum(map(size, different.values()))

    @property
    def writes(self) -> int:
        return sum(map(size, self.outs))


def product(call: Call) -> Cost:
    """mm and bmm, or addmm and baddbmm, whose first argument is added."""
    a, b = [t for t in call.args if isinstance(t, torch.Tensor)][-2:]
    given = call.kwargs.get("out")
    moved = call.reads + call.writes - (0 if given is None else size(given))
    rate = "products" if a.dtype in (torch.bfloat16, torch.float16) else "wide"
    return Cost("product", moved, 2.0 * a.numel() * b.shape[-1], rate=rate)


def flash_pairs(call: Call, queries: int, keys: int) -> float:
    """Query-key pairs of causal attention; where there are fewer queries than keys, documents have
    them from their first needed token on, about as many of each.
    """
    left_out = 1 - queries / keys
    return sum(n * n / 2 for n in call.documents) * (1 - left_out**2)


def flash_forward(call: Call) -> Cost:
    q, k = call.ins[:2]
    flops = 4 * flash_pairs(call, len(q), len(k)) * q.shape[-2] * q.shape[-1]
    return Cost("flash", call.reads + call.writes, flops, rate="forward")


def flash_backward(call: Call) -> Cost:
    """dq adds up in fp32 and is converted; dk and dv are made for each query head and summed."""
    q, k = call.ins[1:3]
    flops = 10 * flash_pairs(call, len(q), len(k)) * q.shape[-2] * q.shape[-1]
    extra = 3 * 4 * q.numel() + 2 * 2 * size(q)
    return Cost("flash", call.reads + call.writes + extra, flops, kernels=5, rate="backward")


def index_put(call: Call) -> Cost:
    """Adding up sorts the indices first."""
    values, accumulate = call.args[2], len(call.args) > 3 and call.args[3]
    moved = (3 if accumulate else 2) * values.numel() * call.outs[0].element_size()
    if not call.name.endswith("_"):
        moved += 2 * call.writes
    if accumulate:
        return Cost("index", moved + 96 * len(values), kernels=8)
    return Cost("index", moved)


def fused_adamw(call: Call) -> Cost:
    """Reads weight, gradient and both moments, writes all but the gradient."""
    each = sum(map(size, call.args[0]))
    return Cost("plain", 7 * each, kernels=max(1, len(call.args[0]) // 6 + each // (1 << 30)))


def foreach(call: Call) -> Cost:
    """Over lists of tensors, about 50 a kernel."""
    lists = tree_leaves(call.args[0])
    moved = sum(map(size, call.ins)) + sum(map(size, lists))
    return Cost("plain", moved, kernels=len(lists) // 50 + 1)


def logsumexp(call: Call) -> Cost:
    """amax, x - max, exp, sum: torch has no kernel for it."""
    each = size(call.ins[0])
    return Cost("plain", 6 * each, kernels=8, temporary=each)


def copy(call: Call) -> Cost:
    """Of another device, dtype or layout."""
    sources = call.ins[1:2] if call.name == "aten::copy_" else call.ins
    strided = call.name in ("aten::copy_", "aten::clone") and any(
        not t.is_contiguous() and t.stride(-1) != 1 for t in call.ins
    )
    return Cost("strided" if strided else "plain", sum(map(size, sources)) + call.writes)


def rms_norm_backward(call: Call) -> Cost:
    """Reads gradient and input twice: for their own gradient, and for the weight's."""
    grad, x, *_ = call.ins
    return Cost("plain", 2 * (size(grad) + size(x)) + size(call.outs[0]), kernels=2)


REDUCTIONS = "sum mean amax argmax max linalg_vector_norm"


def pointwise(call: Call) -> Cost:
    """Everything else: arguments read and results written once; slower where an argument is
    broadcast or not contiguous, or where short rows are reduced.
    """
    shape, large = call.outs[0].shape if call.outs else (), [t for t in call.ins if size(t) > SMALL]
    strided = any(t.shape != shape or not t.is_contiguous() for t in large)
    if call.name.removeprefix("aten::") in REDUCTIONS.split():
        first = call.ins[0]
        strided &= not (first.dim() and first.shape[-1] >= 1024 and first.is_contiguous())
    return Cost("strided" if strided else "plain", call.reads + call.writes)


def own(call: Call) -> Cost:
    """A kernel of this project: results written, arguments read, and written too where it changes
    them; of those with more rows than the first, as many rows as that has.
    """
    rows, moved = len(call.ins[0]), call.writes
    for place, given in enumerate(call.args):
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        read = sum(size(t) * min(1, rows / max(1, len(t))) for t in tensors)
        moved += 2 * read if place in call.written else read
    return Cost("plain", moved)


# For each logit, as dev/compile_kernels.py counts them in Triton 3.7.1's code for sm_90: of the
# kernels by hand, and of those that torch 2.13 makes of other losses, of a mix of all.
OF_KL, OF_ACCEPTANCE, OF_TEACHERS = 27, 47, 9
OF_COMPILED, OF_COMPILED_TEACHERS = {"reverse_kl": 168, "jsd": 209, "mix": 370}, 16


def loss_cost(call: Call, of_pairs: int, of_teachers: int) -> Cost:
    """Statistics of the teachers' rows, then all else, whose instructions take longer than its
    bytes do.
    """
    logits, teacher, *_ = call.ins
    instructions = of_pairs * logits.numel() + of_teachers * teacher.numel()
    moved = own(call).bytes + size(teacher)
    return Cost("plain", moved, instructions, kernels=2, rate="instructions")


def loss_terms(call: Call) -> Cost:
    *_, tv, nla, eta = call.args
    accepts = tv or nla or eta is not None
    return loss_cost(call, OF_ACCEPTANCE if accepts else OF_KL, OF_TEACHERS)


def loss_chunk(call: Call) -> Cost:
    pointwise = fused.POINTWISE[call.args[-1]]
    of_pairs = OF_COMPILED[getattr(pointwise, "func", pointwise).__name__]
    return loss_cost(call, of_pairs, OF_COMPILED_TEACHERS)


def rows(kind: str):
    """Rows are read where they lie, and written; then the indices."""
    return lambda call: Cost(kind, 2 * call.writes + sum(map(size, call.ins[1:])))


GROUPS = {
    product: "mm bmm addmm baddbmm addmm_ baddbmm_",
    flash_forward: "_flash_attention_forward",
    flash_backward: "_flash_attention_backward",
    rows("index"): "index_select gather embedding",
    rows("plain"): "index",
    index_put: "index_put index_put_ _index_put_impl_",
    lambda call: Cost("index", 2 * size(call.args[3])): "index_copy index_copy_",
    lambda call: Cost("index", 3 * size(call.args[3])): "index_add index_add_",
    # Zeros, and the part copied into them.
    lambda call: Cost("plain", call.writes + 2 * size(call.ins[0]), kernels=2): "slice_backward",
    logsumexp: "logsumexp",
    fused_adamw: "_fused_adamw_",
    lambda call: Cost("plain", call.reads, kernels=len(call.args[0]) // 50 + 2): "_foreach_norm",
    foreach: "_foreach_mul_ _foreach_add_",
    copy: "copy_ _to_copy cat clone",
    lambda call: Cost("plain", call.writes): "zeros full arange scalar_tensor zero_ fill_ "
    "zeros_like ones_like full_like new_zeros new_full",
}
RULES = {f"aten::{name}": rule for rule, names in GROUPS.items() for name in names.split()}
RULES["torch_attn::_varlen_attn"] = flash_forward
RULES["aten::_fused_rms_norm_backward"] = rms_norm_backward
OWN = {"eagle3::loss_terms": loss_terms, "eagle3::loss_chunk": loss_chunk}
FREE = (
    "empty empty_strided empty_like resize_ set_ new_empty new_empty_strided detach alias "
    "lift_fresh _unsafe_view is_pinned _has_compatible_shallow_copy_type"
)
FREE = {f"aten::{name}" for name in FREE.split()} | {"prim::device"}


def price(call: Call, views: bool) -> Cost | None:
    """None where nothing happens on the device; `views`: all of its results are."""
    devices = {tensor.device.type for tensor in call.ins + call.outs}
    if call.name in FREE or "cuda" not in devices:
        return None
    if "cpu" in devices and call.name in ("aten::_to_copy", "aten::copy_"):
        return Cost("copy", size(call.outs[0]), rate="pinned" if call.pinned else "pageable")
    if views:
        return Cost("view", kernels=0)
    if call.name.startswith("eagle3::"):
        return OWN.get(call.name, own)(call)
    return RULES.get(call.name, pointwise)(call)
