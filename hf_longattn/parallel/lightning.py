"""Lightning attention of a sequence that lies on several ranks in slices.

A slice acts on what came before it only through its own state and its length, so with N slices in order,

    alone_i     the state behind slice i, from zero           (every rank its own, at once)
    carried_i = exp(-slope n_i) carried_{i-1} + alone_i       (one all-gather, the same sum on every rank)
    output_i  = the scan of slice i, entered by carried_{i-1}

and the gradients run the other way through the same sum: with d_i the gradient that slice i has for what
enters it, the gradient of alone_i is g_i = exp(-slope n_{i+1}) g_{i+1} + d_{i+1}. So a layer costs one
all-gather of a state a slice forward and one backward, whatever the length. The second scan takes the state
in before anything is rounded: results are those of one process. arXiv 2401.04658, equation 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_longattn.cache.token_rows import TokenRows, scan_rows
from hf_longattn.kernels.lightning_attention import combine_states
from hf_longattn.parallel.group import SequenceGroup


def scan_slices(
    group: SequenceGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    rows: Sequence[TokenRows],
    state: Tensor | None = None,
    *,
    stateful: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal lightning attention over rows whose tokens lie on the ranks of a group.

    Every rank calls it alike. The gradients of what every rank holds, `slopes` and `state`, are each rank's
    share, as those of parameters are: their sum over the ranks is the gradient.

    Args:
        group: the ranks.
        query: (B, H, t, K), this rank's tokens: its slice, or its two of equal length one behind the other.
        key: (B, G, t, K), where G divides H.
        value: (B, G, t, V).
        slopes: (H,) fp32 (fp64 for fp64 inputs).
        scale: factor on the output.
        rows: of each slice, which of its tokens exist and where documents begin. One: rank r has slice r of
            P. Two: rank r has slices r and 2P - 1 - r of 2P.
        state: (B, H, K, V) that enters the first slice, the same on every rank, or None for zeros.
        stateful: whether the state behind the last slice is wanted.

    Returns:
        The output (B, t, H, V) in the query's dtype, and the state, the same bits on every rank, or None.
    """
    slices = list(
        zip(*(tensor.tensor_split(len(rows), 2) for tensor in (query, key, value)), rows, strict=True)
    )
    outputs: list[Tensor] = []
    if group.world_size == 1:
        for q, k, v, own in slices:
            output, state = scan_rows(q, k, v, slopes, scale, own, state, stateful=True)
            outputs.append(output)
        return torch.cat(outputs, 1), state if stateful else None
    # The first scan is for its state alone: any query will do.
    alone = [scan_rows(q.detach(), k, v, slopes, scale, own, stateful=True)[1] for q, k, v, own in slices]
    counts = [own.counts(k.shape[0], k.shape[2], k.device) for _, k, _, own in slices]
    lengths, resets = (torch.stack(part) for part in zip(*counts, strict=True))
    pieces = torch.stack([part for part in alone if part is not None])
    entering, state = _Carry.apply(pieces, slopes, state, Pieces(group, lengths, resets))
    for part, (q, k, v, own) in zip(entering.unbind(), slices, strict=True):
        outputs.append(scan_rows(q, k, v, slopes, scale, own, part)[0])
    return torch.cat(outputs, 1), state if stateful else None


