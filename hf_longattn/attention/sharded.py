"""Attention on a cache that is cut along the sequence over the ranks of a group.

A few new tokens are the same on every rank: each attends its own keys, and one reduction joins the results.
A run of the prompt is cut among the ranks: the queries of all are gathered, every rank attends them to the
keys it holds, and each gets the partial results of its own queries back. Keys never travel, but for layers
with a window, which keep a short one everywhere.
"""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.attention.exact import MAX_DECODE_QUERIES, Options, unsupported
from hf_longattn.cache.placement import Slices
from hf_longattn.cache.sharded import Shard, ShardedLayer, ShardedSlidingLayer
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.blockwise_attention.sdpa import prefix_pieces
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_partials
from hf_longattn.masking import LazyMask
from hf_longattn.parallel.reduction import exchange_merge, tree_merge


def sharded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask | Tensor | None, options: Options, shard: Shard
) -> Tensor:
    """Softmax attention over the keys of all ranks.

    Args:
        query: (B, H, T, K), the same on every rank, or this rank's slices of a run.
        key: (B, G, S, K), this rank's share, in the order of its positions.
        value: (B, G, S, V).
        mask: the `LazyMask` of the whole sequence.
        options: what the call asks beyond query, key and value.
        shard: what the cache tagged `key` with.

    Returns:
        (B, T, H, V), contiguous, in the dtype of `query`.

    Raises:
        ValueError: a mask or an option that is not supported over several processes.
    """
    run = _run_mask(mask, options, shard)
    if isinstance(shard.layer, ShardedSlidingLayer):
        assert shard.slices is not None
        output = _attend_window(query, key, value, run, options, shard, shard.slices)
    elif shard.slices is not None:
        output = _attend_run(query, key, value, run, options, shard, shard.slices)
    else:
        output = _attend_few(query, key, value, run, options, shard)
    return output.transpose(1, 2).contiguous()


def _run_mask(mask: LazyMask | Tensor | None, options: Options, shard: Shard) -> LazyMask:
    """The mask of the queries of all ranks, worked out once a forward from that of this rank's."""
    if (name := unsupported(mask, options)) is not None:
        raise ValueError(
            f"`{name}`: this kind of attention is not supported over several processes; masks must be "
            "made of causal order, windows, chunks and padding. Generate in one process."
        )
    assert isinstance(mask, LazyMask)
    if shard.slices is None:
        return mask
    if "run" not in mask.derived:
        mask.derived["run"] = LazyMask(
            mask.batch_size,
            shard.slices.count,
            mask.kv_length,
            mask.q_offset,
            mask.kv_offset,
            mask.mask_function,
            mask.padding,
            mask.device,
            mask.pattern,
            mask.runs,
        )
    return mask.derived["run"]


def _attend_few(
    query: Tensor, key: Tensor, value: Tensor, mask: LazyMask, options: Options, shard: Shard
) -> Tensor:
    held = _held(mask, shard, query.device)
    attend = decode_attention if query.shape[2] <= MAX_DECODE_QUERIES else blockwise_attention
    output, lse = attend(query, key, value, mask=held, **_terms(options, shard))
    return tree_merge(shard.group, output, lse)[0]


def _attend_run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask,
    options: Options,
    shard: Shard,
    slices: Slices,
) -> Tensor:
    queries = slices.in_order(shard.group.gather(query))
    terms = _terms(options, shard)
    limits = mask.key_range(query.device)
    if limits is not None and limits.is_dense and options.softcap is None:
        output, lse = _attend_dense_run(queries, key, value, slices, terms)
    else:
        held = _held(mask, shard, query.device)
        output, lse = blockwise_attention(queries, key, value, mask=held, **terms)
    lse = slices.by_rank(lse.unsqueeze(-1)).squeeze(-1)
    return exchange_merge(shard.group, slices.by_rank(output), lse)[0]


