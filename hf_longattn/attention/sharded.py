"""Attention on a cache that is cut along the sequence over the ranks of a group.

A few new tokens are the same on every rank: each attends its own keys, and one reduction joins the results.
A run of the prompt is cut among the ranks, and what is fewer bytes travels. In the first chunks of a prompt
that is keys and values, of which most models have fewer heads: each rank attends its own queries to those of
all. Behind a longer cache it is queries: every rank attends those of all to the keys it holds, and each gets
the partial results of its own queries back. What travels does so while the ranks attend to what they have.
Layers with a window keep a short one everywhere. Keys and values in 8 bits travel as they are, with their
scales.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_longattn.attention.exact import (
    MAX_DECODE_QUERIES,
    Options,
    attend_many,
    of_one_dtype,
    unsupported,
)
from hf_longattn.cache.placement import Slices
from hf_longattn.cache.quantized import scale_bytes, scales_of
from hf_longattn.cache.shares import Shard, ShardedLayer, ShardedSlidingLayer, ShardedStates
from hf_longattn.kernels.blockwise_attention.sdpa import key_tile, prefix_pieces
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_over_first
from hf_longattn.masking import LazyMask
from hf_longattn.parallel.reduction import ReturningPartials, tree_merge


def sharded_attention(
    query: Tensor, key: ShardedStates, value: Tensor, mask: LazyMask | Tensor | None, options: Options
) -> Tensor:
    """Softmax attention over the keys of all ranks.

    Args:
        query: (B, H, T, K), the same on every rank, or this rank's slices of a run.
        key: (B, G, S, K), this rank's share, in the order of its positions, as the cache returned it.
        value: (B, G, S, V).
        mask: the `LazyMask` of the whole sequence.
        options: what the call asks beyond query, key and value.

    Returns:
        (B, T, H, V), contiguous, in the dtype of `query`.

    Raises:
        ValueError: a mask or an option that is not supported over several processes.
    """
    shard, held = key.shard, key.held
    if isinstance(value, ShardedStates):
        value = value.held
    run, scales = _run_mask(mask, options, shard), scales_of(held)
    query = of_one_dtype(query)[0]
    if scales is None:
        held, value = of_one_dtype(held, value)
    if isinstance(shard.layer, ShardedSlidingLayer):
        assert shard.slices is not None
        states = _whole_run(key, held, value, shard.slices)
        output = _attend_window(query, *states, run, options, shard.slices)
    elif shard.slices is not None:
        output = _attend_run(query, _States(held, value, scales), run, options, shard, shard.slices)
    else:
        output = _attend_few(query, _States(held, value, scales), run, options, shard)
    return output.transpose(1, 2).contiguous()


class _States(NamedTuple):
    """Keys and values of some tokens, as the cache keeps them.

    Args:
        key: (B, G, S, K).
        value: (B, G, S, V).
        scales: (B, G, S, 2) fp32 where they are in 8 bits, else None.
    """

    key: Tensor
    value: Tensor
    scales: Tensor | None

    @property
    def row_bytes(self) -> int:
        """Bytes of one token of one head."""
        width = self.key.shape[3] + self.value.shape[3]
        return width * self.key.element_size() + scale_bytes(self.key.dtype)

    def part(self, columns: slice) -> "_States":
        """Those of some of the tokens."""
        scales = None if self.scales is None else self.scales[:, :, columns]
        return _States(self.key[:, :, columns], self.value[:, :, columns], scales)

    def together(self) -> Tensor:
        """(B, S, G, K + V, and the bytes of two scales where there are some), as they travel."""
        parts = [self.key, self.value]
        if self.scales is not None:
            parts = [part.view(torch.int8) for part in (*parts, self.scales)]
        return torch.cat([part.transpose(1, 2) for part in parts], -1)

    def apart(self, together: Tensor) -> "_States":
        """What `together` made of other tokens, whose strides follow from their shape alone where B = 1.

        cuDNN's plans then serve every prompt, whatever room its cache has: see `_tokens_together`.
        """
        together = together[0][None] if len(together) == 1 else together
        ends = [self.key.shape[3], self.key.shape[3] + self.value.shape[3]]
        key, value, rest = together.transpose(1, 2).tensor_split(ends, -1)
        if self.scales is None:
            return _States(key, value, None)
        scales = rest.contiguous().view(self.scales.dtype)
        return _States(key.view(self.key.dtype), value.view(self.value.dtype), scales)


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


def _attend_few(query: Tensor, states: _States, mask: LazyMask, options: Options, shard: Shard) -> Tensor:
    held, options = _held(mask, shard, query.device), _own_options(options, shard)
    if query.shape[2] > MAX_DECODE_QUERIES:
        output, lse = attend_many(query, *states, held, options)
    else:
        terms = {"scale": options.scale, "softcap": options.softcap, "sinks": options.sinks}
        key, value, scales = states
        output, lse = decode_attention(query, key, value, mask=held, scales=scales, **terms)
    return tree_merge(shard.group, output, lse)[0]


def _attend_run(
    query: Tensor, states: _States, mask: LazyMask, options: Options, shard: Shard, slices: Slices
) -> Tensor:
    limits = mask.key_range(query.device)
    is_dense = limits is not None and limits.is_dense and options.softcap is None
    if is_dense and _keys_are_fewer(query, states, shard.layer, slices):
        return _attend_by_keys(query, states, options, shard, slices)
    held = None if is_dense else _held_by_rank(mask, shard, slices, query.device)
    return _attend_by_queries(query, shard, _Run(states, _own_options(options, shard), slices, held))


def _keys_are_fewer(query: Tensor, states: _States, layer: ShardedLayer, slices: Slices) -> bool:
    """Whether keys and values so far are no more bytes than queries and results of the run.

    A rank receives (P - 1) / P of S G (K + V) numbers, or of T H (K + V), S tokens so far and T of the run.
    Where both are equal, keys are better: they are sent before there is work, and nothing has to come back.
    """
    width = query.shape[3] + states.value.shape[3]
    keys = layer.length * states.key.shape[1] * states.row_bytes
    return layer.placement.is_even and keys <= slices.count * query.shape[1] * width * query.element_size()


def _attend_by_keys(query: Tensor, held: _States, options: Options, shard: Shard, slices: Slices) -> Tensor:
    """The queries of this rank over the keys of all, in causal order; keys come while its own are attended.

    Its two slices make a triangle over themselves. Both see the first slices of the ranks before it, and all
    that lies before the run, in whatever order of the ranks. Its second slice sees those of the ranks behind
    it too, first and second. So three messages are keys that are seen whole.
    """
    rank, piece, states = slices.rank, slices.piece, held.together()
    past, own = states.split([states.shape[1] - 2 * piece, 2 * piece], 1)
    # The message that most work goes before comes last.
    coming = [shard.group.begin_gather(part) for part in (*own.split(piece, 1), past) if part.shape[1]]
    queries = _tokens_together(query).transpose(1, 2)
    # Every query meets its own slice once, and so its sink.
    parts = [attend_many(queries, *held.apart(own), KeyRange(causal=True), options)]
    whole = _Whole(held, replace(options, sinks=None))
    firsts = coming[0].wait()
    parts += whole.attend(queries, firsts[:rank], piece)
    later = _tokens_together(query[:, :, piece:]).transpose(1, 2)
    behind = whole.attend(later, firsts[rank + 1 :], piece)
    behind += whole.attend(later, coming[1].wait()[rank + 1 :], piece)
    if past.shape[1]:
        parts += whole.attend(queries, coming[2].wait(), slices.count)
    output, lse = merge_over_first(parts)
    if not behind:
        return output
    second = output[:, :, piece:], lse[:, :, piece:].contiguous()
    joined = merge_over_first([second, *behind])[0]
    return torch.cat([part.transpose(1, 2) for part in (output[:, :, :piece], joined)], 1).transpose(1, 2)


@dataclass(frozen=True)
class _Whole:
    """Attention over keys and values of some ranks, all of which the queries see.

    Args:
        like: keys and values of this rank, as the others keep theirs.
        options: of attention.
    """

    like: _States
    options: Options

    def attend(self, queries: Tensor, together: Tensor, unit: int) -> list[tuple[Tensor, Tensor]]:
        """Output and lse of each of a few parts.

        Args:
            queries: (B, H, T, K).
            together: (ranks, B, S, G, ...), what `_States.together` made on each.
            unit: tokens, of which whole numbers come back.
        """
        # As they lie where B = 1; else they are copied.
        row = together.transpose(0, 1).flatten(1, 2)
        pieces = prefix_pieces(row.shape[1], unit, key_tile(queries, row.transpose(1, 2)))
        parts = [self.like.apart(row[:, columns]) for columns in pieces]
        return [attend_many(queries, *part, None, self.options) for part in parts]


def _attend_by_queries(query: Tensor, shard: Shard, run: "_Run") -> Tensor:
    """The queries of all ranks over the keys of this one, and what the others found for its own.

    Queries travel in two halves, the first slices of all ranks and then the second ones. This rank attends
    its own first slice while those of the others come, and its own second one while results go back.
    """
    slices = run.slices
    halves = [_tokens_together(half) for half in query.split(slices.piece, dim=2)]
    coming = [shard.group.begin_gather(half) for half in halves]
    own = [run.attend(halves[0].transpose(1, 2), 0, slice(slices.rank, slices.rank + 1))]
    returning = []
    for half, queries in enumerate(coming):
        output, lse = run.attend_others(queries.wait(), half)
        returning.append(ReturningPartials(shard.group, output, lse))
    own.append(run.attend(halves[1].transpose(1, 2), 1, slice(slices.rank, slices.rank + 1)))
    merged = [others.merge(*part) for others, part in zip(returning, own, strict=True)]
    return torch.cat([output.transpose(1, 2) for output in merged], 1).transpose(1, 2)


def _tokens_together(states: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, H, K), contiguous, in the strides of a tensor of its own where B = 1, too.

    cuDNN builds a plan for every set of strides it has not seen: those of one rank's tokens and of another's
    must not differ.
    """
    return states.transpose(1, 2).flatten(0, 1).contiguous().unflatten(0, (states.shape[0], states.shape[2]))


