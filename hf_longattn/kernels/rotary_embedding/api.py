"""The public function of rotary embedding."""

import torch
from torch import Tensor

from hf_longattn.kernels import dispatch
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
        impl: "auto", "triton" (forward only) or "reference".

    Returns:
        (query, key), turned.

    Raises:
        ValueError: shapes that do not fit, or a gradient asked of "triton".
    """
    dispatch.check_impl(_NAME, impl, query.device, ("auto", "triton", "reference"))
    width, head_dim = cos.shape[-1], query.shape[-1]
    if width % 2 or not 0 < width <= head_dim or key.shape[-1] != head_dim or sin.shape[-1] != width:
        raise ValueError(
            f"`cos` and `sin` of {_NAME} must have one even width, at most the head dim of `query` and "
            f"`key`, got {width}, {sin.shape[-1]}, {head_dim} and {key.shape[-1]}; cut the angles to the "
            "part of a head that turns."
        )
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if impl == "triton" and gradient:
        raise ValueError(f"`impl='triton'` of {_NAME} has no backward; use 'auto' or torch.no_grad().")
    wide = torch.float64 in (query.dtype, cos.dtype)
    if impl == "triton" or (impl == "auto" and query.is_cuda and not gradient and not wide):
        from hf_longattn.kernels.rotary_embedding.triton import rotate_forward

        return rotate_forward(query, key, cos, sin)
    return rotate(query, cos, sin).to(query.dtype), rotate(key, cos, sin).to(key.dtype)
