"""What the forward and backward kernels share: tiles of inputs, visible intervals, logits, dropout.

Logits are kept in units of log2, so that one exp2 without a multiplication makes a probability: `scale` and
`softcap` arrive multiplied by log2(e).

The keys that a tile of queries sees are cut in two runs of key tiles: inner tiles that every query sees in
whole, which need no mask, and outer tiles on both sides. Rows that see nothing are left out of that, or a
padded row would cost every tile its inner run; whoever calls clears such rows.

`masks` = (lower, upper, key_mask, bias), pointers or None; `mask_strides` = batch strides of the first three,
then the four of the bias, 0 where a tensor is broadcast.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.common import next_power_of_2

from .philox import drop_threshold
from .terms import Terms

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """Tile sizes over queries and keys, and how a program is run."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tanh(query: Tensor) -> str:
    """How kernels compute the tanh of a softcap: "instruction", "quotient" or "series", see `tanh`.

    Args:
        query: says dtype and device.
    """
    if query.dtype == torch.float32:
        return "series"
    # The instruction errs by up to 2^-11 of the score: an eighth of what one rounding to bf16 costs, but as
    # much as one to fp16, and there the slope 1 - tanh^2 of scores near the cap does not bear it.
    nvidia = query.device.type == "cuda" and torch.version.hip is None and not dispatch.interpreting()
    if nvidia and query.dtype == torch.bfloat16 and torch.cuda.get_device_capability(query.device) >= (7, 5):
        return "instruction"
    return "quotient"


