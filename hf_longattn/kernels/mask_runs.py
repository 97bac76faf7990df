"""What the host knows of masks without a look at the device: where the tokens of each row lie."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Runs(NamedTuple):
    """Where the tokens of each row lie that exist, all of a row together: `[first[b], end[b])`."""

    first: list[int]
    end: list[int]

    def fill(self, begin: int, end: int) -> bool:
        """Whether every row's tokens reach over the columns `[begin, end)`."""
        return max(self.first) <= begin and end <= min(self.end)


# What is known of masks that nobody writes to any more: who made them has looked.
_KNOWN_RUNS = WeakIdKeyDictionary()


def look_for_runs(mask: Tensor) -> Runs | None:
    """Looks at a mask, once for all that is cut from it: one wait for the device.

    Args:
        mask: (B, N), nonzero where a token exists.

    Returns:
        the run of every row, or None where a row has gaps or no token at all.
    """
    exists = mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    first = exists.to(torch.uint8).argmax(-1)
    end = torch.where(exists, columns + 1, 0).amax(-1)
    rows = torch.stack([first, end, exists.sum(-1)]).tolist()
    whole = all(0 < count == end - first for first, end, count in zip(*rows, strict=True))
    return Runs(rows[0], rows[1]) if whole else None


def look_for_whole_rows(mask: Tensor, position_ids: Tensor | None) -> bool:
    """Whether every row is one document without pads: one wait for the device.

    Args:
        mask: (B, N), nonzero where a token exists.
        position_ids: (B or 1, N), which start again or stand still where a document begins, or None.
    """
    whole = mask.bool().all()
    if position_ids is not None:
        whole = whole & (position_ids[:, 1:] > position_ids[:, :-1]).all()
    return bool(whole)


def remember_runs(mask: Tensor, runs: Runs | None) -> None:
    """Spares whoever needs to know a look at a mask.

    Args:
        mask: (B, N) bool, not written to afterwards.
        runs: of the mask that `mask` holds the first columns of; None says nothing.
    """
    if runs is not None:
        _KNOWN_RUNS[mask] = runs


def known_runs(mask: Tensor | None) -> Runs | None:
    """What `remember_runs` was told of a mask, or None.

    Args:
        mask: (B, N), or None.
    """
    return None if mask is None else _KNOWN_RUNS.get(mask)


def extend_runs(before: Tensor | None, after: Tensor | None) -> None:
    """Carries what is known of a mask over to one that goes on behind it with ones.

    Args:
        before: (B, N), or None.
        after: (B, more than N), not written to afterwards, or None.
    """
    runs = known_runs(before)
    if runs is not None and before is not None and after is not None and min(runs.end) == before.shape[1]:
        _KNOWN_RUNS[after] = Runs(runs.first, [after.shape[1]] * len(runs.end))


def is_known_full(mask: Tensor | None) -> bool:
    """Whether a (B, N) mask is known to hide no token, without a look at it."""
    runs = known_runs(mask)
    return runs is not None and mask is not None and runs.fill(0, mask.shape[1])
