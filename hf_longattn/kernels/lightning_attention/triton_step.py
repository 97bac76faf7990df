"""Triton kernel of one decoding step of lightning attention; see `api.py` for the arithmetic.

One program owns a tile of the state of one head, (K, BLOCK_V) in registers, and walks the tokens of the step,
so the state is read and written once whatever their number. That traffic is the cost of the step: rounding as
`rounding.py` says hides behind it.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset, overlap, wait_for_previous
from hf_longattn.kernels.lightning_attention import rounding
from hf_longattn.kernels.lightning_attention.tiling import choose_step_tiling
from hf_longattn.kernels.lightning_attention.triton import forgotten, locate, state_tile

GOLDEN, EXPONENT, SIGN = (tl.constexpr(x) for x in (rounding.GOLDEN, rounding.EXPONENT, rounding.SIGN))
ULP, ULP_BITS = tl.constexpr(rounding.ULP), tl.constexpr(rounding.ULP_BITS)
FIRST, SECOND = tl.constexpr(rounding.FIRST), tl.constexpr(rounding.SECOND)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * FIRST
    return (x ^ (x >> 13)) * SECOND


@triton.jit
def draws(state, key, value):
    """Bits of the rows (K, 1) and columns (1, C) of a tile; the xor of two draws for an element."""
    rows = tl.arange(0, state.shape[0]).to(tl.uint32) * GOLDEN
    columns = (-1 - tl.arange(0, state.shape[1])).to(tl.uint32) * GOLDEN
    seed = tl.sum(state.to(tl.uint32, bitcast=True) * (rows | 1)[:, None])
    rows = _mix(seed ^ (key.to(tl.uint32, bitcast=True) + rows))
    columns = _mix(seed ^ (value.to(tl.uint32, bitcast=True) + columns))
    return (rows >> 9)[:, None], ((columns >> 9) | ULP_BITS)[None, :]


@triton.jit
def add(state, change, rows, columns):
    """state + change of one tile, rounded as `rounding.add` does with the bits of `draws`."""
    nearest = state + change
    added = nearest - state
    rest = (state - (nearest - added)) + (change - added)
    size = nearest.to(tl.uint32, bitcast=True) & EXPONENT
    step = (size | (rest.to(tl.uint32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)
    draw = (rows ^ columns).to(tl.float32, bitcast=True) - ULP
    away = tl.abs(rest) > draw * size.to(tl.float32, bitcast=True)
    return tl.where(away, nearest + step * ULP, nearest)


@triton.jit(do_not_specialize=["length", "scale"])
def _step_kernel(
    q_ptr, k_ptr, v_ptr, slope_ptr, state_ptr, o_ptr,
    q_strides, k_strides, v_strides, state_strides, o_strides,
    share, length, num_heads, scale,
    DIMS: tl.constexpr, SINGLE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A few tokens of one head and one tile of value columns: the state is read and written once.

    SINGLE says that there is one token. Without a loop, addresses do not stay in registers, and twice as many
    programs are on a multiprocessor.
    """
    wait_for_previous(OVERLAP)
    tile, head, _, row = locate(num_heads, 1, tl.cdiv(DIMS[1], BLOCK_V))
    lost = forgotten(tl.load(slope_ptr + head).to(tl.float32), tl.cast(1, tl.int32))
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < DIMS[0], offs_v < DIMS[1]
    q_ptr += offset((row, head), (q_strides[0], q_strides[1])) + offs_k * q_strides[3]
    k_ptr += offset((row, head // share), (k_strides[0], k_strides[1])) + offs_k * k_strides[3]
    v_ptr += offset((row, head // share), (v_strides[0], v_strides[1])) + offs_v * v_strides[3]
    o_ptr += offset((row, head), (o_strides[0], o_strides[1])) + offs_v * o_strides[3]
    state_ptrs = state_tile(state_ptr, state_strides, row, head, offs_k, offs_v)
    mask = mask_k[:, None] & mask_v[None, :]
    state = tl.load(state_ptrs, mask=mask, other=0.0)
    for t in tl.range(0, 1 if SINGLE else length, num_stages=1):
        q = tl.load(q_ptr + t * q_strides[2], mask=mask_k, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t * k_strides[2], mask=mask_k, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + t * v_strides[2], mask=mask_v, other=0.0).to(tl.float32)
        # Before the rest: the sum over the tile waits for all of it, when only the state is in registers.
        rows, columns = draws(state, k, v)
        state = add(state, k[:, None] * v[None, :] - state * lost, rows, columns)
        o = tl.sum(q[:, None] * state, 0) * scale
        tl.store(o_ptr + t * o_strides[2], o.to(o_ptr.dtype.element_ty), mask=mask_v)
    tl.store(state_ptrs, state, mask=mask)


def step(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor, scale: float) -> Tensor:
    """A decoding step; the same arguments as `reference.step`."""
    batch, num_heads, length, key_dim = query.shape
    value_dim = value.shape[3]
    output = query.new_empty((batch, num_heads, length, value_dim))
    block_k = max(16, next_power_of_2(key_dim))
    block_v, num_warps = choose_step_tiling(key_dim, value_dim)
    _step_kernel[(cdiv(value_dim, block_v) * num_heads * batch,)](
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        slope_ptr=slopes,
        state_ptr=state,
        o_ptr=output,
        q_strides=query.stride(),
        k_strides=key.stride(),
        v_strides=value.stride(),
        state_strides=state.stride(),
        o_strides=output.stride(),
        share=num_heads // key.shape[1],
        length=length,
        num_heads=num_heads,
        scale=scale,
        DIMS=(key_dim, value_dim),
        SINGLE=length == 1,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=num_warps,
        **overlap(query.device),
    )
    return output
