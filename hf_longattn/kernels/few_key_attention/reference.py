"""Attention over a few keys in plain torch: the definition of correct."""

import torch
from torch import Tensor

from hf_longattn.kernels.rotary_embedding.reference import rotate


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    held_keys: Tensor,
    held_values: Tensor,
    start: int,
    rotary: tuple[Tensor, Tensor] | None,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Writes the new keys and values, then takes the softmax over all that are held.

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K).
        value: (B, G, T, V).
        held_keys: (B, G, S, K), written at start .. start + T.
        held_values: (B, G, S, V), likewise.
        start: how many keys are held.
        rotary: (cos, sin), (B or 1, T, R) each, or None.
        scale: factor of the scores.
        key_mask: (B, start + T) bool, or None.

    Returns:
        (B, T, H, V), in the dtype of `query`.
    """
    if rotary is not None:
        query, key = rotate(query, *rotary).to(query.dtype), rotate(key, *rotary).to(key.dtype)
    (H, T), stop = query.shape[1:3], start + query.shape[2]
    held_keys[:, :, start:stop] = key
    held_values[:, :, start:stop] = value
    # Sums of 16-bit numbers are fp32, as in the kernel.
    wide = torch.promote_types(query.dtype, torch.float32)
    repeats = H // key.shape[1]
    keys = held_keys[:, :, :stop].to(wide).repeat_interleave(repeats, dim=1)
    values = held_values[:, :, :stop].to(wide).repeat_interleave(repeats, dim=1)
    visible = torch.ones(T, stop, dtype=torch.bool, device=query.device).tril(start)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    scores = (query.to(wide) @ keys.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    # A row without keys is all -inf, of which the softmax is NaN.
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return (weights @ values).to(query.dtype).transpose(1, 2)
