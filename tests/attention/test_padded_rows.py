"""Prompts with padding on the left: rows are cut where they begin, and nothing else changes."""

import pytest
import tiny
import torch

from hf_longattn.attention import padded_rows
from hf_longattn.attention.exact import Options, exact_attention
from hf_longattn.kernels.mask_runs import look_for_runs, remember_runs
from hf_longattn.masking import lazy_mask

LENGTH, QUERIES = 50, 20


def masks(first, known):
    """The mask of the last queries of rows that begin at `first`; `known` is whether the host has looked."""
    exists = torch.arange(LENGTH + 7)[None] >= torch.tensor(first)[:, None]
    whole = exists[:, :LENGTH].clone()
    if known:
        remember_runs(whole, look_for_runs(exists))
    return lazy_mask(len(first), QUERIES, LENGTH, LENGTH - QUERIES, attention_mask=whole)


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("first", [[0, 3], [1, 1], [37, 0], [52, 4]], ids="first{}".format)
def test_equal_to_the_mask_that_nobody_has_looked_at(first, sinks, monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(2, 4, QUERIES, 16, dtype=torch.float64)
    key, value = (torch.randn(2, 2, LENGTH, 16, dtype=torch.float64) for _ in range(2))
    options = Options(True, 0.3, sinks=torch.randn(4, dtype=torch.float64) if sinks else None)
    slots = []
    real = padded_rows.attend_rows
    monkeypatch.setattr(
        "hf_longattn.attention.exact.attend_rows", lambda *a: slots.append(a[3]) or real(*a), raising=True
    )
    results = [
        exact_attention(query, key, value, masks(first, known), options, split_kv=True)
        for known in (True, False)
    ]
    assert slots == [[min(n, LENGTH) for n in first]]
    rows = padded_rows.attend_rows(query, key, value, slots[0], 0.3, options.sinks)
    # What the layer takes next is this memory, not a copy.
    assert rows.transpose(1, 2).is_contiguous() and torch.equal(rows.transpose(1, 2), results[0])
    assert tiny.relative_error(results[0], results[1]) <= 1e-13


def test_what_more_than_padding_hides_goes_the_general_way():
    assert padded_rows.empty_slots(masks([0, 1], True)) == [0, 1]
    assert padded_rows.empty_slots(masks([0, 1], False)) is None
    # A third number of empty slots would need shapes of its own.
    assert padded_rows.empty_slots(masks([0, 1, 2], True)) is None
    assert padded_rows.empty_slots(masks([0, 0], True)) is None
    right = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [LENGTH - 2]])
    remember_runs(right, look_for_runs(right))
    mask = lazy_mask(2, QUERIES, LENGTH, LENGTH - QUERIES, attention_mask=right)
    assert padded_rows.empty_slots(mask) is None
