"""The public functions of linear maps of a few rows."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.few_row_linear.reference import gated_linear, linear
from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS

MAX_ROWS = 16
_IMPLS = ("auto", "triton", "reference")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def few_row_linear(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    settled_weight: bool = False,
    impl: str = "auto",
) -> Tensor:
    """A linear map of at most 16 rows, as in a decoding step, where reading the weight is all the cost.

        y = act(x W^T + b)             bytes: N K of the weight, once

    Sums are fp32 and rounded once, and once more behind an activation. The Triton kernel is forward only.

    Args:
        states: (..., K), at most 16 rows for "triton"; bf16, fp16 or fp32 there.
        weight: (N, K), rows contiguous, of the same dtype and device.
        bias: (N,) or None.
        activation: "silu", "gelu", "gelu_tanh", or None for the linear map alone.
        settled_weight: a promise that no kernel which may still be running writes to `weight`. With it,
            "triton" may read the weight for a single row while the kernels in front of it end, back to the
            last one that is not of this package. Parameters in a captured step keep it: nothing there writes
            to them. Without it, nothing is read before they have ended.
        impl: "auto", "triton" or "reference".

    Returns:
        (..., N), in the dtype of `states`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or what "triton" cannot do.
    """
    _check("few_row_linear", states, weight, impl)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({weight.shape[0]},), got {tuple(bias.shape)}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` of few_row_linear must be None or one of {', '.join(ACTIVATIONS)}, got "
            f"{activation!r}."
        )
    if _takes_triton(states, (weight, bias), impl):
        from hf_longattn.kernels.few_row_linear.triton import launch

        return launch(states, weight, None, bias, settled_weight, activation)
    return linear(states, weight, bias, activation)


def few_row_gated_linear(
    states: Tensor, gate: Tensor, up: Tensor, *, settled_weight: bool = False, impl: str = "auto"
) -> Tensor:
    """The first half of a gated feed-forward layer (SwiGLU, arXiv 2002.05202) on at most 16 rows.

        y = silu(x G^T) * (x U^T)      bytes: 2 N K of the weights, once

    Args:
        states: (..., K), at most 16 rows for "triton"; bf16, fp16 or fp32 there.
        gate: (N, K), rows contiguous, of the same dtype and device.
        up: (N, K), as `gate`.
        settled_weight: as in `few_row_linear`, of both weights.
        impl: "auto", "triton" or "reference".

    Returns:
        (..., N), in the dtype of `states`; fp32 inside, rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit, or what "triton" cannot do.
    """
    _check("few_row_gated_linear", states, gate, impl)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"`up` must be {tuple(gate.shape)} in {gate.dtype} as `gate`, got {tuple(up.shape)}, {up.dtype}."
        )
    if _takes_triton(states, (gate, up), impl):
        from hf_longattn.kernels.few_row_linear.triton import launch

        return launch(states, gate, up, None, settled_weight)
    return gated_linear(states, gate, up)


def _check(name: str, states: Tensor, weight: Tensor, impl: str) -> None:
    dispatch.check_impl(name, impl, states.device, _IMPLS)
    if weight.ndim != 2 or states.shape[-1] != weight.shape[1] or states.dtype != weight.dtype:
        raise ValueError(
            f"`weight` of {name} must be (N, {states.shape[-1]}) in {states.dtype}, got "
            f"{tuple(weight.shape)} in {weight.dtype}."
        )


def _takes_triton(states: Tensor, weights: tuple[Tensor | None, ...], impl: str) -> bool:
    """Whether the kernel runs; raises where it is asked for by name and cannot."""
    given = [tensor for tensor in (states, *weights) if tensor is not None]
    rows = states.numel() // max(states.shape[-1], 1)
    obstacles = (
        (not 0 < rows <= MAX_ROWS, f"takes 1 to {MAX_ROWS} rows, got {rows}"),
        (states.dtype not in _DTYPES, f"takes bf16, fp16 and fp32, got {states.dtype}"),
        (any(t.stride(-1) != 1 for t in given[1:]), "needs weights with contiguous rows"),
        (torch.is_grad_enabled() and any(t.requires_grad for t in given), "has no backward"),
    )
    reason = next((words for found, words in obstacles if found), None)
    if impl == "triton" and reason is not None:
        raise ValueError(f"`impl='triton'` of linear maps {reason}; use 'auto'.")
    return impl == "triton" or (impl == "auto" and states.is_cuda and reason is None)
