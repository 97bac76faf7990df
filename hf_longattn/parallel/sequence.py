"""One sequence over several ranks in a forward and its backward: which tokens a rank computes.

The tokens are cut in 2P equal pieces, and rank r takes pieces r and 2P - 1 - r (`cache.placement.Slices`), so
that causal work is the same everywhere. Where T does not divide, tokens are added at the end, which no token
of the sequence sees and whose outputs nobody reads.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_longattn.cache.placement import Slices
from hf_longattn.parallel.group import SequenceGroup


@dataclass(frozen=True, eq=False)
class SequenceShare:
    """The tokens of one forward that this rank computes.

    Args:
        group: the ranks.
        length: T, tokens of the whole sequence.
        positions: (..., T) position ids of the whole sequence.
        padding: (B, T) mask of the whole sequence, True where a token exists, or None where all do.
        documents: (B, T) integer, the document of each token, equal ids contiguous; None for one a row.
    """

    group: SequenceGroup
    length: int
    positions: Tensor
    padding: Tensor | None = None
    documents: Tensor | None = None

    @cached_property
    def slices(self) -> Slices:
        """The slices of this rank, of a sequence that was filled up to a multiple of 2P tokens."""
        pieces = 2 * self.group.world_size
        count = -(-self.length // pieces) * pieces
        return Slices(0, count, self.group.rank, self.group.world_size)

    def place(self, rows: slice) -> slice:
        """Where some of this rank's tokens lie in the sequence.

        Args:
            rows: tokens of one slice, counted over both slices of this rank.
        """
        piece = self.slices.piece
        half = rows.start // piece
        start = self.slices.own[half].start - half * piece
        return slice(start + rows.start, start + rows.stop)

    def fill(self, tensor: Tensor, dim: int, value: float = 0) -> Tensor:
        """A tensor with one entry a token along `dim`, with `value` for the tokens that were added."""
        missing = self.slices.count - self.length
        dim = dim % tensor.ndim
        pads = (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)
        return F.pad(tensor, pads, value=value) if missing else tensor

    def filled_positions(self) -> Tensor:
        """The position ids, which go on counting over the tokens that were added."""
        missing = self.slices.count - self.length
        steps = torch.arange(1, missing + 1, device=self.positions.device, dtype=self.positions.dtype)
        return torch.cat([self.positions, self.positions[..., -1:] + steps], -1)

    def filled_padding(self) -> Tensor | None:
        """The padding, where each row goes on as it ends: no new hole in it."""
        if self.padding is None:
            return None
        missing = self.slices.count - self.length
        return torch.cat([self.padding, self.padding[:, -1:].expand(-1, missing)], 1)

    def take(self, tensor: Tensor, dim: int, value: float = 0) -> Tensor:
        """This rank's part of a tensor with one entry a token along `dim`.

        Args:
            tensor: of the whole sequence.
            dim: that of the tokens.
            value: for the tokens that were added.
        """
        return self.slices.take(self.fill(tensor, dim, value), dim)

    def split(self, hidden: Tensor) -> Tensor:
        """(B, T, D) that every rank has -> this rank's (B, t, D); the gradient is that of the whole."""
        return _Split.apply(hidden, self)

    def join(self, hidden: Tensor) -> Tensor:
        """This rank's (B, t, D) -> (B, T, D) on every rank, who all go on with it in the same way."""
        return _Join.apply(hidden, self)

    def add_up(self, total: Tensor) -> Tensor:
        """The sum over the ranks; the gradient of it is that of each term."""
        return _AddUp.apply(total, self)

    def add_up_gradients(self, totals: list[Tensor | None], parameters: list[Tensor]) -> list[Tensor | None]:
        """The sums over the ranks of the gradients of parameters that every rank holds.

        Args:
            totals: this rank's, contiguous, None where a parameter took no part; written over.
            parameters: as many.

        Returns:
            the sums, None where a parameter took part on no rank.
        """
        if not parameters or self.group.world_size == 1:
            return totals
        mine = torch.tensor([t is not None for t in totals], dtype=torch.uint8, device=parameters[0].device)
        used = self.group.gather(mine).amax(0).tolist()
        for index, parameter in enumerate(parameters):
            if used[index]:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                total = totals[index]
                totals[index] = self.group.add_up(
                    torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
                    if total is None
                    else total.contiguous()
                )
        return totals

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, `current_share` is this share."""
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)


_running: ContextVar[SequenceShare | None] = ContextVar("hf_longattn_sequence_share", default=None)


def current_share() -> SequenceShare | None:
    """The share of the forward that runs, None where this process computes whole sequences.

    It is known in the forward alone: what a backward needs of it is to be kept.
    """
    return _running.get()


def _take(hidden: Tensor, share: SequenceShare) -> Tensor:
    return share.take(hidden, 1)


def _gather(hidden: Tensor, share: SequenceShare) -> Tensor:
    whole = share.slices.in_order(share.group.gather(hidden)[:, :, None])[:, 0]
    return whole[:, : share.length]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, share: SequenceShare) -> Tensor:
        ctx.share = share
        return _take(hidden, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.share), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, share: SequenceShare) -> Tensor:
        ctx.share = share
        return _gather(hidden, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Every rank has the gradient of the whole already: adding them up would count it P times.
        return _take(grad, ctx.share), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, share: SequenceShare) -> Tensor:
        return share.group.add_up(total.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
