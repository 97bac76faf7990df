"""Exact attention of many queries on keys and values in 8 bits: piece by piece.

The cache is never in 16 bits as a whole. A piece of it at a time is brought to the dtype of the queries,
attended, and merged with those before it by log-sum-exp. A query sees the 8-bit values of every token,
itself and its chunk included, so that nothing depends on how a prompt is cut into chunks.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.kernels.quantized_states import dequantized_states

# Tokens of a piece, all rows together: as long as a few chunks of a prompt, so that a merge is a small part
# of the work; 128 MiB of keys and values for 8 key heads of 128 in 16 bits.
PIECE_TOKENS = 32768

Attend = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor]]


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, scales: Tensor, attend: Attend
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all pieces.

    Args:
        query: (B, H, T, K).
        key: (B, G, S, K), int8 or float8_e4m3fn.
        value: (B, G, S, V), the same.
        scales: (B, G, S, 2) fp32.
        attend: called with key and value of a piece in the dtype of `query`, its columns, and whether it is
            the last, which holds the keys of the queries; returns output (B, H, T, V) and lse (B, H, T).

    Returns:
        output (B, H, T, V) in the dtype of `query`, and lse (B, H, T).
    """
    outputs, lses = None, None
    for columns in _pieces(query, key):
        factors = scales[:, :, columns]
        output, lse = attend(
            dequantized_states(key[:, :, columns], factors[..., :1], query.dtype),
            dequantized_states(value[:, :, columns], factors[..., 1:], query.dtype),
            columns,
            columns.stop == key.shape[2],
        )
        if outputs is None or lses is None:
            if columns.stop == key.shape[2]:
                return output, lse
            # The running result is kept in fp32: many merges in 16 bits would round as many times.
            outputs, lses = (
                output.new_zeros((2, *output.shape), dtype=lse.dtype),
                lse.new_zeros((2, *lse.shape)),
            )
            outputs[0], lses[0] = output, lse
        else:
            outputs[1], lses[1] = output, lse
            outputs[0], lses[0] = merge_partials(outputs, lses)
    assert outputs is not None and lses is not None
    return outputs[0].to(query.dtype), lses[0]


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    """Pieces from the first key on, so that those of a chunk are those of the next; the rest is one piece."""
    size = max(PIECE_TOKENS // max(query.shape[0], 1), 1)
    whole = max(key.shape[2] - query.shape[2], 0) // size
    for index in range(whole):
        yield slice(index * size, (index + 1) * size)
    yield slice(whole * size, key.shape[2])


def piece_of(limits: KeyRange | None, columns: slice, is_last: bool) -> KeyRange | None:
    """The range of a whole cache in the places of one piece.

    Args:
        limits: of the whole cache.
        columns: of the piece.
        is_last: the piece holds the keys of the queries; causal order hides nothing of the others.
    """
    if limits is None:
        return None
    lower, upper = (
        None if bound is None else bound - columns.start for bound in (limits.lower, limits.upper)
    )
    key_mask = None if limits.key_mask is None else limits.key_mask[:, columns]
    return KeyRange(limits.causal and is_last, lower, upper, key_mask)


def bias_of(bias: Tensor | None, columns: slice) -> Tensor | None:
    """The columns of a piece in a bias whose last dimension is 1 or that of the whole cache."""
    return bias if bias is None or bias.shape[-1] == 1 else bias[..., columns]
