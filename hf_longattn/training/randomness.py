"""Random numbers of a layer that runs a block at a time, and runs again in the backward.

Every block draws numbers of its own, which follow from a seed of the call and the block's place in the
sequence: the second run draws what the first did, on whatever rank, and the generators go on as if neither
had been. Most layers draw nothing, and seeding generators takes longer than launching a product. So the first
forward only watches them: a block that moves one of them is run again with its own numbers, and what has
drawn nothing in the forward needs no numbers in the backward.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from hf_longattn.devices import default_generator

_Result = TypeVar("_Result")


class BlockRandomness:
    """The random numbers of one call of a layer.

    Args:
        seed: of the first block, or None outside training, where generators are left to themselves.
        device: of the hidden states.
        draws: whether the layer is known to draw numbers.
    """

    def __init__(self, seed: int | None, device: torch.device, draws: bool = False) -> None:
        self.seed, self.device, self.draws = seed, device, draws
        # Until the first forward is over.
        self.watches = True

    def run(self, place: int, compute: Callable[[], _Result]) -> _Result:
        """Computes one block with its numbers.

        Args:
            place: of its first token in the sequence.
            compute: what may draw; it may be called twice.
        """
        if self.seed is None or not (self.draws or self.watches):
            return compute()
        if not self.draws:
            generators = self._generators()
            before = [generator.get_state() for generator in generators]
            result = compute()
            if all(map(torch.equal, before, [generator.get_state() for generator in generators])):
                return result
            del result
            _restore(generators, before)
            self.draws = True
        with self._seeded(self.seed + place):
            return compute()

    def _generators(self) -> list[torch.Generator]:
        """Those of the CPU and of one device; those of other devices go on."""
        shared, own = torch.default_generator, default_generator(self.device)
        return [shared] if own is shared else [shared, own]

    @contextlib.contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        generators = self._generators()
        before = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            _restore(generators, before)


def _restore(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
