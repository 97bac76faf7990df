"""The forward kernel of blockwise attention.

One program: BLOCK_M queries of one head, looping over the key tiles that they see.

    z = q k^T (log2 units)         m' = max(m, max z)          p = exp2(z - m')
    l = l * exp2(m - m') + sum p   acc = acc * exp2(m - m') + p v
    o = acc / l                    lse = (m + log2 l) / log2(e)

with a sink as one more logit at the end. Inner tiles run without mask arithmetic.
Source: Dao, arXiv 2307.08691, algorithm 1.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, offset
from hf_longattn.kernels.dispatch import num_processors
from hf_longattn.kernels.merge_partials.triton import merge_forward

from .key_parts import pick_parts
from .terms import Terms
from .triton_tiles import (
    Config,
    dropped,
    key_span,
    load_tile,
    logits_tile,
    row_bounds,
    run_length,
    shared_arguments,
    store_tile,
    tile_of_run,
    without_unseen,
)

# The first is safe (fp32, head dims up to 256, small shared memory), and tests use it; the others are for
# 16-bit inputs on Hopper, by head dim: up to 64, up to 128, up to 256, up to 512.
CONFIGS = [
    Config(32, 32, 4, 2), Config(128, 64, 4, 3), Config(128, 128, 8, 3), Config(128, 64, 8, 2),
    Config(32, 32, 8, 2),
]  # fmt: skip


def pick_config(dtype: torch.dtype, head_dim: int, device: torch.device, configs: list[Config]) -> Config:
    """The entry of a kernel's list that fits: safe, or by head dim."""
    if dtype == torch.float32 or device.type == "cpu":
        return configs[0]
    return configs[1 + sum(head_dim > most for most in (64, 128, 256))]


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    masks,
    o_ptr,
    lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    mask_strides,
    T,
    S,
    scale,
    softcap,
    dropout,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_tiles = tl.cdiv(T, BLOCK_M)
    bh = tl.cast(tl.program_id(0) // num_tiles, tl.int64)
    b, h = bh // H, bh % H
    # The last queries of a causal row see the most keys: they start first.
    start_m = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lower, upper = row_bounds(masks, mask_strides, b, offs_m, T, S, CAUSAL)
    span = key_span(masks, lower, upper, S, BLOCK_N)

    q = load_tile(q_ptr + offset((b, h, 0, 0), q_strides), start_m, q_strides, T, K, BLOCK_M, BLOCK_K)
    k_base = k_ptr + offset((b, h // GROUP, 0, 0), k_strides)
    v_base = v_ptr + offset((b, h // GROUP, 0, 0), v_strides)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)

    for OUTER in tl.static_range(2):
        for i in tl.range(0, run_length(span, OUTER)):
            start_n = tile_of_run(span, i, OUTER) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            where = (b, h, offs_m[:, None], offs_n[None, :], T, S)
            bounds = (lower[:, None], upper[:, None])
            k = load_tile(k_base, start_n, k_strides, S, K, BLOCK_N, BLOCK_K, OUTER)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            z, x, factor = logits_tile(raw, masks, mask_strides, where, bounds, scale, softcap, TANH, OUTER)
            if OUTER:
                m_new = tl.maximum(m, tl.max(z, axis=1))
            else:
                # The maximum before the factor lets the factor and the subtraction below be one instruction.
                m_new = tl.maximum(m, tl.max(x, axis=1) * factor)
            # A row that has seen nothing yet: exp2(-inf - -inf) would be NaN.
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(z - base[:, None])
            shrink = tl.exp2(m - base)
            l = l * shrink + tl.sum(p, axis=1)
            v = load_tile(v_base, start_n, v_strides, S, V, BLOCK_N, BLOCK_V, OUTER)
            v = without_unseen(v, p, OUTER)
            p = dropped(p, dropout, where)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            m = m_new

    # A row without an interval may have passed through inner tiles.
    some = lower < upper
    m = tl.where(some, m, float("-inf"))
    l = tl.where(some, l, 0.0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
        total = tl.maximum(m, sink)
        shrink = tl.exp2(m - total)
        l = l * shrink + tl.exp2(sink - total)
        acc *= shrink[:, None]
        m = total
    seen = some & (l > 0.0)
    share = 1.0 / tl.where(seen, l, 1.0)
    o = tl.where(seen[:, None], acc * share[:, None], 0.0)
    store_tile(o_ptr + offset((b, h, 0, 0), o_strides), start_m, o_strides, T, o, V, BLOCK_M, BLOCK_V)
    lse = tl.where(l > 0.0, (m + tl.log2(l)) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + bh * T + offs_m, lse, mask=offs_m < T)


def _launch(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, config: Config, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; arguments as in `forward`, `dtype` that of the output."""
    batch, heads, num_queries, _ = query.shape
    output = query.new_empty(batch, num_queries, heads, value.shape[3], dtype=dtype).transpose(1, 2)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    grid = (cdiv(num_queries, config.block_m) * batch * heads,)
    _forward_kernel[grid](
        query,
        key,
        value,
        terms.sinks,
        o_ptr=output,
        lse_ptr=lse,
        q_strides=query.stride(),
        k_strides=key.stride(),
        v_strides=value.stride(),
        o_strides=output.stride(),
        **shared_arguments(query, key, value, terms),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return output, lse


def _split(
    query: Tensor, key: Tensor, value: Tensor, terms: Terms, parts: int, block_n: int
) -> tuple[Tensor, Tensor, Tensor, Terms]:
    """Arguments of a batch whose rows are one sequence, each with its own part of the keys, whole tiles."""
    length = cdiv(key.shape[2], parts * block_n) * block_n
    start = length * torch.arange(parts, device=query.device)[:, None].expand(-1, query.shape[2])
    # A sink is one more logit of the row: it is counted once, in the merge.
    terms = replace(terms, mask=terms.mask.narrowed(start, start + length), sinks=None)
    query, key, value = (states.expand(parts, -1, -1, -1) for states in (query, key, value))
    return query, key, value, terms


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    config: Config | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel, and the merge where the keys are cut in parts.

    Args:
        query: (B, H, T, K), fp16, bf16 or fp32.
        key: (B, G, S, K).
        value: (B, G, S, V).
        terms: options of the call.
        config: tile sizes; by dtype and head dim if None.
        parts: of the keys, for B = 1 without dropout; by `pick_parts` if None.

    Returns:
        output (B, H, T, V), from one part laid out as (B, T, H, V), and lse (B, H, T) in fp32.
    """
    head_dim = max(query.shape[3], value.shape[3])
    config = config or pick_config(query.dtype, head_dim, query.device, CONFIGS)
    if query.shape[0] != 1 or terms.dropout is not None:
        parts = 1
    elif parts is None:
        tiles = query.shape[1] * cdiv(query.shape[2], config.block_m)
        parts = pick_parts(tiles, key.shape[2], num_processors(query.device))
    if parts == 1:
        return _launch(query, key, value, terms, config, query.dtype)
    outputs, lse = _launch(*_split(query, key, value, terms, parts, config.block_n), config, torch.float32)
    return merge_forward(outputs[:, None], lse[:, None], query.dtype, terms.sinks)
