"""The public functions of layers with parallel branches: contracts, checks, choice of implementation."""

from torch import Tensor

from hf_longattn.kernels.dispatch import check_impl, takes_triton
from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS
from hf_longattn.kernels.normed_linears.reference import NormedLinear, Product, joined, normed

MAX_ROWS = 2
# A row is held in the registers of one program, as is what it is multiplied with.
MAX_WIDTH = 4096


def normed_linears(
    states: Tensor,
    first: NormedLinear,
    second: NormedLinear,
    *,
    eps: float,
    activation: str | None = None,
    settled_weights: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """What a layer with parallel branches begins with: two norms of one row, and a linear map of each.

        n_i = round((x - m) r s_i + t_i)          m = mean(x), r = 1 / sqrt(var(x) + eps), fp32
        y_1 = round(n_1 W_1^T + b_1)              y_2 = act(round(n_2 W_2^T + b_2))

    Reading the weights is all the cost: (N1 + N2) K of them, once. Sums are fp32.

    Args:
        states: x, (..., K); at most 2 rows, K up to 4096, bf16, fp16 or fp32 for "triton".
        first: (s_1, t_1, W_1, b_1): weight and bias of a norm, (K,) each, weight (N1, K) and bias (N1,) of a
            linear map, of the dtype and device of `states`.
        second: (s_2, t_2, W_2, b_2), the same with N2.
        eps: added to the variance.
        activation: "silu", "gelu", "gelu_tanh", or None for the linear map alone.
        settled_weights: a promise that no kernel which may still be running writes to `first` or `second`.
            With it, "triton" may read them while the kernels in front of it end, back to the last one that is
            not of this package; without it, nothing is read before they have ended.
        impl: "auto", "triton" (forward only) or "reference".

    Returns:
        y_1 (..., N1) and y_2 (..., N2), in the dtype of `states`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or what "triton" cannot do.

    Source: layer norm, Ba et al., arXiv 1607.06450; parallel branches as in GPT-NeoX, arXiv 2204.06745.
    """
    name, width = "normed_linears", states.shape[-1]
    check_impl(name, impl, states.device)
    for which, (scale, shift, weight, bias) in (("first", first), ("second", second)):
        _check_map(name, which, states, width, weight, bias)
        if scale.shape != (width,) or shift.shape != (width,):
            raise ValueError(
                f"`{which}` of {name} must begin with weight and bias ({width},) of a norm, got "
                f"{tuple(scale.shape)} and {tuple(shift.shape)}."
            )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"`activation` of {name} must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    given = (states, *first, *second)
    too_wide = (width > MAX_WIDTH, f"takes rows of up to {MAX_WIDTH} numbers, got {width}")
    if takes_triton(name, impl, given, too_wide, *_obstacles(*given)):
        from hf_longattn.kernels.normed_linears.triton import launch_normed

        return launch_normed(states, first, second, eps, activation, settled_weights)
    return normed(states, first, second, eps, activation)


def residual_linears(
    states: Tensor, first: Product, second: Product, *, settled_weights: bool = False, impl: str = "auto"
) -> Tensor:
    """What a layer with parallel branches ends with: the last linear map of each, added to the states.

        y = round(x + h W_h^T + b_h + o W_o^T + b_o)

    Reading the weights is all the cost. The sum is fp32 and rounded once; modules of torch round both
    products and both sums, as "reference" does.

    Args:
        states: x, (..., N); at most 2 rows, bf16, fp16 or fp32 for "triton".
        first: (h, W_h, b_h): input (..., K1), weight (N, K1) and bias (N,), of the dtype and device of
            `states`.
        second: (o, W_o, b_o), the same with K2.
        settled_weights: as in `normed_linears`, of weights and biases.
        impl: "auto", "triton" (forward only) or "reference".

    Returns:
        y, (..., N), in the dtype of `states`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or what "triton" cannot do.

    Source: parallel branches as in GPT-NeoX, arXiv 2204.06745.
    """
    name, width = "residual_linears", states.shape[-1]
    check_impl(name, impl, states.device)
    for which, (inputs, weight, bias) in (("first", first), ("second", second)):
        _check_map(name, which, states, inputs.shape[-1], weight, bias)
        if weight.shape[0] != width or inputs.shape[:-1] != states.shape[:-1] or inputs.dtype != states.dtype:
            raise ValueError(
                f"`{which}` of {name} must map {tuple(states.shape[:-1])} rows in {states.dtype} to {width} "
                f"numbers, got {tuple(inputs.shape)} in {inputs.dtype} and {tuple(weight.shape)}."
            )
    given = (states, *first, *second)
    if takes_triton(name, impl, given, *_obstacles(*given)):
        from hf_longattn.kernels.normed_linears.triton import launch_joined

        return launch_joined(states, first, second, settled_weights)
    return joined(states, first, second)


def _check_map(name: str, which: str, states: Tensor, width: int, weight: Tensor, bias: Tensor) -> None:
    fits = weight.ndim == 2 and weight.shape[1] == width and weight.dtype == states.dtype
    if not fits or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`{which}` of {name} must have a weight (N, {width}) in {states.dtype} and a bias (N,), got "
            f"{tuple(weight.shape)} in {weight.dtype} and {tuple(bias.shape)}."
        )


def _obstacles(states: Tensor, *others: Tensor) -> tuple[tuple[bool, str], ...]:
    """What keeps the kernels from running, as `takes_triton` reads it."""
    rows = states.numel() // max(states.shape[-1], 1)
    return (
        (not 0 < rows <= MAX_ROWS, f"takes 1 to {MAX_ROWS} rows, got {rows}"),
        (any(tensor.dtype != states.dtype for tensor in others), "takes tensors of one dtype"),
        (any(tensor.stride(-1) != 1 for tensor in others), "needs tensors with contiguous rows"),
    )
