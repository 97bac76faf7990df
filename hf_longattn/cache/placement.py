"""Which rank holds which token of a cache that is cut along the sequence.

A run of prompt tokens that the ranks compute together is cut in 2P equal pieces, and rank r takes pieces r
and 2P - 1 - r: every rank then has the same number of tokens and the same causal work. Tokens that every rank
computes (decoding, the remainder of a prompt) go round in blocks of 32 by position, so that long answers and
long chats stay balanced.
"""

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_longattn.cache.preallocated import lasting_buffers

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


class _Stretch(NamedTuple):
    """Tokens given out in one way: what each rank holds of a run that was cut, None for blocks."""

    start: int
    stop: int
    share: int | None
    before: int


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
        # Runs that were cut and stretches in blocks, in turn.
        self._stretches: list[_Stretch] = []
        self._positions: Tensor | None = None
        self._written = 0
        self._ahead: Tensor | None = None
        self._is_ahead_known = False
        self._slots: tuple[Tensor, Tensor] | None = None

    @property
    def held(self) -> int:
        """Tokens that this rank holds."""
        return self._before[-1] + self._stops[-1] - self._starts[-1] if self._starts else 0

    @property
    def is_even(self) -> bool:
        """Whether all ranks hold as many tokens, those of runs that were cut: the same answer on each."""
        shares = ((stop - start, share) for start, stop, share, _ in self._stretches)
        return all(share is not None and share * self.world_size == count for count, share in shares)

    def count(self, length: int) -> int:
        """How many of the first `length` tokens this rank holds."""
        run = bisect.bisect_left(self._starts, length) - 1
        if run < 0:
            return 0
        return self._before[run] + min(length, self._stops[run]) - self._starts[run]

    def most(self, length: int) -> int:
        """A bound on what any rank holds of the first `length` tokens, those to come in blocks.

        It is the same number on every rank, so that all of them make room at the same step.

        Args:
            length: at least that of now.
        """
        if not self._stretches:
            return self._most_in_blocks(length)
        last = self._stretches[-1]
        if last.share is None:
            return last.before + self._most_in_blocks(length - last.start)
        return last.before + last.share + self._most_in_blocks(length - last.stop)

    def _most_in_blocks(self, count: int) -> int:
        # The stretch may begin and end inside a block.
        blocks = max(count, 0) // BLOCK + 2
        return min(max(count, 0), -(-blocks // self.world_size) * BLOCK)

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
        self._stretch(stop, None)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(start, stop) of the positions that this rank holds, ascending, as they follow each other there."""
        return list(zip(self._starts, self._stops, strict=True))

    @property
    def stretches(self) -> list[tuple[int, int, int | None]]:
        """How all tokens were given out, the same on every rank: what `follow` takes.

        (start, stop, what each rank was given of a run that was cut, None for blocks) of each stretch.
        """
        return [(start, stop, share) for start, stop, share, _ in self._stretches]

    def follow(self, stretches: list[tuple[int, int, int | None]]) -> None:
        """Gives out all tokens anew, as another placement over as many ranks has given them.

        Args:
            stretches: of that one. Of a run that was cut and then cropped, `stop` is where it ends now.
        """
        self.truncate(0)
        for start, stop, share in stretches:
            if share is None:
                self.place(stop - start)
            else:
                self.place_slices(Slices(start, share * self.world_size, self.rank, self.world_size))
                self.truncate(stop)

    def spread(self, length: int) -> None:
        """Gives out all tokens anew, as one run that is cut, and the remainder.

        Args:
            length: tokens.
        """
        pieces = 2 * self.world_size
        count = length // pieces * pieces
        self.follow([(0, count, count // self.world_size)] if count else [])
        if count < length:
            self.place(length - count)

    def place_slices(self, slices: Slices) -> None:
        """Gives out a run that the ranks compute together."""
        for part in slices.own:
            self._add(slices.start + part.start, slices.start + part.stop)
        self._stretch(slices.start + slices.count, 2 * slices.piece)
        self._is_ahead_known = False

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
        while self._stretches and self._stretches[-1].start >= length:
            self._is_ahead_known &= self._stretches.pop().share is None
        if self._stretches and self._stretches[-1].stop > length:
            self._is_ahead_known &= self._stretches[-1].share is None
            self._stretches[-1] = self._stretches[-1]._replace(stop=length)
        self.length = length

    def positions(self, count: int, device: torch.device) -> Tensor:
        """(count,) int64 positions of the first `count` held tokens, ascending."""
        if self._positions is None or self._positions.device != device or len(self._positions) < self.held:
            with lasting_buffers():
                self._positions = torch.zeros(
                    self.held + self.held // 2 + 256, dtype=torch.long, device=device
                )
            self._written = 0
        run = bisect.bisect_right(self._before, self._written) - 1
        while self._written < self.held:
            first = self._starts[run] + self._written - self._before[run]
            stop = self._before[run] + self._stops[run] - self._starts[run]
            torch.arange(first, self._stops[run], out=self._positions[self._written : stop])
            self._written, run = stop, run + 1
        return self._positions[:count]

    def look_ahead(self, slots: int, device: torch.device) -> Tensor:
        """The positions of all slots of a buffer, those to be filled in blocks included, for a CUDA graph.

        Args:
            slots: of the buffer.
            device: of the result.

        Returns:
            (slots,) int64, ascending. The tensor stays the same while `slots` does; runs that are cut, and
            cropped, change what is in it.
        """
        if self._ahead is None or len(self._ahead) != slots or self._ahead.device != device:
            with lasting_buffers():
                self._ahead = torch.zeros(slots, dtype=torch.long, device=device)
            self._is_ahead_known = False
        if not self._is_ahead_known:
            self._ahead[: self.held] = self.positions(self.held, device)
            self._ahead[self.held :] = self._next_in_blocks(slots - self.held, device)
            self._is_ahead_known = True
        return self._ahead

    def slots_of(self, positions: Tensor, spare: int) -> Tensor:
        """Where tokens go in a buffer that `look_ahead` describes; worked out once for all layers of a step.

        Args:
            positions: (T,) int64.
            spare: slot for the tokens of other ranks.

        Returns:
            (T,) int64 slots.
        """
        if self._slots is None or self._slots[0] is not positions:
            assert self._ahead is not None
            slots = torch.searchsorted(self._ahead, positions)
            is_own = self._ahead[slots.clamp(max=len(self._ahead) - 1)] == positions
            self._slots = positions, torch.where(is_own, slots, spare)
        return self._slots[1]

    def _next_in_blocks(self, count: int, device: torch.device) -> Tensor:
        block = self.length // BLOCK
        block += (self.rank - block) % self.world_size
        begun = max(self.length - block * BLOCK, 0)
        index = torch.arange(begun, begun + count, device=device)
        return (block + index // BLOCK * self.world_size) * BLOCK + index % BLOCK

    def _stretch(self, stop: int, share: int | None) -> None:
        start, before = self.length, self.most(self.length)
        if share is None and self._stretches and self._stretches[-1].share is None:
            start, before = self._stretches[-1].start, self._stretches.pop().before
        self._stretches.append(_Stretch(start, stop, share, before))
        self.length = stop

    def _add(self, start: int, stop: int) -> None:
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
            return
        self._before.append(self.held)
        self._starts.append(start)
        self._stops.append(stop)