@dataclass(frozen=True)
class _Run:
    """A run of queries of all ranks over this rank's keys.

    Args:
        states: those of the tokens before the run and of this rank's two slices.
        options: of attention.
        slices: the run.
        held: where not causal order alone decides: key mask, and lower and upper bound by rank.
    """

    states: _States
    options: Options
    slices: Slices
    held: "_HeldByRank | None"

    def attend_others(self, queries: Tensor, half: int) -> tuple[Tensor, Tensor]:
        """One slice of every other rank over all keys that it may see here.

        Args:
            queries: (P, B, piece, H, K), this rank's among them.
            half: 0 for the first slices of the ranks, 1 for the second ones.

        Returns:
            output (P - 1, B, piece, H, V) and lse (P - 1, B, H, piece), -inf where no key is seen.
        """
        rank, piece = self.slices.rank, self.slices.piece
        outputs, sums = [], []
        for some in (slice(0, rank), slice(rank + 1, len(queries))):
            count = some.stop - some.start
            # One sequence as it lies where B = 1; else it is copied.
            rows = queries[some].transpose(0, 1).flatten(1, 2).transpose(1, 2)
            output, lse = self.attend(rows, half, some) if count else self._nothing(rows)
            outputs.append(output.transpose(1, 2).unflatten(1, (count, piece)).transpose(0, 1))
            sums.append(lse.unflatten(2, (count, piece)).permute(2, 0, 1, 3))
        return _joined(outputs), _joined(sums)

    def attend(self, queries: Tensor, half: int, ranks: slice) -> tuple[Tensor, Tensor]:
        """A slice of neighbouring ranks, this one alone or others, over all keys that it may see here.

        Args:
            queries: (B, H, T, K), T = piece a rank.
            half: 0 for the first slices, 1 for the second ones.
            ranks: whose they are.

        Returns:
            output (B, H, T, V) and lse (B, H, T), nobody else's.
        """
        if self.held is not None:
            return attend_many(queries, *self.states, self.held.of(half, ranks), self.options)
        rank, piece = self.slices.rank, self.slices.piece
        past = self.states.key.shape[2] - 2 * piece
        if ranks.start == rank:
            return self._attend_dense(queries, slice(0, past + (half + 1) * piece), is_causal=True)
        # Of the 2P pieces of the run, this rank holds two, of which the second slices of ranks before it see
        # both and their first slices none. The slices of ranks behind it lie between its two.
        seen = past + 2 * half * piece if ranks.start < rank else past + piece
        pieces = prefix_pieces(seen, piece, key_tile(queries, self.states.key))
        parts = [self._attend_dense(queries, columns) for columns in pieces]
        if not parts:
            return self._nothing(queries)
        return merge_over_first(parts)

    def _attend_dense(
        self, queries: Tensor, columns: slice, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Causal order alone, which torch's own kernels take."""
        # Every row meets the first key of rank 0, and so its sink, once.
        options = self.options if columns.start == 0 else replace(self.options, sinks=None)
        return attend_many(queries, *self.states.part(columns), KeyRange(causal=is_causal), options)

    def _nothing(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        output = queries.new_empty((*queries.shape[:3], self.states.value.shape[3]))
        dtype = torch.promote_types(queries.dtype, torch.float32)
        return output, queries.new_full(queries.shape[:3], -torch.inf, dtype=dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts along their first dimension, without a copy where only one holds anything."""
    full = [part for part in parts if len(part)]
    return full[0] if len(full) == 1 else torch.cat(parts)


class _HeldByRank(NamedTuple):
    """What the queries of a run may see of this rank's keys.

    Args:
        lower: (P, B or 1, 2 * piece), the first visible key of each rank's queries, or None.
        upper: (P, B or 1, 2 * piece), one past the last.
        key_mask: (B or 1, S), or None.
    """

    lower: Tensor | None
    upper: Tensor | None
    key_mask: Tensor | None

    def of(self, half: int, ranks: slice) -> KeyRange:
        """The range of one slice, the first or the second, of some ranks."""
        lower, upper = (
            None if bound is None else bound[ranks].chunk(2, -1)[half].transpose(0, 1).flatten(1)
            for bound in (self.lower, self.upper)
        )
        return KeyRange(lower=lower, upper=upper, key_mask=self.key_mask)


def _held_by_rank(mask: LazyMask, shard: Shard, slices: Slices, device: torch.device) -> _HeldByRank:
    if "held by rank" not in mask.derived:
        held = _held(mask, shard, device)
        lower, upper = (
            None if bound is None else slices.by_rank(bound[:, None, :, None])[:, :, 0, :, 0]
            for bound in (held.lower, held.upper)
        )
        mask.derived["held by rank"] = _HeldByRank(lower, upper, held.key_mask)
    return mask.derived["held by rank"]


def _whole_run(key: ShardedStates, held: Tensor, value: Tensor, slices: Slices) -> tuple[Tensor, Tensor]:
    """Keys and values of a window layer for the whole run and the window before it.

    The first layer that attends to them appends them to the cache, and those that share its keys find them.
    """
    run = key.run
    if run is None:
        group, layer, _ = key.shard
        states = slices.in_order(group.gather(torch.cat([held, value], -1)))
        run = key.run = layer.append_run(*states.split([held.shape[-1], value.shape[-1]], -1))
    return run


def _attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: LazyMask,
    options: Options,
    slices: Slices,
) -> Tensor:
    rows = _bounded(mask, query.device)
    own = KeyRange(
        lower=None if rows.lower is None else slices.take(rows.lower, 1),
        upper=None if rows.upper is None else slices.take(rows.upper, 1),
        key_mask=rows.key_mask,
    )
    return attend_many(query, key, value, scales_of(key), own, options)[0]


def _own_options(options: Options, shard: Shard) -> Options:
    # A sink is one more logit of the row: it is counted once, by rank 0.
    return options if shard.group.rank == 0 else replace(options, sinks=None)


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
    key_mask = limits.key_mask
    if key_mask is not None:
        # Slots that a graph is still to fill may lie past the mask: the upper bound hides them.
        key_mask = key_mask[:, positions.clamp(max=mask.kv_length - 1)]
    return KeyRange(lower=lower, upper=upper, key_mask=key_mask)
