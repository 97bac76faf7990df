"""Both ends of a layer with parallel branches in plain torch: the definition of correct."""

import torch.nn.functional as F
from torch import Tensor

from hf_longattn.kernels.gated_activation.reference import ACTIVATIONS

NormedLinear = tuple[Tensor, Tensor, Tensor, Tensor]
Product = tuple[Tensor, Tensor, Tensor]


def normed(
    states: Tensor, first: NormedLinear, second: NormedLinear, eps: float, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Two layer norms of the same states, and a linear map of each; an activation behind the second.

    Args:
        states: (..., K).
        first: weight and bias of the norm (K,), weight (N1, K) and bias (N1,) of the map.
        second: the same with N2.
        eps: added to the variance.
        activation: a key of `ACTIVATIONS`, or None.

    Returns:
        (..., N1) and (..., N2).
    """
    one, other = (
        F.linear(F.layer_norm(states, states.shape[-1:], scale, shift, eps), weight, bias)
        for scale, shift, weight, bias in (first, second)
    )
    return one, other if activation is None else ACTIVATIONS[activation](other)


def joined(states: Tensor, first: Product, second: Product) -> Tensor:
    """The sum of two linear maps and the states, added as GPT-NeoX adds them.

    Args:
        states: (..., N).
        first: input (..., K1), weight (N, K1), bias (N,).
        second: the same with K2.

    Returns:
        (..., N).
    """
    return F.linear(*first) + F.linear(*second) + states
