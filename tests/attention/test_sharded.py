"""Attention of ranks that send each other their keys, all of them in this process, against fp64."""

import pytest
import torch

from hf_longattn.attention.exact import Options
from hf_longattn.attention.sharded import sharded_attention
from hf_longattn.cache.placement import Placement, Slices
from hf_longattn.cache.shares import ShardedLayer, ShardedQuantizedLayer
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.quantized_states import dequantized_states, quantized_states
from hf_longattn.masking import lazy_mask
from hf_longattn.parallel.group import Pending

HEADS, KEY_HEADS = 8, 2
DEVICES = [
    pytest.param("cpu", torch.float32, 24, 16, id="cpu-T24-K16-fp32"),
    # Slices of whole tiles of cuDNN, and slices that it does not take.
    pytest.param("cuda", torch.bfloat16, 1536, 128, marks=pytest.mark.gpu, id="cuda-T1536-K128-bf16"),
    pytest.param("cuda", torch.bfloat16, 720, 64, marks=pytest.mark.gpu, id="cuda-T720-K64-bf16"),
]


class Rank:
    """A rank whose messages are what all ranks have put down before; it puts its own down where none are.

    Args:
        rank: this one.
        world_size: P.
    """

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size
        self.sent, self.everyone = [], []

    def begin_gather(self, part):
        self.sent.append(part)
        if not self.everyone:
            return Pending(part.expand(self.world_size, *part.shape))
        return Pending(torch.stack([sent[len(self.sent) - 1] for sent in self.everyone]))


def rounds(ranks, attend):
    """What `attend` gives for each rank once all messages are known."""
    for rank in ranks:
        rank.sent, rank.everyone = [], []
        attend(rank)
    everyone = [rank.sent for rank in ranks]
    for rank in ranks:
        rank.sent, rank.everyone = [], everyone
    return [attend(rank) for rank in ranks]


def make_layer(rank, size, capacity, kind):
    placement = Placement(rank.rank, size)
    if kind is None:
        return ShardedLayer(rank, placement, capacity)
    return ShardedQuantizedLayer(rank, placement, kind, capacity)


def attended(states, count, size, sinks, kind=None):
    """Output of every run of `count` tokens, in order."""
    query, *both = states
    ranks, outputs = [Rank(rank, size) for rank in range(size)], []
    layers = {rank: make_layer(rank, size, query.shape[2] + 100, kind) for rank in ranks}
    for start in range(0, query.shape[2], count):
        seen, found = slice(start, start + count), {}
        for rank, layer in layers.items():
            layer.slices = slices = Slices(start, count, rank.rank, size)
            own, key, value = (slices.take(x[:, :, seen], 2) for x in (query, *both))
            found[rank] = own, *layer.update(key, value)

        def attend(rank, start=start, found=found):
            own, key, value = found[rank]
            mask = lazy_mask(len(own), own.shape[2], start + count, start, device=own.device)
            return sharded_attention(own, key, value, mask, Options(True, sinks=sinks))

        parts = torch.stack(rounds(ranks, attend)).transpose(2, 3)
        outputs.append(layers[ranks[0]].slices.in_order(parts))
    return torch.cat(outputs, 2)


@pytest.mark.parametrize(("device", "dtype", "count", "width"), DEVICES)
@pytest.mark.parametrize("batch", [1, 2], ids="B{}".format)
@pytest.mark.parametrize("size", [2, 3], ids="P{}".format)
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
def test_keys_of_all_ranks_are_seen_once(device, dtype, count, width, batch, size, has_sinks):
    # Four runs: the most for which keys are fewer bytes than queries, with four query heads a key head.
    shapes = [(batch, heads, 4 * count, width) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    states = [torch.randn(shape).to(device, dtype) for shape in shapes]
    sinks = torch.randn(HEADS).to(device, dtype) if has_sinks else None
    terms = {"mask": KeyRange(causal=True)}
    wide = None if sinks is None else sinks.double()
    want = blockwise_attention(*(x.double() for x in states), sinks=wide, impl="reference", **terms)[0]
    alone = blockwise_attention(*states, sinks=sinks, **terms)[0]
    got = attended(states, count, size, sinks)
    error, bound = ((x.double() - want).abs().max() / want.abs().max() for x in (got, alone))
    assert error <= 1.5 * (bound + torch.finfo(dtype).eps), (error, bound)


@pytest.mark.parametrize(("device", "dtype", "count", "width"), DEVICES)
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("size", [2, 3], ids="P{}".format)
def test_bytes_and_scales_of_all_ranks_are_seen_once(device, dtype, count, width, size, kind):
    shapes = [(1, heads, 4 * count, width) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    query, *plain = (torch.randn(shape).to(device, dtype) for shape in shapes)
    *eight, scales = quantized_states(*plain, kind)
    factors = list(zip(eight, scales.split(1, -1), strict=True))
    causal = KeyRange(causal=True)
    wide = [dequantized_states(part, factor, torch.float64) for part, factor in factors]
    want = blockwise_attention(query.double(), *wide, mask=causal, impl="reference")[0]
    alone = [dequantized_states(part, factor, dtype) for part, factor in factors]
    alone = blockwise_attention(query, *alone, mask=causal)[0]
    got = attended([query, *plain], count, size, None, kind)
    error, bound = ((x.double() - want).abs().max() / want.abs().max() for x in (got, alone))
    assert error <= 1.5 * (bound + torch.finfo(dtype).eps), (error, bound)
