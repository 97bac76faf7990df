"""The public function of rotary embedding, and its registration with torch."""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
from hf_longattn.kernels.direct import direct_operator, wants_operator
from hf_longattn.kernels.rotary_embedding.layout import empty_outputs
from hf_longattn.kernels.rotary_embedding.reference import rotate

_NAME = "rotary_embedding"


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their positions (RoFormer, arXiv 2104.09864, in the layout of GPT-NeoX).

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K).
        cos: (B or 1, T, R), the two halves equal; R even, at most K. The first R elements of a head turn, the
            others are copied.
        sin: (B or 1, T, R), the two halves equal.
        impl: "auto", "triton" (no gradient of the angles, no float64) or "reference".

    Returns:
        (query, key), turned. Only `cos` and `sin` are kept for the backward.

    Raises:
        ValueError: shapes that do not fit, or what "triton" does not do.
    """
    dispatch.check_impl(_NAME, impl, query.device)
    width, head_dim = cos.shape[-1], query.shape[-1]
    if width % 2 or not 0 < width <= head_dim or key.shape[-1] != head_dim or sin.shape[-1] != width:
        raise ValueError(
            f"`cos` and `sin` of {_NAME} must have one even width, at most the head dim of `query` and "
            f"`key`, got {width}, {sin.shape[-1]}, {head_dim} and {key.shape[-1]}; cut the angles to the "
            "part of a head that turns."
        )
    plain = torch.float64 in (query.dtype, cos.dtype) or (
        torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    )
    if impl == "triton" and plain:
        raise ValueError(
            f"`impl='triton'` of {_NAME} has no float64 and no gradient of `cos` and `sin`; use 'auto'."
        )
    if impl == "reference" or (impl == "auto" and (plain or not query.is_cuda)):
        return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin).to(key.dtype)
    return (_call if wants_operator(query, key) else _run)(query, key, cos, sin, False)


def _run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    from hf_longattn.kernels.rotary_embedding.triton import rotated

    return rotated(query, key, cos, sin, inverse)


def _fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(query, key, inverse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.inverse = inputs[4]


def _gradients(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    return *_call(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


_call = direct_operator("hf_longattn::rotary_embedding", _run, _fake, _save, _gradients)
