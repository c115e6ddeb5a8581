"""A CUDA device that is not there, for a torch without CUDA, and stand-ins for what torch cannot do
on tensors without data. `load` must run before torch is imported.
"""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import subprocess
import zlib
from importlib.metadata import version
from pathlib import Path
from unittest import mock

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
SOURCE = Path(__file__).with_name("guard.cpp")
# Of these a CPU build has no kernel for CUDA, and would take them apart before they are recorded.
WHOLE = ("_fused_rms_norm", "_fused_rms_norm_backward", "silu_backward")


def load() -> None:
    """Register the device of guard.cpp, unless this torch has CUDA's own."""
    if not (TORCH / "lib" / "libtorch_cuda.so").exists():
        guard = build()
        ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)
        import torch

        for name in WHOLE:
            torch.library.impl(f"aten::{name}", "CUDA", lambda *given: None)


def build() -> Path:
    """guard.cpp, compiled once for this torch into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle3"
    library = cache / f"guard-{version('torch')}-{zlib.crc32(SOURCE.read_bytes()):08x}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("error: the simulator needs a C++ compiler; install g++ or set CXX")
    cache.mkdir(parents=True, exist_ok=True)
    unfinished, include = library.with_suffix(f".{os.getpid()}"), TORCH / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{TORCH / 'lib'}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(unfinished)], check=True)
    unfinished.replace(library)
    return library


class Streams:
    """Side streams and pinned memory, as far as they decide which copies run beside the step, and
    for what the host waits: `on_sync()`, and `on_pin(tensor)` for a copy into pinned memory.
    """

    def __init__(self, on_sync, on_pin):
        self.on_sync, self.on_pin, self.open, self.pinned = on_sync, on_pin, 0, {}

    def is_pinned(self, tensor, *device) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage  # kept, as an address may be used again
        return tensor

    def pin(self, tensor, *device):
        if not self.is_pinned(tensor):
            self.on_pin(tensor)
        return self.mark(tensor)

    def pinning(self, make):
        def made(*given, pin_memory=False, **named):
            tensor = make(*given, **named)
            return self.mark(tensor) if pin_memory else tensor

        return made

    @contextlib.contextmanager
    def on(self, stream):
        self.open += 1
        yield
        self.open -= 1


@contextlib.contextmanager
def stand_ins(streams: Streams):
    """Put them in place of torch's own."""
    import torch
    from torch.utils import _device

    class Stream:
        """A stream or an event: `synchronize` alone makes the host wait."""

        wait_stream = wait_event = wait = record = lambda *given: None

        def __init__(self, *given, **named): ...

        def synchronize(self):
            streams.on_sync()

        def record_event(self, event=None):
            return event or Stream()

        def query(self):
            return True

    _device._device_constructors()  # remembers torch's own, for `with device:`
    find_spec = importlib.util.find_spec
    of_torch = {name: streams.pinning(getattr(torch, name)) for name in ("empty", "zeros")}
    of_cuda = {
        "Stream": Stream, "Event": Stream, "current_stream": Stream, "default_stream": Stream,
        "stream": streams.on, "synchronize": lambda *device: streams.on_sync(),
        "is_initialized": lambda: True,
    }  # fmt: skip
    of_tensors = {
        "pin_memory": lambda tensor, *device: streams.pin(tensor),
        "is_pinned": lambda tensor, *device: streams.is_pinned(tensor),
        "record_stream": lambda tensor, stream: None,
    }
    with (
        mock.patch.multiple(torch, **of_torch),
        mock.patch.multiple(torch.cuda, **of_cuda),
        mock.patch.multiple(torch.Tensor, **of_tensors),
        # Modules of tensors without data cannot be moved.
        mock.patch.object(torch.nn.Module, "to", lambda module, *given, **named: module),
        # The machine has Triton; no kernel of it is ever asked for.
        mock.patch.object(
            importlib.util, "find_spec", lambda *given: given[0] == "triton" or find_spec(*given)
        ),
    ):
        yield
