"""Prompts with padding on their left, a row at a time: without its padding a row is causal and nothing else.

Torch's own kernels, the fastest for dense causal attention, take no padding. Where the host knows how many
slots each row leaves empty, a row's keys are cut there, which costs nothing, and the kernels serve it.
"""

from torch import Tensor

from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import LazyMask, Pattern

# Numbers of empty slots in a batch: each makes key lengths of its own, for which kernels are set up anew.
_MOST_LENGTHS = 2


def empty_slots(mask: object) -> list[int] | None:
    """How many of the first keys of each row are padding, where the rest of the mask is causal order alone.

    Args:
        mask: of the call.

    Returns:
        a number a row, or None where the host does not know, or where the rows need too many shapes.
    """
    if not isinstance(mask, LazyMask) or mask.runs is None or mask.padding is None:
        return None
    if mask.pattern != Pattern(causal=True) or mask.q_length == 1:
        return None
    q_offset, kv_offset = mask.q_offset, mask.kv_offset
    if not isinstance(q_offset, int) or not isinstance(kv_offset, int):
        return None
    end = kv_offset + mask.kv_length
    if q_offset + mask.q_length != end or min(mask.runs.end) < end:
        return None
    slots = [min(max(first - kv_offset, 0), mask.kv_length) for first in mask.runs.first]
    few = len(slots) == mask.batch_size and len(set(slots)) <= _MOST_LENGTHS
    return slots if few else None


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, slots: list[int], scale: float | None, sinks: Tensor | None
) -> Tensor:
    """Causal attention of rows that begin behind their empty slots.

    Args:
        query: (B, H, T, K), the last T positions of each row.
        key: (B, G, S, K).
        value: (B, G, S, V).
        slots: from `empty_slots`.
        scale: factor on the scores.
        sinks: (H,) fp32, or None.

    Returns:
        (B, H, T, V); zeros where a query lies in the padding.
    """
    B, H, T, _ = query.shape
    # (B, T, H, V) in memory: each row is contiguous, and so is what the layer takes next.
    output = query.new_empty(B, T, H, value.shape[3]).transpose(1, 2)
    for row, first in enumerate(slots):
        # Queries of the padding see nothing.
        begin = min(max(first - (key.shape[2] - T), 0), T)
        output[row, :, :begin] = 0
        if begin < T:
            own, seen = slice(begin, None), slice(first, None)
            output[row : row + 1, :, own] = blockwise_attention(
                query[row : row + 1, :, own],
                key[row : row + 1, :, seen],
                value[row : row + 1, :, seen],
                scale=scale,
                mask=KeyRange(causal=True),
                sinks=sinks,
            )[0]
    return output
