"""Joining the partial attention results of the ranks: the tree reduction, in several forms.

Every rank holds (output, lse) of its own keys. The forms differ in what travels; each leaves the same bits on
every rank, since each rank merges the same numbers in the same order. Tree Attention, arXiv 2408.04093,
section 4.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from hf_longattn.kernels.merge_partials import merge_over_first, merge_partials
from hf_longattn.parallel.group import SequenceGroup


def pack(output: Tensor, lse: Tensor) -> Tensor:
    """Puts (..., V) outputs and (...) lse in one tensor, (..., V + a few), in the dtype of `output`.

    lse travels as its bits, so that nothing is rounded.

    Args:
        output: (..., V).
        lse: (...), fp32 or fp64.
    """
    width, per_lse = output.shape[-1], lse.element_size() // output.element_size()
    parts = [output, lse.contiguous().unsqueeze(-1).view(output.dtype)]
    if width % per_lse:
        # The bits of lse start where a number of its size may.
        parts.insert(1, output.new_zeros((*lse.shape, -width % per_lse)))
    return torch.cat(parts, -1)


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of the output and the lse in what `pack` made.

    Args:
        packed: (..., V + a few).
        width: V.
        dtype: of lse.

    Returns:
        output (..., V) and lse (...).
    """
    return packed[..., :width], packed.view(dtype)[..., -1]


def tree_merge(group: SequenceGroup, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest join that the ranks have, a level of the group at a time: inside the node, then across.

    Small results of GPUs that reach each other's memory are written, read and merged by one kernel; all
    others take `gather_merge`. Shapes and topology decide, so every rank decides alike.

    Args:
        group: the ranks.
        output: (B, H, T, V), this rank's.
        lse: (B, H, T), -inf where the rank has no key.

    Returns:
        output (B, H, T, V) and lse (B, H, T) over the keys of all ranks.
    """
    for level in range(group.levels if group.world_size > 1 else 0):
        joined = group.join(output, lse, level)
        output, lse = joined or _gather_level(group, output, lse, level)
    return output, lse


def _gather_level(group: SequenceGroup, output: Tensor, lse: Tensor, level: int) -> tuple[Tensor, Tensor]:
    parts = group.gather(pack(output, lse), level)
    return merge_partials(*unpack(parts, output.shape[-1], lse.dtype))


def gather_merge(group: SequenceGroup, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """One packed all-gather and a local merge a level of the group: inside the node first, then across.

    Args:
        group: the ranks.
        output: (B, H, T, V), this rank's.
        lse: (B, H, T), -inf where the rank has no key.

    Returns:
        output (B, H, T, V) and lse (B, H, T) over the keys of all ranks.
    """
    for level in range(group.levels if group.world_size > 1 else 0):
        output, lse = _gather_level(group, output, lse, level)
    return output, lse


def three_reductions(group: SequenceGroup, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The three all-reduces of the paper's Algorithm 3: the maximum, the denominator, the numerator.

    Slower than `gather_merge`; kept as the reference.

    Args:
        group: the ranks.
        output: (B, H, T, V), this rank's.
        lse: (B, H, T), -inf where the rank has no key.

    Returns:
        output (B, H, T, V) and lse (B, H, T) over the keys of all ranks.
    """
    peak = group.reduce(lse, dist.ReduceOp.MAX)
    # A row without a key anywhere has no peak; any finite stand-in gives it weights of zero.
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weight = torch.exp(lse - peak)
    held = output.to(lse.dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    total = group.reduce(weight, dist.ReduceOp.SUM)
    merged = group.reduce(held * weight.unsqueeze(-1), dist.ReduceOp.SUM)
    merged = merged / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return merged.to(output.dtype), peak + torch.log(total)


class ReturningPartials:
    """Partial results on their way to the ranks whose queries they belong to.

    Args:
        group: the ranks.
        output: (P - 1, B, T, H, V), this rank's for the queries of each other rank, in their order.
        lse: (P - 1, B, H, T), -inf where this rank has no key.
    """

    def __init__(self, group: SequenceGroup, output: Tensor, lse: Tensor) -> None:
        # Two messages: to pack them in one would copy the large one.
        self._output, self._lse = group.begin_exchange(output), group.begin_exchange(lse)

    def merge(self, output: Tensor, lse: Tensor) -> Tensor:
        """Joins what the other ranks found for this rank's queries with what it found itself.

        Args:
            output: (B, H, T, V), over this rank's keys; may be written over.
            lse: (B, H, T); may be written over.

        Returns:
            (B, H, T, V), over the keys of all ranks.
        """
        others = zip(self._output.wait().transpose(2, 3), self._lse.wait(), strict=True)
        return merge_over_first([(output, lse), *others])[0]
