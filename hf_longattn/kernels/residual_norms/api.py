"""The public operator `residual_norms`: its contract, its checks and the choice of implementation."""

from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.residual_norms.reference import added_and_normalised

_NAME = "residual_norms"
# A row is held in the registers of one program.
_MOST_COLUMNS = 8192
Affine = tuple[Tensor, Tensor]


def residual_norms(
    states: Tensor,
    branches: tuple[Tensor, Tensor],
    first: Affine,
    second: Affine | None = None,
    *,
    eps: float,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What two parallel branches add to the residual stream, and the norms that the next layer begins with.

        total = round(round(b1 + b2) + x)
        norm_i = round((total - m) r w_i + bias_i)       m = mean(total), r = 1 / sqrt(var(total) + eps), fp32

    The sums are rounded where GPT-NeoX rounds them.

    Args:
        states: x, (..., D); bf16, fp16 or fp32 for "triton".
        branches: (b1, b2), outputs of the two branches, like `states`.
        first: (weight, bias) of the first norm, (D,) each.
        second: (weight, bias) of the second norm, or None: there is one norm only.
        eps: added to the variance.
        impl: "auto", "triton" (forward only, D up to 8192) or "reference".

    Returns:
        (total, norm, norm of `second` or None), each (..., D) in the dtype of `states`.

    Raises:
        ValueError: shapes that do not fit, or what "triton" cannot do.

    Source: layer norm, Ba et al., arXiv 1607.06450; parallel branches as in GPT-NeoX, arXiv 2204.06745.
    """
    dispatch.check_impl(_NAME, impl, states.device)
    if any(branch.shape != states.shape or branch.dtype != states.dtype for branch in branches):
        raise ValueError(
            f"`branches` of {_NAME} must be {tuple(states.shape)} in {states.dtype} like `states`, got "
            f"{[(tuple(branch.shape), branch.dtype) for branch in branches]}."
        )
    weights = [*first, *(second or ())]
    if any(weight.shape != states.shape[-1:] for weight in weights):
        raise ValueError(
            f"`first` and `second` of {_NAME} must be weights and biases ({states.shape[-1]},), got "
            f"{[tuple(weight.shape) for weight in weights]}."
        )
    too_wide = (states.shape[-1] > _MOST_COLUMNS, f"takes rows of up to {_MOST_COLUMNS} numbers")
    if not dispatch.takes_triton(_NAME, impl, [states, *branches, *weights], too_wide):
        return added_and_normalised(states, branches, first, second, eps)
    from hf_longattn.kernels.residual_norms.triton import norms_forward

    return norms_forward(states, branches, first, second, eps)
