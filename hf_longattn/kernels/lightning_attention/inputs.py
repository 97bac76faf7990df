"""What one scan reads: the same for every implementation."""

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """The tensors of a scan.

    Args:
        query: (B, heads, T, K); the number of heads of each of the three divides H.
        key: (B, heads, T, K).
        value: (B, heads, T, V).
        slopes: (H,).
        state: (B or documents, H, K, V) entering at the first token (the last one if time runs backwards), or
            None.
        cu_seqlens: (documents + 1,) bounds of packed documents, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    state: Tensor | None
    cu_seqlens: Tensor | None
