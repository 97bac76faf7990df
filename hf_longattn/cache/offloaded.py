"""Cache layers whose keys and values wait in host memory, and come to the device when they are needed.

A cache owns two device buffers of the size of one layer, however many of its layers are offloaded:

    compute   ... | layer i: attention, MLP, layers that stay | layer j: attention ...
    side      ... | store new tokens of i | fetch j           | store new tokens of j | fetch k ...

While layer i computes on one buffer, the next offloaded layer j is copied to the other on a stream of its
own; new tokens are written to the buffer and to the host. The views that a layer returns have the shape and
the strides that they have without offload, so that attention computes the same bits. They hold until the
layer after next: models that read them later are refused by `check_offload`.

Host memory is page-locked on CUDA; elsewhere, and on a CPU, it is plain memory and copies are made at once.
"""

import copy
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_longattn.cache.pinned import Pins
from hf_longattn.cache.preallocated import PreallocatedLayer, lasting_buffers
from hf_longattn.cache.quantized import QuantizedLayer
from hf_longattn.kernels.dispatch import warn_slow

# Device buffers that the offloaded layers of a cache share.
BUFFERS = 2


class Copies(Protocol):
    """How one device exchanges keys and values with the host; moves happen in the order of the calls."""

    def begin(self, *sources: Tensor) -> None:
        """What follows waits for all that was computed so far; `sources` are kept until they are read."""
        ...

    def lend(self, buffer: Tensor) -> None:
        """Keeps the memory of a buffer, once it is dropped, until the last move is done with it."""
        ...

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copies (B, G, T, K) between device and host."""
        ...

    def mark(self) -> Any:
        """The moves so far, to be given to `join`."""
        ...

    def join(self, mark: Any) -> None:
        """What is computed from now on waits for the moves of a mark, or for none."""
        ...

    def finish(self) -> None:
        """The host waits for all moves."""
        ...


class DirectCopies:
    """Copies that are done when the call returns."""

    def begin(self, *sources: Tensor) -> None:
        """Nothing: the order of the calls is the order of the work."""

    def lend(self, buffer: Tensor) -> None:
        """Nothing: no move outlasts its call."""

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copies now."""
        target.copy_(source)

    def mark(self) -> None:
        """Nothing is under way."""

    def join(self, mark: Any) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""


class StreamCopies:
    """Copies on a CUDA stream beside the one that computes.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, *sources: Tensor) -> None:
        """The side stream waits for the computing one: for new tokens, and for the readers of old buffers."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for source in sources:
            source.record_stream(self.stream)

    def lend(self, buffer: Tensor) -> None:
        """Tells the allocator that the side stream uses the buffer, too."""
        buffer.record_stream(self.stream)

    def move(self, target: Tensor, source: Tensor) -> None:
        """Queues a copy a row: a row of tokens is contiguous on both sides, all rows together are not."""
        with torch.cuda.stream(self.stream):
            for to, states in zip(target.flatten(0, 1), source.flatten(0, 1), strict=True):
                to.copy_(states, non_blocking=True)

    def mark(self) -> Any:
        """An event behind the moves so far."""
        return self.stream.record_event()

    def join(self, mark: Any) -> None:
        """The computing stream waits for an event."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def finish(self) -> None:
        """The host waits for the side stream."""
        self.stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    """How a device exchanges keys and values with the host."""
    return StreamCopies(device) if device.type == "cuda" else DirectCopies()


class Slot:
    """A pair of device buffers, and whose tokens are in it."""

    def __init__(self) -> None:
        self.buffers: tuple[Tensor, ...] = ()
        self.owner: Any = None
        # Tokens of the owner, from the first one on.
        self.filled = 0
        self.ready: Any = None

    def holds(self, layer: "OffloadedLayer") -> bool:
        """Whether tokens of this layer are in the buffers."""
        return self.owner is not None and self.owner() is layer

    def forget(self) -> None:
        """Keeps the memory and nothing else."""
        self.owner, self.filled = None, 0

    def take(self, layer: "OffloadedLayer", device: torch.device, copies: Copies) -> None:
        """Becomes the layer's, with buffers shaped like those on the host."""
        if self.holds(layer):
            return
        self.forget()
        like = layer.host_buffers()
        same = [(b.shape, b.dtype) for b in self.buffers] == [(b.shape, b.dtype) for b in like]
        if not same:
            # The old ones are freed before the new ones are made.
            self.buffers = ()
            with lasting_buffers():
                self.buffers = tuple(torch.empty(b.shape, dtype=b.dtype, device=device) for b in like)
            for buffer in self.buffers:
                copies.lend(buffer)
        self.owner = weakref.ref(layer)


