"""Records what code does on CUDA tensors without data: calls with their costs, memory, syncs."""

import contextlib
import linecache
import re
import sys
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from fake_cuda import Streams, stand_ins
from prices import Call, Cost, price
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT, CUDA = Path(__file__).parents[2], torch.device("cuda", 0)
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass
class Recorded:
    """A call of an operator; `shapes` of its tensors, `place` as file:line in the project."""

    name: str
    cost: Cost
    hidden: bool  # on a side stream
    shapes: list[list[int]]
    place: str = ""
    backward: bool = False

    @property
    def source(self) -> str:
        file, _, line = self.place.rpartition(":")
        return linecache.getline(str(ROOT / file), int(line)).strip()


class Recorder(TorchDispatchMode):
    """`documents`: the lengths that attention works on; with `places`, which take most of the time,
    calls know where they come from.
    """

    def __init__(self, documents: list[int], places: bool):
        super().__init__()
        self.documents, self.places, self.calls = documents, places, []
        self.alive, self.now, self.peak = set(), 0, 0
        self.streams = Streams(
            lambda: self.add("synchronize", Cost("sync", kernels=0)),
            lambda tensor: self.add("pin_memory", Cost("host", tensor.nbytes, kernels=0), tensor),
        )

    def restart(self) -> None:
        """What was recorded so far was preparation; what it made stays."""
        self.calls, self.peak = [], self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        if schema.name in ("aten::normal_", "aten::uniform_"):
            return args[0]  # would want a generator on the device
        try:
            result = function(*args, **kwargs)
        except DataDependentOutputException:
            self.streams.on_sync()
            return 0  # where a target tries something out: the distance is none
        ins, outs = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)]
            for each in ((args, kwargs), result)
        )
        for tensor in outs:
            self.hold(tensor)
        written = [i for i, each in enumerate(schema.arguments) if each.is_write]
        views = bool(schema.returns) and all(each.alias_info for each in schema.returns)
        pinned = any(self.streams.is_pinned(t) for t in ins if t.device.type == "cpu")
        call = Call(schema.name, args, kwargs, ins, outs, self.documents, written, pinned)
        if (cost := price(call, views and not written)) is not None:
            self.peak = max(self.peak, self.now + cost.temporary)
            self.add(schema.name, cost, *ins)
            if cost.kind == "copy" and not kwargs.get("non_blocking", args[2:3] == (True,)):
                self.streams.on_sync()  # torch waits until such a copy is done
        return result

    def add(self, name: str, cost: Cost, *tensors: torch.Tensor) -> None:
        hidden = self.streams.open > 0 and (cost.kind, cost.rate) != ("copy", "pageable")
        where = self.find() if self.places else ()
        self.calls.append(Recorded(name, cost, hidden, [list(t.shape) for t in tensors], *where))

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a storage until its last tensor is gone."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and id(storage) not in self.alive:
            self.alive.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, id(storage), storage.nbytes())

    def release(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def find(self) -> tuple[str, bool]:
        """Place, and whether it is backward: of backward, the line of its forward."""
        frames, node = traceback.walk_stack(sys._getframe(3)), torch._C._current_autograd_node()
        frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in frames]
        ours = [each for each in frames if of_interest(each[0])]
        if node is not None and not any(name == "backward" for _, _, name in ours):
            text = "".join(node.metadata.get("traceback_") or ())  # kept by anomaly mode
            stack = [(file, int(line), name) for file, line, name in FRAME.findall(text)]
            ours = [each for each in reversed(stack) if of_interest(each[0])] or ours
        file, line, _ = ours[0] if ours else ("?", 0, "?")
        file = file.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
        return f"{file}:{line}", node is not None


def of_interest(file: str) -> bool:
    return "/transformers/models/" in file or file.startswith(str(ROOT / "eagle3"))


@contextlib.contextmanager
def recording(documents: list[int], places: bool = False):
    """A Recorder within which tensors are made without data, and CUDA is there."""
    torch.autograd.set_multithreading_enabled(False)  # other threads would not be recorded
    recorder, fake = Recorder(documents, places), FakeTensorMode(allow_non_fake_inputs=True)
    anomaly = torch.autograd.set_detect_anomaly(places, check_nan=False)
    with stand_ins(recorder.streams), fake, recorder, anomaly:
        yield recorder
