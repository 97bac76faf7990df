"""The cross-entropy of a row and its gradient in one launch: two walks over the row, one without gradient.

    m = max(x)        s = sum exp(x - m)        lse = m + log(s)
    loss = (1 - e) (lse - x[target]) + e (lse - mean(x))
    dx = exp(x - m) / s - (1 - e) onehot(target) - e / V

One program takes one row. The first walk keeps a running maximum m and BLOCK sums of exponentials less m,
scaled down where m grows: one reduction over the program a step, and V / BLOCK terms a sum. The second walk
goes from the end of the row to its beginning, so that it first meets what the first one read last, which is
still in the caches, and writes the gradient, over the logits where it may. Of 6 bytes a logit in 16 bits, two
reads and a write, those that the caches hold never reach memory: programs are wide, so that few rows are on
their way at a time. Both walks load a step ahead.

Computes in fp32 and rounds the gradient once. Losses are one number a row, so that their sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import next_power_of_2
from hf_longattn.kernels.dispatch import interpreting

# What a thread loads in a step, in two loads.
_BYTES, _MOST_WARPS = 32, 16
_LOG2_E = tl.constexpr(1.4426950408889634)


def choose_block(columns: int, itemsize: int) -> tuple[int, int]:
    """(columns of a step, warps of a program) for rows of so many columns of `itemsize` bytes."""
    a_warp = 32 * _BYTES // itemsize
    block = min(max(next_power_of_2(columns), a_warp), _MOST_WARPS * a_warp)
    return block, block // a_warp


@triton.jit
def _exp_less(x, most, PTX: tl.constexpr):
    """exp(x - most), of which 0 takes the place while all logits were -inf.

    Subtracted first: a product with log2(e) would round both, by more than the difference is where they are
    large. By itself the compiler adds four instructions to keep numbers below 2^-126, which say nothing here.
    """
    x = (x - tl.where(most == float("-inf"), 0.0, most)) * _LOG2_E
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _load_columns(row_ptr, cols, V):
    return tl.load(row_ptr + cols, mask=(cols >= 0) & (cols < V), other=float("-inf"))


@triton.jit
def _row_sums(row_ptr, V, pivot, SMOOTHED: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """(maximum, sum of exp(x - maximum), sum of x - pivot or 0) of a row."""
    most = tl.full((), float("-inf"), tl.float32)
    exponentials = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    cols = tl.arange(0, BLOCK)
    ahead = _load_columns(row_ptr, cols, V)
    for start in range(0, V, BLOCK):
        x = ahead.to(tl.float32)
        ahead = _load_columns(row_ptr, start + BLOCK + cols, V)
        before = most
        most = tl.maximum(most, tl.max(x, 0))
        exponentials = exponentials * _exp_less(before, most, False) + _exp_less(x, most, PTX)
        if SMOOTHED:
            plain += tl.where(start + cols < V, x - pivot, 0.0)
    return most, tl.sum(exponentials, 0), tl.sum(plain, 0)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, grad_ptr, logits_strides, grad_strides, V, smoothing,
    SMOOTHED: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_strides[0]
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < V)
    # Before anything is written over it.
    chosen = tl.load(row_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    # Some number that the row has: of large logits, differences are what counts.
    pivot = tl.where(chosen == float("-inf"), 0.0, chosen)
    most, total, plain = _row_sums(row_ptr, V, pivot, SMOOTHED, PTX, BLOCK)
    log_total = tl.log(total)
    loss = (most - chosen + log_total) * (1.0 - smoothing)
    if SMOOTHED:
        loss += (most - pivot - plain / V + log_total) * smoothing
    tl.store(losses_ptr + row, loss)
    if grad_ptr is not None:
        grad_row_ptr = grad_ptr + row * grad_strides[0]
        share = 1.0 / total
        # Of the last step; what it has behind the end of the row stays there.
        cols = (tl.cdiv(V, BLOCK) - 1) * BLOCK + tl.arange(0, BLOCK)
        ahead = _load_columns(row_ptr, cols, V)
        for _ in range(0, V, BLOCK):
            x = ahead.to(tl.float32)
            ahead = _load_columns(row_ptr, cols - BLOCK, V)
            grad = _exp_less(x, most, PTX) * share
            if SMOOTHED:
                grad -= smoothing / V
            tl.store(grad_row_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)
            cols -= BLOCK
        # Once all are written: to look for it among them would take a tenth of the instructions.
        grad = _exp_less(chosen, most, False) * share - smoothing / V - (1.0 - smoothing)
        tl.debug_barrier()
        tl.store(grad_row_ptr + target, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def cross_entropy_forward(
    logits: Tensor, targets: Tensor, smoothing: float, gradient: bool, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; arguments and results as in `cross_entropy`."""
    n, V = logits.shape
    logits, targets = logits if logits.stride(1) == 1 else logits.contiguous(), targets.contiguous()
    losses, grad = logits.new_empty(n, dtype=torch.float32), None
    if gradient:
        grad = logits if overwrite else logits.new_empty(n, V)
    if n:
        block, warps = choose_block(V, logits.element_size())
        _cross_entropy_kernel[(n,)](
            logits, targets, losses, grad, logits.stride(), (0, 1) if grad is None else grad.stride(),
            V, float(smoothing), SMOOTHED=smoothing > 0,
            PTX=torch.version.cuda is not None and not interpreting(), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return losses, grad
