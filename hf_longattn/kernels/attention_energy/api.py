"""Attention as the gradient of a scalar function of a source term."""

import torch
from torch import Tensor

from hf_longattn.kernels.blockwise_attention import blockwise_attention


def attention_energy(
    query: Tensor, key: Tensor, value: Tensor, zeta: Tensor, *, scale: float, mask: Tensor | None = None
) -> Tensor:
    """The log-partition function of attention with a source, whose gradient in the source is attention.

        F(zeta) = log sum_s exp(scale * q . k[s] + zeta . v[s])

        dF/dzeta at 0 = sum_s softmax(scale * q . k)[s] v[s]

    F is convex, and the cumulant generating function of the values under the softmax: its second derivative
    at 0 is their covariance. It is computed as the log-sum-exp of attention with query [scale * q, zeta] and
    key [k, v]: in memory linear in the length, and differentiable once in every input.

    Args:
        query: (B, H, T, K), floating.
        key: (B, G, S, K), with H a multiple of G.
        value: (B, G, S, V).
        zeta: (B, H, T, V), the source; zeros give the log-partition function itself.
        scale: factor on the scores.
        mask: bool, broadcastable to (B, H, T, S), True where the query sees the key; None for all of them.

    Returns:
        (B, H, T) in fp32 (fp64 for fp64); -inf where a query sees nothing. 16-bit inputs are widened first,
        for the energy is a number to compare and not an activation.

    Raises:
        ValueError: a shape that does not fit, by name.
        TypeError: a mask that is not bool.

    Source: Shyam et al., "Tree Attention", arXiv 2408.04093, section 4.

    Example:
        >>> query, key, value = (torch.randn(1, 2, 8, 16) for _ in range(3))
        >>> zeta = torch.zeros_like(query, requires_grad=True)
        >>> energy = attention_energy(query, key, value, zeta, scale=0.25)
        >>> output = torch.autograd.grad(energy.sum(), zeta)[0]
    """
    if zeta.shape != (*query.shape[:-1], value.shape[-1]):
        expected = (*query.shape[:-1], value.shape[-1])
        raise ValueError(f"`zeta` must be (B, H, T, V) = {expected}, got {tuple(zeta.shape)}.")
    dtype = torch.promote_types(torch.promote_types(query.dtype, zeta.dtype), torch.float32)
    query, key, value, zeta = (x.to(dtype) for x in (query, key, value, zeta))
    source_query = torch.cat((query * scale, zeta), dim=-1)
    source_key = torch.cat((key, value), dim=-1)
    # The output of this attention is not wanted: one column of values is the least it takes.
    column = value[..., :1].detach()
    return blockwise_attention(source_query, source_key, column, scale=1.0, bias=_as_bias(mask, query, key))[
        1
    ]


def _as_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask with four dims and every key spelled out, as blockwise attention reads a bias."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, True where the query sees the key, got {mask.dtype}.")
    full = (*query.shape[:3], key.shape[2])
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(got not in (1, want) for got, want in zip(sizes, full, strict=True)):
        raise ValueError(f"`mask` must broadcast to (B, H, T, S) = {full}, got shape {tuple(mask.shape)}.")
    return mask.reshape(sizes).expand(*sizes[:3], key.shape[2])
