"""Going back to what a cache held before a call that failed, wherever the error has left its layers.

Layers of full attention only ever write behind what they hold, so their length is enough. A window moves, and
a state is added to: those are copied, and they are of constant size.
"""

import copy
from typing import Any

from hf_longattn.cache.long_context import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer, PreallocatedSlidingLayer
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.cache.sharded import ShardedCache

# What counts the tokens of a layer of full attention. Its capacity is that of the layers beside it, some of
# which may have grown before memory ran out.
_COUNTS = ("end", "length", "capacity")


class Snapshot:
    """What a cache holds now.

    Args:
        cache: of the caller; it may be empty.
    """

    def __init__(self, cache: LongContextCache) -> None:
        self.cache = cache
        self.length = int(cache.get_seq_length())
        self._empty: dict[str, Any] | None = None
        self._layers: list[Any] = []
        layers: list[Any] = cache.layers
        if self.length == 0 and not any(layer.is_initialized for layer in layers):
            # No tensor is in there yet: after an error the memory is given back too.
            self._empty = copy.deepcopy(vars(cache))
        else:
            self._layers = [_kept(layer) for layer in layers]

    def restore(self) -> None:
        """Makes the cache hold again what it held, and no more."""
        if self._empty is not None:
            vars(self.cache).update(copy.deepcopy(self._empty))
            return
        layers: list[Any] = self.cache.layers
        for index, kept in enumerate(self._layers):
            if isinstance(kept, (_Counts, _Window)):
                kept.restore(layers[index])
            else:
                layers[index] = kept
        if isinstance(self.cache, ShardedCache):
            self.cache.placement.truncate(self.length)

    def settle(self) -> None:
        """Has every layer hold the tokens that all of them hold, after an error somewhere in a step.

        Where a layer cannot go back so far, or does not tell how far it has come, all hold what they held.
        """
        layers: list[Any] = self.cache.layers
        if not all(isinstance(layer, (PreallocatedLayer, RecurrentLayer)) for layer in layers):
            self.restore()
            return
        lengths = [int(layer.get_seq_length()) for layer in layers]
        drops = [length - min(lengths) for length in lengths]
        if not any(drops):
            return
        if min(lengths) <= self.length or not all(map(_can_drop, layers, drops)):
            self.restore()
            return
        for layer, drop in zip(layers, drops, strict=True):
            layer.crop(-drop)


def _can_drop(layer: Any, count: int) -> bool:
    try:
        layer.check_drop(count)
    except RuntimeError:
        return False
    return True


class _Window:
    """A layer's last window, copied."""

    def __init__(self, layer: PreallocatedSlidingLayer) -> None:
        self.state = {name: tensor.clone() for name, tensor in layer.state().items()}
        self.length, self.capacity = int(layer.get_seq_length()), layer.capacity

    def restore(self, layer: Any) -> None:
        """Puts the window back."""
        for part in (layer, getattr(layer, "scales", layer)):
            part.capacity = self.capacity
        layer.load_state(self.state, self.length)


class _Counts:
    """The lengths of a layer, and of the layer of its scales where it has one."""

    def __init__(self, layer: Any) -> None:
        self.counts = {name: vars(layer)[name] for name in _COUNTS if name in vars(layer)}
        self.scales = _Counts(layer.scales) if hasattr(layer, "scales") else None

    def restore(self, layer: Any) -> None:
        """Puts the lengths back."""
        vars(layer).update(self.counts)
        if self.scales is not None:
            self.scales.restore(layer.scales)


def _kept(layer: Any) -> Any:
    if isinstance(layer, PreallocatedSlidingLayer) and not layer.record_past:
        return _Window(layer)
    if isinstance(layer, PreallocatedLayer) and not isinstance(layer, PreallocatedSlidingLayer):
        return _Counts(layer)
    # The layers of a cache that ranks share have one placement between them, which is put back by its length.
    placement = getattr(layer, "placement", None)
    return copy.deepcopy(layer, {id(placement): placement})
