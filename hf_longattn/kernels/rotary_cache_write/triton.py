"""Rotary embedding and the write of keys and values into a cache: one launch in place of two or more.

    q'[b, h, t] = turned(q[b, h, t])
    keys[b, g, index[b, t]] = turned(k[b, g, t])        values[b, g, index[b, t]] = v[b, g, t]

One program takes BLOCK_H heads of one token: programs past the query heads take the key heads, and those past
them the value heads. A decoding step writes a few KiB a layer and is bound by the launch alone. The rotation
is that of `rotary_embedding`, fp32 and rounded once; there is no backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, next_power_of_2, offset, overlap, wait_for_previous
from hf_longattn.kernels.rotary_embedding.triton import HEADS, angle_of, copy_heads, turn_heads


@triton.jit(do_not_specialize=["T", "S", "H", "G"])
def _rotary_write_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, index_ptr, q_out_ptr, keys_ptr, values_ptr,
    q_strides, k_strides, v_strides, cos_strides, sin_strides, index_strides,
    q_out_strides, keys_strides, values_strides,
    T, S, H, G, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, position = token // T, token % T
    slot = tl.load(index_ptr + offset((batch, position), index_strides))
    is_inside = (slot >= 0) & (slot < S)
    groups_q, groups_k = tl.cdiv(H, BLOCK_H), tl.cdiv(G, BLOCK_H)
    row, offs_h = (batch, position, 0), tl.arange(0, BLOCK_H)
    if group < groups_q:
        angle = angle_of(cos_ptr, sin_ptr, row, cos_strides, sin_strides, R, BLOCK_R)
        head = group * BLOCK_H + offs_h
        where = (batch, head, position, 0)
        turn_heads(q_ptr, q_out_ptr, q_strides, q_out_strides, where, where, head < H, angle, R, K, BLOCK_R)
    elif group < groups_q + groups_k:
        angle = angle_of(cos_ptr, sin_ptr, row, cos_strides, sin_strides, R, BLOCK_R)
        head = (group - groups_q) * BLOCK_H + offs_h
        source, target = (batch, head, position, 0), (batch, head, slot, 0)
        wanted = (head < G) & is_inside
        turn_heads(k_ptr, keys_ptr, k_strides, keys_strides, source, target, wanted, angle, R, K, BLOCK_R)
    else:
        head = (group - groups_q - groups_k) * BLOCK_H + offs_h
        v_row = v_ptr + offset((batch, head, position, 0), v_strides)[:, None]
        values_row = values_ptr + offset((batch, head, slot, 0), values_strides)[:, None]
        copy_heads(v_row, values_row, v_strides[3], values_strides[3], (head < G) & is_inside, 0, V)


def write_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
) -> Tensor:
    """Launches the kernel; arguments as in `rotary_cache_write`."""
    B, H, T, K = query.shape
    G, V, R = key.shape[1], value.shape[3], cos.shape[-1]
    cos, sin, index = cos.expand(B, -1, -1), sin.expand(B, -1, -1), index.expand(B, -1)
    query_out = torch.empty_like(query)
    if B * T == 0:
        return query_out
    groups_q, groups_k = cdiv(H, HEADS), cdiv(G, HEADS)
    _rotary_write_kernel[(B * T, groups_q + groups_k * (2 if V else 1))](
        q_ptr=query, k_ptr=key, v_ptr=value, cos_ptr=cos, sin_ptr=sin, index_ptr=index,
        q_out_ptr=query_out, keys_ptr=keys, values_ptr=values,
        q_strides=query.stride(), k_strides=key.stride(), v_strides=value.stride(),
        cos_strides=cos.stride(), sin_strides=sin.stride(), index_strides=index.stride(),
        q_out_strides=query_out.stride(), keys_strides=keys.stride(), values_strides=values.stride(),
        T=T, S=keys.shape[2], H=H, G=G, R=R, K=K, V=V,
        BLOCK_H=HEADS, BLOCK_R=next_power_of_2(R // 2), num_warps=2, **overlap(query.device),
    )  # fmt: skip
    return query_out
