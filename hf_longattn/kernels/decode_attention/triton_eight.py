"""Attention of a few queries over a long cache in 8 bits: the work of `triton.py`, two numbers a word.

    score[s] = scale * scale_k[s] * (q_even . k_even[s] + q_odd . k_odd[s])
    m = max_s score[s]     l = sum_s exp2(score[s] - m)
    n = max_s score[s] + floor(log2 scale_v[s])          w[s] = exp2(score[s] - n) * scale_v[s], below 2
    o_even = exp2(n - m) / l * sum_s w[s] v_even[s]      o_odd the same with v_odd

Half the bytes leave half the time for everything else, and tensor cores take no keys in 8 bits beside queries
in 16. Bytes cannot be transposed on their way out of shared memory, 16-bit words can. So two neighbours in a
row are read as one word, taken apart in registers and multiplied apart: even columns with even, odd with odd.

What is multiplied is fp16 (fp32 beside queries in fp32), which holds both kinds of 8 bits exactly and gets
them in the fewest instructions. Its range holds, too: a row of queries is divided by a power of two, which
its scores get back in fp32, and the weights have a peak n of their own, so that no scale of a value, however
large or small, leaves fp16.
"""

import triton
import triton.language as tl

from hf_longattn.kernels.common import offset
from hf_longattn.kernels.decode_attention.triton_parts import (
    LN_2,
    key_exists,
    row_intervals,
    soft_cap,
    visible_keys,
)

# Two words to two fp16 numbers. A byte x of int8 plus 128, or x ^ 0x80, is the last byte of the fp16 number
# 1024 + 128 + x, whose first byte is 0x64: one instruction puts both in place, one subtracts 1152 (0x6480).
_EVEN_INT8 = tl.constexpr(
    "{ .reg .b32 a, b; mov.b32 b, 0x64806480; lop3.b32 a, $1, 0x00ff00ff, b, 0x6a; sub.f16x2 $0, a, b; }"
)
_ODD_INT8 = tl.constexpr(
    "{ .reg .b32 a, b; mov.b32 b, 0x64806480; shr.u32 a, $1, 8; lop3.b32 a, a, 0x00ff00ff, b, 0x6a; "
    "sub.f16x2 $0, a, b; }"
)
# fp8 has an instruction for two neighbours, which `prmt` makes of the first bytes and of the second ones.
_EVEN_FP8 = tl.constexpr(
    "{ .reg .b32 a; .reg .b16 b, c; prmt.b32 a, $1, 0, 0x3120; mov.b32 {b, c}, a; "
    "cvt.rn.f16x2.e4m3x2 $0, b; }"
)
_ODD_FP8 = tl.constexpr(
    "{ .reg .b32 a; .reg .b16 b, c; prmt.b32 a, $1, 0, 0x3120; mov.b32 {b, c}, a; "
    "cvt.rn.f16x2.e4m3x2 $0, c; }"
)


