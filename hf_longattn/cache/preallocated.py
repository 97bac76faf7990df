"""KV cache layers that own their memory: a step writes in place, growth happens in big steps.

`DynamicCache` of transformers concatenates a layer's whole cache at every token, about three times the
traffic of reading it once. Here keys and values live in buffers with room to spare, and callers get views of
what is filled.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hf_longattn.kernels.cache_write import cache_write

# A buffer that is full grows by half, and never by less than this many tokens.
_SMALLEST_GROWTH = 256
# Tokens that a sliding layer keeps beyond its window, so that rejected guesses of assisted decoding can be
# undone.
_UNDO = 64
# Leading bits of a capacity that may differ: it is rounded up by a 128th at most.
_ROUNDING = 8


def grown_capacity(capacity: int, needed: int) -> int:
    """Room for `needed` tokens, in big steps.

    Args:
        capacity: tokens that there is room for now.
        needed: tokens that there must be room for.
    """
    return max(needed, capacity + max(capacity // 2, _SMALLEST_GROWTH))


def rounded_capacity(tokens: int) -> int:
    """Room for some tokens, of which few different numbers come up.

    cuDNN builds a plan, some 50 ms, for every set of strides it has not seen, and the room of a cache is one
    of the strides of its keys: calls that differ by a few tokens shall have the same.

    Args:
        tokens: that there must be room for; fewer than 256 are returned as they are.
    """
    step = 1 << max(tokens.bit_length() - _ROUNDING, 0)
    return -(-tokens // step) * step


@contextlib.contextmanager
def lasting_buffers() -> Iterator[None]:
    """Inside, new tensors are ordinary ones, also in `torch.inference_mode()`.

    What is made in that mode cannot be written to outside of it, and a cache may go on in the other one.
    """
    # The question would end a compiler's graph, and what that makes stays in the mode it was called in.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    # To leave the mode asks for gradients again.
    with torch.inference_mode(False), torch.no_grad():
        yield


def tokens_to_drop(held: Any, tokens_to_remove: int) -> int:
    """How many of the last tokens `crop` forgets.

    Args:
        held: a cache or a layer of one.
        tokens_to_remove: a negative number of tokens to drop, or a positive length to keep.
    """
    # Assisted decoding counts with tensors.
    tokens_to_remove, length = int(tokens_to_remove), int(held.get_seq_length())
    drop = max(length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
    return min(drop, length)


class Clock:
    """Where a group of layers writes next, kept on the device, so that a CUDA graph needs no host.

    Args:
        device: of the layers.
    """

    def __init__(self, device: torch.device) -> None:
        with lasting_buffers():
            self.write = torch.zeros(1, dtype=torch.int64, device=device)
            self.offset = torch.zeros(1, dtype=torch.int64, device=device)
        self.index = self.write
        self._known = (0, 0)

    def set(self, write: int, offset: int) -> None:
        """Tells the device the slot of the next token and the position of slot 0, if it does not know."""
        if (write, offset) != self._known:
            self.write.fill_(write)
            self.offset.fill_(offset)
            self._known = (write, offset)

    def begin(self, count: int) -> None:
        """Works out the slots of the next `count` tokens; part of the graph."""
        self.index = self.write + torch.arange(count, device=self.write.device)

    def advance(self, count: int) -> None:
        """Moves on by `count` tokens on the device; part of the graph."""
        self.write.add_(count)

    def advanced(self, count: int) -> None:
        """Notes on the host that the device has moved on."""
        self._known = (self._known[0] + count, self._known[1])


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, in buffers of `capacity` tokens.

    Args:
        capacity: tokens to make room for at the first update; more are added as needed.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.start = 0
        self.end = 0
        # Slots that forks of this layer read: they are not written again.
        self.shared_end = 0
        self.clock: Clock | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.is_initialized = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, K), a view of the filled part; None before the first update."""
        return None if self._keys is None else self._keys[:, :, self.start : self.end]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, V), a view of the filled part; None before the first update."""
        return None if self._values is None else self._values[:, :, self.start : self.end]

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first update."""
        return -1 if self._keys is None else self._keys.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates room for `capacity` tokens of this shape, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        with lasting_buffers():
            self._keys = key_states.new_empty(_sized(key_states, self.capacity))
            self._values = value_states.new_empty(_sized(value_states, self.capacity))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends (B, G, T, K) keys and (B, G, T, V) values; returns views of all there is to look at."""
        return self._write(key_states, value_states)

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """What `update` does, and its views before another kind of layer says more about them."""
        if self.clock is not None:
            return self._write_by_clock(self.clock, key_states, value_states)
        self._append(key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def _write_by_clock(
        self, clock: Clock, key_states: Tensor, value_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self._keys is not None and self._values is not None
        # A buffer may be longer than the other, or that of the next layer, where memory ran out in between.
        keys, values = self._keys[:, :, : self.capacity], self._values[:, :, : self.capacity]
        cache_write(keys, values, clock.index, key_states, value_states)
        return keys, values

    @property
    def group(self) -> tuple[Any, ...]:
        """Layers that are equal in this advance together."""
        return (self.is_sliding, self.capacity, self.device)

    def set_clock(self, clock: Clock) -> None:
        """Tells the device where this layer, and all of its group, writes next."""
        clock.set(self.end, self.get_seq_length() - self.end)

    def reserve(self, tokens: int) -> None:
        """Has the first update make room for `tokens`; a layer that holds memory grows as it needs."""
        if not self.is_initialized:
            self.capacity = max(self.capacity, tokens)

    def make_room(self, count: int) -> None:
        """Sees to it that `count` more tokens fit without moving anything."""
        self._make_room(count)

    def advanced(self, count: int) -> None:
        """Counts tokens that a CUDA graph has written."""
        self.end += count

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        count = key_states.shape[2]
        self._prepare(key_states, value_states)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, self.end : self.end + count] = key_states
        self._values[:, :, self.end : self.end + count] = value_states
        self.end += count

    def _prepare(self, key_states: Tensor, value_states: Tensor) -> None:
        """Sees to it that there are buffers, with room for these tokens."""
        count = key_states.shape[2]
        if not self.is_initialized:
            self.capacity = max(self.capacity, count)
            self.lazy_initialization(key_states, value_states)
        assert self._keys is not None and self._values is not None
        for held, new in ((self._keys, key_states), (self._values, value_states)):
            if (held.shape[1], held.shape[3]) != (new.shape[1], new.shape[3]):
                raise ValueError(
                    f"`past_key_values` holds {held.shape[1]} heads x {held.shape[3]} in a layer, got "
                    f"{new.shape[1]} x {new.shape[3]}: another model filled it; pass a cache made from this "
                    "model's config."
                )
        if key_states.shape[0] != self._keys.shape[0]:
            raise ValueError(
                f"`past_key_values` holds {self._keys.shape[0]} sequences, got a batch of "
                f"{key_states.shape[0]}; pass a new cache, or `cache.fork(batch_size)`."
            )
        if key_states.dtype != self._keys.dtype:
            raise ValueError(
                f"`past_key_values` holds keys in {self._keys.dtype}, got {key_states.dtype}; use the model "
                "in the dtype that filled it, or pass a new cache."
            )
        self._make_room(count)

    def share(self) -> tuple[Tensor, Tensor]:
        """Views of keys and values that nothing done to this layer will change."""
        assert self.keys is not None and self.values is not None
        self.shared_end = self.end
        return self.keys, self.values

    def _make_room(self, count: int) -> None:
        fits = self.end + count <= self.capacity
        if fits and self.end >= self.shared_end:
            return
        if not fits:
            self.capacity = grown_capacity(self.capacity, self.end + count)
        self._replace_buffers(lambda filled: filled)

    def _replace_buffers(self, change: Any) -> None:
        """Moves `change(filled part)` of keys and values to the front of new buffers of `capacity` tokens."""
        keys, values = change(self.keys), change(self.values)
        self.start, self.end = 0, keys.shape[2]
        self.capacity = max(self.capacity, self.end)
        try:
            # One buffer is freed before the next is made: growing needs one extra half, not two.
            self._keys = _moved(keys, self.capacity)
            del keys
            self._values = _moved(values, self.capacity)
        except torch.OutOfMemoryError:
            # There is room for what both buffers have room for.
            buffers = [buffer for buffer in (self._keys, self._values) if buffer is not None]
            self.capacity = min(buffer.shape[2] for buffer in buffers)
            raise
        self.shared_end = 0

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys that attention will see, position of the first) once `query_length` tokens are appended."""
        if self.clock is not None:
            return self.capacity, self.clock.offset
        return self.end + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens seen so far."""
        return self.end if self.clock is None else self.clock.write + self.clock.offset

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: a negative number of tokens to drop. A positive number, which transformers
                deprecates, is the length to keep.
        """
        drop = tokens_to_drop(self, tokens_to_remove)
        self.check_drop(drop)
        self._drop(drop)

    def check_drop(self, count: int) -> None:
        """Refuses to forget the last `count` tokens where that cannot be; changes nothing."""

    def _drop(self, count: int) -> None:
        self.end -= count

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        self.start = self.end = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts row `beam_idx[b]` in the place of row b."""
        for filled in (self.keys, self.values):
            if filled is not None:
                filled.copy_(filled.index_select(0, beam_idx.to(filled.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times in place of it."""
        if self.is_initialized:
            self._replace_buffers(lambda filled: filled.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices`."""
        if self.is_initialized:
            self._replace_buffers(lambda filled: filled[indices])

    def offload(self) -> None:
        """Moves the buffers to the CPU."""
        if self._keys is not None and self._values is not None:
            with lasting_buffers():
                self._keys = self._keys.to("cpu", non_blocking=True)
                self._values = self._values.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Moves offloaded buffers back to the device of the layer."""
        if self._keys is not None and self._values is not None:
            with lasting_buffers():
                self._keys = self._keys.to(self.device, non_blocking=True)
                self._values = self._values.to(self.device, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs, without the spare room: safetensors-ready."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            return {}
        return {"keys": keys.contiguous(), "values": values.contiguous()}

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens seen."""
        if state:
            self.reset()
            self._append(state["keys"], state["values"])


class PreallocatedSlidingLayer(PreallocatedLayer):
    """Keys and values of one layer that looks back `window` tokens: memory for the window, whatever the
    length.

    Args:
        window: tokens that a query sees, itself included.
        capacity: tokens to make room for at the first update.
    """

    is_sliding = True

    def __init__(self, window: int, capacity: int = 0) -> None:
        super().__init__(sliding_capacity(window, capacity))
        self.sliding_window = window
        self.cumulative_length = 0
        self.record_past = False

    @property
    def _past(self) -> int:
        """Tokens before the next one that it may look at."""
        return min(self.cumulative_length, self.sliding_window - 1)

    def activate_past_recording(self) -> None:
        """Keeps every token until the next `crop`, which may then undo any number of them."""
        self.record_past = True

    def reserve(self, tokens: int) -> None:
        """Has the first update make room for a sequence of `tokens`, of which a window is kept."""
        super().reserve(sliding_capacity(self.sliding_window, tokens))

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends; returns views of the new tokens and of the `window - 1` before them."""
        if self.clock is not None:
            return self._write_by_clock(self.clock, key_states, value_states)
        shown = self._past + key_states.shape[2]
        self._append(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        first = self.end - shown
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, first : self.end], self._values[:, :, first : self.end]

    def _make_room(self, count: int) -> None:
        if self.end + count <= self.capacity:
            return
        kept = self.end - self.start if self.record_past else min(self.end - self.start, self._past + _UNDO)
        self.start = self.end - kept
        if kept <= self.start and kept + count <= self.capacity:
            self._move_to_front(kept)
            return
        # Room for as much again: the next move to the front needs no new buffer.
        self.capacity = max(self.capacity, kept + count, min(2 * kept, 2 * (self.sliding_window + _UNDO)))
        self._replace_buffers(lambda filled: filled)

    def _move_to_front(self, kept: int) -> None:
        for buffer in (self._keys, self._values):
            assert buffer is not None
            buffer[:, :, :kept] = buffer[:, :, self.start : self.end]
        self.start, self.end = 0, kept

    @property
    def group(self) -> tuple[Any, ...]:
        """Layers that are equal in this advance together."""
        return (*super().group, self.sliding_window)

    def advanced(self, count: int) -> None:
        """Counts tokens that a CUDA graph has written."""
        super().advanced(count)
        self.cumulative_length += count

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys that attention will see, position of the first) once `query_length` tokens are appended."""
        if self.clock is not None:
            return self.capacity, self.clock.offset
        return self._past + query_length, self.cumulative_length - self._past

    def get_seq_length(self) -> Any:
        """Tokens seen so far, the forgotten ones included."""
        return self.cumulative_length if self.clock is None else self.clock.write + self.clock.offset

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def check_drop(self, count: int) -> None:
        """Refuses to forget more tokens than there are kept before the window."""
        needed = min(self.cumulative_length - count, self.sliding_window - 1)
        if self.end - count - self.start < needed:
            raise RuntimeError(
                f"`crop` would remove {count} tokens, more than this sliding-window layer can restore; call "
                "`activate_past_recording` before the tokens are added."
            )

    def _drop(self, count: int) -> None:
        self.end -= count
        self.cumulative_length -= count
        if self.record_past:
            # What was recorded has served.
            self.start = max(self.start, self.end - self._past - _UNDO)

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        super().reset()
        self.cumulative_length = 0

    def state(self) -> dict[str, Tensor]:
        """The last window; safetensors-ready."""
        if self._keys is None or self._values is None:
            return {}
        recent = slice(self.end - self._past, self.end)
        return {
            "keys": self._keys[:, :, recent].contiguous(),
            "values": self._values[:, :, recent].contiguous(),
        }

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens seen."""
        super().load_state(state, length)
        self.cumulative_length = length


def sliding_capacity(window: int, tokens: int) -> int:
    """Slots that a sliding layer makes for a sequence of `tokens`: two windows, so that it moves in place."""
    return min(tokens, 2 * (window + _UNDO))


def _sized(states: Tensor, capacity: int) -> tuple[int, int, int, int]:
    batch, heads, _, width = states.shape
    return batch, heads, capacity, width


def _moved(filled: Tensor, capacity: int) -> Tensor:
    with lasting_buffers():
        buffer = filled.new_empty(_sized(filled, capacity))
    buffer[:, :, : filled.shape[2]] = filled
    return buffer