def shared_arguments(query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> dict:
    """The arguments that every kernel of this operator takes."""
    mask, bias = terms.mask, terms.bias
    ranges = [None if t is None else t.contiguous() for t in (mask.lower, mask.upper, mask.key_mask)]
    strides = [0 if t is None or t.shape[0] == 1 else t.shape[1] for t in ranges]
    bias_strides = (
        [0] * 4
        if bias is None
        else [
            0 if size == 1 and dim < 3 else step
            for dim, (size, step) in enumerate(zip(bias.shape, bias.stride(), strict=True))
        ]
    )
    dropout = terms.dropout
    return {
        "masks": (*ranges, bias),
        "mask_strides": (*strides, *bias_strides),
        "T": query.shape[2],
        "S": key.shape[2],
        "scale": terms.scale * LOG2_E,
        "softcap": None if terms.softcap is None else terms.softcap * LOG2_E,
        "dropout": None
        if dropout is None
        else (drop_threshold(dropout[0]), dropout[1], 1 / (1 - dropout[0])),
        "H": query.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "K": query.shape[3],
        "V": value.shape[3],
        "CAUSAL": mask.causal,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        "TANH": choose_tanh(query),
        "BLOCK_K": max(16, next_power_of_2(query.shape[3])),
        "BLOCK_V": max(16, next_power_of_2(value.shape[3])),
    }


@triton.jit
def load_tile(
    base_ptr,
    start,
    strides,
    num_rows,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECKED=True,
):
    """Rows start.. of a matrix, zeros beyond its ends. Unchecked where every row is known to exist."""
    offs_r = start + tl.arange(0, ROWS)
    offs_c = tl.arange(0, COLUMNS)
    pointers = base_ptr + tl.cast(offs_r, tl.int64)[:, None] * strides[2] + offs_c[None, :] * strides[3]
    if CHECKED:
        return tl.load(pointers, mask=(offs_r < num_rows)[:, None] & (offs_c < DIM)[None, :], other=0.0)
    if DIM != COLUMNS:
        return tl.load(pointers, mask=(offs_c < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(rows_ptr, start, T, SIZE: tl.constexpr, CHECKED=True):
    """(lse2, delta, lower, upper) of a tile of queries; those past T see nothing."""
    offs_t = start + tl.arange(0, SIZE)
    pointers = rows_ptr + tl.cast(offs_t, tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if CHECKED:
        rows = tl.load(pointers, mask=(offs_t < T)[:, None], other=0)
    else:
        rows = tl.load(pointers)
    even, odd = tl.split(tl.reshape(rows, (SIZE, 2, 2)))
    lse2, lower = tl.split(even)
    delta, upper = tl.split(odd)
    return lse2.to(tl.float32, bitcast=True), delta.to(tl.float32, bitcast=True), lower, upper


@triton.jit
def store_rows(rows_ptr, start, T, lse2, delta, lower, upper, SIZE: tl.constexpr):
    """Writes what `load_rows` reads, int32: the bits of lse in units of log2, those of delta, the interval.

    Together they are one copy of 16 bytes a query. Apart, Triton 3.6 copies each of them in the layout of
    the scores, 4 bytes at a time: that gave every thread of `_dkdv_kernel` 32 copies and their addresses.
    """
    offs_t = start + tl.arange(0, SIZE)
    even = tl.join(lse2.to(tl.int32, bitcast=True), lower.to(tl.int32))
    odd = tl.join(delta.to(tl.int32, bitcast=True), upper.to(tl.int32))
    rows = tl.reshape(tl.join(even, odd), (SIZE, 4))
    pointers = rows_ptr + tl.cast(offs_t, tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(pointers, rows, mask=(offs_t < T)[:, None])


@triton.jit
def store_tile(
    base_ptr, start, strides, num_rows, tile, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes `tile` to rows start.. of a matrix, in the matrix's dtype: here fp32 is rounded."""
    offs_r = start + tl.arange(0, ROWS)
    offs_c = tl.arange(0, COLUMNS)
    pointers = base_ptr + tl.cast(offs_r, tl.int64)[:, None] * strides[2] + offs_c[None, :] * strides[3]
    inside = (offs_r < num_rows)[:, None] & (offs_c < DIM)[None, :]
    tl.store(pointers, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_bounds(masks, mask_strides, b, offs_t, T, S, CAUSAL: tl.constexpr):
    """(lower, upper) of each query; rows past T see nothing."""
    inside = offs_t < T
    lower = tl.zeros_like(offs_t)
    upper = tl.where(inside, S, 0)
    if CAUSAL:
        upper = tl.minimum(upper, offs_t + 1 + (S - T))
    if masks[0] is not None:
        lower = tl.maximum(tl.load(masks[0] + b * mask_strides[0] + offs_t, mask=inside, other=0), 0)
    if masks[1] is not None:
        upper = tl.minimum(upper, tl.load(masks[1] + b * mask_strides[1] + offs_t, mask=inside, other=0))
    return lower, upper


@triton.jit
def key_span(masks, lower, upper, S, BLOCK_N: tl.constexpr):
    """(first, inner first, inner last, last) key tiles of a tile of queries; the `last`s are exclusive."""
    some = lower < upper
    first = tl.min(tl.where(some, lower, S), axis=0) // BLOCK_N
    last = tl.cdiv(tl.max(tl.where(some, upper, 0), axis=0), BLOCK_N)
    inner_first = tl.cdiv(tl.max(tl.where(some, lower, 0), axis=0), BLOCK_N)
    inner_last = tl.min(tl.where(some, upper, S), axis=0) // BLOCK_N
    if masks[2] is not None or masks[3] is not None:
        inner_last = first
    inner_first = tl.minimum(tl.maximum(inner_first, first), last)
    return first, inner_first, tl.maximum(tl.minimum(inner_last, last), inner_first), last


@triton.jit
def run_length(span, OUTER: tl.constexpr):
    """How many tiles the inner run, or both outer runs together, have."""
    inner = span[2] - span[1]
    if OUTER:
        return span[3] - span[0] - inner
    return inner


@triton.jit
def tile_of_run(span, i, OUTER: tl.constexpr):
    """The i-th tile of the inner run, or of the outer runs, which lie on both sides of the inner one."""
    if OUTER:
        return span[0] + i + tl.where(span[0] + i >= span[1], span[2] - span[1], 0)
    return span[1] + i


@triton.jit
def tanh(x, TANH: tl.constexpr):
    """By an instruction good to 2^-11, or by 1 - 2 / (1 + exp 2x), for fp32 with a series near 0."""
    if TANH == "instruction":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    result = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if TANH == "series":
        square = x * x
        series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        result = tl.where(square < 0.0625, x * series, result)
    return result


@triton.jit
def bias_pointers(masks, mask_strides, b, h, offs_t, offs_s):
    """Where a tile of the bias lies. Offsets come shaped to broadcast."""
    pointers = masks[3] + b * mask_strides[3] + h * mask_strides[4]
    pointers += tl.cast(offs_t, tl.int64) * mask_strides[5] + tl.cast(offs_s, tl.int64) * mask_strides[6]
    return pointers


@triton.jit
def logits_tile(
    raw, masks, mask_strides, where, bounds, scale, softcap, TANH: tl.constexpr, OUTER: tl.constexpr
):
    """Logits in units of log2, -inf where hidden, then x and factor: their product is the logits, unmasked.

    With a softcap x is the tanh, of which 1 - x^2 is the derivative. `where` = (b, h, offs_t, offs_s, T, S)
    and `bounds` = (lower, upper) come shaped to broadcast with `raw`.
    """
    x, factor = raw, scale
    if softcap is not None:
        x, factor = tanh(raw * (scale / softcap), TANH), softcap
    z = x * factor
    if OUTER:
        b, h, offs_t, offs_s, T, S = where
        visible = (offs_s >= bounds[0]) & (offs_s < bounds[1])
        if masks[2] is not None:
            visible &= tl.load(masks[2] + b * mask_strides[2] + offs_s, mask=offs_s < S, other=0) != 0
        if masks[3] is not None:
            pointers = bias_pointers(masks, mask_strides, b, h, offs_t, offs_s)
            inside = (offs_t < T) & (offs_s < S)
            if masks[3].dtype.element_ty.is_int():
                visible &= tl.load(pointers, mask=inside, other=0) != 0
            else:
                bias = tl.load(pointers, mask=inside, other=float("-inf")).to(tl.float32)
                visible &= bias > float("-inf")
                z += bias * 1.4426950408889634
        z = tl.where(visible, z, float("-inf"))
    return z, x, factor


@triton.jit
def sloped(p, x, softcap):
    """The probabilities times the derivative of the softcap, of which `x` is the tanh."""
    if softcap is None:
        return p
    return p * (1.0 - x * x)


@triton.jit
def without_unseen(tile, p, OUTER: tl.constexpr):
    """Zeroes the rows of a (BLOCK_N, D) tile without a share in (BLOCK_M, BLOCK_N) `p`: 0 * NaN is NaN."""
    if OUTER:
        seen = tl.max(p, axis=0) > 0.0
        tile = tl.where(seen[:, None], tile, 0.0)
    return tile


@triton.jit
def hidden_to_zero(tile, p, OUTER: tl.constexpr):
    """Zeroes the gradient of pairs without probability, which NaN in an unseen slot would make 0 * NaN."""
    if OUTER:
        tile = tl.where(p == 0.0, 0.0, tile)
    return tile


@triton.jit
def dropped(tile, dropout, where):
    """Zeroes the entries that dropout takes and rescales the others."""
    if dropout is not None:
        b, h, offs_t, offs_s, _, _ = where
        word, _, _, _ = tl.philox(dropout[1], offs_s, offs_t, tl.cast(h, tl.int32), tl.cast(b, tl.int32))
        tile = tl.where(word >= tl.cast(dropout[0], tl.uint32), tile * dropout[2], 0.0)
    return tile
