"""Which rank holds which token of a cache that is cut along the sequence.

A run of prompt tokens that the ranks compute together is cut in 2P equal pieces, and rank r takes pieces r
and 2P - 1 - r: every rank then has the same number of tokens and the same causal work. Tokens that every rank
computes (decoding, the remainder of a prompt) go round in blocks of 32 by position, so that long answers and
long chats stay balanced.
"""

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32


@dataclass(frozen=True)
class Slices:
    """A run of tokens that the ranks compute together, each its two slices.

    Args:
        start: position of the first token.
        count: tokens of the run, a multiple of 2P.
        rank: this rank.
        world_size: P.
    """

    start: int
    count: int
    rank: int
    world_size: int

    @property
    def piece(self) -> int:
        """Tokens of one of the 2P pieces."""
        return self.count // (2 * self.world_size)

    @property
    def own(self) -> tuple[slice, slice]:
        """The two slices of this rank, counted from the start of the run."""
        last = 2 * self.world_size - 1 - self.rank
        return tuple(slice(i * self.piece, (i + 1) * self.piece) for i in (self.rank, last))  # type: ignore

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The part of this rank, from a tensor with one entry a token of the run along `dim`."""
        return torch.cat([tensor.narrow(dim, part.start, self.piece) for part in self.own], dim)

    def in_order(self, gathered: Tensor) -> Tensor:
        """Puts the tokens that every rank computed in the order of the run.

        Args:
            gathered: (P, B, H, count / P, K), one part a rank.

        Returns:
            (B, H, count, K).
        """
        halves = gathered.unflatten(3, (2, self.piece))
        pieces = torch.cat([halves[:, :, :, 0], halves[:, :, :, 1].flip(0)])  # (2P, B, H, piece, K)
        return pieces.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def by_rank(self, tensor: Tensor) -> Tensor:
        """The inverse of `in_order`.

        Args:
            tensor: (B, H, count, K), in the order of the run.

        Returns:
            (P, B, H, count / P, K), what belongs to each rank.
        """
        pieces = tensor.unflatten(2, (2 * self.world_size, self.piece)).permute(2, 0, 1, 3, 4)
        first, second = pieces[: self.world_size], pieces[self.world_size :].flip(0)
        return torch.cat([first, second], 3)


class Placement:
    """The tokens of a cache that one rank holds, as runs of positions; one for all layers of a cache.

    Args:
        rank: this rank.
        world_size: P.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.length = 0
        self._starts: list[int] = []
        self._stops: list[int] = []
        # Held tokens before each run.
        self._before: list[int] = []
        self._positions: Tensor | None = None
        self._written = 0

    @property
    def held(self) -> int:
        """Tokens that this rank holds."""
        return self._before[-1] + self._stops[-1] - self._starts[-1] if self._starts else 0

    def count(self, length: int) -> int:
        """How many of the first `length` tokens this rank holds."""
        run = bisect.bisect_left(self._starts, length) - 1
        if run < 0:
            return 0
        return self._before[run] + min(length, self._stops[run]) - self._starts[run]

    def own_of(self, start: int, count: int) -> list[slice]:
        """Where this rank's tokens lie in the `count` tokens from position `start`, which are placed."""
        first = bisect.bisect_right(self._stops, start)
        runs = zip(self._starts[first:], self._stops[first:], strict=True)
        clipped = ((max(run, start), min(stop, start + count)) for run, stop in runs)
        return [slice(low - start, high - start) for low, high in clipped if low < high]

    def place(self, count: int) -> None:
        """Gives out the next `count` tokens, which every rank computes, in blocks by position."""
        stop = self.length + count
        block = self.length // BLOCK
        while block * BLOCK < stop:
            if block % self.world_size == self.rank:
                self._add(max(block * BLOCK, self.length), min((block + 1) * BLOCK, stop))
            block += 1
        self.length = stop

    def place_slices(self, slices: Slices) -> None:
        """Gives out a run that the ranks compute together."""
        for part in slices.own:
            self._add(slices.start + part.start, slices.start + part.stop)
        self.length += slices.count

    def truncate(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if length >= self.length:
            return
        self._written = min(self._written, self.count(length))
        while self._starts and self._starts[-1] >= length:
            for run in (self._starts, self._stops, self._before):
                run.pop()
        if self._stops:
            self._stops[-1] = min(self._stops[-1], length)
        self.length = length

    def positions(self, count: int, device: torch.device) -> Tensor:
        """(count,) int64 positions of the first `count` held tokens, ascending."""
        if self._positions is None or self._positions.device != device or len(self._positions) < self.held:
            self._positions = torch.zeros(self.held + self.held // 2 + 256, dtype=torch.long, device=device)
            self._written = 0
        run = bisect.bisect_right(self._before, self._written) - 1
        while self._written < self.held:
            first = self._starts[run] + self._written - self._before[run]
            stop = self._before[run] + self._stops[run] - self._starts[run]
            torch.arange(first, self._stops[run], out=self._positions[self._written : stop])
            self._written, run = stop, run + 1
        return self._positions[:count]

    def _add(self, start: int, stop: int) -> None:
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
            return
        self._before.append(self.held)
        self._starts.append(start)
        self._stops.append(stop)
