"""Rotary position embedding in plain torch: the definition of correct."""

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, with the halves of what turns of a head as the two coordinates.

    Args:
        states: (B, H, T, K).
        cos: (B or 1, T, R), R at most K.
        sin: (B or 1, T, R).

    Returns:
        (B, H, T, K), in the wider dtype of `states` and `cos`.
    """
    width = cos.shape[-1]
    turning, half = states[..., :width], width // 2
    swapped = torch.cat((-turning[..., half:], turning[..., :half]), dim=-1)
    turned = turning * cos[:, None] + swapped * sin[:, None]
    if width == states.shape[-1]:
        return turned
    return torch.cat((turned, states[..., width:].to(turned.dtype)), dim=-1)
