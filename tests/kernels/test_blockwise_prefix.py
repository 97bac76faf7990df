"""A long prefix, cut into pieces that torch's own kernels take."""

import pytest
import torch
from dense_attention import check, dense, error, make_inputs, torch_only

from hf_longattn.kernels.blockwise_attention import blockwise_attention, sdpa
from hf_longattn.kernels.key_range import KeyRange


def sizes_of(pieces):
    return [piece.stop - piece.start for piece in pieces]


@torch_only
@pytest.mark.parametrize("tile", [1, 128])
@pytest.mark.parametrize("unit", [0, 1, 500, 1023, 1024, 4096, 5000])
@pytest.mark.parametrize("prefix", [0, 1, 127, 4095, 4096, 4097, 8192, 15000, 114624, 131071])
def test_pieces_cover_the_prefix_in_whole_tiles(prefix, unit, tile):
    pieces = list(sdpa.prefix_pieces(prefix, unit, tile))
    sizes = sizes_of(pieces)
    assert sum(sizes) == prefix and 0 not in sizes
    assert [piece.start for piece in pieces] == [sum(sizes[:index]) for index in range(len(sizes))]
    tiled = tile > 1 and prefix >= 4096 and unit >= 1024
    if tiled:
        assert all(size % tile == 0 for size in sizes[sizes[:1] == [prefix % tile] :])
    elif unit and prefix % unit == 0:
        assert sorted(sizes, reverse=True) == sizes and all((size // unit).bit_count() == 1 for size in sizes)
    else:
        assert sizes == ([prefix] if prefix else [])


@torch_only
@pytest.mark.parametrize("before", [-1, -127, 1, 127, 128, 10007])
def test_chunks_behind_what_fills_no_tile_meet_few_shapes(before):
    unit, shapes = 4096, set()
    for chunk in range(2, 32):
        ragged, *sizes = sizes_of(sdpa.prefix_pieces(chunk * unit + before, unit, 128))
        # Fewer keys than a tile go to a kernel without plans.
        shapes |= {*sizes, *([] if ragged < 128 else [ragged])}
        assert len(sizes) + 1 <= 2 + chunk.bit_length()
    # One, two, four, eight and 16 chunks, and what lies before the first.
    assert len(shapes) <= 6 + (before > unit)


@torch_only
def test_cuts_are_for_cudnn_alone(monkeypatch):
    query, key, _ = make_inputs()
    monkeypatch.setattr(sdpa, "_uses_cudnn", lambda query, key: True)
    assert sdpa.key_tile(query, key) == 1 and sdpa.key_tile(query.to("meta"), key) == 1


@torch_only
def test_gradients_of_a_prefix_cut_into_tiles(monkeypatch):
    monkeypatch.setattr(sdpa, "key_tile", lambda query, key: 16)
    monkeypatch.setattr(sdpa, "_LONG_PREFIX", 64)
    monkeypatch.setattr(sdpa, "_MANY_QUERIES", 32)
    for with_lse in (True, False):
        check(make_inputs(T=40, S=119), "sdpa", with_lse, mask=KeyRange(causal=True))


@torch_only
@pytest.mark.parametrize("T", [31, 32, 40, 64])
@pytest.mark.parametrize("offset", [63, 64, 65, 79, 80, 81, 128, 143])
@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_prefix_cut_into_tiles(monkeypatch, T, offset, sinks):
    monkeypatch.setattr(sdpa, "key_tile", lambda query, key: 16)
    monkeypatch.setattr(sdpa, "_LONG_PREFIX", 64)
    monkeypatch.setattr(sdpa, "_MANY_QUERIES", 32)
    tensors = make_inputs(T=T, S=T + offset)
    forward, seen = sdpa._attend_cpu, []

    def attend(q, k, *rest):
        seen.append(k.shape[2])
        return forward(q, k, *rest)

    monkeypatch.setattr(sdpa, "_attend_cpu", attend)
    options = {"mask": KeyRange(causal=True), **({"sinks": torch.randn(4)} if sinks else {})}
    results = blockwise_attention(*tensors, **options, impl="sdpa")
    *pieces, square = seen
    wide = [x.double() for x in tensors]
    exact, plain = dense(*wide, **options), dense(*tensors, **options)
    for got, standard, truth in zip(results, plain, exact, strict=True):
        eps = torch.finfo(torch.float32).eps
        assert error(got, truth) <= 1.5 * (error(standard, truth) + eps * truth.norm())
    assert square == T and sum(pieces) == offset
    assert (pieces[0] == offset % 16) == (T >= 32 and offset >= 64 and offset % 16 > 0)
