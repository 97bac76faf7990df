"""Layers of a cache that is cut along the sequence: what one rank of a group holds of them.

A full-attention layer holds this rank's share of the tokens and reports the length of the whole sequence to
transformers. A layer with a window holds the last window, the same on every rank. Keys that are not all there
are go to the model as `ShardedStates`, by which our attention function knows, and which no other one takes.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hf_longattn.cache.guarded_states import GuardedStates
from hf_longattn.cache.placement import BLOCK, Placement, Slices
from hf_longattn.cache.preallocated import (
    Clock,
    PreallocatedLayer,
    PreallocatedSlidingLayer,
    rounded_capacity,
)
from hf_longattn.cache.quantized import QuantizedLayer, QuantizedSlidingLayer
from hf_longattn.kernels.cache_write import cache_write


class Shard(NamedTuple):
    """What the attention function must know of keys that are one rank's share.

    Args:
        group: the `SequenceGroup` over which partial results are joined.
        layer: the layer that the keys come from.
        slices: the run that the ranks compute together, or None where every rank computes every token.
    """

    group: Any
    layer: Any
    slices: Slices | None


class ShardedStates(GuardedStates):
    """Keys or values of one rank, where attention must see those of all: their shape, without storage.

    Values in the dtype of the model stay a tensor: no attention does without keys.

    Args:
        held: (B, G, S, K), those of this rank.
        shard: what they are a part of.
        dtype: that of the model, which is not that of `held` in 8 bits.

    Attributes:
        run: keys and values of a window layer's whole run with the window before it, once they are appended.
            Layers that read the keys of an earlier one (`num_kv_shared_layers`) are given them here, too.
    """

    held: Tensor
    shard: Shard
    run: tuple[Tensor, Tensor] | None

    def __new__(cls, held: Tensor, shard: Shard, dtype: torch.dtype) -> "ShardedStates":
        """A tensor in the shape of `held`."""
        states = cls.empty(held.shape, dtype, held.device)
        states.held, states.shard, states.run = held, shard, None
        return states

    def refuse(self, caller: str) -> NoReturn:
        """Names the implementations that ask the other ranks.

        Args:
            caller: what was about to take this rank's keys for all there are.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"`past_key_values` is a cache shared by {self.shard.group.world_size} processes, of which each "
            "holds a share of the keys; only 'tree_attention' and 'lightning_attention' read those of all, "
            f"got {caller}. Pass a fresh cache, for this one may hold a part of the call, and prepare the "
            "model with `prepare_generation(model, accelerator=...)` to share it."
        )


