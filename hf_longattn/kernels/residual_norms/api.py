"""The public operator `residual_norms`: its contract, its checks and the choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.residual_norms.reference import added_and_normalised

_NAME = "residual_norms"
# A row is held in the registers of one program.
_MOST_COLUMNS = 8192
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
    dispatch.check_impl(_NAME, impl, states.device, ("auto", "triton", "reference"))
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
    if not _takes_triton(impl, [states, *branches, *weights]):
        return added_and_normalised(states, branches, first, second, eps)
    from hf_longattn.kernels.residual_norms.triton import norms_forward

    return norms_forward(states, branches, first, second, eps)


def _takes_triton(impl: str, given: list[Tensor]) -> bool:
    """Whether the kernel runs; raises where it is asked for by name and cannot."""
    obstacles = (
        (given[0].shape[-1] > _MOST_COLUMNS, f"takes rows of up to {_MOST_COLUMNS} numbers"),
        (any(t.dtype not in _DTYPES for t in given), "takes bf16, fp16 and fp32 alone"),
        (torch.is_grad_enabled() and any(t.requires_grad for t in given), "has no backward"),
    )
    reason = next((words for found, words in obstacles if found), None)
    if impl == "triton" and reason is not None:
        raise ValueError(f"`impl='triton'` of {_NAME} {reason}; use 'auto'.")
    return impl == "triton" or (impl == "auto" and given[0].is_cuda and reason is None)
