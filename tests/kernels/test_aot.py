"""Every kernel compiles for an H100 without spilling and within its shared memory, found out without a GPU.

To add a kernel, append a `Case` to `CASES`.
"""

import importlib
from typing import NamedTuple

import pytest

from hf_longattn.kernels.dispatch import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from aot import MAX_SHARED_BYTES, compile_sm90  # noqa: E402


class Case(NamedTuple):
    """One kernel with one set of constants. `kernel` reads "module:name", the rest as in `compile_sm90`."""

    id: str
    kernel: str
    signature: dict
    constexprs: dict
    num_warps: int = 4
    num_stages: int = 3
    max_spills: int = 0
    max_shared: int = MAX_SHARED_BYTES
    slow: bool = False


CASES: list[Case] = []


def _parameters():
    return [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]


@pytest.mark.parametrize("case", _parameters())
def test_kernel_fits_hopper(case):
    module, _, name = case.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    used = compile_sm90(kernel, case.signature, case.constexprs, case.num_warps, case.num_stages)
    assert used.spills <= case.max_spills, used
    assert used.shared <= case.max_shared, used


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + rows[:, None] * BLOCK + rows[None, :])
    total = tl.dot(tile, tile)
    total = tl.dot(tl.exp(total).to(tile.dtype), tile, total)
    tl.store(y_ptr + rows[:, None] * BLOCK + rows[None, :], total)


def test_spills_and_shared_memory_are_seen():
    signature = {"x_ptr": "*fp16:16", "y_ptr": "*fp32:16"}
    small = compile_sm90(_spilling_kernel, signature, {"BLOCK": 32}, num_warps=1)
    large = compile_sm90(_spilling_kernel, signature, {"BLOCK": 64}, num_warps=1)
    assert small.spills == 0 and small.shared >= 32 * 32 * 2
    assert large.spills > 0
