"""Compiles the Triton kernels without a GPU: registers and spilled bytes on sm_80, sm_90, sm_100.

python dev/compile_kernels.py              # those of eagle3/kernels/jit.py
python dev/compile_kernels.py jsd          # what torch.compile makes of this loss
Of losses also the instructions for each logit, in the loops of the code for sm_90. Exits with 1 if
any spills, or a loss is more than the statistics of teachers and one kernel.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "roofline")]

import fake_cuda  # noqa: E402

fake_cuda.load()

import torch  # noqa: E402
import torch._dynamo.device_interface as devices  # noqa: E402
import torch._inductor.config as inductor  # noqa: E402
import triton  # noqa: E402
import yaml  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from eagle3.config import instantiate  # noqa: E402
from eagle3.kernels import jit  # noqa: E402
from eagle3.kernels.eager import Eager  # noqa: E402
from eagle3.kernels.fused import INDUCTOR  # noqa: E402

ROOT = Path(__file__).parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
B, F, L, I = "*bf16", "*fp32", "*i64", "i32"  # noqa: E741
SIZES = {"H": 32, "G": 8, "W": 8, "D": 128, "HEADS": jit.HEADS_BLOCK, "HALF": 64}
GROUPS = {"S": 6, "G": 8, "R": 16, "D": 128, "HEADS": 16, "SIZE": 128}
SIX = (B,) * 6
# Of each kernel, at the shapes of a draft for Llama-3.1-8B: types, constants and warps. Its 4 query
# heads to a key put as much on a warp as 16 do.
LANES = {"LANES": jit.LOSS_BLOCK // 8}
LOSS = [B, B, L, F, F, F, L, B, I] + ["fp32"] * 4
KERNELS = [
    (jit.swiglu_kernel, [B, B, I], {"BLOCK": jit.SWIGLU_BLOCK}, jit.SWIGLU_WARPS),
    (jit.swiglu_backward_kernel, [B] * 4 + [I], {"BLOCK": jit.SWIGLU_BLOCK}, jit.SWIGLU_WARPS),
    (jit.heads_kernel, [B, B, L, F, F, B, B, B, I, I, I], SIZES, jit.HEADS_WARPS),
    (jit.heads_backward_kernel, [B, B, B, L, F, F, B, B, I, I, I, I], SIZES, jit.HEADS_WARPS),
    (jit.merge_kernel, [B, B, F, SIX, SIX, B, F, "fp32"], GROUPS, jit.merge_warps(16, 128)),
    (
        jit.merge_backward_kernel, [B, B, B, F, SIX, SIX, B, SIX, SIX, "fp32"], GROUPS,
        jit.merge_warps(16, 128),
    ),
    (
        jit.norm_backward_kernel, [B] * 6 + [F, I, I, "fp32"],
        {"D": 4096, "ROWS": jit.NORM_ROWS, "KEPT": True, "BLOCK": 4096}, jit.NORM_WARPS,
    ),
    (jit.logsumexp_kernel, [B, F, I], LANES, jit.LOSS_WARPS),
    (jit.loss_kernel, LOSS, {"ACCEPTANCE": False, "LK": False} | LANES, jit.LOSS_WARPS),
    (jit.loss_kernel, LOSS, {"ACCEPTANCE": True, "LK": False} | LANES, jit.LOSS_WARPS),
    (jit.loss_kernel, LOSS, {"ACCEPTANCE": True, "LK": True} | LANES, jit.LOSS_WARPS),
]  # fmt: skip


def aligned(types: list, place: tuple = ()) -> dict:
    """Every pointer at a multiple of 16 bytes, as torch allocates, and sizes as of Llama-3.1-8B."""
    found = {}
    for number, kind in enumerate(types):
        if isinstance(kind, tuple):
            found |= aligned(list(kind), (*place, number))
        elif kind != "fp32":
            found[(*place, number)] = [["tt.divisibility", 16]]
    return found


def instructions(cubin: str, numbers: float) -> float:
    """Of each number, in loops over rows of which a turn does so many numbers in a thread."""
    command = [TOOLS / "nvdisasm", "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, labels, total = [], {}, 0.0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    for place, instruction in enumerate(code):
        jump = re.search(r"BRA\b.*`\((\.L_\w+)\)", instruction)
        loop = code[labels[jump[1]] : place + 1] if jump else []
        # An exponential takes as long as 8 others, which run beside it; a wait is a short loop.
        if len(loop) >= 40:
            total += max(len(loop), 8 * sum("MUFU" in each for each in loop)) / numbers
    return total


def usage_of(arch: int, source: ASTSource, **options: int) -> tuple[int, int, float]:
    """(registers, spilled bytes, instructions for a number of a row) of a kernel."""
    built = triton.compile(source, GPUTarget("cuda", arch, 32), options=options)
    names = source.fn.arg_names
    constants = {names[place]: value for (place, *_), value in source.constants.items()}
    numbers = constants.get("LANES", 0) * 8 + constants.get("R0_BLOCK", 0) * constants.get(
        "XBLOCK", 1
    )
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        each = instructions(file.name, numbers / 32 / options["num_warps"]) if numbers else 0.0
    text = usage.stdout + usage.stderr
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local, each


def own_kernels():
    """(name, warps, function that compiles it for an architecture) of each."""
    for kernel, types, constants, warps in KERNELS:
        signature = dict(zip(kernel.arg_names, types, strict=False))
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned(types))
        flags = [name for name, value in constants.items() if value is True]
        yield (
            " ".join([kernel.__name__, *flags]),
            warps,
            partial(usage_of, source=source, num_warps=warps),
        )


class Driver:
    """Of a GPU that is not there, as far as Inductor asks."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    is_active = staticmethod(lambda: True)


