"""Both ends of a layer with parallel branches on one row or two, each a launch that reads weights once.

    m, r = mean, 1 / sqrt(var + eps) of x       n_i = round((x - m) r s_i + t_i)
    y_1 = round(n_1 W_1^T + b_1)                y_2 = act(round(n_2 W_2^T + b_2))
    (attention, between the two launches)
    y = round(x + h W_h^T + b_h + o W_o^T + b_o)

Front: a program makes TILES x BLOCK_N columns of y_1 or of y_2, BLOCK_N at a time and each with all of its K
weights at once: the row is normalised once, and stays in registers. Back: a program makes BLOCK_N columns of
y and walks along the columns of W_h, then along those of W_o. Products are multiplied and summed
elementwise, in fp32, with AHEAD tiles of the weight in flight. Where launches overlap, the first of these are
loaded before the wait for the kernels that make x, or h and o.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import (
    activated,
    cdiv,
    flat_rows,
    let_next_begin,
    next_power_of_2,
    overlap,
    wait_for_previous,
    weight_tile,
)
from hf_longattn.kernels.normed_linears.reference import NormedLinear, Product


class Front(NamedTuple):
    """Columns of a tile, tiles of a program, tiles in flight, warps, most registers of a thread."""

    block_n: int
    tiles: int
    ahead: int
    num_warps: int
    registers: int | None = None


class Back(NamedTuple):
    """Columns of a program, width of a tile, tiles in flight, warps, most registers of a thread."""

    block_n: int
    block_k: int
    ahead: int
    num_warps: int
    registers: int | None = None


# By rows, for K = 2048 and bf16. The bounds on registers let all programs of one row run at the same time.
FRONTS = {1: Front(2, 14, 2, 4, 128), 2: Front(4, 14, 2, 8)}
BACKS = {1: Back(2, 1024, 2, 4, 64), 2: Back(4, 1024, 3, 4)}


@triton.jit
def _normed_row(x_ptr, scale, shift, offs_k, eps, K: tl.constexpr):
    """The layer norm of one row, rounded as one that is stored."""
    x = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    centred = tl.where(offs_k < K, x - tl.sum(x, axis=0) / K, 0.0)
    scaled = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / K + eps)
    return (scaled * scale + shift).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_columns(pointers, acc, mask, ACTIVATION: tl.constexpr):
    if ACTIVATION is not None:
        # Rounded as a product that is stored.
        acc = activated(acc.to(pointers.dtype.element_ty).to(tl.float32), ACTIVATION)
    tl.store(pointers, acc.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _columns(
    x_ptr, scale_ptr, shift_ptr, w_ptr, bias_ptr, y_ptr, x_stride, w_stride, first, eps, N, K: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TILES x BLOCK_N columns of one product, from column `first` on."""
    offs_n, offs_k = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    end = tl.minimum(first + TILES * BLOCK_N, N)
    EVEN: tl.constexpr = K == BLOCK_K
    held = ()
    for i in tl.static_range(AHEAD):
        held = held + (weight_tile(w_ptr, w_stride, offs_n + i * BLOCK_N, offs_k, end, K, EVEN),)
    scale = tl.load(scale_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    wait_for_previous(OVERLAP)
    rows = ()
    for row in tl.static_range(ROWS):
        rows = rows + (_normed_row(x_ptr + row * x_stride, scale, shift, offs_k, eps, K)[None, :],)
    # Unrolled as a whole, so many tiles would be asked for at once that registers run out. Unrolled by those
    # in flight, each is loaded into the registers of the one just used: moving it there would wait for it.
    for step in range(0, TILES, AHEAD):
        new = ()
        for i in tl.static_range(AHEAD):
            places, products = offs_n + (step + i) * BLOCK_N, ()
            for row in tl.static_range(ROWS):
                products = products + (held[i].to(tl.float32) * rows[row],)
            new = new + (weight_tile(w_ptr, w_stride, places + AHEAD * BLOCK_N, offs_k, end, K, EVEN),)
            bias = tl.load(bias_ptr + places, mask=places < end, other=0.0).to(tl.float32)
            for row in tl.static_range(ROWS):
                acc = tl.sum(products[row], axis=1) + bias
                _store_columns(y_ptr + row * N + places, acc, places < end, ACTIVATION)
        held = new


@triton.jit
def _normed_kernel(
    x_ptr, scale1_ptr, shift1_ptr, w1_ptr, bias1_ptr, scale2_ptr, shift2_ptr, w2_ptr, bias2_ptr,
    y1_ptr, y2_ptr, x_stride, w1_stride, w2_stride, eps, N1, N2, K: tl.constexpr,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    WIDTH: tl.constexpr = TILES * BLOCK_N
    program, own = tl.program_id(0), tl.cdiv(N1, WIDTH)
    if program < own:
        _columns(
            x_ptr, scale1_ptr, shift1_ptr, w1_ptr, bias1_ptr, y1_ptr, x_stride, w1_stride,
            program * WIDTH, eps, N1, K, ROWS, None, OVERLAP, AHEAD, TILES, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _columns(
            x_ptr, scale2_ptr, shift2_ptr, w2_ptr, bias2_ptr, y2_ptr, x_stride, w2_stride,
            (program - own) * WIDTH, eps, N2, K, ROWS, ACTIVATION, OVERLAP, AHEAD, TILES, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _added(sums, w, rows_ptr, offs_k, K: tl.constexpr, ROWS: tl.constexpr):
    """The sums of each row with its products of one tile; rows lie next to each other."""
    new, w, places = (), w.to(tl.float32), offs_k[None, :]
    for row in tl.static_range(ROWS):
        x = tl.load(rows_ptr + row * K + places, mask=places < K, other=0.0).to(tl.float32)
        new = new + (tl.fma(w, tl.broadcast_to(x, w.shape), sums[row]),)
    return new


@triton.jit
def _joined_kernel(
    x_ptr, h_ptr, wh_ptr, bias_h_ptr, o_ptr, wo_ptr, bias_o_ptr, y_ptr,
    x_stride, wh_stride, wo_stride, N,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    offs_n, offs_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    FIRST: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    ALL: tl.constexpr = FIRST + (D + BLOCK_K - 1) // BLOCK_K
    STEADY: tl.constexpr = (FIRST - AHEAD) // AHEAD * AHEAD
    EVEN_H: tl.constexpr = H % BLOCK_K == 0
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    held, sums = (), ()
    for i in tl.static_range(AHEAD):
        held = held + (weight_tile(wh_ptr, wh_stride, offs_n, i * BLOCK_K + offs_k, N, H, EVEN_H),)
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    wait_for_previous(OVERLAP)
    # Unrolled as in `_columns`.
    for step in range(0, STEADY, AHEAD):
        new = ()
        for i in tl.static_range(AHEAD):
            places = (step + i) * BLOCK_K + offs_k
            sums = _added(sums, held[i], h_ptr, places, H, ROWS)
            new = new + (weight_tile(wh_ptr, wh_stride, offs_n, places + AHEAD * BLOCK_K, N, H, EVEN_H),)
        held = new
    # The last tiles of W_h, and those of W_o.
    for i in tl.static_range(STEADY, ALL):
        if i < FIRST:
            sums = _added(sums, held[i - STEADY], h_ptr, i * BLOCK_K + offs_k, H, ROWS)
        else:
            sums = _added(sums, held[i - STEADY], o_ptr, (i - FIRST) * BLOCK_K + offs_k, D, ROWS)
        if i + AHEAD < FIRST:
            places = (i + AHEAD) * BLOCK_K + offs_k
            held = held + (weight_tile(wh_ptr, wh_stride, offs_n, places, N, H, EVEN_H),)
        elif i + AHEAD < ALL:
            places = (i + AHEAD - FIRST) * BLOCK_K + offs_k
            held = held + (weight_tile(wo_ptr, wo_stride, offs_n, places, N, D, EVEN_D),)
    mask = offs_n < N
    bias = tl.load(bias_h_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    bias += tl.load(bias_o_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + offs_n, mask=mask, other=0.0).to(tl.float32)
        y = tl.sum(sums[row], axis=1) + bias + x
        tl.store(y_ptr + row * N + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask)


def warps_of(config: Front, block_k: int) -> int:
    """Warps for rows of `block_k` numbers, a power of two.

    A warp covers 256 numbers of a row of a tile, and the warps no more than the row: x then has the layout of
    the tile without a detour through shared memory.
    """
    return min(config.num_warps * max(block_k // 2048, 1), max(block_k // 256, 1))


def _options(device: torch.device, settled: bool, registers: int | None) -> dict[str, Any]:
    """Keywords of a launch: whether it may begin early, and the most registers of a thread."""
    options: dict[str, Any] = overlap(device) if settled else {"OVERLAP": False}
    # An option of NVIDIA's compiler alone, which one that traces the launch does not know.
    known = device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling()
    return {**options, "maxnreg": registers} if known and registers is not None else options


def launch_normed(
    states: Tensor,
    first: NormedLinear,
    second: NormedLinear,
    eps: float,
    activation: str | None,
    settled_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the front; arguments as in `normed_linears`."""
    x = flat_rows(states)
    (M, K), N1, N2 = x.shape, len(first[3]), len(second[3])
    config, block_k = FRONTS[M], next_power_of_2(K)
    y1, y2 = (torch.empty((M, N), device=x.device, dtype=x.dtype) for N in (N1, N2))
    width = config.block_n * config.tiles
    _normed_kernel[(cdiv(N1, width) + cdiv(N2, width),)](
        x, *first, *second, y1, y2, x.stride(0), first[2].stride(0), second[2].stride(0), eps, N1, N2, K=K,
        ROWS=M, ACTIVATION=activation, AHEAD=config.ahead, TILES=config.tiles, BLOCK_N=config.block_n,
        BLOCK_K=block_k, num_warps=warps_of(config, block_k), num_stages=1,
        **_options(x.device, settled_weights, config.registers),
    )  # fmt: skip
    return y1.view(*states.shape[:-1], N1), y2.view(*states.shape[:-1], N2)


def launch_joined(states: Tensor, first: Product, second: Product, settled_weights: bool) -> Tensor:
    """Launches the back; arguments as in `residual_linears`."""
    x, h, o = flat_rows(states), flat_rows(first[0]).contiguous(), flat_rows(second[0]).contiguous()
    (M, N), H, D = x.shape, h.shape[1], o.shape[1]
    config = BACKS[M]
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    _joined_kernel[(cdiv(N, config.block_n),)](
        x, h, *first[1:], o, *second[1:], y, x.stride(0), first[1].stride(0), second[1].stride(0), N,
        H=H, D=D, ROWS=M, AHEAD=min(config.ahead, cdiv(H, config.block_k)),
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=1,
        **_options(x.device, settled_weights, config.registers),
    )  # fmt: skip
    return y.view(states.shape)
