"""A residual sum and its layer norms, forward only: three reads and three writes where torch takes ten.

    t = round(round(b1 + b2) + x)       m = mean(t)      r = 1 / sqrt(mean((t - m)^2) + eps)
    y1 = (t - m) r w1 + c1              y2 = (t - m) r w2 + c2

One program takes one row and keeps it in registers; mean and variance are fp32 over what was rounded, as the
norm of the stored sum would have them. Nothing is saved: there is no backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import next_power_of_2, overlap, wait_for_previous


@triton.jit
def _store_norm(y_ptr, weight_ptr, bias_ptr, scaled, row, offs, mask, D):
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs, (scaled * weight + bias).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norms_kernel(
    x_ptr, b1_ptr, b2_ptr, w1_ptr, c1_ptr, w2_ptr, c2_ptr, total_ptr, y1_ptr, y2_ptr,
    eps, D: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    kept = total_ptr.dtype.element_ty
    b1 = tl.load(b1_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    b2 = tl.load(b2_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    total = ((b1 + b2).to(kept).to(tl.float32) + x).to(kept)
    tl.store(total_ptr + row * D + offs, total, mask=mask)
    total = total.to(tl.float32)
    centred = tl.where(mask, total - tl.sum(total, axis=0) / D, 0.0)
    scaled = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / D + eps)
    _store_norm(y1_ptr, w1_ptr, c1_ptr, scaled, row, offs, mask, D)
    if y2_ptr is not None:
        _store_norm(y2_ptr, w2_ptr, c2_ptr, scaled, row, offs, mask, D)


def norms_forward(
    states: Tensor,
    branches: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launches the kernel; arguments as in `residual_norms`."""
    D = states.shape[-1]
    x, b1, b2 = (tensor.contiguous() for tensor in (states, *branches))
    total, y1 = torch.empty_like(x), torch.empty_like(x)
    y2 = None if second is None else torch.empty_like(x)
    weights = [tensor.contiguous() for tensor in (*first, *(second or ()))]
    weights += [None] * (4 - len(weights))
    block = next_power_of_2(D)
    if x.numel():
        _norms_kernel[(x.numel() // D,)](
            x, b1, b2, *weights, total, y1, y2, eps,
            D=D, BLOCK_D=block, num_warps=min(max(block // 512, 1), 8), **overlap(x.device),
        )  # fmt: skip
    return total, y1, y2
