"""The public function of gated activations: checks, choice of implementation, and registration with torch."""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.direct import direct_operator, wants_operator
from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS

_NAME = "gated_activation"


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu", impl: str = "auto") -> Tensor:
    """act(gate) up, with act(gate) rounded before the product, as modules compute it.

    Args:
        gate: (..., D), any strides; the two halves of one tensor are read where they are.
        up: (..., D), in the same dtype.
        activation: "silu", "gelu" (by the error function) or "gelu_tanh".
        impl: "auto", "triton" or "reference".

    Returns:
        (..., D), in the dtype of `gate`. Only `gate` and `up` are kept for the backward.

    Raises:
        ValueError: an activation that is unknown, tensors that do not fit, or what "triton" does not do.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202, equations 5 and 6.
    """
    dispatch.check_impl(_NAME, impl, gate.device)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` of {_NAME} must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}."
        )
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"`up` of {_NAME} must be {tuple(gate.shape)} in {gate.dtype} like `gate`, got {tuple(up.shape)} "
            f"in {up.dtype}."
        )
    wide = gate.dtype == torch.float64
    if impl == "triton" and wide:
        raise ValueError(f"`impl='triton'` of {_NAME} has no float64; use 'auto'.")
    if impl == "reference" or (impl == "auto" and (wide or not gate.is_cuda)):
        return ACTIVATIONS[activation](gate) * up
    return (_call if wants_operator(gate, up) else _run)(gate, up, activation)


def _run(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from hf_longattn.kernels.gated_activation.triton import gate_forward

    return gate_forward(gate, up, activation)


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from hf_longattn.kernels.gated_activation.triton import gate_backward

    return gate_backward(grad, gate, up, activation)


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_call_backward = direct_operator("hf_longattn::gated_activation_backward", _run_backward, _backward_fake)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.activation = inputs[2]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_call_backward(grad, *ctx.saved_tensors, ctx.activation), None


_call = direct_operator("hf_longattn::gated_activation", _run, _fake, _save, _gradients)
