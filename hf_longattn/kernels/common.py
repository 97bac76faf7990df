"""What the Triton kernels share. Imported by `triton*.py` files only, since it imports triton.

Shape letters of the whole project:

    B batch            T query length     S key length       H query heads      G key/value heads
    K key dim          V value dim        D model dim        L block length     N number of blocks     P ranks

The public layout is (B, H, T, K); a kernel that wants another reads it through strides.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def offset(index, strides):
    """sum(index[i] * strides[i]) in int64: one tensor of 1 M tokens x 32 heads x 128 already passes 2^31."""
    total = tl.cast(0, tl.int64)
    for i in tl.static_range(len(strides)):
        total += tl.cast(index[i], tl.int64) * strides[i]
    return total


def flat_rows(x: Tensor) -> Tensor:
    """(rows, D) of a tensor (..., D), elements of a row next to each other: copied where they are not."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
