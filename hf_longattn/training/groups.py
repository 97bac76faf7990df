"""Groups of layers of which the first alone keeps its input: how many to a group, and what waits then.

Of L layers in groups of n, ceil(L / n) keep their input in the forward. In the backward of a group its layers
run forward once more, so that n - 1 further inputs wait until that backward is over:

    at the highest point    ceil(L / n) + n - 1 inputs                         least near n = sqrt(L)
    on top of a step        the forward of n - 1 of every n layers, once more

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 4.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hf_longattn.devices import host_memory
from hf_longattn.parallel.sequence import SequenceShare
from hf_longattn.training.offload import Layout, Offloader, has_room
from hf_longattn.training.shards import check_recallable, is_sharded


def waiting(layers: int, every: int, hidden: int, attention: list[int]) -> list[int]:
    """Bytes of every tensor that waits for the backward at its highest point, in the order they are made.

    Args:
        layers: L.
        every: layers of a group.
        hidden: bytes of the input of a layer.
        attention: bytes of what is saved of attention in a layer, none where it is computed again.
    """
    groups = -(-layers // every)
    tail = layers - every * (groups - 1)
    # The backward begins with the last group, which may be a short one; those before it are whole.
    ends = [(groups, tail), *([(groups - 1, every)] if groups > 1 else [])]
    found = []
    for kept, size in ends:
        # The last layer of a group is not run forward again: its backward is next.
        again = [hidden, *attention] * max(size - 2, 0) + [hidden] * (size > 1)
        found.append([hidden, *attention] * kept + again)
    return max(found, key=sum)


def pick_every(layers: int, sizes: Callable[[int], list[int]], holds: Callable[[list[int]], bool]) -> int:
    """The fewest layers to a group whose inputs find room; where none do, those that need least.

    Args:
        layers: L.
        sizes: bytes of what waits, given the layers to a group.
        holds: whether there is room for it.
    """
    # Beyond the root of L, larger groups need more.
    numbers = range(1, math.isqrt(max(layers - 1, 0)) + 2)
    fitting = next((every for every in numbers if holds(sizes(every))), None)
    return min(numbers, key=lambda every: sum(sizes(every))) if fitting is None else fitting


@dataclass
class Groups:
    """How many layers of one model share a kept input.

    Args:
        every: the number, or "auto" for the fewest whose inputs find room.
        layers: L.
        attention: bytes of what is saved of attention for one token in one layer.
        offloader: where inputs wait.
    """

    every: int | str
    layers: int
    attention: tuple[int, ...]
    offloader: Offloader

    def pick(self, layout: Layout, module: nn.Module, share: SequenceShare | None) -> int:
        """The number for one forward.

        Args:
            layout: of the input of the first layer.
            module: that layer.
            share: what this rank computes of a sequence over several.

        Raises:
            ValueError: a number above 1 where the parameters of a layer are gone in the backward of others.
        """
        if isinstance(self.every, int):
            check_recallable(module, self.every)
            return self.every
        # With shards, ranks of other lengths would pick other numbers and wait for one another for ever.
        if layout.device.type != "cuda" or is_sharded(module):
            return 1
        every = self._fitting(layout)
        if share is None:
            return every
        # Ranks gather keys and values in every layer that they run again.
        return int(share.group.gather(torch.tensor([every], device=layout.device)).max())

    def _fitting(self, layout: Layout) -> int:
        tokens, offloader = layout.shape[0] * layout.shape[1], self.offloader
        free, host = offloader.free(layout.device), host_share()
        attention = [tokens * size for size in self.attention]

        def holds(sizes: list[int]) -> bool:
            return has_room(sizes, (free, host), offloader.mode, offloader.reserve)

        return pick_every(
            self.layers, lambda every: waiting(self.layers, every, layout.num_bytes, attention), holds
        )


def host_share() -> int:
    """Bytes of host memory for the inputs of this process: other processes of the host want theirs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return host_memory(torch.device("cuda")) // max(processes, 1)
