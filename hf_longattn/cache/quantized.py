"""KV cache layers that keep keys and values in 8 bits.

Every token of every head has a scale of its own for its key and one for its value, so a token that is added
changes nothing about those before it. The scales, (B, G, S, 2) fp32, live in a second layer of the same kind
that does whatever the first one does, and so lie where the keys lie. What a layer returns to the model is
tagged with the scales, by which the attention function knows what the bytes mean.
"""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.cache.preallocated import Clock, PreallocatedLayer, PreallocatedSlidingLayer
from hf_longattn.kernels.dispatch import lacks_fp8
from hf_longattn.kernels.quantized_states import quantized_states

_TAG = "_hf_longattn_scales"
CACHE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def scales_of(key: Tensor) -> Tensor | None:
    """The (B, G, S, 2) scales that a layer in 8 bits tagged its keys with, or None for other keys.

    Args:
        key: what attention was given.

    Raises:
        TypeError: keys in 8 bits that have lost their scales.
    """
    scales = getattr(key, _TAG, None)
    if scales is None and key.dtype in CACHE_DTYPES.values():
        raise TypeError(
            "`cache_dtype`: keys in 8 bits came to attention without their scales, so the model changes them "
            "after the cache has returned them; keep its cache in its own dtype."
        )
    return scales


