"""The lazy mask against transformers' own dense one, over shapes, offsets, kinds and padding."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as mu

from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.mask_runs import look_for_runs, remember_runs
from hf_longattn.masking import (
    LazyMask,
    document_bounds,
    lazy_mask,
    packed_bounds,
    recognise,
)

BATCH = 2


def mask_functions(total, left_padding):
    documents = (torch.arange(total) // 5 + torch.arange(total) // 7).expand(BATCH, -1)
    return {
        "causal": mu.causal_mask_function,
        "bidirectional": mu.bidirectional_mask_function,
        "window": mu.sliding_window_causal_mask_function(4),
        "both-sides": mu.sliding_window_bidirectional_mask_function(3),
        "chunked": mu.chunked_causal_mask_function(6, left_padding),
        "packed": mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(documents)),
        "packed-window": mu.and_masks(
            mu.sliding_window_causal_mask_function(3), mu.packed_sequence_mask_function(documents)
        ),
        "general": mu.and_masks(mu.causal_mask_function, lambda b, h, q, k: (q + k) % 3 != 1),
        "union": mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(documents)),
    }


KINDS = list(mask_functions(1, torch.zeros(BATCH)))


def dense(mask: LazyMask):
    limits, (queries, keys) = mask.key_range(), mask.shape[2:]
    if limits is None:
        return mask.tile(slice(0, queries)).expand(BATCH, 1, -1, -1)
    tile = limits.tile(slice(0, queries), slice(0, keys), queries, keys, mask.device)
    return tile.expand(BATCH, 1, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_equal_to_the_dense_mask(kind, data):
    past, new = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 24))
    kv_offset = data.draw(st.integers(0, past))
    # A static cache shows slots that are still empty.
    spare = data.draw(st.sampled_from([0, 0, 5]))
    total = past + new + spare
    left = torch.tensor([0, data.draw(st.integers(0, past + new - 1))])
    style = data.draw(st.sampled_from(["none", "full", "left", "right", "holes"]))
    padding = torch.ones(BATCH, past + new, dtype=torch.bool)
    if style == "left":
        padding[1, : left[1]] = False
    elif style == "right":
        padding[1, past + new - left[1] :] = False
    elif style == "holes":
        padding = torch.rand(BATCH, past + new) > 0.3
    arguments = {
        "batch_size": BATCH,
        "q_length": new,
        "kv_length": total - kv_offset,
        "q_offset": torch.tensor(past) if spare else past,
        "kv_offset": kv_offset,
        "mask_function": mask_functions(total, left)[kind],
        "attention_mask": None if style == "none" else padding,
    }
    expected = mu.sdpa_mask(**arguments, allow_is_causal_skip=False, use_vmap=kind in ("general", "union"))
    mask = lazy_mask(**arguments)
    assert mask.shape == expected.shape
    assert torch.equal(dense(mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_known_kinds_are_recognised_and_others_are_not(kind):
    function = mask_functions(20, torch.zeros(BATCH, dtype=torch.long))[kind]
    assert (recognise(function) is None) is (kind in ("general", "union"))


def test_a_full_padding_mask_leaves_attention_dense():
    mask = lazy_mask(2, 32, 32, attention_mask=torch.ones(2, 32, dtype=torch.bool))
    assert mask.key_range() == KeyRange(causal=True)
    assert lazy_mask(2, 5, 37, q_offset=32).key_range().is_dense


@pytest.mark.parametrize("length", [1_000, 4_000])
def test_memory_is_linear_in_the_length(length):
    padding = tiny.padding([length, length // 3], length, "left").bool()
    limits = lazy_mask(
        2, length, length, mask_function=mu.sliding_window_causal_mask_function(64), attention_mask=padding
    ).key_range()
    stored = sum(
        t.numel() * t.element_size() for t in (limits.lower, limits.upper, limits.key_mask) if t is not None
    )
    assert stored <= 2 * 2 * length * 4


def test_a_mask_is_the_same_when_the_cache_moves_on():
    offset = torch.tensor(3)
    mask = lazy_mask(1, 2, 10, q_offset=offset)
    offset.add_(4)
    expected = mu.sdpa_mask(1, 2, 10, q_offset=3, allow_is_causal_skip=False)
    assert torch.equal(dense(mask)[:1], expected)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_document_bounds(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    lower, upper = document_bounds(ids)
    same = ids[0][:, None] == ids[0][None]
    key = torch.arange(ids.shape[1])
    assert torch.equal((key >= lower[0][:, None]) & (key < upper[0][:, None]), same)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 3))
def test_packed_bounds(lengths, spare):
    queries, extra = zip(*lengths, strict=True)
    keys = [q + e for q, e in zip(queries, extra, strict=True)]
    bounds = [torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (queries, keys)]
    total = sum(queries) + spare
    if total == 0:
        return
    lower, upper, diagonal = (b[0] for b in packed_bounds(*bounds, total))
    row = 0
    for document, (q, k) in enumerate(zip(queries, keys, strict=True)):
        start = int(bounds[1][document])
        for index in range(q):
            assert (lower[row], upper[row]) == (start, start + k)
            assert diagonal[row] == start + k - q + index + 1
            row += 1
    assert (upper[row:] <= lower[row:]).all()


def test_a_wrong_mask_is_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        lazy_mask(2, 4, 4, attention_mask=torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="outside transformers' attention interface"):
        _ = torch.zeros(1) + lazy_mask(2, 4, 4)
    with pytest.raises(TypeError, match="outside transformers' attention interface"):
        _ = lazy_mask(2, 4, 4)[:, :, :2]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_known_of_a_whole_mask_serves_its_slices(data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(bits) for _ in range(batch)])
    runs = look_for_runs(mask)
    spans = [[i for i, bit in enumerate(row) if bit] for row in mask.tolist()]
    gaps = any(not span or span[-1] - span[0] + 1 != len(span) for span in spans)
    assert (runs is None) == gaps
    end = data.draw(st.integers(1, length))
    queries = data.draw(st.integers(1, end))
    known, unknown = mask[:, :end].clone(), mask[:, :end].clone()
    remember_runs(known, runs)
    made = [lazy_mask(batch, queries, end, end - queries, attention_mask=part) for part in (known, unknown)]
    dense = [part.tile(slice(0, queries)) for part in made]
    assert torch.equal(dense[0], dense[1])
    ranges = [part.key_range() for part in made]
    tile = slice(0, queries), slice(0, end), queries, end, torch.device("cpu")
    spelled = [each.tile(*tile).expand(batch, 1, queries, end) for each in ranges]
    assert torch.equal(spelled[0], spelled[1])
    if runs is not None and mask[:, :end].all():
        assert made[0].padding is None and ranges[0].is_dense
