"""What the Triton kernels share. Imported by `triton*.py` files only, since it imports triton.

Shape letters of the whole project:

    B batch            T query length     S key length       H query heads      G key/value heads
    K key dim          V value dim        D model dim        L block length     N number of blocks     P ranks

The public layout is (B, H, T, K); a kernel that wants another reads it through strides.
"""

import ctypes
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.dispatch import interpreting

# The first CUDA driver that takes launches which overlap into a graph.
_OVERLAPPING_DRIVER = 12030


def overlap(device: torch.device) -> dict[str, bool]:
    """Keywords of a launch that may begin while the kernel before it in the stream ends.

    The kernel takes a flag `OVERLAP` and calls `wait_for_previous(OVERLAP)` in every program, before it reads
    what another kernel wrote, and before it writes at all: what it writes to may still be read.

    Args:
        device: of the tensors.

    Returns:
        `OVERLAP`, and where it is on (compute capability 9 and later) the option of the launch.
    """
    # A compiler that traces the launch knows the flag, but not the option.
    if device.type != "cuda" or torch.compiler.is_compiling() or not _overlaps(device):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@functools.cache
def _overlaps(device: torch.device) -> bool:
    if torch.version.cuda is None or interpreting() or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return _driver_version() >= _OVERLAPPING_DRIVER


def _driver_version() -> int:
    """The version of CUDA that the driver knows, 12030 for 12.3; 0 where it cannot be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def cdiv(number: int, size: int) -> int:
    """Pieces of a size that a number makes: `triton.cdiv` of the host, which takes a launch's fourth part.

    Args:
        number: 0 or more.
        size: 1 or more.
    """
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no smaller, as `triton.next_power_of_2` and in a tenth of its time.

    Args:
        number: 1 or more; of 0 it is 0.
    """
    return number and 1 << (number - 1).bit_length()


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Lets the next kernel be launched, to wait in its turn; asked for again, it does nothing."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Waits until every kernel before this one is done, and lets the next one be launched to wait as well.

    As every program of a kernel waits here, the end of a kernel implies the end of all before it.
    """
    let_next_begin(OVERLAP)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def offset(index, strides):
    """sum(index[i] * strides[i]) in int64: one tensor of 1 M tokens x 32 heads x 128 already passes 2^31."""
    total = tl.cast(0, tl.int64)
    for i in tl.static_range(len(strides)):
        total += tl.cast(index[i], tl.int64) * strides[i]
    return total


@triton.jit
def weight_tile(w_ptr, stride, offs_n, offs_k, N, K: tl.constexpr, EVEN: tl.constexpr):
    """Rows `offs_n` and columns `offs_k` of a weight (N, K); EVEN: no column lies behind the last."""
    pointers = w_ptr + offs_n.to(tl.int64)[:, None] * stride + offs_k[None, :]
    inside = (offs_n < N)[:, None]
    if not EVEN:
        inside = inside & (offs_k < K)[None, :]
    # Read once: what else is in the cache is worth more.
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def activated(gate, KIND: tl.constexpr):
    """SiLU, GELU ("gelu") or its form with tanh ("gelu_tanh") of fp32 numbers."""
    if KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    if KIND == "gelu_tanh":
        # sqrt(8 / pi)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-slope))
    return gate / (1.0 + tl.exp(-gate))


def flat_rows(x: Tensor) -> Tensor:
    """(rows, D) of a tensor (..., D), elements of a row next to each other: copied where they are not."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
