"""The public functions of the norms: checks and choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.row_norm.reference import KINDS, normalised

_NAME = "row_norm"
# A row is held in the registers of one program.
_MOST_COLUMNS = 16384


def row_norm(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    impl: str = "auto",
) -> Tensor:
    """An RMS norm or a layer norm of every row, rounded where transformers' modules round.

        r = 1 / sqrt(mean(x^2) + eps)                           in fp32
        "rms"           round(x r) w                            Llama, Qwen, Mistral, Phi 3
        "rms_wide"      round(x r w)                            OLMo 2, GPT-OSS, torch.nn.RMSNorm
        "rms_plus_one"  round(x r (1 + w))                      Gemma
        "layer"         round((x - m) r' w + b)                 torch.nn.LayerNorm, r' of x - m, m = mean(x)

    Args:
        states: (..., D), any floating dtype.
        weight: (D,), or None for ones.
        bias: (D,), of "layer" alone.
        eps: added to the mean of squares.
        kind: one of the four above.
        impl: "auto", "triton" (forward only, D up to 16384) or "reference".

    Returns:
        (..., D), in the dtype of `states`; of "rms", in the one that `states` and `weight` promote to.

    Raises:
        ValueError: a kind that is unknown, shapes that do not fit, or what "triton" does not do.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; Ba et al., 1607.06450.
    """
    if not _by_kernel(impl, kind, states, (weight, bias)):
        return normalised(states, weight, bias, eps, kind)
    from hf_longattn.kernels.row_norm.triton import norm_forward

    return norm_forward(states, None, weight, bias, eps, kind)[1]


def add_row_norm(
    states: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str = "rms",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, and `row_norm` of that sum, in one launch.

    Args:
        states: (..., D).
        residual: (..., D), of the same shape and dtype.
        weight: as in `row_norm`, like all that follow.
        bias: (D,).
        eps: added to the mean of squares.
        kind: of norm.
        impl: "auto", "triton" or "reference".

    Returns:
        (sum, norm): the sum rounded to its dtype, which is what the norm is taken of.

    Raises:
        ValueError: as `row_norm`, or a `residual` that is not like `states`.
    """
    if residual.shape != states.shape or residual.dtype != states.dtype:
        raise ValueError(
            f"`residual` of add_{_NAME} must be {tuple(states.shape)} in {states.dtype} like `states`, got "
            f"{tuple(residual.shape)} in {residual.dtype}; expand or convert it."
        )
    if not _by_kernel(impl, kind, states, (weight, bias, residual)):
        total = states + residual
        return total, normalised(total, weight, bias, eps, kind)
    from hf_longattn.kernels.row_norm.triton import norm_forward

    return norm_forward(states, residual, weight, bias, eps, kind)


def _by_kernel(impl: str, kind: str, states: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    dispatch.check_impl(_NAME, impl, states.device, ("auto", "triton", "reference"))
    weight, bias = others[:2]
    if kind not in KINDS or (bias is not None and kind != "layer"):
        raise ValueError(
            f"`kind` of {_NAME} must be one of {', '.join(map(repr, KINDS))}, and 'layer' with a `bias`, got "
            f"{kind!r}."
        )
    if any(x is not None and x.shape != states.shape[-1:] for x in (weight, bias)):
        raise ValueError(
            f"`weight` and `bias` of {_NAME} must be ({states.shape[-1]},) like the rows of `states`, got "
            f"{[tuple(x.shape) for x in (weight, bias) if x is not None]}."
        )
    tensors = [x for x in (states, *others) if x is not None]
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    wide = any(x.dtype == torch.float64 for x in tensors) or states.shape[-1] > _MOST_COLUMNS
    if impl == "triton" and (gradient or wide):
        raise ValueError(
            f"`impl='triton'` of {_NAME} has no backward, no float64, and rows up to {_MOST_COLUMNS}; use "
            "'auto'."
        )
    return impl == "triton" or (impl == "auto" and states.is_cuda and not gradient and not wide)
