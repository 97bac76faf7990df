"""Attention of a few queries over a long cache in plain PyTorch: what is correct, and the CPU's path."""

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import in_its_own_dtypes
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials.reference import merge_reference

# Keys a chunk where the caller asks for no number of splits: the scores of one chunk stay small beside the
# cache.
CHUNK = 16384


@in_its_own_dtypes
def decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: KeyRange,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends chunk by chunk and merges, in fp32 (fp64 for fp64); arguments as in `decode_attention`."""
    num_keys = key.shape[2]
    chunk = -(-num_keys // num_splits) if num_splits else CHUNK
    outputs, lses = [], []
    for start in range(0, max(num_keys, 1), max(chunk, 1)):
        columns = slice(start, min(start + chunk, num_keys))
        output, lse = _attend_chunk(query, key, value, scale, mask, softcap, columns, scales)
        outputs.append(output)
        lses.append(lse)
    if sinks is not None:
        outputs.append(torch.zeros_like(outputs[0]))
        lses.append(sinks.to(lses[0].dtype)[:, None].expand_as(lses[0]))
    output, lse = merge_reference(torch.stack(outputs), torch.stack(lses))
    return output.to(query.dtype), lse


def _attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: KeyRange,
    softcap: float | None,
    columns: slice,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, V) and lse (B, H, T) over the keys of `columns`: 0 and -inf where none is visible."""
    B, H, T, K = query.shape
    G, S, V = key.shape[1], key.shape[2], value.shape[3]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = key[:, :, columns].to(dtype), value[:, :, columns].to(dtype)
    if scales is not None:
        factors = scales[:, :, columns].to(dtype)
        keys, values = keys * factors[..., :1], values * factors[..., 1:]
    # The H / G heads that share keys become rows of one product, so that no key is repeated in memory.
    rows = query.to(dtype).reshape(B, G, H // G * T, K)
    scores = (rows @ keys.transpose(-1, -2)).view(B, G, H // G, T, keys.shape[2]) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if not (mask.is_dense and (T == 1 or not mask.causal)):
        visible = mask.tile(slice(0, T), columns, T, S, query.device)
        scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
        # A slot that nobody sees may hold anything, and a probability of zero would let NaN through.
        values = values.masked_fill(~visible.any(2).unsqueeze(-1), 0.0)
    lse = scores.logsumexp(-1)
    # The softmax of a row that sees nothing is 0 / 0.
    weights = torch.softmax(scores, -1).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    output = weights.view(B, G, H // G * T, keys.shape[2]) @ values
    return output.view(B, H, T, V), lse.view(B, H, T)
