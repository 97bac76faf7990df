"""Attention over a shared prefix against fp64 on the same inputs, and how often it reads the prefix."""

import pytest
import tiny
import torch
from transformers import masking_utils

from hf_longattn.attention import shared_prefix
from hf_longattn.attention.exact import Options
from hf_longattn.attention.shared_prefix import shared_prefix_attention
from hf_longattn.cache.shared_prefix import SharedStates
from hf_longattn.kernels.merge_partials.api import _alike
from hf_longattn.masking import lazy_mask

H, G, K, V, WINDOW = 4, 2, 16, 24, 9
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(1, 1), (16, 1), (17, 1), (3, 5), (33, 2), (2, 40)]
gpu = pytest.mark.gpu


def lengths_of(rows, width):
    """One row as long as the suffixes may be, the others shorter."""
    return [width] + [1 + 7 * row % width for row in range(1, rows)]


def make_inputs(rows, count, prefix, own, dtype):
    """Query, prefix keys and values, suffix keys and values; queries are the last `count` of the suffix."""
    shapes = (rows, H, count, K), (1, G, prefix, K), (1, G, prefix, V), (rows, G, own, K), (rows, G, own, V)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def make_mask(padding, prefix, count, window, kept):
    """The lazy mask of `kept` keys of the prefix and the suffixes, of which the last `count` ask."""
    rows, own = padding.shape
    whole = torch.cat([padding.new_ones(rows, prefix), padding], 1).bool()
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.and_masks(masking_utils.sliding_window_overlay(window), function)
    start = prefix + own - count
    return lazy_mask(rows, count, kept + own, start, prefix - kept, function, whole, whole.device)


def visible(padding, prefix, count, window, kept):
    """(B, T, kept + S): what a row sees when positions are counted as if it ran alone."""
    position = padding.cumsum(-1) - 1 + prefix
    keys = torch.cat([torch.arange(prefix - kept, prefix).expand(len(padding), -1), position], 1)
    exists = torch.cat([torch.ones(len(padding), kept, dtype=torch.bool), padding.bool()], 1)
    queries = position[:, -count:, None]
    seen = exists[:, None] & (keys[:, None] <= queries)
    own = torch.arange(padding.shape[1])
    seen[:, :, kept:] &= own <= own[-count:, None]
    return seen if window is None else seen & (keys[:, None] > queries - window)


def dense(inputs, seen, dtype, softcap=None, sinks=None):
    """Softmax attention on keys that are repeated for every row, as it is usually written, in `dtype`."""
    query, *shared = (states.to(dtype) for states in inputs)
    rows = len(query)
    key, value = (
        torch.cat([shared[i].expand(rows, -1, -1, -1), shared[i + 2]], 2).repeat_interleave(H // G, 1)
        for i in (0, 1)
    )
    # A hidden slot may hold anything.
    hidden = ~seen.any(1)[:, None, :, None]
    key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    scores = query @ key.mT * K**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1)
    return (weights[..., : key.shape[2]] @ value).transpose(1, 2)


