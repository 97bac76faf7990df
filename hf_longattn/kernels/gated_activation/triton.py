"""act(gate) up, forward only: two reads and one write, where plain torch reads three times and writes twice.

    silu       g / (1 + exp(-g))
    gelu       g (1 + erf(g / sqrt(2))) / 2
    gelu_tanh  g (1 + tanh(u)) / 2 = g / (1 + exp(-2 u)),     u = sqrt(2 / pi) (g + 0.044715 g^3)

One program computes BLOCK columns of one row, 16 bytes a thread at a time. Computes in fp32 and rounds
act(gate) before the product.
"""

import triton
import triton.language as tl
from torch import Tensor

from hf_longattn.kernels.common import flat_rows

_BLOCK = 2048


@triton.jit
def _activated(gate, KIND: tl.constexpr):
    if KIND == "gelu":
        return 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    if KIND == "gelu_tanh":
        # sqrt(8 / pi)
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-slope))
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _gate_kernel(
    gate_ptr, up_ptr, out_ptr, gate_strides, up_strides,
    D: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_strides[0] + cols, mask=mask, other=0.0).to(tl.float32)
    active = _activated(gate, KIND).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * D + cols, (active * up).to(dtype), mask=mask)


def gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launches the kernel; arguments as in `gated_activation`."""
    result = gate.new_empty(gate.shape)
    if not result.numel():
        return result
    D = gate.shape[-1]
    gate, up = (flat_rows(x) for x in (gate, up))
    block = min(_BLOCK, triton.next_power_of_2(D))
    _gate_kernel[(gate.shape[0], triton.cdiv(D, block))](
        gate, up, result, gate.stride(), up.stride(),
        D=D, KIND=activation, BLOCK=block, num_warps=min(max(block // 512, 1), 4),
    )  # fmt: skip
    return result
