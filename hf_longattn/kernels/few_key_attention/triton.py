"""Attention over a few keys, forward only: rotation, the write of the new keys and the softmax in one launch.

    k[s] = held_keys[s]  (s < start)   or  turned(key[s - start]), which is stored        v[s] likewise
    o[t] = sum_s softmax_{s <= start + t}(scale * turned(q[t]) . k[s]) v[s]

One program takes one key head of one row of the batch: all its keys and values stay in registers, fp32, while
the T H / G queries pass by. New keys come from their projection, so that nothing is read that this launch
writes. Products are sums over the lanes: at most 32 keys are too few for a matrix unit to matter, and the
bytes of keys, values and projections bound the time. Nothing is saved: there is no backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import offset, overlap, wait_for_previous

LOG2_E = 1.4426950408889634
# Numbers of a tile of keys that one warp holds: 32 registers of each thread.
_NUMBERS_A_WARP = 1024


@triton.jit
def _turned(
    x_ptr, cos_ptr, sin_ptr, x_strides, cos_strides, sin_strides, row, head, tokens, valid, K, R,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head of the `tokens` (N, 1), the first R of its K numbers turned, as (N, BLOCK_K) fp32."""
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    rows = x_ptr + offset((row, head, 0, 0), x_strides) + tokens * x_strides[2]
    x = tl.load(rows + offs_k * x_strides[3], mask=valid & (offs_k < K), other=0.0).to(tl.float32)
    if cos_ptr is not None:
        first = offs_k < R // 2
        turns = valid & (offs_k < R)
        partner = tl.where(first, offs_k + R // 2, offs_k - R // 2)
        other = tl.load(rows + partner * x_strides[3], mask=turns, other=0.0).to(tl.float32)
        cos_rows = cos_ptr + row * cos_strides[0] + tokens * cos_strides[1]
        sin_rows = sin_ptr + row * sin_strides[0] + tokens * sin_strides[1]
        cos = tl.load(cos_rows + offs_k * cos_strides[2], mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_rows + offs_k * sin_strides[2], mask=turns, other=0.0).to(tl.float32)
        x = x * cos + tl.where(first, -other, other) * sin
    return x


@triton.jit
def _joined(held_rows, stride, new, is_old, is_new, WIDTH, BLOCK: tl.constexpr):
    """Stores the rows `new` among those that are held, and returns both as (S, BLOCK) fp32."""
    offs = tl.arange(0, BLOCK)[None, :]
    places = held_rows + offs * stride
    new = new.to(held_rows.dtype.element_ty)
    tl.store(places, new, mask=is_new & (offs < WIDTH))
    old = tl.load(places, mask=is_old & (offs < WIDTH), other=0.0)
    return tl.where(is_new, new, old).to(tl.float32)


@triton.jit
def _softmax(scores):
    """Weights of one query; all 0 where every score is -inf."""
    top = tl.maximum(tl.max(scores, axis=0), -1e30)
    weights = tl.exp2(scores - top)
    return weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)


@triton.jit(do_not_specialize=["start", "T"])
def _few_key_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, key_mask_ptr, held_k_ptr, held_v_ptr, o_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, key_mask_strides,
    held_k_strides, held_v_strides, o_strides,
    start, T, scale,
    GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slots = tl.arange(0, BLOCK_S)
    place = slots[:, None]
    is_old, is_new = place < start, (place >= start) & (place < start + T)
    # Slots that are not new point at the first new token, and are masked.
    fresh = tl.where(is_new, place - start, 0)
    k = _turned(
        k_ptr, cos_ptr, sin_ptr, k_strides, cos_strides, sin_strides, row, head, fresh, is_new, K, R, BLOCK_K
    )  # fmt: skip
    v = _turned(v_ptr, None, None, v_strides, None, None, row, head, fresh, is_new, V, 0, BLOCK_V)
    held_k = held_k_ptr + offset((row, head, 0, 0), held_k_strides) + place * held_k_strides[2]
    held_v = held_v_ptr + offset((row, head, 0, 0), held_v_strides) + place * held_v_strides[2]
    k = _joined(held_k, held_k_strides[3], k, is_old, is_new, K, BLOCK_K)
    v = _joined(held_v, held_v_strides[3], v, is_old, is_new, V, BLOCK_V)
    seen = slots < start + T
    if key_mask_ptr is not None:
        marks = key_mask_ptr + row * key_mask_strides[0] + slots * key_mask_strides[1]
        seen = seen & (tl.load(marks, mask=seen, other=0) != 0)
    offs_v = tl.arange(0, BLOCK_V)
    first = tl.zeros((1, 1), tl.int64)
    for index in range(T * GROUP):
        t, query_head = index // GROUP, head * GROUP + index % GROUP
        q = _turned(
            q_ptr, cos_ptr, sin_ptr, q_strides, cos_strides, sin_strides, row, query_head, first + t,
            first == 0, K, R, BLOCK_K,
        )  # fmt: skip
        scores = tl.sum(k * q, axis=1) * scale
        weights = _softmax(tl.where(seen & (slots <= start + t), scores, -float("inf")))
        o = tl.sum(weights[:, None] * v, axis=0)
        out = o_ptr + offset((row, t, query_head, 0), o_strides) + offs_v
        tl.store(out, o.to(o_ptr.dtype.element_ty), mask=offs_v < V)


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
    block_s, block_k, block_v = (triton.next_power_of_2(n) for n in (held_keys.shape[2], K, V))
    cos, sin = (None, None) if rotary is None else (each.expand(B, -1, -1) for each in rotary)
    _few_key_kernel[(B, G)](
        query, key, value, cos, sin, key_mask, held_keys, held_values, output,
        query.stride(), key.stride(), value.stride(),
        (0, 0, 0) if cos is None else cos.stride(), (0, 0, 0) if sin is None else sin.stride(),
        (0, 0) if key_mask is None else key_mask.stride(),
        held_keys.stride(), held_values.stride(), output.stride(), start, T, scale * LOG2_E,
        GROUP=H // G, K=K, V=V, R=0 if cos is None else cos.shape[2],
        BLOCK_S=block_s, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=min(max(block_s * max(block_k, block_v) // _NUMBERS_A_WARP, 1), 8), num_stages=1,
        **overlap(query.device),
    )  # fmt: skip
    return output
