"""`ShardedCache`: a KV cache cut along the sequence over the ranks of a group.

Softmax layers hold what `cache/shares.py` says, and lightning layers their state on every rank, which needs
no communication to decode.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_longattn.cache.files import Notes
from hf_longattn.cache.long_context import CACHES, LongContextCache
from hf_longattn.cache.placement import Placement, Slices
from hf_longattn.cache.preallocated import Clock, PreallocatedLayer, PreallocatedSlidingLayer
from hf_longattn.cache.quantized import QuantizedLayer, QuantizedSlidingLayer
from hf_longattn.cache.recurrent import MAX_RECORDED, Recording, RecurrentLayer, check_whole_keys
from hf_longattn.cache.shares import (
    ShardedLayer,
    ShardedQuantizedLayer,
    ShardedQuantizedSlidingLayer,
    ShardedSlidingLayer,
    mask_sizes,
    place_next,
    roomier,
    share_capacity,
)
from hf_longattn.cache.token_rows import TokenRows


@dataclass(frozen=True)
class Run:
    """Tokens that the ranks compute together, as lightning layers need to know them.

    Args:
        slices: whose they are.
        exists: (B, count) bool, which of the run exist, or None where all do.
        rows: those of this rank's two slices.
    """

    slices: Slices
    exists: Tensor | None
    rows: tuple[TokenRows, TokenRows]

    @classmethod
    def of(cls, slices: Slices, mask: Tensor | None) -> "Run":
        """The run of a (B, sequence so far) mask of existing tokens, or of None."""
        if mask is None:
            return cls(slices, None, (TokenRows(), TokenRows()))
        exists = mask[:, slices.start : slices.start + slices.count].bool()
        first, second = (TokenRows(exists[:, part]) for part in slices.own)
        return cls(slices, exists, (first, second))


@dataclass(frozen=True)
class RecordedRun:
    """A run that `crop` may undo, with this rank's keys and values; the recording goes on behind it."""

    state: Tensor | None
    key: Tensor
    value: Tensor
    exists: Tensor | None
    slices: Slices