@dataclass
class Pieces:
    """The slices of all ranks in the order of the sequence.

    Args:
        group: the ranks.
        lengths: (n, B) fp32, existing tokens of this rank's slices; of all slices once they are gathered.
        resets: (n, B) bool, whether a document begins in them.
    """

    group: SequenceGroup
    lengths: Tensor
    resets: Tensor

    def __post_init__(self) -> None:
        rank, size = self.group.rank, self.group.world_size
        self.own = [rank] if len(self.lengths) == 1 else [rank, 2 * size - 1 - rank]

    def gather(self, states: Tensor) -> Tensor:
        """(n, B, H, K, V) of every rank -> (N, B, H, K, V), and the lengths and resets with them."""
        marks = torch.stack([self.lengths, self.resets.float()], -1).to(states.dtype)
        everyone = self._in_order(torch.cat([states.flatten(2), marks], -1))
        self.lengths, self.resets = everyone[..., -2], everyone[..., -1] > 0
        return everyone[..., :-2].unflatten(-1, states.shape[2:])

    def gather_gradients(self, entering: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients (N, B, H, K, V) of what enters each slice, and the sum of those of the last state."""
        everyone = self.group.gather(torch.cat([entering, last[None]]))
        return self._order(everyone[:, :-1]), everyone[:, -1].sum(0)

    def _in_order(self, own: Tensor) -> Tensor:
        return self._order(self.group.gather(own))

    def _order(self, everyone: Tensor) -> Tensor:
        """(P, n, ...) -> (N, ...): the second slices of the ranks come in reverse."""
        return torch.cat([everyone[:, 0], everyone[:, 1].flip(0)]) if len(self.own) == 2 else everyone[:, 0]

    def enter(self, alone: Tensor, slopes: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states that enter this rank's slices.

        Args:
            alone: (n, B, H, K, V), behind each of this rank's slices, from zero.
            slopes: (H,).
            state: (B, H, K, V) that enters the first slice, or None for zeros.

        Returns:
            (n, B, H, K, V), and the state (B, H, K, V) behind the last slice of all.
        """
        carried = [torch.zeros_like(alone[0]) if state is None else state.to(alone.dtype)]
        for index, piece in enumerate(self.gather(alone)):
            carried.append(carry(carried[-1], piece, self.lengths[index], self.resets[index], slopes))
        return torch.stack([carried[index] for index in self.own]), carried[-1]

    def leave(self, grad_entering: Tensor, grad_last: Tensor, slopes: Tensor) -> Tensor:
        """The gradients of the states of this rank's slices alone, from those of what enters the slices.

        Args:
            grad_entering: (n, B, H, K, V).
            grad_last: (B, H, K, V), this rank's of the state behind all.
            slopes: (H,).
        """
        behind = self._back(*self.gather_gradients(grad_entering, grad_last), slopes)
        return torch.stack([behind[index + 1] for index in self.own])

    def own_gradient_of_state(self, grad_entering: Tensor, grad_last: Tensor, slopes: Tensor) -> Tensor:
        """This rank's share of the gradient of the state before all; arguments as in `leave`."""
        mine = grad_entering.new_zeros(len(self.lengths), *grad_last.shape)
        for index, grad in zip(self.own, grad_entering, strict=True):
            mine[index] = grad
        return self._back(mine, grad_last, slopes)[0]

    def _back(self, entering: Tensor, last: Tensor, slopes: Tensor) -> list[Tensor]:
        """The gradients of the states behind each slice; the first is that of the state before all."""
        grads = [last]
        for index in reversed(range(len(entering))):
            grad = carry(grads[-1], entering[index], self.lengths[index], self.resets[index], slopes)
            grads.append(grad)
        return grads[::-1]


def carry(left: Tensor, right: Tensor, lengths: Tensor, resets: Tensor, slopes: Tensor) -> Tensor:
    """exp(-slope n) left + right over n tokens, where the beginning of a document forgets `left`.

    Args:
        left: (B, H, K, V).
        right: (B, H, K, V).
        lengths: (B,), n.
        resets: (B,) bool, whether a document begins in the tokens.
        slopes: (H,).
    """
    return combine_states(left.masked_fill(resets[:, None, None, None], 0), right, lengths, slopes)


class _Carry(torch.autograd.Function):
    """From the states of the slices alone to those that enter them, and the one behind all."""

    @staticmethod
    def forward(
        ctx: Any, alone: Tensor, slopes: Tensor, state: Tensor | None, pieces: Pieces
    ) -> tuple[Tensor, Tensor]:
        entering, last = pieces.enter(alone, slopes, state)
        ctx.pieces = pieces
        ctx.save_for_backward(slopes, entering if ctx.needs_input_grad[1] else None)
        return entering, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entering: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        slopes, entering = ctx.saved_tensors
        pieces: Pieces = ctx.pieces
        grad_alone = pieces.leave(grad_entering, grad_last, slopes)
        grad_slopes = grad_state = None
        if entering is not None:
            grad_slopes = _decay_gradient(entering, grad_alone, slopes, pieces)
        if ctx.needs_input_grad[2]:
            grad_state = pieces.own_gradient_of_state(grad_entering, grad_last, slopes)
        return grad_alone, grad_slopes, grad_state, None


def _decay_gradient(entering: Tensor, grad_behind: Tensor, slopes: Tensor, pieces: Pieces) -> Tensor:
    """The gradient of the slopes in exp(-slope n), of this rank's slices: (H,)."""
    lengths = pieces.lengths[pieces.own]
    products = (entering * grad_behind).sum((-2, -1)).masked_fill(pieces.resets[pieces.own][..., None], 0)
    decays = torch.exp(-slopes * lengths[..., None])
    return -(products * lengths[..., None] * decays).sum((0, 1)).to(slopes.dtype)
