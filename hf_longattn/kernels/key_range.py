"""`KeyRange`: which keys each query may see, in memory linear in the length.

Causal order, sliding windows, left and right padding, packed documents and chunks all give every query one
interval of keys, and the intersection of intervals is an interval. So one description serves every kernel:

    query t of row b sees key s  <=>  lower[b, t] <= s < upper[b, t]  and  key_mask[b, s]
                                      and, where `causal`, s <= t + S - T
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyRange:
    """An interval of visible keys for each query; every field left out restricts nothing.

    Args:
        causal: query t sees keys up to t + S - T (bottom-right aligned). Known on the host, so that a dense
            causal call can be handed to torch's own attention.
        lower: (B or 1, T) int32, the first visible key.
        upper: (B or 1, T) int32, one past the last visible key. May change on the device between two replays
            of a CUDA graph.
        key_mask: (B or 1, S) bool, True where a key exists: padding with holes.
    """

    causal: bool = False
    lower: Tensor | None = None
    upper: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing but (perhaps) causal order restricts the keys."""
        return self.lower is None and self.upper is None and self.key_mask is None

    def narrowed(self, lower: Tensor | None = None, upper: Tensor | None = None) -> "KeyRange":
        """The intersection with another interval a query.

        Args:
            lower: (B or 1, T) integer, the first visible key, or None.
            upper: (B or 1, T) integer, one past the last visible key, or None.
        """
        if lower is not None:
            lower = lower.to(torch.int32)
            lower = lower if self.lower is None else torch.maximum(self.lower, lower)
        if upper is not None:
            upper = upper.to(torch.int32)
            upper = upper if self.upper is None else torch.minimum(self.upper, upper)
        lower = self.lower if lower is None else lower
        upper = self.upper if upper is None else upper
        return KeyRange(self.causal, lower, upper, self.key_mask)

    def masked(self, key_mask: Tensor) -> "KeyRange":
        """The intersection with a (B or 1, S) bool mask of existing keys."""
        both = key_mask if self.key_mask is None else self.key_mask & key_mask
        return KeyRange(self.causal, self.lower, self.upper, both)

    def to(self, device: torch.device) -> "KeyRange":
        """The same range with its tensors on `device`."""
        tensors = (self.lower, self.upper, self.key_mask)
        return KeyRange(self.causal, *(None if tensor is None else tensor.to(device) for tensor in tensors))

    def tile(
        self, rows: slice, columns: slice, num_queries: int, num_keys: int, device: torch.device
    ) -> Tensor:
        """The visibility of one tile.

        Args:
            rows: queries of the tile, with start and stop.
            columns: keys of the tile, with start and stop.
            num_queries: T of the whole problem.
            num_keys: S of the whole problem.
            device: where to build the tile.

        Returns:
            bool, (B or 1, 1, rows, columns), True where the query may see the key.
        """
        key = torch.arange(columns.start, columns.stop, device=device)
        query = torch.arange(rows.start, rows.stop, device=device)
        visible = torch.ones(1, len(query), len(key), dtype=torch.bool, device=device)
        if self.causal:
            visible = visible & (key <= query[:, None] + (num_keys - num_queries))
        if self.lower is not None:
            visible = visible & (key >= self.lower[:, rows, None])
        if self.upper is not None:
            visible = visible & (key < self.upper[:, rows, None])
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, columns]
        return visible[:, None]


def check_mask(mask: KeyRange, query: Tensor, key: Tensor) -> None:
    """Refuses a `mask` that does not fit the tensors of an attention.

    Args:
        mask: what the caller gave.
        query: (B, H, T, K).
        key: (B, G, S, K).

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: a mask that is no `KeyRange`, or dtypes that do not fit.
    """
    if not isinstance(mask, KeyRange):
        raise TypeError(
            f"`mask` must be a KeyRange or None, got {type(mask).__name__}; a tensor, bool or added to the "
            "scores, is the `bias` of blockwise_attention."
        )
    B, T, S = query.shape[0], query.shape[2], key.shape[2]
    for name, tensor, width in (
        ("lower", mask.lower, T),
        ("upper", mask.upper, T),
        ("key_mask", mask.key_mask, S),
    ):
        if tensor is None:
            continue
        if tensor.dim() != 2 or tensor.shape[0] not in (1, B) or tensor.shape[1] != width:
            raise ValueError(
                f"`mask.{name}` must be ({B} or 1, {width}) for {B=}, {T=}, {S=}, got {tuple(tensor.shape)}."
            )
        if tensor.device != query.device:
            raise ValueError(
                f"`mask.{name}` must be on {query.device} like `query`, got {tensor.device}; "
                "use `mask.to(device)`."
            )
        if (tensor.dtype == torch.bool) != (name == "key_mask") or tensor.is_floating_point():
            wanted = "bool" if name == "key_mask" else "an integer dtype"
            raise TypeError(f"`mask.{name}` must be {wanted}, got {tensor.dtype}.")
