"""act(gate) up and its gradients, one launch each: every tensor is read or written once.

    silu       g / (1 + exp(-g))
    gelu       g (1 + erf(g / sqrt(2))) / 2
    gelu_tanh  g (1 + tanh(u)) / 2 = g / (1 + exp(-2 u)),     u = sqrt(2 / pi) (g + 0.044715 g^3)

    dgate = dy up act'(gate)          dup = dy act(gate)

One program computes BLOCK columns of one row, 16 bytes a thread at a time. Computes in fp32 and rounds
act(gate) before the product. Saved for the backward are gate and up, from which it computes the rest again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import activated, cdiv, flat_rows, next_power_of_2, overlap, wait_for_previous

_BLOCK = 2048


@triton.jit
def _with_slope(gate, KIND: tl.constexpr):
    """act(gate) and act'(gate)."""
    if KIND == "gelu":
        # 1 / sqrt(2 pi)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        share = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        return gate * share, share + gate * density
    if KIND == "gelu_tanh":
        square = gate * gate
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))
        rise = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return gate * share, share * (1.0 + gate * (1.0 - share) * rise)
    share = 1.0 / (1.0 + tl.exp(-gate))
    return gate * share, share * (1.0 + gate * (1.0 - share))


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, out_ptr, gate_strides, up_strides,
    D: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    active = activated(gate, KIND).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * D + cols, (active * up).to(dtype), mask=mask)


def gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launches the kernel; arguments as in `gated_activation`."""
    result = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not result.numel():
        return result
    D = gate.shape[-1]
    gate, up = (flat_rows(x) for x in (gate, up))
    block = min(_BLOCK, next_power_of_2(D))
    _gate_kernel[(gate.shape[0], cdiv(D, block))](
        gate, up, result, gate.stride(), up.stride(),
        D=D, KIND=activation, BLOCK=block, num_warps=min(max(block // 512, 1), 4), **overlap(gate.device),
    )  # fmt: skip
    return result


@triton.jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_strides, gate_strides, up_strides,
    D: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    dy = tl.load(dy_ptr + row * dy_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    active, slope = _with_slope(gate, KIND)
    tl.store(dgate_ptr + row * D + cols, (dy * up * slope).to(dtype), mask=mask)
    # What met `up` in the forward.
    tl.store(dup_ptr + row * D + cols, (dy * active.to(dtype).to(tl.float32)).to(dtype), mask=mask)


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Launches the kernel: the gradients of gate and up, given that of `gated_activation`."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if not grad_gate.numel():
        return grad_gate, grad_up
    D = gate.shape[-1]
    grad, gate, up = (flat_rows(x) for x in (grad, gate, up))
    block = min(_BLOCK, next_power_of_2(D))
    _backward_kernel[(gate.shape[0], cdiv(D, block))](
        grad, gate, up, grad_gate, grad_up, grad.stride(), gate.stride(), up.stride(),
        D=D, KIND=activation, BLOCK=block, num_warps=min(max(block // 512, 1), 4),
    )  # fmt: skip
    return grad_gate, grad_up
