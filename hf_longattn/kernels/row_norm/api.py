"""The public functions of the norms: checks, choice of implementation, and registration with torch."""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.direct import direct_operator, wants_operator
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
        impl: "auto", "triton" (D up to 16384) or "reference".

    Returns:
        (..., D), in the dtype of `states`; of "rms", in the one that `states` and `weight` promote to.

    Only `states` and `weight` are kept for the backward. Its sums over rows are fp32 and always taken in the
    same order.

    Raises:
        ValueError: a kind that is unknown, shapes that do not fit, or what "triton" does not do.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; Ba et al., 1607.06450.
    """
    if not _by_kernel(impl, kind, states, (weight, bias)):
        return normalised(states, weight, bias, eps, kind)
    run = _call if wants_operator(states, weight, bias) else _run
    return run(states, weight, bias, eps, kind)


def gated_row_norm(
    states: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    kind: str = "rms",
    sigmoid: bool = False,
    impl: str = "auto",
) -> Tensor:
    """gate * norm, or sigmoid(gate) * norm, of `row_norm`, in one launch; each factor is rounded first.

    Args:
        states: (..., D).
        gate: (..., D), of the same shape and dtype, rows at any distance from one another.
        weight: as in `row_norm`, like all that follow.
        eps: added to the mean of squares.
        kind: of norm.
        sigmoid: whether the gate is the sigmoid of what is given.
        impl: "auto", "triton" or "reference".

    Returns:
        (..., D), in the dtype that norm and gate promote to. Where a gradient is wanted or a compiler
        traces, the gate is a launch of its own.

    Raises:
        ValueError: as `row_norm`, or a `gate` that is not like `states`.

    Source: Qin et al., arXiv 2401.04658 (figure 3); MiniMax-01, arXiv 2501.08313 (section 2.2).
    """
    if gate.shape != states.shape or gate.dtype != states.dtype:
        raise ValueError(
            f"`gate` of gated_{_NAME} must be {tuple(states.shape)} in {states.dtype} like `states`, got "
            f"{tuple(gate.shape)} in {gate.dtype}; expand or convert it."
        )
    by_kernel = _by_kernel(impl, kind, states, (weight, None, gate))
    mixed = weight is not None and weight.dtype != states.dtype
    if not by_kernel or mixed or wants_operator(states, weight, gate):
        normed = row_norm(states, weight, eps=eps, kind=kind, impl=impl)
        return (gate.sigmoid() if sigmoid else gate) * normed
    from hf_longattn.kernels.row_norm.triton import norm_forward

    return norm_forward(states, weight, None, eps, kind, gate, sigmoid)


def _by_kernel(impl: str, kind: str, states: Tensor, others: tuple[Tensor | None, ...]) -> bool:
    dispatch.check_impl(_NAME, impl, states.device)
    weight, bias = others[:2]
    if kind not in KINDS or (bias is not None and kind != "layer"):
        raise ValueError(
            f"`kind` of {_NAME} must be one of {', '.join(map(repr, KINDS))}, and 'layer' with a `bias`, got "
            f"{kind!r}."
        )
    row = (states.shape[-1],)
    if (weight is not None and weight.shape != row) or (bias is not None and bias.shape != row):
        raise ValueError(
            f"`weight` and `bias` of {_NAME} must be ({states.shape[-1]},) like the rows of `states`, got "
            f"{[tuple(x.shape) for x in (weight, bias) if x is not None]}."
        )
    dtypes = [x.dtype for x in (states, *others) if x is not None]
    wide = torch.float64 in dtypes or row[0] > _MOST_COLUMNS
    if impl == "triton" and wide:
        raise ValueError(
            f"`impl='triton'` of {_NAME} takes no float64, and rows of up to {_MOST_COLUMNS} numbers; use "
            "'auto'."
        )
    return impl == "triton" or (impl == "auto" and states.is_cuda and not wide)


def _run(states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    from hf_longattn.kernels.row_norm.triton import norm_forward

    return norm_forward(states, weight, bias, eps, kind)


def _fake(states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    widens = kind == "rms" and weight is not None
    dtype = torch.promote_types(states.dtype, weight.dtype) if widens and weight is not None else states.dtype
    return states.new_empty(states.shape, dtype=dtype)


def _run_backward(
    grad: Tensor, states: Tensor, weight: Tensor | None, wants: list[bool], eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, weight and bias, the two last in fp32; no elements for what is not wanted."""
    from hf_longattn.kernels.row_norm.triton import norm_backward

    grads = norm_backward(grad, states, weight, (wants[0], wants[1], wants[2]), eps, kind)
    first, second, third = (grad.new_empty(0) if part is None else part for part in grads)
    return first, second, third


def _backward_fake(
    grad: Tensor, states: Tensor, weight: Tensor | None, wants: list[bool], eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    row = states.new_empty(states.shape[-1:], dtype=torch.float32)
    shapes = (states.new_empty(states.shape), row, torch.empty_like(row))
    first, second, third = (
        like if wanted else grad.new_empty(0) for like, wanted in zip(shapes, wants, strict=True)
    )
    return first, second, third


_call_backward = direct_operator("hf_longattn::row_norm_backward", _run_backward, _backward_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, weight, bias, eps, kind = inputs
    ctx.save_for_backward(states, weight)
    ctx.options, ctx.bias_dtype = (eps, kind), None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    states, weight = ctx.saved_tensors
    wants = list(ctx.needs_input_grad[:3])
    parts = _call_backward(grad, states, weight, wants, *ctx.options)
    dtypes = (states.dtype, None if weight is None else weight.dtype, ctx.bias_dtype)
    grads = [
        part.to(dtype) if wanted else None for part, dtype, wanted in zip(parts, dtypes, wants, strict=True)
    ]
    return *grads, None, None


_call = direct_operator("hf_longattn::row_norm", _run, _fake, _save, _gradients)
