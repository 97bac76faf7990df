"""How rotated heads lie in memory."""

import torch
from torch import Tensor


def empty_outputs(query: Tensor, key: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Where results go: laid out as their inputs are, gradients as projections leave heads.

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K).
        inverse: whether they are gradients.
    """
    if not inverse:
        return torch.empty_like(query), torch.empty_like(key)
    batch, _, length, dim = query.shape
    sizes = ((batch, length, states.shape[1], dim) for states in (query, key))
    query_out, key_out = (query.new_empty(size).transpose(1, 2) for size in sizes)
    return query_out, key_out