def share_capacity(capacity: int, world_size: int) -> int:
    """Slots that one rank makes for its share of `capacity` tokens.

    Args:
        capacity: tokens of the whole sequence; 0 makes none.
        world_size: P.
    """
    # Shares differ by a block, and by the remainders of prompts that do not divide evenly.
    share = -(-capacity // world_size)
    needed = share + share // 128 + 4 * BLOCK if capacity else 0
    return rounded_capacity(needed)


def place_next(layer: Any, count: int) -> None:
    """Gives out the next tokens, if no layer before this one has."""
    if layer.placement.length != layer.length:
        return
    if layer.slices is None:
        layer.placement.place(count)
    else:
        layer.placement.place_slices(layer.slices)


def roomier(layer: Any, count: int) -> int:
    """The slots that a layer needs for `count` more tokens of the whole sequence, the same on every rank."""
    needed = layer.placement.most(layer.length + count) + 1
    if needed <= layer.capacity:
        return layer.capacity
    return needed + needed // 4 if layer.is_initialized else needed


def mask_sizes(layer: Any, query_length: int) -> tuple[Any, Any]:
    """(tokens of the whole sequence, 0) once the new tokens of all ranks are appended."""
    if layer.clock is not None:
        return layer.group_of_ranks.world_size * layer.capacity, layer.clock.offset
    return layer.length + (query_length if layer.slices is None else layer.slices.count), 0


class ShardedLayer(PreallocatedLayer):
    """This rank's share of one full-attention layer.

    Args:
        group: the `SequenceGroup`.
        placement: who holds what, shared by the layers of a cache.
        capacity: tokens of the whole sequence to make room for, a share of them here.
    """

    def __init__(self, group: Any, placement: Placement, capacity: int = 0) -> None:
        super().__init__(share_capacity(capacity, group.world_size))
        self.group_of_ranks, self.placement = group, placement
        self.length = 0
        self.slices: Slices | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps this rank's share of the new tokens; returns its share of all, the keys as `ShardedStates`.

        Args:
            key_states: (B, G, T, K), all new tokens, or this rank's slices of a run.
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        keys, values = self._write(key_states, value_states)
        return ShardedStates(keys, Shard(self.group_of_ranks, self, self.slices), keys.dtype), values

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if self.clock is not None:
            return self._write_by_clock(self.clock, key_states, value_states)
        count = key_states.shape[2] if self.slices is None else self.slices.count
        place_next(self, count)
        self.make_room(count)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        own = self.placement.own_of(self.length, count) if self.slices is None else [slice(None)]
        for part in own:
            self._append(key_states[:, :, part], value_states[:, :, part])
        self.length += count
        return self.keys, self.values  # type: ignore[return-value]

    def _write_by_clock(
        self, clock: Clock, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The clock counts the tokens of all ranks; what is not this rank's goes to the spare slot.
        assert self._keys is not None and self._values is not None
        spare = self.capacity - 1
        slots = self.placement.slots_of(clock.index, spare)
        cache_write(self._keys, self._values, slots, key_states, value_states)
        return self._keys[:, :, :spare], self._values[:, :, :spare]

    def positions(self, device: torch.device) -> Tensor:
        """Positions of the keys that `update` returned, ascending."""
        if self.clock is not None:
            return self.placement.look_ahead(self.capacity - 1, device)
        return self.placement.positions(self.end, device)

    def set_clock(self, clock: Clock) -> None:
        """Tells the device the length of the whole sequence, and the positions of all slots."""
        clock.set(self.length, 0)
        self.placement.look_ahead(self.capacity - 1, self.device)

    def make_room(self, count: int) -> None:
        """Sees to it that `count` more tokens of the whole sequence fit, at the same step on every rank.

        Args:
            count: tokens.
        """
        capacity = roomier(self, count)
        if capacity == self.capacity:
            return
        self.capacity = capacity
        if self.is_initialized:
            self._replace_buffers(lambda filled: filled)

    def advanced(self, count: int) -> None:
        """Counts tokens of the whole sequence that a CUDA graph has written."""
        place_next(self, count)
        self.length += count
        self.end = self.placement.count(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys of the whole sequence, 0) once the new tokens of all ranks are appended."""
        return mask_sizes(self, query_length)

    def get_seq_length(self) -> Any:
        """Tokens of the whole sequence."""
        return self.length if self.clock is None else self.clock.write + self.clock.offset

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over this rank's share.

        Args:
            state: as `state` gives it, of the tokens that the placement says by now.
            length: tokens of the whole sequence.
        """
        self.reset()
        if state:
            self.make_room(length)
            self._append(state["keys"], state["values"])
        self.length = length

    def _drop(self, count: int) -> None:
        self.length -= count
        self.end = self.placement.count(self.length)

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        super().reset()
        self.length = 0


class ShardedSlidingLayer(PreallocatedSlidingLayer):
    """The last window of one layer, the same on every rank.

    Args:
        group: the `SequenceGroup`.
        window: tokens that a query sees, itself included.
        capacity: tokens to make room for at the first update.
    """

    def __init__(self, group: Any, window: int, capacity: int = 0) -> None:
        super().__init__(window, capacity)
        self.group_of_ranks = group
        self.slices: Slices | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends tokens that every rank computed; slices of a run wait for `append_run`.

        Args:
            key_states: (B, G, T, K), all new tokens, or this rank's slices of a run.
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        if self.slices is None:
            return super().update(key_states, value_states)
        shard = Shard(self.group_of_ranks, self, self.slices)
        return ShardedStates(key_states, shard, key_states.dtype), value_states

    def append_run(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a whole run, gathered from the ranks; returns it with the window before it."""
        return self._write(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys that attention will see, position of the first) once the new tokens are appended."""
        return super().get_mask_sizes(query_length if self.slices is None else self.slices.count)


class ShardedQuantizedLayer(QuantizedLayer, ShardedLayer):
    """This rank's share of one full-attention layer in 8 bits; the scales are shared as their keys are.

    Args:
        group: the `SequenceGroup`.
        placement: who holds what, shared by the layers of a cache.
        cache_dtype: int8 or float8_e4m3fn.
        capacity: tokens of the whole sequence to make room for, a share of them here.
    """

    def __init__(self, group: Any, placement: Placement, cache_dtype: torch.dtype, capacity: int = 0) -> None:
        self.scales = ShardedLayer(group, placement, capacity)
        ShardedLayer.__init__(self, group, placement, capacity)
        self.cache_dtype = cache_dtype

    @property
    def slices(self) -> Slices | None:  # type: ignore[override]
        """The run that a forward carries slices of, or None."""
        return self.scales.slices

    @slices.setter
    def slices(self, slices: Slices | None) -> None:
        """Tells the scales, too."""
        self.scales.slices = slices

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantises and keeps this rank's share; returns its share of all, both as `ShardedStates`.

        Args:
            key_states: (B, G, T, K), all new tokens, or this rank's slices of a run.
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        keys, values = self._write(key_states, value_states)
        shard = Shard(self.group_of_ranks, self, self.slices)
        # Attention of torch compares the dtypes before anything could refuse it.
        return (
            ShardedStates(keys, shard, key_states.dtype),
            ShardedStates(values, shard, value_states.dtype),
        )


class ShardedQuantizedSlidingLayer(ShardedSlidingLayer, QuantizedSlidingLayer):
    """The last window of one layer in 8 bits, the same on every rank.

    Args:
        group: the `SequenceGroup`.
        cache_dtype: int8 or float8_e4m3fn.
        window: tokens that a query sees, itself included.
        capacity: tokens to make room for at the first update.
    """

    def __init__(self, group: Any, cache_dtype: torch.dtype, window: int, capacity: int = 0) -> None:
        QuantizedSlidingLayer.__init__(self, cache_dtype, window, capacity)
        self.group_of_ranks = group
        self.slices: Slices | None = None
