"""Keys and values in 8 bits, in one launch.

    scale = max_k |x[k]| / LARGEST        y[k] = round(x[k] / scale)

One program computes BLOCK_R rows, a row being one token of one key head, of the keys and then of the values:
a decoding step has few rows and many launches, a prefill is bound by reading the rows once. Everything is
fp32 between the load and the store.
"""

import torch
import triton
import triton.language as tl

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset
from hf_longattn.kernels.quantized_states.reference import LARGEST, SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)
# Added to and taken from a number below 2^22, this rounds it to the nearest integer, ties to even.
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
# Elements of one tile.
_TILE = 2048


@triton.jit
def _quantize_rows(
    x_ptr, y_ptr, scales_ptr, x_strides, index, rows, mask_r,
    WIDTH: tl.constexpr, LARGEST_NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows `index` (batch, group, token) of x to contiguous rows of y, and their scales, two apart."""
    columns = tl.arange(0, BLOCK)
    mask = mask_r[:, None] & (columns < WIDTH)[None, :]
    at = offset((index[0], index[1], index[2], 0), x_strides)[:, None] + columns[None, :] * x_strides[3]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(x), 1), _SMALLEST)
    scale = tl.div_rn(peak, tl.full(peak.shape, LARGEST_NUMBER, tl.float32))
    y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    # A maximum skips NaN; this sum is 0 for numbers and NaN where there is an infinity or a NaN.
    scale += tl.sum(x * 0.0, 1)
    if y_ptr.dtype.element_ty == tl.int8:
        y = (y + _TO_INTEGER) - _TO_INTEGER
    tl.store(y_ptr + rows[:, None] * WIDTH + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + rows * 2, scale, mask=mask_r)


@triton.jit(do_not_specialize=["G", "T", "num_rows"])
def _quantize_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, scales_ptr, k_strides, v_strides, G, T, num_rows,
    K: tl.constexpr, V: tl.constexpr, LARGEST_NUMBER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    index = (rows // T // G, rows // T % G, rows % T)
    _quantize_rows(k_ptr, k_out_ptr, scales_ptr, k_strides, index, rows, mask_r, K, LARGEST_NUMBER, BLOCK_K)
    _quantize_rows(
        v_ptr, v_out_ptr, scales_ptr + 1, v_strides, index, rows, mask_r, V, LARGEST_NUMBER, BLOCK_V
    )


def quantize_forward(
    key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the kernel; arguments as in `quantized_states`."""
    B, G, T, K = key.shape
    V = value.shape[3]
    key_out, value_out = key.new_empty(key.shape, dtype=dtype), value.new_empty(value.shape, dtype=dtype)
    scales = key.new_empty((B, G, T, 2), dtype=torch.float32)
    num_rows = B * G * T
    if num_rows == 0:
        return key_out, value_out, scales
    block_k, block_v = next_power_of_2(K), next_power_of_2(V)
    block_r = max(1, _TILE // max(block_k, block_v)) if num_rows >= 4096 else 1
    _quantize_kernel[(cdiv(num_rows, block_r),)](
        key, value, key_out, value_out, scales, key.stride(), value.stride(), G, T, num_rows,
        K=K, V=V, LARGEST_NUMBER=LARGEST[dtype],
        BLOCK_R=block_r, BLOCK_K=block_k, BLOCK_V=block_v, num_warps=4 if block_r > 1 else 1,
    )  # fmt: skip
    return key_out, value_out, scales
