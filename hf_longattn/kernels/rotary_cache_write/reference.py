"""Rotary embedding and cache write in plain torch: the definition of correct, and the CPU's path."""

import torch
from torch import Tensor

from hf_longattn.kernels.rotary_embedding.reference import rotate


def write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
) -> Tensor:
    """Turns both and copies keys and values, row by row; arguments as in `rotary_cache_write`."""
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    keys.transpose(1, 2)[rows, index] = rotate(key, cos, sin).to(key.dtype).transpose(1, 2)
    values.transpose(1, 2)[rows, index] = value.transpose(1, 2)
    return rotate(query, cos, sin).to(query.dtype)
