"""The public functions of linear maps of a few rows."""

from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.few_row_linear.reference import gated_linear, linear
from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS

MAX_ROWS = 16


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
    name = "few_row_linear"
    _check(name, states, weight, impl)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must be ({weight.shape[0]},), got {tuple(bias.shape)}.")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` of {name} must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    given = (states, weight) if bias is None else (states, weight, bias)
    if dispatch.takes_triton(name, impl, given, *_obstacles(*given)):
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
    name, given = "few_row_gated_linear", (states, gate, up)
    _check(name, states, gate, impl)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"`up` must be {tuple(gate.shape)} in {gate.dtype} as `gate`, got {tuple(up.shape)}, {up.dtype}."
        )
    if dispatch.takes_triton(name, impl, given, *_obstacles(*given)):
        from hf_longattn.kernels.few_row_linear.triton import launch

        return launch(states, gate, up, None, settled_weight)
    return gated_linear(states, gate, up)


def _check(name: str, states: Tensor, weight: Tensor, impl: str) -> None:
    dispatch.check_impl(name, impl, states.device)
    if weight.ndim != 2 or states.shape[-1] != weight.shape[1] or states.dtype != weight.dtype:
        raise ValueError(
            f"`weight` of {name} must be (N, {states.shape[-1]}) in {states.dtype}, got "
            f"{tuple(weight.shape)} in {weight.dtype}."
        )


def _obstacles(states: Tensor, *weights: Tensor) -> tuple[tuple[bool, str], ...]:
    """What keeps the kernel from running, as `dispatch.takes_triton` reads it."""
    rows = states.numel() // max(states.shape[-1], 1)
    return (
        (not 0 < rows <= MAX_ROWS, f"takes 1 to {MAX_ROWS} rows, got {rows}"),
        (any(weight.stride(-1) != 1 for weight in weights), "needs weights with contiguous rows"),
    )
