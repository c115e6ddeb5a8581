"""A CUDA device that is not there, for a torch without CUDA. `load` must run before torch is
imported; `Streams` stands in for streams, events and pinned memory.
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


def load() -> None:
    """Register the device of guard.cpp, unless this torch has CUDA's own."""
    if not (TORCH / "lib" / "libtorch_cuda.so").exists():
        guard = build()
        ctypes.CDLL(str(TORCH / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)


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
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = TORCH / "include"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{TORCH / 'lib'}"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu", "-o", str(unfinished)], check=True)
    unfinished.replace(library)
    return library


class Streams:
    """What torch has for streams, replaced while this is entered: which copies run beside the step,
    and how often the host waits.
    """

    def __init__(self):
        self.open, self.pinned = 0, {}
        self.on_sync, self.on_pin = (lambda: None), (lambda tensor: None)

    def is_pinned(self, tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def pin(self, tensor, *device):
        if not self.is_pinned(tensor):
            self.on_pin(tensor)
        return self.mark(tensor)

    def mark(self, tensor):
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def wait(self, *stream) -> None:
        self.on_sync()

    @contextlib.contextmanager
    def on(self, stream):
        self.open += 1
        yield
        self.open -= 1

    @contextlib.contextmanager
    def replaced(self):
        import torch
        from torch.utils import _device

        _device._device_constructors()  # which remembers torch's own, for `with device:`
        streams = self

        class Stream:
            """A stream or an event: nothing but `synchronize` makes the host wait."""

            device_index, query = 0, lambda *given: True
            wait_stream = wait_event = wait = record = lambda *given: None
            synchronize = streams.wait

            def __init__(self, *given, **named):
                pass

            def record_event(self, event=None):
                return event or Stream()

        def pinning(make):
            def made(*given, pin_memory=False, **named):
                tensor = make(*given, **named)
                return streams.mark(tensor) if pin_memory else tensor

            return made

        stand_ins = {
            torch.cuda: {
                "Stream": Stream, "Event": Stream, "stream": self.on, "synchronize": self.wait,
                "is_initialized": lambda: True,
                "current_stream": Stream, "default_stream": Stream,
            },
            torch.Tensor: {
                "record_stream": lambda tensor, stream: None, "pin_memory": self.pin,
                "is_pinned": lambda tensor, *device: self.is_pinned(tensor),
            },
            torch: {name: pinning(getattr(torch, name)) for name in ("empty", "zeros")},
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            for owner, names in stand_ins.items():
                stack.enter_context(mock.patch.multiple(owner, **names))
            yield self
