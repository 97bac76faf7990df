"""A residual sum and its norms in plain torch: the definition of correct."""

import torch.nn.functional as F
from torch import Tensor


def added_and_normalised(
    states: Tensor,
    branches: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """b1 + b2 + x, and its layer norms.

    Args:
        states: (..., D).
        branches: two like `states`.
        first: (weight, bias) of a norm.
        second: (weight, bias) of another, or None.
        eps: added to the variance.

    Returns:
        (total, norm, second norm or None).
    """
    total = branches[0] + branches[1] + states
    norms = [
        None if pair is None else F.layer_norm(total, total.shape[-1:], *pair, eps)
        for pair in (first, second)
    ]
    return total, norms[0], norms[1]  # pyright: ignore[reportReturnType]
