"""A weight matrix read once for a few rows: every byte of it passes once, and nothing else costs.

    y[m, n] = act(sum_k x[m, k] W[n, k]  (+ bias[n]))       or  silu(x G^T) * (x U^T)

One program makes BLOCK_N columns of y and walks along k. One row is multiplied and summed elementwise, which
keeps many loads in flight without shared memory; two rows or more go through the tensor cores, padded to 16,
with the weight tile as the left operand. Sums are fp32. The rows stay in L2: they are read by every program.

Where launches overlap, the program of one row loads its first tiles of a settled W before it waits for the
kernels that make x, so that the memory is busy while they end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import (
    activated,
    cdiv,
    let_next_begin,
    overlap,
    wait_for_previous,
    weight_tile,
)


class Config(NamedTuple):
    """Tile of the weight, and how a program is run."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# One row: with more columns than programs that fit, wider tiles read `x` less often.
_ONE_ROW = (Config(2, 1024, 4, 1), Config(8, 512, 4, 1))
# More rows: 16 columns are the least that tensor cores take.
_MANY_ROWS = (Config(16, 256, 1, 4), Config(32, 256, 2, 4))
# Rows in fp32: what one product sums, one number after the other, is short.
_FULL_PRECISION = Config(16, 64, 4, 12)
# A larger weight is loaded two tiles ahead, others one.
_LARGE = 2048 * 8192
# So many columns give every multiprocessor of a large GPU several programs.
_WIDE = 8192


def choose(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """The configuration for x of `rows` rows in `dtype` and a weight of `columns` rows."""
    if rows > 1 and dtype == torch.float32:
        return _FULL_PRECISION
    narrow, wide = _ONE_ROW if rows == 1 else _MANY_ROWS
    return wide if columns >= _WIDE else narrow


@triton.jit
def _rows_tile(x_ptr, stride, offs_m, offs_k, M, K: tl.constexpr):
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    return tl.load(x_ptr + offs_m[:, None] * stride + offs_k[None, :], mask=inside, other=0.0)


@triton.jit
def _add_product(acc, w, x, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + w x: elementwise for one row (summed at the end), else a matrix product.

    In fp32 each product has a sum of its own. Its sign keeps the compiler from going on with that of `acc`,
    which makes one sum of K terms, with an error that grows as sqrt(K).
    """
    if ROWS == 1:
        # Left to the compiler, the order of roundings depends on how far the loop is unrolled.
        acc = tl.fma(w.to(tl.float32), tl.broadcast_to(x.to(tl.float32), w.shape), acc)
    elif w.dtype == tl.float32:
        acc = acc - tl.dot(w, tl.trans(-x), input_precision=PRECISION)
    else:
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x_ptr, w_ptr, up_ptr, bias_ptr, y_ptr, x_stride, w_stride, up_stride, M, N, K: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, ROWS)
    WIDTH: tl.constexpr = BLOCK_K if ROWS == 1 else ROWS
    EVEN: tl.constexpr = K % BLOCK_K == 0
    acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    acc_up = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    held, held_up = (), ()
    for i in tl.static_range(AHEAD):
        offs_k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        held = held + (weight_tile(w_ptr, w_stride, offs_n, offs_k, N, K, EVEN),)
        if up_ptr is not None:
            held_up = held_up + (weight_tile(up_ptr, up_stride, offs_n, offs_k, N, K, EVEN),)
    wait_for_previous(OVERLAP)
    for i in tl.static_range(AHEAD):
        x = _rows_tile(x_ptr, x_stride, offs_m, i * BLOCK_K + tl.arange(0, BLOCK_K), M, K)
        acc = _add_product(acc, held[i], x, ROWS, PRECISION)
        if up_ptr is not None:
            acc_up = _add_product(acc_up, held_up[i], x, ROWS, PRECISION)
    for start in range(AHEAD * BLOCK_K, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x = _rows_tile(x_ptr, x_stride, offs_m, offs_k, M, K)
        w = weight_tile(w_ptr, w_stride, offs_n, offs_k, N, K, EVEN)
        acc = _add_product(acc, w, x, ROWS, PRECISION)
        if up_ptr is not None:
            up = weight_tile(up_ptr, up_stride, offs_n, offs_k, N, K, EVEN)
            acc_up = _add_product(acc_up, up, x, ROWS, PRECISION)
    if ROWS == 1:
        acc = tl.sum(acc, axis=1)[:, None]
        acc_up = tl.sum(acc_up, axis=1)[:, None]
    if up_ptr is not None:
        acc = activated(acc, "silu") * acc_up
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        # Rounded as a product that is stored.
        acc = activated(acc.to(y_ptr.dtype.element_ty).to(tl.float32), ACTIVATION)
    pointers = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(pointers, acc.to(y_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])


def tiles_ahead(config: Config, rows: int, columns: int, width: int) -> int:
    """Tiles of a settled weight (columns, width) that are loaded before the wait for x of `rows` rows."""
    if rows > 1:
        return 0
    return min(1 if columns * width <= _LARGE else 2, cdiv(width, config.block_k))


def launch(
    states: Tensor,
    weight: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    settled_weight: bool,
    activation: str | None = None,
) -> Tensor:
    """Launches the kernel; arguments as in `few_row_linear`, and `up` as in `few_row_gated_linear`."""
    x = states.reshape(-1, states.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    (M, K), N = x.shape, weight.shape[0]
    config = choose(M, N, x.dtype)
    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    early = overlap(x.device)
    ahead = tiles_ahead(config, M, N, K) if settled_weight and early["OVERLAP"] else 0
    _few_rows_kernel[(cdiv(N, config.block_n),)](
        x, weight, up, bias, y, x.stride(0), weight.stride(0), None if up is None else up.stride(0), M, N, K,
        ROWS=1 if M == 1 else 16, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        AHEAD=ahead, ACTIVATION=activation, BLOCK_N=config.block_n, BLOCK_K=config.block_k, **early,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y.view(*states.shape[:-1], N)
