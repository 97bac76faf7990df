"""The counter-based random generator of attention dropout, in plain torch.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns (counter, key)
into random words by ten rounds of multiplication and exclusive or. The counter here is (column, row, head,
batch) and the key is the seed, so an entry is dropped or kept whatever the tiling, and on every device alike.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of constant * word, in halves of 16 bits so that int64 holds the product."""
    low = (constant & 0xFFFF) * word
    middle = (constant >> 16) * word + (low >> 16)
    return middle >> 16, ((middle << 16) & _WORD) | (low & 0xFFFF)


def philox_words(seed: int, column: Tensor, row: Tensor, head: Tensor, batch: Tensor) -> Tensor:
    """The first output word of Philox-4x32-10.

    Args:
        seed: 64-bit key.
        column: int64 counter word 0; this and the other three broadcast together.
        row: int64 counter word 1.
        head: int64 counter word 2.
        batch: int64 counter word 3.

    Returns:
        int64 tensor of the broadcast shape, in [0, 2^32).
    """
    words = (column, row, head, batch)
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        high_a, low_a = _product(_ROUND_A, words[0])
        high_b, low_b = _product(_ROUND_B, words[2])
        words = (high_b ^ words[1] ^ key_0, low_b, high_a ^ words[3] ^ key_1, low_a)
        key_0, key_1 = (key_0 + _KEY_A) & _WORD, (key_1 + _KEY_B) & _WORD
    return words[0]


def drop_threshold(probability: float) -> int:
    """The word below which an entry is dropped: P(word < threshold) = probability up to 2^-32."""
    return min(round(probability * 2**32), _WORD)


def keep_tile(
    dropout: tuple[float, int], shape: tuple[int, int], rows: slice, columns: slice, device: torch.device
) -> Tensor:
    """Which entries of a tile of probabilities survive dropout.

    Args:
        dropout: (probability, seed).
        shape: (B, H).
        rows: queries of the tile, with start and stop.
        columns: keys of the tile, with start and stop.
        device: where to build the tile.

    Returns:
        bool, (B, H, rows, columns).
    """
    ranges = ((0, shape[0]), (0, shape[1]), (rows.start, rows.stop), (columns.start, columns.stop))
    counters = [
        torch.arange(*ends, device=device).view([-1] + [1] * (3 - dim)) for dim, ends in enumerate(ranges)
    ]
    return philox_words(dropout[1], *reversed(counters)) >= drop_threshold(dropout[0])
