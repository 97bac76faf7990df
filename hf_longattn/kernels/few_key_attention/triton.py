"""Attention over a few keys, forward only: rotation, the write of the new keys and the softmax in one launch.

    k[s] = held_keys[s]  (s < start)   or  turned(key[s - start]), which is stored        v[s] likewise
    o[t] = sum_s softmax_{s <= start + t}(scale * turned(q[t]) . k[s]) v[s]

One program, most often one warp, takes one key head of one row of the batch: each slot's key and value lie in
registers, a row of the head by itself, while the T new tokens pass by with their H / G queries. New keys come
from their projection, so that nothing is read that this launch writes. Products are sums over the lanes: at
most 32 keys are too few for a matrix unit to matter. Large batches are bound by the bytes of keys, values and
projections, and by instructions: what is done once a token is not done for every slot. Nothing is saved:
there is no backward.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import next_power_of_2, offset, overlap, wait_for_previous

LOG2_E = 1.4426950408889634
# Bytes of keys that one warp holds: 32 registers of each thread, and as many for values.
_BYTES_A_WARP = 4096


@triton.jit
def _turned(x_row, stride, cos_row, sin_row, cos_stride, sin_stride, K, R, BLOCK_K: tl.constexpr):
    """One head of one token, the first R of its K numbers turned, as (BLOCK_K,) fp32."""
    offs = tl.arange(0, BLOCK_K)
    x = tl.load(x_row + offs * stride, mask=offs < K, other=0.0).to(tl.float32)
    if cos_row is not None:
        first, turns = offs < R // 2, offs < R
        partner = tl.where(first, offs + R // 2, offs - R // 2)
        other = tl.load(x_row + partner * stride, mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(cos_row + offs * cos_stride, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_row + offs * sin_stride, mask=turns, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -other, other) * sin
    return x


@triton.jit
def _held(places, stride, start, mask, SLOTS: tl.constexpr):
    """The rows of all slots, 0 from `start` on."""
    rows = ()
    for s in tl.static_range(SLOTS):
        rows = rows + (tl.load(places + s * stride, mask=mask & (s < start), other=0.0),)
    return rows


@triton.jit
def _kept(places, stride, slot, new, mask, held, SLOTS: tl.constexpr):
    """Stores the row `new` in one slot, and returns `held` with it there."""
    new = new.to(places.dtype.element_ty)
    tl.store(places + slot * stride, new, mask=mask)
    rows = ()
    for s in tl.static_range(SLOTS):
        rows = rows + (tl.where(slot == s, new, held[s]),)
    return rows


@triton.jit
def _attended(q, keys, values, seen, slot, scale, SLOTS: tl.constexpr, BLOCK_V: tl.constexpr):
    """What one query finds in the slots up to `slot` that are seen; 0 where there are none."""
    scores, top = (), -1e30
    for s in tl.static_range(SLOTS):
        score = tl.sum(keys[s].to(tl.float32) * q, axis=0) * scale
        score = tl.where(seen[s] & (s <= slot), score, -float("inf"))
        scores, top = scores + (score,), tl.maximum(top, score)
    total, o = 0.0, tl.zeros((BLOCK_V,), tl.float32)
    for s in tl.static_range(SLOTS):
        weight = tl.exp2(scores[s] - top)
        total += weight
        o += weight * values[s].to(tl.float32)
    return o / tl.maximum(total, 1e-30)


@triton.jit(do_not_specialize=["start", "T"])
def _few_key_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, key_mask_ptr, held_k_ptr, held_v_ptr, o_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, key_mask_strides,
    held_k_strides, held_v_strides, o_strides,
    start, T, scale,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, OVERLAP: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    in_k, in_v = offs_k < K, offs_v < V
    held_k = held_k_ptr + offset((row, head), held_k_strides[:2]) + offs_k * held_k_strides[3]
    held_v = held_v_ptr + offset((row, head), held_v_strides[:2]) + offs_v * held_v_strides[3]
    keys = _held(held_k, held_k_strides[2], start, in_k, SLOTS)
    values = _held(held_v, held_v_strides[2], start, in_v, SLOTS)
    seen = ()
    for s in tl.static_range(SLOTS):
        mark = s < start + T
        if key_mask_ptr is not None:
            place = key_mask_ptr + row * key_mask_strides[0] + s * key_mask_strides[1]
            mark = mark & (tl.load(place, mask=mark, other=0) != 0)
        seen = seen + (mark,)
    for t in range(T):
        cos = None if cos_ptr is None else cos_ptr + offset((row, t), cos_strides[:2])
        sin = None if sin_ptr is None else sin_ptr + offset((row, t), sin_strides[:2])
        k = k_ptr + offset((row, head, t), k_strides[:3])
        k = _turned(k, k_strides[3], cos, sin, cos_strides[2], sin_strides[2], K, R, BLOCK_K)
        v = v_ptr + offset((row, head, t), v_strides[:3])
        v = _turned(v, v_strides[3], None, None, 0, 0, V, 0, BLOCK_V)
        keys = _kept(held_k, held_k_strides[2], start + t, k, in_k, keys, SLOTS)
        values = _kept(held_v, held_v_strides[2], start + t, v, in_v, values, SLOTS)
        for member in range(GROUP):
            query_head = head * GROUP + member
            q = q_ptr + offset((row, query_head, t), q_strides[:3])
            q = _turned(q, q_strides[3], cos, sin, cos_strides[2], sin_strides[2], K, R, BLOCK_K)
            o = _attended(q, keys, values, seen, start + t, scale, SLOTS, BLOCK_V)
            out = o_ptr + offset((row, t, query_head), o_strides[:3]) + offs_v * o_strides[3]
            tl.store(out, o.to(o_ptr.dtype.element_ty), mask=in_v)


def attend_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    start: int,
    rotary: tuple[Tensor, Tensor] | None,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Launches the kernel; arguments as in `few_key_attention`."""
    B, H, T, K = query.shape
    G, V = key.shape[1], value.shape[3]
    output = torch.empty((B, T, H, V), device=query.device, dtype=query.dtype)
    if B * T == 0:
        return output
    slots, block_k, block_v = held_keys.shape[2], next_power_of_2(K), next_power_of_2(V)
    warps = slots * max(block_k, block_v) * held_keys.element_size() / _BYTES_A_WARP
    cos, sin = (None, None) if rotary is None else (each.expand(B, -1, -1) for each in rotary)
    _few_key_kernel[(B, G)](
        query, key, value, cos, sin, key_mask, held_keys, held_values, output,
        query.stride(), key.stride(), value.stride(),
        (0, 0, 0) if cos is None else cos.stride(), (0, 0, 0) if sin is None else sin.stride(),
        (0, 0) if key_mask is None else key_mask.stride(),
        held_keys.stride(), held_values.stride(), output.stride(), start, T, scale * LOG2_E,
        GROUP=H // G, K=K, V=V, R=0 if cos is None else cos.shape[2],
        SLOTS=slots, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=min(next_power_of_2(math.ceil(warps)), 8), num_stages=1,
        **overlap(query.device),
    )  # fmt: skip
    return output
