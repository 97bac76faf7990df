"""RMS and layer norms: one launch for norm, weight and gate, and one for the gradients.

    m = mean(x) of a layer norm, else 0          r = 1 / sqrt(mean((x - m)^2) + eps)
    n = (x - m) r                                y = n w + b, rounded as the kind says
    y <- y sigmoid(g) or y g of a gated norm, each factor rounded first

    g = dy w        dx = r (g - n mean(g n) - mean(g) of a layer norm)        dw = sum dy n        db = sum dy

One program holds whole rows in registers, BLOCK_R of them where rows are short and many. Every element is
read and written once, 16 bytes a thread at a time; the weight is asked for before the reduction, so that few
rows wait for memory once. Accumulates in fp32. Saved for the backward is x alone: r takes one more sum over a
row that is in registers. A program of the backward walks over its rows and keeps its share of dw and db in
registers; the shares are added up behind it, always in the same order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import cdiv, flat_rows, next_power_of_2, overlap, wait_for_previous

# Programs of the backward: four to a multiprocessor of the largest GPUs.
_PROGRAMS = 512


@triton.jit
def _scaled(x, weight, kind: tl.constexpr, dtype: tl.constexpr):
    """x times the weight; the kind says what is added to the weight, and what is rounded before."""
    if kind == "rms":
        return x.to(dtype).to(tl.float32) * weight[None, :]
    if kind == "rms_plus_one":
        return x * (weight + 1.0)[None, :]
    return x * weight[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, y_ptr, x_strides, gate_strides, num_rows, eps,
    D: tl.constexpr, KIND: tl.constexpr, SIGMOID: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    mask_d = cols < D
    mask = (rows < num_rows)[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_strides[0] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate_at = rows[:, None] * gate_strides[0] + cols[None, :]
        gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    if KIND == "layer":
        x = tl.where(mask, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
    if weight_ptr is not None:
        x = _scaled(x, weight, KIND, x_ptr.dtype.element_ty)
    if bias_ptr is not None:
        x += bias[None, :]
    if gate_ptr is not None:
        if SIGMOID:
            gate = (1.0 / (1.0 + tl.exp(-gate))).to(gate_ptr.dtype.element_ty).to(tl.float32)
        x = x.to(y_ptr.dtype.element_ty).to(tl.float32) * gate
    tl.store(y_ptr + rows[:, None] * D + cols[None, :], x.to(y_ptr.dtype.element_ty), mask=mask)


def norm_forward(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    gate: Tensor | None = None,
    sigmoid: bool = False,
) -> Tensor:
    """Launches the kernel; arguments as in `row_norm` and `gated_row_norm`."""
    D = states.shape[-1]
    x, gate = flat_rows(states), None if gate is None else flat_rows(gate)
    dtype = states.dtype
    if kind == "rms" and weight is not None and weight.dtype != dtype:
        dtype = torch.promote_types(dtype, weight.dtype)
    result = torch.empty_like(states, dtype=dtype, memory_format=torch.contiguous_format)
    num_rows = x.shape[0]
    if num_rows and D:
        block_d = next_power_of_2(D)
        block_r = max(2048 // block_d, 1) if num_rows >= 4096 else 1
        _norm_kernel[(cdiv(num_rows, block_r),)](
            x, weight, bias, gate, result, x.stride(), (0, 1) if gate is None else gate.stride(),
            num_rows, eps, D=D, KIND=kind, SIGMOID=sigmoid, BLOCK_R=block_r, BLOCK_D=block_d,
            num_warps=min(max(block_r * block_d // 512, 1), 16), **overlap(x.device),
        )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _backward_kernel(
    x_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, x_strides, dy_strides,
    num_rows, rows_each, eps,
    D: tl.constexpr, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_each
    last = tl.minimum(first + rows_each, num_rows)
    cols = tl.arange(0, BLOCK_D)
    mask_d = cols < D
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask_d, other=0.0).to(tl.float32)
        if KIND == "rms_plus_one":
            weight += 1.0
    dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < last)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_strides[0] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * dy_strides[0] + cols[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if KIND == "layer":
            x = tl.where(mask, x - (tl.sum(x, 1) / D)[:, None], 0.0)
        inverse = (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps))[:, None]
        x *= inverse
        if dweight_ptr is not None:
            # What met the weight in the forward.
            dweight += dy * (x.to(dtype).to(tl.float32) if KIND == "rms" else x)
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            if weight_ptr is not None:
                dy *= weight[None, :]
            dx = dy - x * (tl.sum(dy * x, 1) / D)[:, None]
            if KIND == "layer":
                dx -= (tl.sum(dy, 1) / D)[:, None]
            tl.store(dx_ptr + rows[:, None] * D + cols[None, :], (dx * inverse).to(dtype), mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * D + cols, tl.sum(dweight, 0), mask=mask_d)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + cols, tl.sum(dbias, 0), mask=mask_d)


def norm_backward(
    grad: Tensor, states: Tensor, weight: Tensor | None, wants: tuple[bool, bool, bool], eps: float, kind: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launches the kernel.

    Args:
        grad: (..., D), of the norm.
        states: (..., D), as in `row_norm`.
        weight: (D,), or None.
        wants: which gradients to take: of states, weight and bias.
        eps: as in `row_norm`.
        kind: as in `row_norm`.

    Returns:
        those gradients, of weight and bias in fp32.
    """
    D = states.shape[-1]
    x, dy = flat_rows(states), flat_rows(grad)
    num_rows, block_d = x.shape[0], next_power_of_2(D)
    block_r = max(2048 // block_d, 1) if num_rows >= 4096 else 1
    rows_each = cdiv(cdiv(num_rows, _PROGRAMS), block_r) * block_r
    programs = cdiv(num_rows, rows_each) if rows_each and D else 0
    dx = states.new_empty(states.shape) if wants[0] else None
    parts = [x.new_empty(programs, D, dtype=torch.float32) if wanted else None for wanted in wants[1:]]
    if programs:
        _backward_kernel[(programs,)](
            x, weight, dy, dx, *parts, x.stride(), dy.stride(), num_rows, rows_each, eps,
            D=D, KIND=kind, BLOCK_R=block_r, BLOCK_D=block_d,
            num_warps=min(max(block_r * block_d // 256, 1), 16),
        )  # fmt: skip
    sums = [None if part is None else part.sum(0) for part in parts]
    return dx, sums[0], sums[1]
