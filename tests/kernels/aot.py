"""Compiles a Triton kernel for sm_90 on a machine without a GPU, and reads what it costs there.

Usage (see `test_aot.py` for the table of cases):

    compile_sm90(
        _kernel,
        signature={"x_ptr": "*bf16:16", "x_strides": ("i64:16", 1), "num_rows": "i32", "scale": "fp32"},
        constexprs={"BLOCK": 128, "mask_ptr": None},
        num_warps=4,
        num_stages=3,
    )
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
# What one thread block may use on an H100, and what one thread may.
MAX_SHARED_BYTES = 227 * 1024
MAX_REGISTERS = 255


class Resources(NamedTuple):
    """What one compiled kernel takes: registers and spilled bytes a thread, shared bytes a thread block.

    And what it was assembled from.
    """

    registers: int
    spills: int
    shared: int
    ptx: str


def _flatten(index, kind, constants, attributes):
    """The type of one argument in Triton's words; constants and alignments are noted under its path."""
    if isinstance(kind, tuple):
        return tuple(_flatten((*index, i), k, constants, attributes) for i, k in enumerate(kind))
    if kind is None or isinstance(kind, int):
        constants[index] = kind
        return "constexpr"
    name, _, alignment = kind.partition(":")
    if alignment:
        attributes[index] = [["tt.divisibility", int(alignment)]]
    return name


def _source_of(kernel):
    """The class that compiles a kernel's source: Gluon has its own."""
    if not getattr(kernel, "is_gluon", bool)():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def compile_sm90(kernel, signature, constexprs, num_warps=4, num_stages=3, max_registers=None):
    """Compiles `kernel` for an H100 and returns its `Resources`.

    Args:
        kernel: a `@triton.jit` function, perhaps wrapped by `autotune` or `heuristics`.
        signature: parameter -> type: "*bf16" is a pointer, "i32", "i64" and "fp32" are numbers; ":16"
            appended says that the value is a multiple of 16, as Triton finds out at a launch; a number says
            that the value is that constant (strides of 1); a tuple of these is a tuple argument.
        constexprs: parameter -> value, for `tl.constexpr` parameters and for those left out (None).
        num_warps: warps of a thread block.
        num_stages: stages of the software pipeline.
        max_registers: that a thread may use; None: as many as there are.

    Gluon kernels too: a descriptor's type reads "tensordesc<bf16[64, 128],LAYOUT>", and `num_warps` may be
    one of their `constexprs` as well.
    """
    while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
        kernel = kernel.fn
    overlaps = bool(constexprs.get("OVERLAP"))
    constants, attributes, types = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constexprs:
            types[name], constants[(position,)] = "constexpr", constexprs[name]
        else:
            types[name] = _flatten((position,), signature[name], constants, attributes)
    source = _source_of(kernel)(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": overlaps}
    options |= {} if max_registers is None else {"maxnreg": max_registers}
    compiled = triton.compile(source, target=HOPPER, options=options)
    registers, spills = _usage(compiled.asm["cubin"])
    return Resources(registers, spills, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(cubin):
    """Registers and local (spilled) bytes a thread of the one kernel in `cubin`."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])