class Lane:
    """The two buffers of one device, and the way between it and the host.

    Args:
        device: where attention runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, copies_for(device)
        # The one used last stands last.
        self.slots = [Slot() for _ in range(BUFFERS)]

    def append(
        self,
        layer: "OffloadedLayer",
        key_states: Tensor,
        value_states: Tensor,
        following: "OffloadedLayer | None",
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens to a layer, on the host and in a buffer, and starts to fetch the layer that is next.

        Args:
            layer: with room for the tokens.
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).
            following: the layer that is needed next, or None.

        Returns:
            Views of all keys and values of the layer, in a buffer.
        """
        hosts = layer.host_buffers()
        pairs = zip((key_states, value_states), hosts, strict=True)
        states = tuple(new.to(host.dtype).contiguous() for new, host in pairs)
        self.copies.begin(*states)
        slot = self._fetched(layer)
        self.slots.sort(key=lambda other: other is slot)
        tokens = slice(layer.end, layer.end + key_states.shape[2])
        for host, new in zip(hosts, states, strict=True):
            self.copies.move(host[:, :, tokens], new)
        if following is not None:
            self._fetched(following)
        self.copies.join(slot.ready)
        for buffer, new in zip(slot.buffers, states, strict=True):
            buffer[:, :, tokens] = new
        slot.filled = tokens.stop
        keys, values = (buffer[:, :, : tokens.stop] for buffer in slot.buffers)
        return keys, values

    def _fetched(self, layer: "OffloadedLayer") -> Slot:
        """The slot in which a layer's tokens are, or will be once `ready` is joined."""
        slot = next((slot for slot in self.slots if slot.holds(layer)), self.slots[0])
        slot.take(layer, self.device, self.copies)
        missing = slice(min(slot.filled, layer.end), layer.end)
        if missing.start < missing.stop:
            for buffer, host in zip(slot.buffers, layer.host_buffers(), strict=True):
                self.copies.move(buffer[:, :, missing], host[:, :, missing])
            slot.ready = self.copies.mark()
        slot.filled = layer.end
        return slot

    def forget(self, layer: "OffloadedLayer") -> None:
        """What is in the buffers of this layer is not what is on the host any more."""
        for slot in self.slots:
            if slot.holds(layer):
                slot.forget()


