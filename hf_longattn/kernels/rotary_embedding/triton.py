"""Rotary position embedding of queries and keys: one launch where plain torch takes ten.

    y[i] = x[i] cos[i] - x[i + R/2] sin[i]                i <  R/2
    y[i] = x[i] cos[i] + x[i - R/2] sin[i]                R/2 <= i < R
    y[i] = x[i]                                           R <= i < K

One program turns BLOCK_H heads of one token, which share its angles; programs past the query heads take the
key heads. Every element of a head is read once. A decoding step is bound by the launch, a chunk of a prompt
by memory. Accumulates in fp32 and rounds once. The backward turns by the opposite angles, all that it needs.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset, overlap, wait_for_previous
from hf_longattn.kernels.rotary_embedding.layout import empty_outputs

# Heads of one program: 16 bytes a thread of two warps at 128 elements a head in bf16.
HEADS = 8


@triton.jit
def _part(ptr, row, strides, start, mask, BLOCK: tl.constexpr):
    """(1, BLOCK) cosines or sines of one token, from element `start` on."""
    at = offset(row, strides) + (start + tl.arange(0, BLOCK)) * strides[2]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def angle_of(cos_ptr, sin_ptr, row, cos_strides, sin_strides, R: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines of the two halves of one token, as `turn_heads` takes them."""
    HALF: tl.constexpr = R // 2
    mask = tl.arange(0, BLOCK) < HALF
    cos_low = _part(cos_ptr, row, cos_strides, 0, mask, BLOCK)
    sin_low = _part(sin_ptr, row, sin_strides, 0, mask, BLOCK)
    cos_high = _part(cos_ptr, row, cos_strides, HALF, mask, BLOCK)
    sin_high = _part(sin_ptr, row, sin_strides, HALF, mask, BLOCK)
    return cos_low, sin_low, cos_high, sin_high


@triton.jit
def copy_heads(x_row, y_row, x_stride, y_stride, mask, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Copies the elements [FIRST, LAST) of some heads, 32 at a time."""
    for start in tl.static_range(FIRST, LAST, 32):
        offs = start + tl.arange(0, 32)[None, :]
        inside = mask[:, None] & (offs < LAST)
        tl.store(
            y_row + offs * y_stride, tl.load(x_row + offs * x_stride, mask=inside, other=0.0), mask=inside
        )


@triton.jit
def turn_heads(
    x_ptr, y_ptr, x_strides, y_strides, source, target, mask_h, angle,
    R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turns some heads of one token: `source` and `target` are where they are read and written."""
    HALF: tl.constexpr = R // 2
    offs = tl.arange(0, BLOCK)
    mask = mask_h[:, None] & (offs < HALF)[None, :]
    x_row = x_ptr + offset(source, x_strides)[:, None]
    low = tl.load(x_row + offs[None, :] * x_strides[3], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_row + (offs + HALF)[None, :] * x_strides[3], mask=mask, other=0.0).to(tl.float32)
    cos_low, sin_low, cos_high, sin_high = angle
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y_row = y_ptr + offset(target, y_strides)[:, None]
    tl.store(y_row + offs[None, :] * y_strides[3], (low * cos_low - high * sin_low).to(dtype), mask=mask)
    tl.store(
        y_row + (offs + HALF)[None, :] * y_strides[3], (high * cos_high + low * sin_high).to(dtype), mask=mask
    )
    copy_heads(x_row, y_row, x_strides[3], y_strides[3], mask_h, R, K)


@triton.jit(do_not_specialize=["T", "H", "G"])
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_strides, k_strides, cos_strides, sin_strides, q_out_strides, k_out_strides,
    T, H, G, R: tl.constexpr, K: tl.constexpr, INVERSE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, position = token // T, token % T
    angle = angle_of(cos_ptr, sin_ptr, (batch, position, 0), cos_strides, sin_strides, R, BLOCK_R)
    if INVERSE:
        angle = (angle[0], -angle[3], angle[2], -angle[1])
    groups = tl.cdiv(H, BLOCK_H)
    offs_h = tl.arange(0, BLOCK_H)
    if group < groups:
        head = group * BLOCK_H + offs_h
        where = (batch, head, position, 0)
        turn_heads(q_ptr, q_out_ptr, q_strides, q_out_strides, where, where, head < H, angle, R, K, BLOCK_R)
    else:
        head = (group - groups) * BLOCK_H + offs_h
        where = (batch, head, position, 0)
        turn_heads(k_ptr, k_out_ptr, k_strides, k_out_strides, where, where, head < G, angle, R, K, BLOCK_R)


def rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; arguments as in `rotary_embedding`, `inverse` for its gradients."""
    B, H, T, K = query.shape
    G, R = key.shape[1], cos.shape[-1]
    cos, sin = cos.expand(B, -1, -1), sin.expand(B, -1, -1)
    query_out, key_out = empty_outputs(query, key, inverse)
    if B * T == 0:
        return query_out, key_out
    _rotary_kernel[(B * T, cdiv(H, HEADS) + cdiv(G, HEADS))](
        q_ptr=query, k_ptr=key, cos_ptr=cos, sin_ptr=sin, q_out_ptr=query_out, k_out_ptr=key_out,
        q_strides=query.stride(), k_strides=key.stride(), cos_strides=cos.stride(), sin_strides=sin.stride(),
        q_out_strides=query_out.stride(), k_out_strides=key_out.stride(),
        T=T, H=H, G=G, R=R, K=K, INVERSE=inverse, BLOCK_H=HEADS, BLOCK_R=next_power_of_2(R // 2),
        num_warps=2, **overlap(query.device),
    )  # fmt: skip
    return query_out, key_out
