"""Records what a piece of code does on fake CUDA tensors: calls with their costs, memory, syncs."""

import contextlib
import linecache
import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from fake_cuda import Streams
from prices import Call, Cost, price
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass
class Recorded:
    """A call of an operator; `shapes` of its tensors, `place` as file:line in the project."""

    name: str
    cost: Cost
    hidden: bool  # on a side stream
    shapes: list[list[int]]
    place: str = ""
    function: str = ""
    backward: bool = False

    @property
    def source(self) -> str:
        file, _, line = self.place.rpartition(":")
        return linecache.getline(str(ROOT / file), int(line or 0)).strip()


class Recorder(TorchDispatchMode):
    """`documents`: the lengths that attention works on; `places` are found where asked for, which
    takes most of the time.
    """

    def __init__(self, documents: list[int], places: bool, streams: Streams):
        super().__init__()
        self.documents, self.places, self.streams = documents, places, streams
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        self.calls: list[Recorded] = []
        streams.on_sync, streams.on_pin = self.sync, self.pin

    def restart(self) -> None:
        """What was recorded so far was preparation; what it made stays."""
        self.calls, self.peak = [], self.now

    def sync(self) -> None:
        self.add("synchronize", Cost("sync", kernels=0))

    def pin(self, tensor: torch.Tensor) -> None:
        self.add("pin_memory", Cost("host", tensor.nbytes, kernels=0), tensor)

    def add(self, name: str, cost: Cost, *tensors: torch.Tensor) -> None:
        where = self.find() if self.places else ()
        hidden = self.streams.open > 0 and (cost.kind, cost.rate) != ("copy", "pageable")
        shapes = [list(tensor.shape) for tensor in tensors]
        self.calls.append(Recorded(name, cost, hidden, shapes, *where))

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a storage until its last tensor is gone."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and id(storage) not in self.alive:
            self.alive[id(storage)] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, id(storage))

    def release(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        if schema.name == "aten::_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.sync()
            return 1  # what is decided by it is not simulated
        if schema.name in ("aten::normal_", "aten::uniform_"):
            return args[0]  # would want a generator on the device
        result = function(*args, **kwargs)
        ins, outs = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)]
            for each in ((args, kwargs), result)
        )
        for tensor in outs:
            self.hold(tensor)
        aliases = [each.alias_info for each in schema.arguments if each.alias_info]
        views = bool(aliases) and not any(each.is_write for each in aliases)
        pinned = any(self.streams.is_pinned(t) for t in ins if t.device.type == "cpu")
        call = Call(schema.name, args, kwargs, ins, outs, self.documents)
        cost = price(call, views and all(each.alias_info for each in schema.returns), pinned)
        if cost is not None:
            self.peak = max(self.peak, self.now + cost.temporary)
            self.add(schema.name, cost, *ins)
        return result

    def find(self) -> tuple[str, str, bool]:
        """Place, function, and whether it is backward: of backward, the line of its forward."""
        frames, frame = [], sys._getframe(3)
        while frame is not None:
            code = frame.f_code
            frames.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        ours = [each for each in frames if of_interest(each[0])]
        if node is not None and not any(name == "backward" for _, _, name in ours):
            # Kept by anomaly mode.
            text = "".join(node.metadata.get("traceback_") or ())
            stack = [(file, int(line), name) for file, line, name in FRAME.findall(text)]
            ours = [each for each in reversed(stack) if of_interest(each[0])] or ours
        file, line, name = ours[0] if ours else ("?", 0, "?")
        return f"{shortened(file)}:{line}", name, node is not None


def of_interest(file: str) -> bool:
    return "/transformers/models/" in file or file.startswith(str(ROOT / "eagle3"))


def shortened(file: str) -> str:
    return file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]


def kernel(schema: str, fake):
    """An operator that CUDA has as kernels of its own, where fake tensors take torch's apart."""
    name = f"simulated::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :])
    for key in ("cpu", "cuda"):
        torch.library.impl(name, key, fake)
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.simulated, name.partition("::")[2])


rms_norm = kernel(
    "rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)",
    lambda x, weight: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
rms_norm_backward = kernel(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    lambda grad, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
)
silu_backward = kernel(
    "silu_backward(Tensor grad, Tensor x) -> Tensor", lambda grad, x: torch.empty_like(x)
)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        out, rstd = rms_norm(x, weight)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        return rms_norm_backward(grad, *ctx.saved_tensors)


@contextlib.contextmanager
def stand_ins():
    def normed(x, shape, weight, eps=None):
        return RMSNorm.apply(x, weight)

    with (
        mock.patch.object(torch.nn.functional, "rms_norm", normed),
        mock.patch.object(torch.ops.aten, "silu_backward", silu_backward),
        mock.patch.object(torch.nn.Module, "to", lambda module, device: module),
    ):
        yield


@contextlib.contextmanager
def recording(documents: list[int], places: bool = False):
    """A Recorder within which tensors are fake, and `cuda` exists."""
    torch.autograd.set_multithreading_enabled(False)
    streams = Streams()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    anomaly = torch.autograd.set_detect_anomaly(places, check_nan=False)
    recorder = Recorder(documents, places, streams)
    with streams.replaced(), stand_ins(), fake, recorder, anomaly:
        yield recorder
