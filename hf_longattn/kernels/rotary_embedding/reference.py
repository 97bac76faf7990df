"""Rotary position embedding in plain torch: the definition of correct."""

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, with the halves of the head as the two coordinates.

    Args:
        states: (B, H, T, K).
        cos: (B or 1, T, K).
        sin: (B or 1, T, K).

    Returns:
        (B, H, T, K), in the dtype of `states`.
    """
    half = states.shape[-1] // 2
    swapped = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos[:, None] + swapped * sin[:, None]