def check(sizes, dtype, window=None, softcap=None, sinks=None, prefix=50, device="cpu"):
    rows, count = sizes
    own = count + 6
    kept = prefix if window is None else window - 1
    padding = tiny.padding(lengths_of(rows, own), own, "left")
    inputs = make_inputs(rows, count, kept, own, dtype)
    seen = visible(padding, prefix, count, window, kept)
    want = dense(inputs, seen, torch.float64, softcap, sinks)
    usual = dense(inputs, seen, dtype, softcap, sinks)
    if device == "cpu" or count <= 16:
        # The decoding kernel reads no slot that nobody sees, whatever is in it.
        for states in inputs[3:]:
            states.masked_fill_(~padding.bool()[:, None, :, None], torch.nan)
    query, *states = (tensor.to(device) for tensor in inputs)
    key, value = SharedStates(states[0], states[2]), SharedStates(states[1], states[3])
    options = Options(True, scale=K**-0.5, softcap=softcap, sinks=None if sinks is None else sinks.to(device))
    mask = make_mask(padding.to(device), prefix, count, window, kept)
    result = shared_prefix_attention(query, key, value, mask, options).cpu()
    assert result.dtype == dtype and result.is_contiguous()
    # Padded queries answer nobody.
    real = padding[:, -count:].bool()
    scale = want[real].abs().max()
    # The kernel adds fp32 products one key after another, the reference in pieces. A walk of n roundings of
    # eps / sqrt(12) under a sum that grows evenly ends sqrt(n) / 6 eps away; the largest of many, four times.
    steps = 4 * prefix**0.5 / 6 if device == "cuda" and dtype == torch.float32 else 1.0
    bound = 1.5 * ((usual[real] - want[real]).abs().max() + steps * torch.finfo(dtype).eps * scale)
    assert (result[real].double() - want[real]).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "B{}-T{}".format(*sizes))
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_error_is_that_of_a_repeated_cache(sizes, dtype, window):
    check(sizes, dtype, window)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "B{}-T{}".format(*sizes))
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_caps_and_sinks(sizes, softcap, sinks):
    # Large sinks: one that is counted twice, or left out, is far outside the bound.
    check(sizes, torch.float32, WINDOW, softcap, torch.randn(H) + 3 if sinks else None)


@pytest.mark.parametrize("rows", [1, 2, 16, 31, 32, 33, 100])
def test_the_prefix_is_read_once_for_sixteen_rows(rows, monkeypatch):
    reads = []

    def count(name):
        real = getattr(shared_prefix, name)

        def wrapper(query, key, value, **keywords):
            if key.shape[2] == 50:
                assert key.untyped_storage().nbytes() == G * 50 * K * 4
                reads.append((name, query.shape[0], query.shape[2]))
            return real(query, key, value, **keywords)

        return wrapper

    for name in ("decode_attention", "blockwise_attention"):
        monkeypatch.setattr(shared_prefix, name, count(name))
    check((rows, 1), torch.float32)
    pieces = -(-rows // 16)
    # Two heads share a key: 32 rows are read twice by the decoding kernel, and by the other kernel as often.
    few = ("decode_attention", pieces, -(-rows // pieces))
    assert reads == [few if rows <= 32 else ("blockwise_attention", 1, rows)]


@pytest.mark.parametrize("rows, count", [(16, 64), (3, 40), (1, 512)], ids=lambda size: str(size))
def test_long_questions_read_the_prefix_in_one_call(rows, count, monkeypatch):
    calls, merges = [], []
    real, merge = shared_prefix.blockwise_attention, shared_prefix.merge_over_first

    def record(query, key, value, **keywords):
        calls.append((tuple(query.shape[:3]), key.shape[2], keywords["mask"].is_dense))
        return real(query, key, value, **keywords)

    def record_merge(parts):
        # Both lie as the layer wants them next, and alike: the kernel reads them where they are.
        assert all(_alike(*pair) for pair in zip(*parts, strict=True))
        merges.append(len(parts))
        return merge(parts)

    monkeypatch.setattr(shared_prefix, "blockwise_attention", record)
    monkeypatch.setattr(shared_prefix, "merge_over_first", record_merge)
    # Short questions are padded: their prefix is as dense as that of others.
    check((rows, count), torch.float32)
    own, common = calls
    assert own == ((rows, H, count), count + 6, rows == 1)
    assert common == ((1, H, rows * count), 50, True) and merges == [2]


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.parametrize("sizes", [(17, 1), (2, 9)], ids=lambda sizes: "B{}-T{}".format(*sizes))
def test_kernels(sizes):
    check(sizes, torch.float16, WINDOW, 3.0, torch.randn(H) + 3)
    check(sizes, torch.float32)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("sizes", [*SIZES, (4, 300)], ids=lambda sizes: "B{}-T{}".format(*sizes))
@pytest.mark.parametrize("window", [None, 200], ids=["full", "window"])
def test_error_on_a_gpu(sizes, dtype, window):
    check(sizes, dtype, window, prefix=5000, device="cuda")
    check(sizes, dtype, window, 5.0, torch.randn(H), prefix=5000, device="cuda")