class ShardedRecurrentLayer(RecurrentLayer):
    """The state of one lightning layer, the same on every rank. Of recorded runs, `crop` can undo the last.

    Args:
        group: the `SequenceGroup`.
        placement: who holds what in the layers beside it.
        capacity: tokens of the whole sequence to make room for in the layers beside it.
    """

    def __init__(self, group: Any, placement: Placement, capacity: int = 0) -> None:
        super().__init__(share_capacity(capacity, group.world_size))
        self.group_of_ranks, self.placement = group, placement
        self.slices: Slices | None = None
        self.run: Run | None = None
        self._recorded_run: RecordedRun | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Counts new tokens, all or this rank's slices of a run; returns them as `RecurrentStates`.

        Args:
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.
        """
        if self.clock is None:
            place_next(self, self._count_new(key_states))
            # First, as the layers beside this one: what is made first has no room to spare.
            self.make_room(self._count_new(key_states))
        return super().update(key_states, value_states)

    def _count_new(self, key_states: Tensor) -> int:
        return key_states.shape[2] if self.slices is None else self.slices.count

    def take_run(self, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor) -> None:
        """Takes over the state behind a run.

        Args:
            key: (B, G, t, K), this rank's slices.
            value: (B, G, t, V).
            slopes: (H,) fp32.
            state: (B, H, K, V) fp32, the same on every rank.
        """
        self._slopes = slopes
        if self.record_past:
            assert self.run is not None
            before = None if self.recurrent_state is None else self.recurrent_state.clone()
            self._recorded_run = RecordedRun(before, key, value, self.run.exists, self.run.slices)
            self._recording = Recording(state.clone(), [])
        else:
            self._recording = self._recorded_run = None
        self._take(state, torch.is_grad_enabled())

    def _record(self, key: Tensor, value: Tensor, exists: Tensor | None) -> None:
        recorded, run = self._recording, self._recorded_run
        # A long run may be undone together with what follows it at once, and then no more.
        if recorded is None or (run and recorded.tokens and run.slices.count + len(recorded) > MAX_RECORDED):
            self._recorded_run = None
        super()._record(key, value, exists)

    @property
    def recorded(self) -> int:
        """How many of the last tokens can be undone, short of all."""
        run = self._recorded_run
        return super().recorded + (0 if self._recording is None or run is None else run.slices.count)

    def _roll_back(self, drop: int) -> None:
        if self._recording is not None and self._recorded_run is not None and drop > len(self._recording):
            run, group = self._recorded_run, self.group_of_ranks
            key, value = (run.slices.in_order(group.gather(part)) for part in (run.key, run.value))
            tokens = [(key, value, run.exists), *self._recording.tokens]
            self._recording = Recording(run.state, tokens)
        super()._roll_back(drop)

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_rows(change)
        if (run := self._recorded_run) is not None:
            state, exists = (None if part is None else change(part) for part in (run.state, run.exists))
            self._recorded_run = replace(
                run, state=state, key=change(run.key), value=change(run.value), exists=exists
            )

    @property
    def mask_length(self) -> int:
        """Columns of the mask behind `update`, as in the layers beside this one."""
        return self.length if self.clock is None else self.group_of_ranks.world_size * self.capacity

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(tokens of the whole sequence, 0) once the new tokens of all ranks are appended."""
        return mask_sizes(self, query_length)

    def make_room(self, count: int) -> None:
        """Grows the capacity as the layers beside this one do.

        Args:
            count: tokens of the whole sequence.
        """
        self.capacity = roomier(self, count)

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens of the whole sequence."""
        self.reset()
        self.make_room(length)
        capacity = self.capacity
        super().load_state(state, length)
        self.capacity = capacity

    def set_clock(self, clock: Clock) -> None:
        """Tells the device the length of the whole sequence, and the positions of all slots."""
        super().set_clock(clock)
        self.placement.look_ahead(self.capacity - 1, self.device)

    def advanced(self, count: int) -> None:
        """Counts tokens of the whole sequence that a CUDA graph has taken in."""
        place_next(self, count)
        super().advanced(count)


class ShardedCache(LongContextCache):
    """A `LongContextCache` of which every rank holds its share.

    Every rank must do the same to its part, in the same order: it is what `generate` does when every process
    calls it alike. In a group of one the share is all: its layers are those of one process.

    Only `tree_attention` and `lightning_attention` know that there is more than the share of a rank: another
    attention implementation, as a restored model may have, is refused where it is given a share.

    Args:
        config: the model's config, or its text config.
        group: the `SequenceGroup` whose ranks share the sequence.
        capacity: tokens of the whole sequence to make room for.
        cache_dtype: "int8" or "fp8" (or the torch dtype) keeps keys and values in 8 bits; None in the dtype
            of the model.

    Raises:
        ValueError: a layer is none of full attention, a window and lightning attention with a state, or
            `cache_dtype` is unknown.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        group: Any,
        capacity: int = 0,
        cache_dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__(config, capacity if group.world_size == 1 else 0, cache_dtype)
        check_whole_keys(config.get_text_config(decoder=True), "model", "a cache for several processes")
        self.group = group
        self.placement = Placement(group.rank, group.world_size)
        # Also in a group of one, which refuses the layers that a larger one refuses.
        shares = [self._sharded(index, layer, capacity) for index, layer in enumerate(self.layers)]
        if group.world_size > 1:
            self.layers: list[Any] = shares

    def _sharded(self, index: int, layer: Any, capacity: int) -> Any:
        if isinstance(layer, QuantizedSlidingLayer):
            window = layer.sliding_window
            return ShardedQuantizedSlidingLayer(self.group, layer.cache_dtype, window, capacity)
        if isinstance(layer, QuantizedLayer):
            return ShardedQuantizedLayer(self.group, self.placement, layer.cache_dtype, capacity)
        if isinstance(layer, PreallocatedSlidingLayer):
            return ShardedSlidingLayer(self.group, layer.sliding_window, capacity)
        if isinstance(layer, RecurrentLayer):
            return ShardedRecurrentLayer(self.group, self.placement, capacity)
        if isinstance(layer, PreallocatedLayer):
            return ShardedLayer(self.group, self.placement, capacity)
        raise ValueError(
            f"`model`: layer {index} keeps a {type(layer).__name__}, which cannot be cut along the sequence "
            "over several processes; models with softmax and lightning attention alone can."
        )

    @property
    def is_computing(self) -> bool:
        """Whether a forward carries this rank's slices of a run."""
        return self.group.world_size > 1 and self.layers[0].slices is not None

    @contextlib.contextmanager
    def computing(self, slices: Slices, mask: Tensor | None = None) -> Iterator[None]:
        """Inside, a forward carries this rank's slices of a run.

        Args:
            slices: the run.
            mask: (B, sequence with the run), 0 at pads, or None.
        """
        recurrent = [layer for layer in self.layers if isinstance(layer, ShardedRecurrentLayer)]
        run = Run.of(slices, mask) if recurrent else None
        for layer in self.layers:
            layer.slices = slices
        for layer in recurrent:
            layer.run = run
        try:
            yield
        finally:
            for layer in self.layers:
                layer.slices = None
            for layer in recurrent:
                layer.run = None

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

    def save(self, path: str | os.PathLike) -> None:
        """Writes this rank's share to a file of its own, as `LongContextCache.save` says.

        Args:
            path: the file of rank 0.

        Raises:
            ValueError: as there; or other processes hold other heads of the same tokens.
            OSError: a file cannot be written; on every process.
        """
        self._check_heads("save")
        super().save(path)

    @classmethod
    def load(cls, path: Any, config: Any, *args: Any, **kwargs: Any) -> LongContextCache:
        """Reads a cache that `save` wrote, as `LongContextCache.load` does.

        Args:
            path: the file of rank 0.
            config: the model, prepared for the processes that will share the cache.
            args: as there.
            kwargs: as there.

        Raises:
            ValueError: as there; or `config` does not say who shares the cache.
        """
        if getattr(config, CACHES, None) is None:
            raise ValueError(
                "`config` must be the model that `prepare_generation` has prepared for the processes that "
                f"share the cache, got a {type(config).__name__}."
            )
        return super().load(path, config, *args, **kwargs)

    @property
    def _ranks(self) -> Any:
        return self.group

    def _check_heads(self, call: str) -> None:
        others = self.group.control.world_size
        if others > self.group.world_size:
            raise ValueError(
                f"`{call}`: the heads of this cache lie on other processes too ({others} in all, "
                f"{self.group.world_size} of which share the tokens); without tensor parallelism it can be "
                "saved and loaded."
            )

    def _placed(self, length: int) -> Placement:
        return super()._placed(length) if self.group.world_size == 1 else self.placement

    def _place(self, notes: Notes) -> Placement:
        self._check_heads("load")
        if self.group.world_size == 1:
            return super()._place(notes)
        if notes.parts == self.group.world_size:
            # The same shares give the same bits.
            self.placement.follow(notes.stretches)
        else:
            self.placement.spread(notes.length)
        return self.placement


@dataclass(frozen=True)
class CacheKind:
    """The caches that a prepared model generates with.

    Args:
        model: the transformers model.
        group: the `SequenceGroup` whose ranks share a cache, or None for this process alone.
        whole: class of the caches of one process.
        shared: class of those that are shared.
    """

    model: Any
    group: Any
    whole: type[LongContextCache]
    shared: type[ShardedCache]

    def make(
        self, capacity: int, cache_dtype: str | torch.dtype | None = None, offload_layers: int = 0
    ) -> LongContextCache:
        """An empty cache.

        Args:
            capacity: tokens of the whole sequence to make room for.
            cache_dtype: as `LongContextCache` takes it.
            offload_layers: the same; 0 where the cache is shared.

        Raises:
            ValueError: an argument that cannot be honoured.
        """
        if self.group is None:
            return self.whole(self.model.config, capacity, cache_dtype, offload_layers)
        if offload_layers:
            raise ValueError(
                f"`offload_layers` must be 0 for a cache that several processes share, got {offload_layers}."
            )
        return self.shared(self.model.config, self.group, capacity, cache_dtype)
