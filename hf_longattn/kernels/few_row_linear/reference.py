"""Linear maps in plain torch: the definition of correct."""

import torch.nn.functional as F
from torch import Tensor


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b.

    Args:
        states: (..., K).
        weight: (N, K).
        bias: (N,) or None.

    Returns:
        (..., N).
    """
    return F.linear(states, weight, bias)


def gated_linear(states: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x G^T) * (x U^T).

    Args:
        states: (..., K).
        gate: (N, K).
        up: (N, K).

    Returns:
        (..., N).
    """
    return F.silu(F.linear(states, gate)) * F.linear(states, up)