def lowered(pointwise) -> str:
    """The source that Inductor writes for a chunk of the loss, at the shapes of Llama-3.1-8B."""
    gpu = SimpleNamespace(
        name="H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, total_memory=141 << 30, L2_cache_size=50 << 20,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, gcnArchName="",
    )  # fmt: skip
    of_cuda = {
        "is_available": lambda: True, "get_device_properties": lambda *given: gpu,
        "get_device_capability": lambda *given: (9, 0), "current_device": lambda: 0,
        "device_count": lambda: 1, "_lazy_init": lambda: None,
    }  # fmt: skip
    of_interface = {
        "is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 1,
        "get_compute_capability": lambda *given: 90, "is_triton_capable": lambda *given: True,
        "raise_if_triton_unavailable": lambda *given: None,
        "maybe_exchange_device": lambda device: device, "exchange_device": lambda device: device,
        "get_device_properties": of_cuda["get_device_properties"],
    }  # fmt: skip
    worker = {"get_device_properties": of_cuda["get_device_properties"], "current_device": int}
    interface = devices.CudaInterface
    triton.runtime.driver.set_active(Driver())
    region = torch.func.functionalize(partial(Eager.loss_chunk, pointwise), remove="mutations")
    mode, half = FakeTensorMode(), torch.bfloat16
    with (
        mock.patch.multiple(torch.cuda, **of_cuda), mock.patch.object(torch.version, "cuda", "13"),
        mock.patch.multiple(interface, **{n: staticmethod(f) for n, f in of_interface.items()}),
        mock.patch.multiple(interface.Worker, **{n: staticmethod(f) for n, f in worker.items()}),
        mock.patch("torch.utils._triton.has_triton", lambda *given: True),
        inductor.patch(INDUCTOR), mode,
    ):  # fmt: skip
        with torch.device("cuda"):
            given = [torch.empty(rows, 32000, dtype=half) for rows in (7168, 1024)]
            given += [torch.empty(7168, dtype=torch.int64), torch.empty(7168)]
        traced = make_fx(region, decomposition_table=select_decomp_table())(*given)
        graph = GraphLowering(traced, example_inputs=given)
        debug = V.set_debug_handler(DebugContext())
        with V.set_graph_handler(graph), V.set_fake_mode(mode), debug:
            graph.run(*given)
            return graph.codegen()[0].value


def loss_kernels(name: str):
    node = yaml.safe_load((ROOT / "conf" / "loss" / f"{name}.yaml").read_text())["pointwise"]
    text = lowered(instantiate(node | {"_partial_": True}))
    wide = re.search(r"\(\(\d+, 32000\), \(32000, 1\), torch.float32\)", text)
    sources = re.findall(r"async_compile.triton\('(\w+)', \'\'\'(.*?)\'\'\'", text, re.S)
    if len(sources) > 2 or wide:
        sys.exit(f"{name}: {len(sources)} kernels, {wide and 'one writes [m,Vd] in fp32'}")
    for kernel, body in sources:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"{kernel}.py")
            file.write_text(body.replace("triton_helpers.set_driver_to_gpu()", ""))
            spec = importlib.util.spec_from_file_location(kernel, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            tuned = getattr(module, kernel)
            for config in tuned.configs:
                constants = tuned.triton_meta.get("constants", {}) | config.kwargs
                signature = dict.fromkeys(tuned.fn.arg_names, "constexpr")
                signature |= tuned.triton_meta["signature"]
                signature |= dict.fromkeys(constants, "constexpr")
                attributes = tuned.triton_meta["configs"][0]
                source = ASTSource(tuned.fn, signature, constexprs=constants, attrs=attributes)
                options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
                yield (
                    f"{name}: {kernel}",
                    config.num_warps,
                    partial(usage_of, source=source, **options),
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("losses", nargs="*", help="files of conf/loss")
    names = parser.parse_args().losses
    table, spills, archs = Table("kernel", "warps"), 0, (80, 90, 100)
    for arch in archs:
        table.add_column(f"sm_{arch}: registers, spilled bytes")
    table.add_column("instructions")
    kernels = [each for name in names for each in loss_kernels(name)] or own_kernels()
    for name, warps, compile_for in kernels:
        found = [compile_for(arch) for arch in archs]
        spills += sum(spilled for _, spilled, _ in found)
        counted = f"{found[1][2]:.0f}" if found[1][2] else ""
        table.add_row(name, str(warps), *(f"{r}, {s}" for r, s, _ in found), counted)
    Console(width=140).print(table)
    sys.exit(spills > 0)


if __name__ == "__main__":
    main()
