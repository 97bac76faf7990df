"""Attention of a layer whose sequence lies on several ranks: keys and values of all, queries of one's own.

    forward:   K, V of the rank's own tokens;  all-gather;  each own block of queries visits its prefix
    backward:  the same K, V;  each own block adds to fp32 dK, dV of the whole sequence;  reduce-scatter

For the time of one layer every rank holds K and V of the whole sequence, G (K + V) numbers a token, twice
while they are put in order, and in the backward as many in fp32, twice while they are added up. Nothing else
grows with T on one rank: hidden states, their gradients and what is saved are T / P.
"""

from torch import Tensor

from hf_longattn.parallel.sequence import SequenceShare
from hf_longattn.training.attention import PrefixAttention
from hf_longattn.training.visibility import Visibility


class SharedAttention(PrefixAttention):
    """The keys and values of one layer on all ranks, and the block that is running on this one.

    Args:
        visibility: what each own block sees.
        share: what this rank computes.
    """

    is_shared = True

    def __init__(self, visibility: Visibility, share: SequenceShare) -> None:
        super().__init__(visibility, share.slices.count // share.group.world_size)
        self.share = share

    def _place(self, rows: slice) -> slice:
        return self.share.place(rows)

    def _own_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        # Queries on other ranks have yet to add theirs.
        return None, None

    def gather(self) -> None:
        """Puts the keys and values of all ranks in the place of this rank's own, in order."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._in_order(self.keys), self._in_order(self.values)

    def _in_order(self, own: Tensor) -> Tensor:
        return self.share.slices.in_order(self.share.group.gather(own))

    def add_up(self) -> None:
        """Adds up the gradients of keys and values over the ranks, and keeps those of this rank's own."""
        assert self.grad_keys is not None and self.grad_values is not None
        self.keys = self.values = None
        self.grad_keys = self._added_up(self.grad_keys)
        self.grad_values = self._added_up(self.grad_values)

    def _added_up(self, whole: Tensor) -> Tensor:
        return self.share.group.add_up_parts(self.share.slices.by_rank(whole))

    def found_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of the block that stopped last, with their graph, and their gradients."""
        assert self.found is not None and self.grad_keys is not None and self.grad_values is not None
        found, self.found = self.found, None
        sums = (self.grad_keys[:, :, self.rows], self.grad_values[:, :, self.rows])
        return list(found), [part.to(own.dtype) for own, part in zip(found, sums, strict=True)]