class Carrier:
    """What the offloaded layers of one cache share: their order, and a lane a device.

    Forks of a filled cache use the same buffers, one after the other.
    """

    def __init__(self) -> None:
        # Weak, so that a cache that is dropped gives its memory back at once.
        self._layers: list[weakref.ref[OffloadedLayer]] = []
        self.lanes: dict[torch.device, Lane] = {}

    @property
    def layers(self) -> list["OffloadedLayer"]:
        """Those that are left, in the order of the model."""
        return [layer for reference in self._layers if (layer := reference()) is not None]

    def enter(self, layer: "OffloadedLayer") -> None:
        """Notes the next layer."""
        self._layers.append(weakref.ref(layer))

    def lane(self, device: torch.device) -> Lane:
        """The lane of a device."""
        if device not in self.lanes:
            self.lanes[device] = Lane(device)
        return self.lanes[device]

    def after(self, layer: "OffloadedLayer") -> "OffloadedLayer | None":
        """The layer whose tokens are needed next on the same device; None where there is nothing to fetch."""
        layers = self.layers
        place = next(index for index, other in enumerate(layers) if other is layer)
        following = layers[(place + 1) % len(layers)]
        elsewhere = not following.is_initialized or following.device != layer.device
        return None if following is layer or elsewhere else following

    def finish(self) -> None:
        """The host waits until everything is where it belongs."""
        for lane in self.lanes.values():
            lane.copies.finish()

    def forget(self, layer: "OffloadedLayer") -> None:
        """A layer was changed on the host."""
        for lane in self.lanes.values():
            lane.forget(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Carrier":
        """The carrier of the copied layers."""
        twin = memo[id(self)] = Carrier()
        for layer in self.layers:
            twin.enter(copy.deepcopy(layer, memo))
        # An empty cache gets new ones, so that a snapshot of it does not hold on to memory.
        twin.lanes = self.lanes or {}
        return twin


class OffloadedLayer(PreallocatedLayer):
    """Keys and values of one full-attention layer in host memory, with the contract of `PreallocatedLayer`.

    `keys` and `values` are those on the host. What `update` returns is on the device, and holds until two
    other offloaded layers of the cache were updated.

    Args:
        carrier: shared by the offloaded layers of the cache; the layer enters itself.
        capacity: tokens to make room for at the first update; more are added as needed.
    """

    def __init__(self, carrier: Carrier, capacity: int = 0) -> None:
        super().__init__(capacity)
        self._enter(carrier)

    def _enter(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.pins = Pins("offload_layers", "lower the length, or the number of offloaded layers")
        carrier.enter(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedLayer":
        """A copy with host memory of its own, once all tokens have arrived there."""
        self.carrier.finish()
        twin = memo[id(self)] = copy.copy(self)
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, K) on the host, a view of the filled part; None before the first update."""
        self.carrier.finish()
        return super().keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """(B, G, S, V) on the host, a view of the filled part; None before the first update."""
        self.carrier.finish()
        return super().values

    def host_buffers(self) -> tuple[Tensor, Tensor]:
        """The (B, G, capacity, K) and (B, G, capacity, V) buffers on the host, fit for copies beside."""
        assert self._keys is not None and self._values is not None
        if self.device.type == "cuda":
            self.pins.hold(self._keys, self._values)
        return self._keys, self._values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates room on the host for `capacity` tokens of this shape and dtype."""
        empty = (states[:, :, :0].to("cpu") for states in (key_states, value_states))
        super().lazy_initialization(*empty)
        self.device = key_states.device

    def _write(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends; returns views on the device of all there is to look at.

        Args:
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).

        Raises:
            ValueError: the states require a gradient.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "`offload_layers`: keys and values in host memory have no gradient; run under "
                "`torch.no_grad()`, or use a cache with `offload_layers=0`."
            )
        self._prepare(key_states, value_states)
        self.device = key_states.device
        lane = self.carrier.lane(self.device)
        states = lane.append(self, key_states, value_states, self.carrier.after(self))
        self.end += key_states.shape[2]
        return states

    def _replace_buffers(self, change: Any) -> None:
        super()._replace_buffers(change)
        self.carrier.forget(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts row `beam_idx[b]` in the place of row b, in host memory."""
        if self.is_initialized and self.device.type == "cuda":
            warn_slow("offload_layers", "beams move the rows of the layers in host memory at every step")
        super().reorder_cache(beam_idx)
        self.carrier.forget(self)

    def offload(self) -> None:
        """Nothing: keys and values are on the host."""

    def prefetch(self) -> None:
        """Nothing: `update` of the layer before fetches."""

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens seen."""
        self.carrier.finish()
        self.carrier.forget(self)
        super().load_state(state, length)


class OffloadedQuantizedLayer(QuantizedLayer, OffloadedLayer):
    """Keys and values of one full-attention layer in 8 bits in host memory; their scales stay on the device.

    Args:
        carrier: shared by the offloaded layers of the cache; the layer enters itself.
        cache_dtype: int8 or float8_e4m3fn.
        capacity: tokens to make room for at the first update.
    """

    def __init__(self, carrier: Carrier, cache_dtype: torch.dtype, capacity: int = 0) -> None:
        PreallocatedLayer.__init__(self, capacity)
        self.cache_dtype, self.scales = cache_dtype, PreallocatedLayer(capacity)
        self._enter(carrier)


def full_layers(layers: list[Any]) -> list[int]:
    """The indices of the layers that can be offloaded: full attention, whose memory grows with the length."""
    kinds = (PreallocatedLayer, QuantizedLayer, OffloadedLayer, OffloadedQuantizedLayer)
    return [index for index, layer in enumerate(layers) if type(layer) in kinds]


def offloaded_layers(layers: list[Any]) -> list[OffloadedLayer]:
    """The layers of a cache that are offloaded."""
    return [layer for layer in layers if isinstance(layer, OffloadedLayer)]


def check_offload(config: PreTrainedConfig) -> None:
    """Refuses models that read keys and values of a layer after `update` of later ones.

    Args:
        config: the text config.

    Raises:
        ValueError: names the field.
    """
    if shared := getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"`offload_layers` must be 0 for a model with num_kv_shared_layers={shared}: its last layers "
            "read keys and values of others, which have left the device by then."
        )


def offload(layers: list[Any], count: int, config: PreTrainedConfig) -> None:
    """Puts `count` offloaded layers in the place of empty layers of full attention, evenly spread.

    Between two offloaded layers the others compute while the next one is fetched.

    Args:
        layers: of a cache that is empty; changed in place.
        count: how many layers wait in host memory.
        config: the text config.

    Raises:
        ValueError: more layers than there are, or a model that cannot be served so.
    """
    places = full_layers(layers)
    if not 0 <= count <= len(places):
        raise ValueError(
            f"`offload_layers` must be from 0 to {len(places)}, the layers of this model that keep all keys, "
            f"got {count}; windows and states do not grow with the length, and stay."
        )
    if count:
        check_offload(config)
    carrier = Carrier()
    for number in range(count):
        place = places[(2 * number + 1) * len(places) // (2 * count)]
        layer = layers[place]
        if isinstance(layer, QuantizedLayer):
            layers[place] = OffloadedQuantizedLayer(carrier, layer.cache_dtype, layer.capacity)
        else:
            layers[place] = OffloadedLayer(carrier, layer.capacity)
