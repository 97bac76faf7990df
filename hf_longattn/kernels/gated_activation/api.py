"""The public function of gated activations: checks and choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS

_NAME = "gated_activation"


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto") -> Tensor:
    """act(gate) up, with act(gate) rounded before the product, as modules compute it.

    Args:
        gate: (..., D), any strides; the two halves of one tensor are read where they are.
        up: (..., D), in the same dtype.
        activation: "silu", "gelu" (by the error function) or "gelu_tanh".
        impl: "auto", "triton" (forward only) or "reference".

    Returns:
        (..., D), in the dtype of `gate`.

    Raises:
        ValueError: an activation that is unknown, tensors that do not fit, or what "triton" does not do.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, equations 5 and 6.
    """
    dispatch.check_impl(_NAME, impl, gate.device, ("auto", "triton", "reference"))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` of {_NAME} must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}."
        )
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"`up` of {_NAME} must be {tuple(gate.shape)} in {gate.dtype} like `gate`, got {tuple(up.shape)} "
            f"in {up.dtype}."
        )
    gradient = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    wide = gate.dtype == torch.float64
    if impl == "triton" and (gradient or wide):
        raise ValueError(f"`impl='triton'` of {_NAME} has no backward and no float64; use 'auto'.")
    if impl == "triton" or (impl == "auto" and gate.is_cuda and not gradient and not wide):
        from hf_longattn.kernels.gated_activation.triton import gate_forward

        return gate_forward(gate, up, activation)
    return ACTIVATIONS[activation](gate) * up
