"""The norms in plain torch: the definition of correct."""

import torch
from torch import Tensor

KINDS = ("rms", "rms_wide", "rms_plus_one", "layer")


def normalised(states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """The norm of every row; arguments as in `row_norm`, computed in fp32 or wider."""
    x = states.to(torch.promote_types(states.dtype, torch.float32))
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if kind == "rms":
        return x.to(states.dtype) if weight is None else weight * x.to(states.dtype)
    if weight is not None:
        x = x * (weight.to(x.dtype) + (kind == "rms_plus_one"))
    if bias is not None:
        x = x + bias.to(x.dtype)
    return x.to(states.dtype)