def read_cache_dtype(cache_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype by its name or itself.

    Args:
        cache_dtype: "int8", "fp8", torch.int8, torch.float8_e4m3fn, or None for the model's dtype.

    Raises:
        ValueError: anything else.
    """
    dtype = CACHE_DTYPES.get(cache_dtype, cache_dtype) if isinstance(cache_dtype, str) else cache_dtype
    if dtype is None or dtype in CACHE_DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise ValueError(
        f"`cache_dtype` must be 'int8', 'fp8' or None for the dtype of the model, got {cache_dtype!r}."
    )


def cache_dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name of a dtype that `read_cache_dtype` returned."""
    return next((name for name, known in CACHE_DTYPES.items() if known == dtype), None)


def scale_bytes(dtype: torch.dtype) -> int:
    """Bytes of the two scales of one token and key head in a cache of `dtype`, 0 where it has none."""
    return 8 if dtype in CACHE_DTYPES.values() else 0


def check_cache_dtype(dtype: torch.dtype | None, device: torch.device) -> None:
    """Refuses fp8 on a GPU that has none.

    Args:
        dtype: what `read_cache_dtype` returned.
        device: of the model.

    Raises:
        ValueError: names the way out.
    """
    if dtype == torch.float8_e4m3fn and lacks_fp8(device):
        raise ValueError(
            f"`cache_dtype='fp8'` needs a GPU of compute capability 8.9 or more, which {device} is not; use "
            "`cache_dtype='int8'`."
        )


class _Quantized(PreallocatedLayer):
    """What the two kinds of layers share: the second layer, and the way in and out of 8 bits."""

    cache_dtype: torch.dtype
    scales: Any

    def reserve(self, tokens: int) -> None:
        """Has the first update make room for `tokens`, and for their scales."""
        super().reserve(tokens)
        self.scales.reserve(tokens)

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises and appends; returns views in 8 bits of all there is to look at, the keys tagged.

        Args:
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).

        Raises:
            ValueError: the states require a gradient.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "`cache_dtype`: keys and values in 8 bits have no gradient; run under `torch.no_grad()`, or "
                "use a cache in the dtype of the model."
            )
        keys, values, scales = quantized_states(key_states, value_states, self.cache_dtype)
        # Bytes can be copied, selected and written by index everywhere, fp8 cannot.
        keys, values = super()._write(keys.view(torch.int8), values.view(torch.int8))
        # Of the second layer only the keys are used: its values have no width.
        scales, _ = self.scales._write(scales, scales[..., :0])
        keys, values = keys.view(self.cache_dtype), values.view(self.cache_dtype)
        # On a view of its own, never on the buffer.
        keys = keys[:]
        setattr(keys, _TAG, scales)
        return keys, values

    @property
    def clock(self) -> Clock | None:  # type: ignore[override]
        """Where to write next while a CUDA graph is captured."""
        return self._clock

    @clock.setter
    def clock(self, clock: Clock | None) -> None:
        self._clock = clock
        if hasattr(self, "scales"):
            self.scales.clock = clock

    def make_room(self, count: int) -> None:
        """Sees to it that `count` more tokens fit without moving anything."""
        super().make_room(count)
        self.scales.make_room(count)

    def advanced(self, count: int) -> None:
        """Counts tokens that a CUDA graph has written."""
        super().advanced(count)
        self.scales.advanced(count)

    def _drop(self, count: int) -> None:
        super()._drop(count)
        self.scales._drop(count)

    def reset(self) -> None:
        """Forgets everything and keeps the memory."""
        super().reset()
        self.scales.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts row `beam_idx[b]` in the place of row b."""
        super().reorder_cache(beam_idx)
        self.scales.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times in place of it."""
        super().batch_repeat_interleave(repeats)
        self.scales.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices`."""
        super().batch_select_indices(indices)
        self.scales.batch_select_indices(indices)

    def offload(self) -> None:
        """Moves the buffers to the CPU."""
        super().offload()
        self.scales.offload()

    def prefetch(self) -> None:
        """Moves offloaded buffers back to the device of the layer."""
        super().prefetch()
        self.scales.prefetch()

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs, without the spare room: the bytes in their dtype, and the scales."""
        state = super().state()
        if not state:
            return {}
        state = {name: tensor.view(self.cache_dtype) for name, tensor in state.items()}
        return {**state, "scales": self.scales.state()["keys"]}

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens seen."""
        if not state:
            return super().load_state(state, length)
        check_cache_dtype(self.cache_dtype, state["keys"].device)
        super().load_state({name: state[name].view(torch.int8) for name in ("keys", "values")}, length)
        scales = state["scales"]
        self.scales.load_state({"keys": scales, "values": scales[..., :0]}, length)


class QuantizedLayer(_Quantized):
    """Keys and values of one full-attention layer in 8 bits, in buffers of `capacity` tokens.

    Args:
        cache_dtype: int8 or float8_e4m3fn.
        capacity: tokens to make room for at the first update.
    """

    def __init__(self, cache_dtype: torch.dtype, capacity: int = 0) -> None:
        super().__init__(capacity)
        self.cache_dtype, self.scales = cache_dtype, PreallocatedLayer(capacity)


class QuantizedSlidingLayer(_Quantized, PreallocatedSlidingLayer):
    """Keys and values in 8 bits of one layer that looks back `window` tokens.

    Args:
        cache_dtype: int8 or float8_e4m3fn.
        window: tokens that a query sees, itself included.
        capacity: tokens to make room for at the first update.
    """

    scales: PreallocatedSlidingLayer

    def __init__(self, cache_dtype: torch.dtype, window: int, capacity: int = 0) -> None:
        PreallocatedSlidingLayer.__init__(self, window, capacity)
        self.cache_dtype, self.scales = cache_dtype, PreallocatedSlidingLayer(window, capacity)

    @property
    def record_past(self) -> bool:  # type: ignore[override]
        """Whether every token is kept until the next `crop`, which may then undo any number of them."""
        return self._record_past

    @record_past.setter
    def record_past(self, record_past: bool) -> None:
        """Has the scales do as their keys."""
        self._record_past = record_past
        if hasattr(self, "scales"):
            self.scales.record_past = record_past


def make_layer(cache_dtype: torch.dtype | None, window: int | None, capacity: int) -> PreallocatedLayer:
    """The layer of one kind of attention.

    Args:
        cache_dtype: what `read_cache_dtype` returned.
        window: tokens that a query sees, itself included, or None for all.
        capacity: tokens to make room for at the first update.
    """
    if cache_dtype is None:
        return PreallocatedLayer(capacity) if window is None else PreallocatedSlidingLayer(window, capacity)
    if window is None:
        return QuantizedLayer(cache_dtype, capacity)
    return QuantizedSlidingLayer(cache_dtype, window, capacity)
