"""Rotary position embedding of queries and keys, forward only: one launch where plain torch takes ten.

    y[i] = x[i] cos[i] - x[i + K/2] sin[i]                i <  K/2
    y[i] = x[i] cos[i] + x[i - K/2] sin[i]                i >= K/2

One program turns one head of one token; programs past the query heads take the key heads. A decoding step is
bound by the launch alone. Accumulates in fp32 and rounds once. Nothing is saved: there is no backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import offset


@triton.jit
def _turn(x_ptr, y_ptr, x_strides, y_strides, where, cos, sin, K: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_k = tl.arange(0, BLOCK_K)
    half: tl.constexpr = K // 2
    first = offs_k < half
    mask = offs_k < K
    partner = tl.where(first, offs_k + half, offs_k - half)
    row = x_ptr + offset(where, x_strides)
    x = tl.load(row + offs_k * x_strides[3], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row + partner * x_strides[3], mask=mask, other=0.0).to(tl.float32)
    y = x * cos + tl.where(first, -other, other) * sin
    out = y_ptr + offset(where, y_strides) + offs_k * y_strides[3]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "H"])
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_strides, k_strides, cos_strides, sin_strides, q_out_strides, k_out_strides,
    T, H, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, position = token // T, token % T
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    row = (batch, position, 0)
    cos = tl.load(cos_ptr + offset(row, cos_strides) + offs_k * cos_strides[2], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + offset(row, sin_strides) + offs_k * sin_strides[2], mask=mask, other=0.0)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if head < H:
        _turn(q_ptr, q_out_ptr, q_strides, q_out_strides, (batch, head, position, 0), cos, sin, K, BLOCK_K)
    else:
        where = (batch, head - H, position, 0)
        _turn(k_ptr, k_out_ptr, k_strides, k_out_strides, where, cos, sin, K, BLOCK_K)


def rotate_forward(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the kernel; arguments as in `rotary_embedding`."""
    B, H, T, K = query.shape
    cos, sin = cos.expand(B, -1, -1), sin.expand(B, -1, -1)
    query_out, key_out = torch.empty_like(query), torch.empty_like(key)
    _rotary_kernel[(B * T, H + key.shape[1])](
        q_ptr=query, k_ptr=key, cos_ptr=cos, sin_ptr=sin, q_out_ptr=query_out, k_out_ptr=key_out,
        q_strides=query.stride(), k_strides=key.stride(), cos_strides=cos.stride(), sin_strides=sin.stride(),
        q_out_strides=query_out.stride(), k_out_strides=key_out.stride(),
        T=T, H=H, K=K, BLOCK_K=triton.next_power_of_2(K), num_warps=1,
    )  # fmt: skip
    return query_out, key_out
