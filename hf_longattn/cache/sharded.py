"""`ShardedCache`: a KV cache cut along the sequence over the ranks of a group.

Every full-attention layer holds this rank's share of the tokens and reports the length of the whole sequence
to transformers. Layers with a window hold the last window on every rank, which needs no communication to
decode. What a layer returns to the model is tagged with a `Shard`, by which the attention function knows that
the keys are not all there are.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_longattn.cache.long_context import LongContextCache
from hf_longattn.cache.placement import BLOCK, Placement, Slices
from hf_longattn.cache.preallocated import Clock, PreallocatedLayer, PreallocatedSlidingLayer

_TAG = "_hf_longattn_shard"


@dataclass(frozen=True)
class Shard:
    """What the attention function must know of keys that are one rank's share.

    Args:
        group: the `SequenceGroup` over which partial results are joined.
        layer: the layer that the keys come from.
        slices: the run that the ranks compute together, or None where every rank computes every token.
    """

    group: Any
    layer: Any
    slices: Slices | None


def shard_of(key: Tensor) -> Shard | None:
    """The `Shard` that a sharded cache tagged its keys with, or None."""
    return getattr(key, _TAG, None)


def share_capacity(capacity: int, world_size: int) -> int:
    """Slots that one rank makes for its share of `capacity` tokens.

    Args:
        capacity: tokens of the whole sequence; 0 makes none.
        world_size: P.
    """
    # Shares differ by a block, and by the remainders of prompts that do not divide evenly.
    share = -(-capacity // world_size)
    return share + share // 64 + 4 * BLOCK if capacity else 0


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
        """Keeps this rank's share of the new tokens; returns views of its share of all, tagged.

        Args:
            key_states: (B, G, T, K), all new tokens, or this rank's slices of a run.
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        if self.clock is not None:
            return self._write_by_clock(self.clock, key_states, value_states)
        count = key_states.shape[2] if self.slices is None else self.slices.count
        if self.placement.length == self.length:
            if self.slices is None:
                self.placement.place(count)
            else:
                self.placement.place_slices(self.slices)
        self.make_room(count)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        own = self.placement.own_of(self.length, count) if self.slices is None else [slice(None)]
        for part in own:
            self._append(key_states[:, :, part], value_states[:, :, part])
        self.length += count
        return self._tagged(self.keys), self.values  # type: ignore[return-value]

    def _tagged(self, keys: Tensor | None) -> Tensor:
        assert keys is not None
        setattr(keys, _TAG, Shard(self.group_of_ranks, self, self.slices))
        return keys

    def _write_by_clock(
        self, clock: Clock, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The clock counts the tokens of all ranks; what is not this rank's goes to the spare slot.
        assert self._keys is not None and self._values is not None
        spare = self.capacity - 1
        slots = self.placement.slots_of(clock.index, spare)
        self._keys.index_copy_(2, slots, key_states)
        self._values.index_copy_(2, slots, value_states)
        return self._tagged(self._keys[:, :, :spare]), self._values[:, :, :spare]

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
        needed = self.placement.most(self.length + count) + 1
        if needed <= self.capacity:
            return
        if self.is_initialized:
            self.capacity = needed + needed // 4
            self._replace_buffers(lambda filled: filled)
        else:
            self.capacity = needed

    def advanced(self, count: int) -> None:
        """Counts tokens of the whole sequence that a CUDA graph has written."""
        if self.placement.length == self.length:
            self.placement.place(count)
        self.length += count
        self.end = self.placement.count(self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys of the whole sequence, 0) once the new tokens of all ranks are appended."""
        if self.clock is not None:
            return self.group_of_ranks.world_size * self.capacity, self.clock.offset
        return self.length + (query_length if self.slices is None else self.slices.count), 0

    def get_seq_length(self) -> Any:
        """Tokens of the whole sequence."""
        return self.length if self.clock is None else self.clock.write + self.clock.offset

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
        """Appends tokens that every rank computed; slices of a run are tagged, for `append_run` to come.

        Args:
            key_states: (B, G, T, K), all new tokens, or this rank's slices of a run.
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        if self.slices is None:
            return super().update(key_states, value_states)
        setattr(key_states, _TAG, Shard(self.group_of_ranks, self, self.slices))
        return key_states, value_states

    def append_run(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a whole run, gathered from the ranks; returns it with the window before it."""
        return super().update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys that attention will see, position of the first) once the new tokens are appended."""
        return super().get_mask_sizes(query_length if self.slices is None else self.slices.count)


class ShardedCache(LongContextCache):
    """A `LongContextCache` of which every rank holds its share.

    Every rank must do the same to its part, in the same order: it is what `generate` does when every process
    calls it alike.

    Args:
        config: the model's config, or its text config.
        group: the `SequenceGroup` whose ranks share the sequence.
        capacity: tokens of the whole sequence to make room for.

    Raises:
        ValueError: a layer is neither full attention nor a window.
    """

    def __init__(self, config: PreTrainedConfig, group: Any, capacity: int = 0) -> None:
        super().__init__(config)
        self.group = group
        self.placement = Placement(group.rank, group.world_size)
        self.layers: list[Any] = [
            self._sharded(index, layer, capacity) for index, layer in enumerate(self.layers)
        ]

    def _sharded(self, index: int, layer: Any, capacity: int) -> Any:
        if isinstance(layer, PreallocatedSlidingLayer):
            return ShardedSlidingLayer(self.group, layer.sliding_window, capacity)
        if isinstance(layer, PreallocatedLayer):
            return ShardedLayer(self.group, self.placement, capacity)
        raise ValueError(
            f"`model`: layer {index} keeps a {type(layer).__name__}, which cannot be cut along the sequence "
            "over several processes; models with attention layers alone can."
        )

    @contextlib.contextmanager
    def computing(self, slices: Slices) -> Iterator[None]:
        """Inside, a forward carries this rank's slices of a run.

        Args:
            slices: the run.
        """
        for layer in self.layers:
            layer.slices = slices
        try:
            yield
        finally:
            for layer in self.layers:
                layer.slices = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens of the whole sequence.

        Args:
            tokens_to_remove: a negative number of tokens to drop, or a positive length to keep.
        """
        super().crop(tokens_to_remove)
        self.placement.truncate(self.get_seq_length())

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        super().reset()
        self.placement.truncate(0)

    def save(self, path: Any) -> NoReturn:
        """Refused: no rank holds the whole cache.

        Args:
            path: unused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`save`: a cache shared by several processes cannot be saved in this version, for no process "
            "holds it whole; generate in one process to save its cache."
        )
