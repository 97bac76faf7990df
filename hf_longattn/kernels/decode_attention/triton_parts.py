"""What the kernel for keys in 16 and 32 bits shares with that for keys in 8 bits."""

import triton
import triton.language as tl

from hf_longattn.kernels.common import offset

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(score, cap):
    """cap * tanh(score) in fp32. Near zero 1 - 2 / (exp(2x) + 1) cancels, so the series takes over."""
    square = score * score
    series = score * (
        1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * 62.0 / 2835)))
    )
    magnitude = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(score)) + 1.0)
    tanh = tl.where(tl.abs(score) < 0.25, series, tl.where(score < 0.0, -magnitude, magnitude))
    return cap * tanh


@triton.jit
def _row_interval(
    lower_ptr, upper_ptr, lower_strides, upper_strides, batch, t, mask_r, T, S, CAUSAL: tl.constexpr
):
    """[first, last) of the keys that each row sees, or of one query; empty for rows that do not exist."""
    first = t * 0
    last = S * mask_r
    if CAUSAL:
        last = tl.minimum(last, t + 1 + S - T)
    if lower_ptr is not None:
        lower = tl.load(lower_ptr + offset((batch, t), lower_strides), mask=mask_r, other=0)
        first = tl.maximum(first, lower.to(tl.int32))
    if upper_ptr is not None:
        upper = tl.load(upper_ptr + offset((batch, t), upper_strides), mask=mask_r, other=0)
        last = tl.minimum(last, upper.to(tl.int32))
    return first, last


@triton.jit
def row_intervals(
    lower_ptr, upper_ptr, lower_strides, upper_strides, batch, t, mask_r, T, S, CAUSAL: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):  # fmt: skip
    """[first, last) of the keys that each row sees, and [begin, end) of those that any row sees."""
    if ONE_QUERY:
        # All rows see the same keys: two numbers, which no threads have to agree on.
        first, last = _row_interval(
            lower_ptr, upper_ptr, lower_strides, upper_strides, batch, 0, True, T, S, CAUSAL
        )
        return first, last, first, last
    else:
        first, last = _row_interval(
            lower_ptr, upper_ptr, lower_strides, upper_strides, batch, t, mask_r, T, S, CAUSAL
        )
        begin = tl.min(tl.where(first < last, first, S), 0)
        end = tl.max(tl.where(first < last, last, 0), 0)
        return first, last, begin, end


@triton.jit
def key_exists(key_mask_ptr, key_mask_strides, batch, keys, end):
    """Which of the keys exist: before `end`, and not padding."""
    at = key_mask_ptr + offset((batch, keys), key_mask_strides)
    return tl.load(at, mask=keys < end, other=0) != 0


@triton.jit
def visible_keys(real, keys, first, last, ONE_QUERY: tl.constexpr, GAPS: tl.constexpr):
    """Which row sees which key, from the keys that exist, and which keys any row sees."""
    visible = real[None, :]
    if not ONE_QUERY:
        visible = visible & (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
    if GAPS:
        # Between two rows' intervals lie slots that nobody sees.
        real = tl.max(visible.to(tl.int32), 0) > 0
    return visible, real
