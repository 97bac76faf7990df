"""Linear maps in plain torch: the definition of correct."""

import torch.nn.functional as F
from torch import Tensor

from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """act(x W^T + b).

    Args:
        states: (..., K).
        weight: (N, K).
        bias: (N,) or None.
        activation: a key of `ACTIVATIONS`, or None.

    Returns:
        (..., N).
    """
    product = F.linear(states, weight, bias)
    return product if activation is None else ACTIVATIONS[activation](product)


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