@triton.jit
def _by_ptx(words, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _even_of(words, NUMBERS: tl.constexpr):
    """The first number of each word in fp16."""
    if NUMBERS == "int8 by ptx":
        return _by_ptx(words, _EVEN_INT8)
    elif NUMBERS == "fp8 by ptx":
        return _by_ptx(words, _EVEN_FP8)
    elif NUMBERS == "int8":
        return words.to(tl.int8).to(tl.float16)
    else:
        return words.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _odd_of(words, NUMBERS: tl.constexpr):
    """The second number of each word in fp16."""
    if NUMBERS == "int8 by ptx":
        return _by_ptx(words, _ODD_INT8)
    elif NUMBERS == "fp8 by ptx":
        return _by_ptx(words, _ODD_FP8)
    else:
        return _even_of(words >> 8, NUMBERS)


@triton.jit
def _load_words(ptr, at, mask, stride, has_odd):
    """Words of two numbers: as they lie in memory, or made of bytes, of which the last one may be missing."""
    if ptr.dtype.element_ty == tl.int16:
        return tl.load(ptr + at, mask=mask, other=0)
    else:
        even = tl.load(ptr + at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int16)
        odd = tl.load(ptr + at + stride, mask=mask & has_odd, other=0).to(tl.int8, bitcast=True)
        return (even & 255) | (odd.to(tl.int16) << 8)


@triton.jit
def _in_range_of_fp16(even, odd):
    """Rows over the power of two at or below their largest magnitude, in fp16, and those powers in fp32."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    peak = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
    # Both the power and its inverse are normal numbers.
    exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    power = (exponent << 23).to(tl.float32, bitcast=True)
    return (even * inverse).to(tl.float16), (odd * inverse).to(tl.float16), power


@triton.jit
def _exponent(x):
    """floor(log2 |x|) of normal numbers, -127 of smaller ones."""
    return (((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127).to(tl.float32)


@triton.jit
def _larger_pair(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit(do_not_specialize=["T", "S"])
def split_eight_kernel(
    q_ptr, k_ptr, v_ptr, lower_ptr, upper_ptr, key_mask_ptr, o_ptr, lse_ptr,
    q_strides, k_strides, v_strides, lower_strides, upper_strides, key_mask_strides, o_strides, lse_strides,
    scales_ptr, scales_strides, scale, cap, T, S,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CAUSAL: tl.constexpr, GAPS: tl.constexpr,
    ONE_QUERY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """The kernel of `triton.py` with the even columns and the odd ones apart. `k_ptr` and `v_ptr`, and their
    strides, are of words (int16) or of bytes (int8); `NUMBERS` is "int8" or "fp8", on NVIDIA "... by ptx"."""
    num_row_tiles = tl.cdiv(GROUP * T, BLOCK_R)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(1) // num_row_tiles
    offs_r = tl.program_id(1) % num_row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < GROUP * T
    head, t = group * GROUP + offs_r // T, offs_r % T
    offs_n, offs_k, offs_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_V // 2)
    mask_k, mask_v = offs_k < (K + 1) // 2, offs_v < (V + 1) // 2
    odd_k, odd_v = offs_k < K // 2, offs_v < V // 2

    at = offset((batch, head, t, 0), q_strides)[:, None] + 2 * offs_k[None, :] * q_strides[3]
    q_even = tl.load(q_ptr + at, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
    q_odd = tl.load(q_ptr + at + q_strides[3], mask=mask_r[:, None] & odd_k[None, :], other=0.0)
    factor = tl.full([BLOCK_R], scale, tl.float32)
    if q_even.dtype != tl.float32:
        q_even, q_odd, power = _in_range_of_fp16(q_even, q_odd)
        factor *= power
    dtype: tl.constexpr = q_even.dtype
    HAS_NAN: tl.constexpr = NUMBERS == "fp8" or NUMBERS == "fp8 by ptx"
    first, last, begin, end = row_intervals(
        lower_ptr, upper_ptr, lower_strides, upper_strides, batch, t, mask_r, T, S, CAUSAL, ONE_QUERY
    )
    split, step = tl.program_id(0), tl.num_programs(0) * BLOCK_N
    begin += split * BLOCK_N
    # Within a tile int32 is enough; the tile's own place is int64. A word holds two columns.
    PER_K: tl.constexpr = 1 if k_ptr.dtype.element_ty == tl.int16 else 2
    PER_V: tl.constexpr = 1 if v_ptr.dtype.element_ty == tl.int16 else 2
    k_tile = offs_n[:, None] * k_strides[2] + PER_K * offs_k[None, :] * k_strides[3]
    v_tile = offs_n[:, None] * v_strides[2] + PER_V * offs_v[None, :] * v_strides[3]

    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    n = tl.full([BLOCK_R], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    even = tl.zeros([BLOCK_R, BLOCK_V // 2], tl.float32)
    odd = tl.zeros([BLOCK_R, BLOCK_V // 2], tl.float32)
    if key_mask_ptr is not None:
        next_real = key_exists(key_mask_ptr, key_mask_strides, batch, begin + offs_n, end)
    for n0 in range(begin, end, step):
        keys = n0 + offs_n
        # What is loaded waits for no mask: that of the next step comes while this one computes.
        held = keys < end
        real = held
        if key_mask_ptr is not None:
            real = next_real
            next_real = key_exists(key_mask_ptr, key_mask_strides, batch, keys + step, end)
        visible, seen = visible_keys(real, keys, first, last, ONE_QUERY, GAPS and HAS_NAN)
        k_base = k_ptr + offset((batch, group, n0, 0), k_strides)
        k = _load_words(k_base, k_tile, held[:, None] & mask_k[None, :], k_strides[3], odd_k[None, :])
        k_even, k_odd = _even_of(k, NUMBERS).to(dtype), _odd_of(k, NUMBERS).to(dtype)
        score = tl.dot(q_even, tl.trans(k_even), input_precision="ieee")
        score = tl.dot(q_odd, tl.trans(k_odd), score, input_precision="ieee")
        scales_at = scales_ptr + offset((batch, group, n0, 0), scales_strides) + offs_n * scales_strides[2]
        k_scale = tl.load(scales_at, mask=real, other=0.0)
        v_scale = tl.load(scales_at + scales_strides[3], mask=real, other=0.0)
        score = score * factor[:, None] * k_scale[None, :]
        if cap is not None:
            score = soft_cap(score, cap)
        score = tl.where(visible, score, float("-inf"))
        # One reduction, so that warps meet once for both.
        peak, w_peak = tl.reduce((score, score + _exponent(v_scale)[None, :]), 1, _larger_pair)
        peak, w_peak = tl.maximum(m, peak), tl.maximum(n, w_peak)
        # A row that has seen nothing yet has no peak; 0 keeps its differences defined.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        w_safe = tl.where(peak == float("-inf"), 0.0, w_peak)
        p = tl.exp2(score - safe[:, None])
        l = l * tl.exp2(m - safe) + tl.sum(p, 1)
        w = (p * v_scale[None, :]) * tl.exp2(safe - w_safe)[:, None]
        if GAPS:
            # Between two rows' intervals lie slots that nobody sees, of whatever scale.
            w = tl.where(visible, w, 0.0)
        shrink = tl.exp2(n - w_safe)[:, None]
        v_base = v_ptr + offset((batch, group, n0, 0), v_strides)
        v = _load_words(v_base, v_tile, held[:, None] & mask_v[None, :], v_strides[3], odd_v[None, :])
        if HAS_NAN and (GAPS or key_mask_ptr is not None):
            # A slot that nobody sees may hold a NaN, which a weight of zero would let through; int8 has none.
            v = tl.where(seen[:, None], v, tl.zeros_like(v))
        v_even, v_odd = _even_of(v, NUMBERS).to(dtype), _odd_of(v, NUMBERS).to(dtype)
        even = tl.dot(w.to(dtype), v_even, even * shrink, input_precision="ieee")
        odd = tl.dot(w.to(dtype), v_odd, odd * shrink, input_precision="ieee")
        m, n = peak, w_peak

    lse = tl.where(l == 0.0, float("-inf"), m * LN_2 + tl.log(tl.where(l == 0.0, 1.0, l)))
    tl.store(lse_ptr + offset((split, batch, head, t), lse_strides), lse, mask=mask_r)
    unit = tl.where(l == 0.0, 0.0, tl.exp2(n - m) / l)[:, None]
    at = offset((split, batch, head, t, 0), o_strides)[:, None] + 2 * offs_v[None, :] * o_strides[4]
    even, odd = (even * unit).to(o_ptr.dtype.element_ty), (odd * unit).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + at, even, mask=mask_r[:, None] & mask_v[None, :])
    tl.store(o_ptr + at + o_strides[4], odd, mask=mask_r[:, None] & odd_v[None, :])
