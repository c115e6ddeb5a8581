"""Compiles the Triton kernels without a GPU: registers, spilled bytes and blocks a processor.

python dev/compile_kernels.py             # a table for sm_80, sm_90 and sm_100; 1 if any spills
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagle3.kernels import jit

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
B, F, L, I = "*bf16", "*fp32", "*i64", "i32"  # noqa: E741
SIZES = {"H": 32, "G": 8, "W": 8, "D": 128, "HEADS": jit.HEADS_BLOCK, "HALF": 64}
GROUPS = {"S": 6, "G": 8, "R": 4, "D": 128, "HEADS": 4, "SIZE": 128}
SIX = (B,) * 6
# Of each kernel, at the shapes of a draft for Llama-3.1-8B: types, constants and warps.
KERNELS = {
    jit.swiglu_kernel: ([B, B, I], {"BLOCK": jit.SWIGLU_BLOCK}, jit.SWIGLU_WARPS),
    jit.swiglu_backward_kernel: ([B] * 4 + [I], {"BLOCK": jit.SWIGLU_BLOCK}, jit.SWIGLU_WARPS),
    jit.heads_kernel: ([B, B, L, F, F, B, B, B, I, I, I], SIZES, jit.HEADS_WARPS),
    jit.heads_backward_kernel: ([B, B, B, L, F, F, B, B, I, I, I, I], SIZES, jit.HEADS_WARPS),
    jit.merge_kernel: ([B, B, F, SIX, SIX, B, F, "fp32"], GROUPS, jit.MERGE_WARPS),
    jit.merge_backward_kernel: (
        [B, B, B, F, SIX, SIX, B, SIX, SIX, "fp32"], GROUPS, jit.MERGE_WARPS,
    ),
    jit.norm_backward_kernel: (
        [B] * 6 + [F, I, I, "fp32"],
        {"D": 4096, "ROWS": jit.NORM_ROWS, "KEPT": True, "BLOCK": 4096}, jit.NORM_WARPS,
    ),
}  # fmt: skip


def aligned(types: list, place: tuple = ()) -> dict:
    """Every pointer at a multiple of 16 bytes, as torch allocates, and sizes as of Llama-3.1-8B."""
    found = {}
    for number, kind in enumerate(types):
        if isinstance(kind, tuple):
            found |= aligned(list(kind), (*place, number))
        elif kind != "fp32":
            found[(*place, number)] = [["tt.divisibility", 16]]
    return found


def compile_for(arch: int, kernel, types: list, constants: dict, warps: int) -> tuple[int, int]:
    """(registers, spilled bytes) of a kernel."""
    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned(types))
    built = triton.compile(source, GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def main() -> None:
    table, spills = Table("kernel", "warps"), 0
    archs = (80, 90, 100)
    for arch in archs:
        table.add_column(f"sm_{arch}: registers, spilled bytes")
    for kernel, (types, constants, warps) in KERNELS.items():
        found = [compile_for(arch, kernel, types, constants, warps) for arch in archs]
        spills += sum(spilled for _, spilled in found)
        table.add_row(kernel.__name__, str(warps), *(f"{r}, {s}" for r, s in found))
    Console(width=140).print(table)
    sys.exit(spills > 0)


if __name__ == "__main__":
    main()
