"""Which query tiles a key tile meets, for kernels that walk along the queries."""

import torch
from torch import Tensor

from .terms import Terms


def _tile_reduce(rows: Tensor, block: int, fill: int, largest: bool) -> Tensor:
    """(B, T) -> (B, T / block), the largest or smallest entry of each tile; `fill` stands past the end."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block), value=fill).unflatten(1, (-1, block))
    return padded.amax(dim=2) if largest else padded.amin(dim=2)


def query_spans(terms: Terms, num_queries: int, num_keys: int, block_m: int, block_n: int) -> Tensor | None:
    """Which query tiles may see each key tile, worked out on the device without a stall.

    Between `first` and `last` lies every query tile that sees the key tile; between `inner first` and
    `inner last` lie only tiles whose every query (but those that see nothing) sees it in whole. Tight for
    bounds that grow with t.

    Args:
        terms: options of the call.
        num_queries: T.
        num_keys: S.
        block_m: queries of a tile.
        block_n: keys of a tile.

    Returns:
        int32, (B or 1, key tiles, 4): first, inner first, inner last, last. None where causal order decides.
    """
    mask = terms.mask
    bound = mask.lower if mask.lower is not None else mask.upper
    if bound is None:
        return None
    device = bound.device
    lower = torch.zeros(1, 1, dtype=torch.int32, device=device)
    upper = torch.full((1, num_queries), num_keys, dtype=torch.int32, device=device)
    if mask.causal:
        upper = upper.minimum(torch.arange(num_queries, device=device)[None] + 1 + num_keys - num_queries)
    lower = lower if mask.lower is None else lower.maximum(mask.lower)
    upper = upper if mask.upper is None else upper.minimum(mask.upper)
    lower, upper = torch.broadcast_tensors(lower, upper)
    some = lower < upper
    low_or_end, up_or_zero = lower.where(some, num_keys), upper.where(some, 0)
    low_or_zero, up_or_end = lower.where(some, 0), upper.where(some, num_keys)
    # Running extremes make each side monotone, so that a search finds where a key tile enters and leaves.
    reach = _tile_reduce(up_or_zero, block_m, 0, largest=True).cummax(1).values
    least = _tile_reduce(low_or_end, block_m, num_keys, largest=False).flip(1).cummin(1).values.flip(1)
    full_up = _tile_reduce(up_or_end, block_m, num_keys, largest=False).flip(1).cummin(1).values.flip(1)
    full_low = _tile_reduce(low_or_zero, block_m, 0, largest=True).cummax(1).values
    starts = (
        torch.arange(0, num_keys, block_n, device=device, dtype=torch.int32)
        .expand(lower.shape[0], -1)
        .contiguous()
    )
    stops = (starts + block_n).clamp(max=num_keys)
    first = torch.searchsorted(reach.contiguous(), starts, right=True)
    last = torch.searchsorted(least.contiguous(), stops).maximum(first)
    inner_first = torch.searchsorted(full_up.contiguous(), stops).maximum(first).minimum(last)
    inner_last = (
        torch.searchsorted(full_low.contiguous(), starts, right=True).minimum(last).maximum(inner_first)
    )
    return torch.stack((first, inner_first, inner_last, last), dim=2).to(torch.int32)