def _attend_dense_run(
    queries: Tensor, key: Tensor, value: Tensor, slices: Slices, terms: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A run under causal order alone, in dense calls, which torch's own kernels take.

    All queries see the keys held before the run. Of the two slices that this rank adds, queries before a
    slice see nothing, its own queries a causal square, and later ones all of it.
    """
    total = queries.new_zeros((*queries.shape[:3], value.shape[-1]))
    total_lse = queries.new_full(total.shape[:3], -torch.inf, dtype=_lse_dtype(queries))

    def add(rows: slice, columns: slice, causal: bool = False, sinks: Tensor | None = None) -> None:
        if rows.start == rows.stop or columns.start == columns.stop:
            return
        part, lse = blockwise_attention(
            queries[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            mask=KeyRange(causal=causal),
            **{**terms, "sinks": sinks},
        )
        merged = merge_partials(
            torch.stack([total[:, :, rows], part]), torch.stack([total_lse[:, :, rows], lse])
        )
        total[:, :, rows], total_lse[:, :, rows] = merged

    past, piece = key.shape[2] - 2 * slices.piece, slices.piece
    for columns in prefix_pieces(past, 2 * piece):
        add(slice(0, slices.count), columns)
    for own, first in zip(slices.own, (past, past + piece), strict=True):
        # Every row of rank 0 meets its first slice, and so its sink, once.
        sinks = terms["sinks"] if first == past else None
        columns = slice(first, first + piece)
        add(own, columns, causal=True, sinks=sinks)
        add(slice(own.stop, slices.count), columns, sinks=sinks)
    return total, total_lse


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask,
    options: Options,
    shard: Shard,
    slices: Slices,
) -> Tensor:
    states = slices.in_order(shard.group.gather(torch.cat([key, value], -1)))
    key, value = shard.layer.append_run(*states.split([key.shape[-1], value.shape[-1]], -1))
    rows = _bounded(mask, query.device)
    own = KeyRange(
        lower=None if rows.lower is None else slices.take(rows.lower, 1),
        upper=None if rows.upper is None else slices.take(rows.upper, 1),
        key_mask=rows.key_mask,
    )
    terms = {"scale": options.scale, "softcap": options.softcap, "sinks": options.sinks}
    return blockwise_attention(query, key, value, mask=own, **terms)[0]


def _terms(options: Options, shard: Shard) -> dict[str, Any]:
    # A sink is one more logit of the row: it is counted once, by rank 0.
    sinks = options.sinks if shard.group.rank == 0 else None
    return {"scale": options.scale, "softcap": options.softcap, "sinks": sinks}


def _bounded(mask: LazyMask, device: torch.device) -> KeyRange:
    """The range of a mask with causal order spelled out as an upper bound."""
    limits = mask.key_range(device)
    assert limits is not None
    if not limits.causal:
        return limits
    last = torch.arange(mask.q_length, device=device)[None] + (mask.kv_length - mask.q_length)
    bounded = limits.narrowed(upper=last + 1)
    return KeyRange(False, bounded.lower, bounded.upper, bounded.key_mask)


def _held(mask: LazyMask, shard: Shard, device: torch.device) -> KeyRange:
    """The range of a mask in the places of the keys that this rank holds, worked out once a forward."""
    if "held" not in mask.derived:
        mask.derived["held"] = _place(mask, shard.layer, device)
    return mask.derived["held"]


def _place(mask: LazyMask, layer: ShardedLayer, device: torch.device) -> KeyRange:
    limits = mask.key_range(device)
    assert limits is not None
    if limits.is_dense and mask.q_length == 1:
        return KeyRange()
    limits = _bounded(mask, device)
    positions = layer.positions(device)
    lower, upper = (
        None if bound is None else torch.searchsorted(positions, bound.long(), out_int32=True)
        for bound in (limits.lower, limits.upper)
    )
    # Slots that a graph is still to fill may lie past the mask: the upper bound hides them.
    inside = positions.clamp(max=mask.kv_length - 1)
    key_mask = None if limits.key_mask is None else limits.key_mask[:, inside]
    return KeyRange(lower=lower, upper=upper, key_mask=key_mask)
