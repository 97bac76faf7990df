"""The backward kernels of blockwise attention.

    p = exp2(z - lse)      dp = keep / (1 - rate) * (do v^T)      delta = sum(do * o) - dlse
    dz = p * (dp - delta)  ds = dz * (1 - tanh^2)
    dv = (p * keep)^T do / (1 - rate)      dk = scale * ds^T q      dq = scale * ds k      dbias = sum dz

`_stats_kernel` prepares lse, delta and the visible interval of every query. `_dkdv_kernel`: one program owns
a key tile of one key head and loops over the queries of every query head of the group, so nothing is added by
two programs. It computes the transposed z and p, whose products with q and do need no transposed accumulator.
`_dq_kernel`: one program owns a query tile and loops over the keys. `_dbias_kernel`: one program owns a tile
of the bias and loops over whatever the bias is broadcast along. All sums have a fixed order.
Source: Dao, arXiv 2307.08691, algorithm 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, offset

from .spans import query_spans
from .terms import Gradients, Terms, sink_gradient
from .triton_forward import pick_config
from .triton_tiles import (
    Config,
    dropped,
    hidden_to_zero,
    key_span,
    load_rows,
    load_tile,
    logits_tile,
    row_bounds,
    run_length,
    shared_arguments,
    sloped,
    store_rows,
    store_tile,
    tile_of_run,
    without_unseen,
)

# As in the forward: safe, then head dims up to 64, 128, 256 and 512 of 16-bit inputs on Hopper.
DKDV_CONFIGS = [
    Config(32, 32, 4, 1), Config(64, 64, 4, 3), Config(64, 128, 8, 3), Config(32, 64, 8, 3),
    Config(32, 32, 8, 1),
]  # fmt: skip
DQ_CONFIGS = [
    Config(32, 32, 4, 1), Config(128, 64, 4, 3), Config(128, 64, 8, 3), Config(128, 32, 8, 2),
    Config(32, 32, 8, 2),
]  # fmt: skip
_STATS_ROWS = 64


@triton.jit(do_not_specialize=["T", "S"])
def _stats_kernel(
    o_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    masks,
    rows_ptr,
    o_strides,
    do_strides,
    dlse_strides,
    mask_strides,
    T,
    S,
    H: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    num_tiles = tl.cdiv(T, BLOCK_M)
    bh = tl.cast(tl.program_id(0) // num_tiles, tl.int64)
    b, h = bh // H, bh % H
    start_m = (tl.program_id(0) % num_tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    o = load_tile(o_ptr + offset((b, h, 0, 0), o_strides), start_m, o_strides, T, V, BLOCK_M, BLOCK_V)
    do = load_tile(do_ptr + offset((b, h, 0, 0), do_strides), start_m, do_strides, T, V, BLOCK_M, BLOCK_V)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        base = dlse_ptr + offset((b, h, 0), dlse_strides)
        delta -= tl.load(base + tl.cast(offs_m, tl.int64) * dlse_strides[2], mask=offs_m < T, other=0.0)
    lse = tl.load(lse_ptr + bh * T + offs_m, mask=offs_m < T, other=0.0)
    lower, upper = row_bounds(masks, mask_strides, b, offs_m, T, S, CAUSAL)
    # lse = inf makes every probability of a row 0, in inner tiles too.
    lse2 = tl.where((lower < upper) & (lse > float("-inf")), lse * 1.4426950408889634, float("inf"))
    store_rows(rows_ptr + bh * T * 4, start_m, T, lse2, delta, lower, upper, BLOCK_M)


@triton.jit
def _query_span(
    spans_ptr, masks, start_n, T, S, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(first, inner first, inner last, last) query tiles of a key tile: from causal order, or tabulated."""
    first = 0
    inner_first = 0
    last = tl.cdiv(T, BLOCK_M)
    inner_last = last
    if spans_ptr is not None:
        first = tl.load(spans_ptr)
        inner_first = tl.load(spans_ptr + 1)
        inner_last = tl.load(spans_ptr + 2)
        last = tl.load(spans_ptr + 3)
    elif CAUSAL:
        first = tl.minimum(tl.maximum(start_n - (S - T), 0) // BLOCK_M, last)
        full = tl.cdiv(tl.maximum(tl.minimum(start_n + BLOCK_N, S) - 1 - (S - T), 0), BLOCK_M)
        inner_first = tl.minimum(tl.maximum(full, first), last)
    if masks[2] is not None or masks[3] is not None:
        inner_last = first
    # Inner tiles are read without checks, so a last tile that is not full is an outer one.
    inner_first = tl.minimum(inner_first, last)
    inner_last = tl.maximum(tl.minimum(inner_last, T // BLOCK_M), inner_first)
    return first, inner_first, inner_last, last


@triton.jit(do_not_specialize=["T", "S"])
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
    spans_ptr,
    masks,
    dk_ptr,
    dv_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dk_strides,
    dv_strides,
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
    num_tiles = tl.cdiv(S, BLOCK_N)
    bg = tl.cast(tl.program_id(0) // num_tiles, tl.int64)
    b, g = bg // (H // GROUP), bg % (H // GROUP)
    # The first keys of a causal row are seen by the most queries: they start first.
    tile = tl.program_id(0) % num_tiles
    start_n = tile * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if spans_ptr is not None:
        spans_ptr += (b * num_tiles + tile) * 4
    span = _query_span(spans_ptr, masks, start_n, T, S, CAUSAL, BLOCK_M, BLOCK_N)
    k = load_tile(k_ptr + offset((b, g, 0, 0), k_strides), start_n, k_strides, S, K, BLOCK_N, BLOCK_K)
    v = load_tile(v_ptr + offset((b, g, 0, 0), v_strides), start_n, v_strides, S, V, BLOCK_N, BLOCK_V)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)

    for h in tl.range(g * GROUP, (g + 1) * GROUP):
        q_base = q_ptr + offset((b, h, 0, 0), q_strides)
        do_base = do_ptr + offset((b, h, 0, 0), do_strides)
        rows = rows_ptr + (b * H + h) * T * 4
        for OUTER in tl.static_range(2):
            for i in tl.range(0, run_length(span, OUTER)):
                start_m = tile_of_run(span, i, OUTER) * BLOCK_M
                offs_m = start_m + tl.arange(0, BLOCK_M)
                where = (b, h, offs_m[None, :], offs_n[:, None], T, S)
                q = load_tile(q_base, start_m, q_strides, T, K, BLOCK_M, BLOCK_K, OUTER)
                raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                do = load_tile(do_base, start_m, do_strides, T, V, BLOCK_M, BLOCK_V, OUTER)
                dp = dropped(tl.dot(v, tl.trans(do), input_precision=PRECISION), dropout, where)
                # Read after both products, lse and delta take no registers from them: no loop spills.
                lse2, delta, lower, upper = load_rows(rows, start_m, T, BLOCK_M, OUTER)
                bounds = (lower[None, :], upper[None, :])
                z, x, _ = logits_tile(raw, masks, mask_strides, where, bounds, scale, softcap, TANH, OUTER)
                p = tl.exp2(z - lse2[None, :])
                dv = tl.dot(dropped(p, dropout, where).to(do.dtype), do, dv, input_precision=PRECISION)
                ds = hidden_to_zero(sloped(p, x, softcap) * (dp - delta[None, :]), p, OUTER)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale * 0.6931471805599453
    store_tile(dk_ptr + offset((b, g, 0, 0), dk_strides), start_n, dk_strides, S, dk, K, BLOCK_N, BLOCK_K)
    store_tile(dv_ptr + offset((b, g, 0, 0), dv_strides), start_n, dv_strides, S, dv, V, BLOCK_N, BLOCK_V)


@triton.jit(do_not_specialize=["T", "S"])
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
    masks,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dq_strides,
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
    start_m = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    lse2, delta, lower, upper = load_rows(rows_ptr + bh * T * 4, start_m, T, BLOCK_M)
    span = key_span(masks, lower, upper, S, BLOCK_N)
    q = load_tile(q_ptr + offset((b, h, 0, 0), q_strides), start_m, q_strides, T, K, BLOCK_M, BLOCK_K)
    do = load_tile(do_ptr + offset((b, h, 0, 0), do_strides), start_m, do_strides, T, V, BLOCK_M, BLOCK_V)
    k_base = k_ptr + offset((b, h // GROUP, 0, 0), k_strides)
    v_base = v_ptr + offset((b, h // GROUP, 0, 0), v_strides)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    for OUTER in tl.static_range(2):
        for i in tl.range(0, run_length(span, OUTER)):
            start_n = tile_of_run(span, i, OUTER) * BLOCK_N
            offs_n = start_n + tl.arange(0, BLOCK_N)
            where = (b, h, offs_m[:, None], offs_n[None, :], T, S)
            bounds = (lower[:, None], upper[:, None])
            k = load_tile(k_base, start_n, k_strides, S, K, BLOCK_N, BLOCK_K, OUTER)
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            z, x, _ = logits_tile(raw, masks, mask_strides, where, bounds, scale, softcap, TANH, OUTER)
            p = tl.exp2(z - lse2[:, None])
            v = load_tile(v_base, start_n, v_strides, S, V, BLOCK_N, BLOCK_V, OUTER)
            dp = dropped(tl.dot(do, tl.trans(v), input_precision=PRECISION), dropout, where)
            ds = hidden_to_zero(sloped(p, x, softcap) * (dp - delta[:, None]), p, OUTER)
            k = without_unseen(k, p, OUTER)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq *= scale * 0.6931471805599453
    store_tile(dq_ptr + offset((b, h, 0, 0), dq_strides), start_m, dq_strides, T, dq, K, BLOCK_M, BLOCK_K)


@triton.jit(do_not_specialize=["T", "S"])
def _dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    rows_ptr,
    masks,
    dbias_ptr,
    q_strides,
    k_strides,
    v_strides,
    do_strides,
    dbias_strides,
    mask_strides,
    bias_sizes,
    repeats,
    T,
    S,
    scale,
    softcap,
    dropout,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    # `bias_sizes` = (heads, query tiles, key tiles) of the bias; `repeats` = its uses along (B, H, tiles).
    start_n = (tl.program_id(0) % bias_sizes[2]) * BLOCK_N
    owner = tl.cast(tl.program_id(0) // bias_sizes[2], tl.int64)
    first_tile = owner % bias_sizes[1]
    first_h = owner // bias_sizes[1] % bias_sizes[0]
    first_b = owner // bias_sizes[1] // bias_sizes[0]
    offs_n = start_n + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, repeats[0] * repeats[1] * repeats[2]):
        b = first_b + i // (repeats[1] * repeats[2])
        h = first_h + i // repeats[2] % repeats[1]
        start_m = tl.cast((first_tile + i % repeats[2]) * BLOCK_M, tl.int32)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        lse2, delta, lower, upper = load_rows(rows_ptr + (b * H + h) * T * 4, start_m, T, BLOCK_M)
        where = (b, h, offs_m[:, None], offs_n[None, :], T, S)
        bounds = (lower[:, None], upper[:, None])
        q = load_tile(q_ptr + offset((b, h, 0, 0), q_strides), start_m, q_strides, T, K, BLOCK_M, BLOCK_K)
        k_base = k_ptr + offset((b, h // GROUP, 0, 0), k_strides)
        k = load_tile(k_base, start_n, k_strides, S, K, BLOCK_N, BLOCK_K)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z, _, _ = logits_tile(raw, masks, mask_strides, where, bounds, scale, softcap, TANH, True)
        do_base = do_ptr + offset((b, h, 0, 0), do_strides)
        do = load_tile(do_base, start_m, do_strides, T, V, BLOCK_M, BLOCK_V)
        v_base = v_ptr + offset((b, h // GROUP, 0, 0), v_strides)
        v = load_tile(v_base, start_n, v_strides, S, V, BLOCK_N, BLOCK_V)
        dp = dropped(tl.dot(do, tl.trans(v), input_precision=PRECISION), dropout, where)
        p = tl.exp2(z - lse2[:, None])
        total += hidden_to_zero(p * (dp - delta[:, None]), p, True)

    base = dbias_ptr + offset((first_b, first_h, 0, 0), dbias_strides) + offs_n * dbias_strides[3]
    if ONE_ROW:
        column = tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty)
        tl.store(base, column, mask=offs_n < S)
    else:
        offs_m = first_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (offs_m < T)[:, None] & (offs_n < S)[None, :]
        pointers = base[None, :] + offs_m[:, None] * dbias_strides[2]
        tl.store(pointers, total.to(dbias_ptr.dtype.element_ty), mask=inside)


def _run_stats(
    grad_output: Tensor, grad_lse: Tensor | None, results: tuple[Tensor, Tensor], shared: dict
) -> Tensor:
    """The (B, H, T, 4) int32 rows of `store_rows`; lse is infinite for a query that sees nothing."""
    output, lse = results
    batch, heads, num_queries, _ = output.shape
    rows = torch.empty(*lse.shape, 4, dtype=torch.int32, device=lse.device)
    names = ("masks", "mask_strides", "T", "S", "H", "V", "CAUSAL", "BLOCK_V")
    _stats_kernel[(cdiv(num_queries, _STATS_ROWS) * batch * heads,)](
        output,
        grad_output,
        lse,
        grad_lse,
        rows_ptr=rows,
        o_strides=output.stride(),
        do_strides=grad_output.stride(),
        dlse_strides=(0, 0, 0) if grad_lse is None else grad_lse.stride(),
        **{name: shared[name] for name in names},
        BLOCK_M=_STATS_ROWS,
        num_warps=4,
    )
    return rows


def prepare(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    terms: Terms,
) -> dict:
    """The arguments that the three gradient kernels share; runs the kernel that prepares delta and lse.

    Args:
        grad_output: (B, H, T, V).
        grad_lse: (B, H, T) or None.
        inputs: query, key and value of the forward.
        results: output and lse of the forward.
        terms: options of the forward.
    """
    query, key, value = inputs
    shared = shared_arguments(query, key, value, terms)
    rows = _run_stats(grad_output, grad_lse, results, shared)
    del shared["CAUSAL"]
    tensors = {"q": query, "k": key, "v": value, "do": grad_output}
    pointers = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    strides = {f"{name}_strides": tensor.stride() for name, tensor in tensors.items()}
    return {**pointers, **strides, "rows_ptr": rows, **shared}


def _blocks(config: Config) -> dict:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def run_dkdv(arguments: dict, terms: Terms, config: Config) -> tuple[Tensor, Tensor]:
    """The gradients of key and value, by `_dkdv_kernel`.

    Args:
        arguments: what `prepare` returned.
        terms: options of the forward.
        config: tile sizes.
    """
    key, value = arguments["k_ptr"], arguments["v_ptr"]
    batch, groups, num_keys, _ = key.shape
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    spans = query_spans(terms, arguments["T"], num_keys, config.block_m, config.block_n)
    _dkdv_kernel[(cdiv(num_keys, config.block_n) * batch * groups,)](
        **arguments,
        spans_ptr=None if spans is None else spans.expand(batch, -1, -1).contiguous(),
        dk_ptr=grad_key,
        dv_ptr=grad_value,
        dk_strides=grad_key.stride(),
        dv_strides=grad_value.stride(),
        CAUSAL=terms.mask.causal,
        **_blocks(config),
    )
    return grad_key, grad_value


def run_dq(arguments: dict, config: Config) -> Tensor:
    """The gradient of the query, by `_dq_kernel`.

    Args:
        arguments: what `prepare` returned.
        config: tile sizes.
    """
    query = arguments["q_ptr"]
    gradient = torch.empty_like(query)
    _dq_kernel[(cdiv(query.shape[2], config.block_m) * query.shape[0] * query.shape[1],)](
        **arguments, dq_ptr=gradient, dq_strides=gradient.stride(), **_blocks(config)
    )
    return gradient


def run_dbias(arguments: dict, bias: Tensor) -> Tensor:
    """The gradient of a floating bias, summed over the dims along which it is broadcast, by `_dbias_kernel`.

    Args:
        arguments: what `prepare` returned.
        bias: (B or 1, H or 1, T or 1, S).
    """
    config = DQ_CONFIGS[0]
    gradient = torch.empty_like(bias)
    batch, heads, num_queries, _ = arguments["q_ptr"].shape
    query_tiles, key_tiles = (
        cdiv(num_queries, config.block_m),
        cdiv(bias.shape[3], config.block_n),
    )
    one_row = bias.shape[2] == 1
    sizes = (bias.shape[1], 1 if one_row else query_tiles, key_tiles)
    repeats = (batch // bias.shape[0], heads // bias.shape[1], query_tiles if one_row else 1)
    _dbias_kernel[(bias.shape[0] * sizes[0] * sizes[1] * sizes[2],)](
        **arguments,
        dbias_ptr=gradient,
        dbias_strides=gradient.stride(),
        bias_sizes=sizes,
        repeats=repeats,
        **_blocks(config),
        ONE_ROW=one_row,
    )
    return gradient


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    terms: Terms,
    bias_grad: bool = False,
) -> Gradients:
    """Gradients of the forward, each by its kernel.

    Args:
        grad_output: (B, H, T, V).
        grad_lse: (B, H, T) or None.
        inputs: query, key and value of the forward.
        results: output and lse of the forward.
        terms: options of the forward.
        bias_grad: whether the floating bias wants its gradient.
    """
    query, _, value = inputs
    head_dim = max(query.shape[3], value.shape[3])
    dkdv, dq = (pick_config(query.dtype, head_dim, query.device, x) for x in (DKDV_CONFIGS, DQ_CONFIGS))
    arguments = prepare(grad_output, grad_lse, inputs, results, terms)
    grad_key, grad_value = run_dkdv(arguments, terms, dkdv)
    grad_query = run_dq(arguments, dq)
    grad_bias = run_dbias(arguments, terms.bias) if terms.bias is not None and bias_grad else None
    grad_sinks = None
    if terms.sinks is not None:
        delta = arguments["rows_ptr"].view(torch.float32)[..., 1]
        grad_sinks = sink_gradient(terms.sinks, results[1], delta)
    return Gradients(grad_query, grad_key, grad_value, grad_bias, grad_sinks)
