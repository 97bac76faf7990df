"""Attention on a run that the ranks compute together. Run as `python run_cases.py P,P... TOPIC...`."""

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import torch
from several import mesh_of

from hf_longattn.attention import exact, quantized, sharded
from hf_longattn.attention.exact import Options
from hf_longattn.cache.placement import Placement, Slices
from hf_longattn.cache.shares import ShardedLayer, ShardedQuantizedLayer
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.quantized_states import dequantized_states, quantized_states
from hf_longattn.masking import lazy_mask
from hf_longattn.parallel.group import Pending, SequenceGroup

HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def states(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def layers_of(mesh, runs, capacity, kind=None):
    """This rank's layer, to which runs are added, with the slices of each."""
    group = SequenceGroup(None if mesh.size() == 1 else mesh.get_group("cp"))
    placement, start = Placement(group.rank, group.world_size), 0
    if kind is None:
        layer = ShardedLayer(group, placement, capacity)
    else:
        layer = ShardedQuantizedLayer(group, placement, kind, capacity)
    for count in runs:
        layer.slices = Slices(start, count, group.rank, group.world_size)
        yield layer, layer.slices
        start += count


def attended(mesh, runs, batch, padding=None, capacity=0, kind=None, **fields):
    """What `sharded_attention` gives of each run, put together in order, with queries, keys and values.

    The keys and values are those that a cache in `kind` keeps.
    """
    total = sum(runs)
    query, both = states(batch, HEADS, total, WIDTH), states(2, batch, KEY_HEADS, total, WIDTH)
    outputs = []
    for layer, slices in layers_of(mesh, runs, capacity, kind):
        seen = slice(slices.start, slices.start + slices.count)
        own, key, value = (slices.take(x[:, :, seen], 2) for x in (query, *both))
        key, value = layer.update(key, value)
        mask = lazy_mask(batch, own.shape[2], seen.stop, slices.start, attention_mask=padding)
        got = sharded.sharded_attention(own, key, value, mask, Options(True, **fields))
        everyone = layer.group_of_ranks.gather(got.transpose(1, 2))
        outputs.append(slices.in_order(everyone))
    if kind is not None:
        *both, scales = quantized_states(*both, kind)
        pairs = zip(both, scales.split(1, -1), strict=True)
        both = [dequantized_states(part, factor, torch.float64) for part, factor in pairs]
    return torch.cat(outputs, 2), query, *both


def dense(query, key, value, padding=None, softcap=None, sinks=None):
    query, (key, value) = query.double(), (x.double().repeat_interleave(2, 1) for x in (key, value))
    scores = query @ key.mT / WIDTH**0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    hidden = hidden if padding is None else hidden | ~padding[:, None, None].bool()
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    # A pad sees nothing, and its output has no meaning but to be finite.
    return scores.softmax(-1).nan_to_num()[..., : value.shape[2]] @ value


def runs(rank, size, mesh):
    """Every kind of run against dense attention in fp64: first and later ones, even and uneven, B 1 and 2."""
    unit = 2 * size
    padding = torch.arange(30 * unit) >= torch.tensor([[0], [7]])
    kinds = {"dense": {}, "softcap": {"softcap": 2.0}, "sinks": {"sinks": states(HEADS)}}
    lengths = [(5 * unit,), (4 * unit, 4 * unit, 4 * unit, 4 * unit), (3 * unit, 7 * unit, 2 * unit)]
    plain = [(None, counts) for counts in lengths]
    # In 8 bits, keys are fewer than queries for longer.
    eight = [(torch.int8, counts) for counts in ((4 * unit, 4 * unit), (7 * unit, unit))]
    cases = itertools.product(kinds.items(), (1, 2), (0, 1), plain + eight)
    for (name, fields), batch, padded, (kind, counts) in cases:
        seen = padding[-batch:, : sum(counts)] if padded else None
        with patch.object(quantized, "PIECE_TOKENS", 24):
            got, *inputs = attended(mesh, counts, batch, seen, kind=kind, **fields)
        want = dense(*inputs, padding=seen, **fields)
        rows = torch.ones(batch, sum(counts), dtype=torch.bool) if seen is None else seen
        error = (got.double() - want).transpose(1, 2)[rows].abs().max()
        # Sums and merges of numbers of about 3 in fp32.
        assert error <= 32 * torch.finfo(torch.float32).eps, (name, batch, counts, padded, kind, error)


def overlap(rank, size, mesh):
    """What travels is begun before some work of this rank, and waited for behind it."""
    events = []

    def note(name, function):
        def noted(*args, **kwargs):
            events.append(name)
            return function(*args, **kwargs)

        return noted

    watched = (
        patch.object(sharded, "_attend_run", note("run", sharded._attend_run)),
        patch.object(SequenceGroup, "begin_gather", note("gather", SequenceGroup.begin_gather)),
        patch.object(SequenceGroup, "begin_exchange", note("exchange", SequenceGroup.begin_exchange)),
        patch.object(Pending, "wait", note("wait", Pending.wait)),
        patch.object(exact, "blockwise_attention", note("attend", blockwise_attention)),
    )

    def steps(fields):
        """The steps of the last of three runs, and of the first two."""
        events.clear()
        with contextlib.ExitStack() as patches:
            for one in watched:
                patches.enter_context(one)
            attended(mesh, [4 * size] * 3, 1, **fields)
        *_, first, second, third = " ".join(events).split("run")
        return [[name for name, _ in itertools.groupby(run.split())] for run in (third, first, second)]

    if size == 1:
        return
    queries = [
        "gather",
        "attend",
        "wait",
        "attend",
        "exchange",
        "wait",
        "attend",
        "exchange",
        "attend",
        "wait",
    ]
    keys = ["gather", "attend", "wait", "attend", "wait"]
    # Of 4 heads two have keys of their own: those of two runs are no more bytes than queries and results.
    third, first, second = steps({})
    assert third[: len(queries)] == queries, third
    assert all(run[: len(keys)] == keys and "exchange" not in run for run in (first, second)), (first, second)
    third, _, second = steps({"softcap": 2.0})
    # In the first run, the first slices of some ranks see no key of others.
    assert all(run[: len(queries)] == queries for run in (second, third)), (second, third)


def calls(rank, size, mesh):
    """Each rank computes its part of the visible pairs; keys that travel have the strides of their shape."""
    found = []

    def noted(query, key, value, **kwargs):
        causal = (kwargs["mask"] or KeyRange()).causal
        found.append((query.shape, key.shape, causal, *(x.stride() for x in (query, key, value))))
        return blockwise_attention(query, key, value, **kwargs)

    unit = 2 * size
    with patch.object(exact, "blockwise_attention", noted):
        for counts in ([3 * unit] * 2, [3 * unit] * 5, [2 * unit, 5 * unit]):
            found.clear()
            attended(mesh, counts, 1)
            # Of a causal call, the last query sees all keys, and each one before it one key less.
            rows = [(q[2], k[2] - causal * (q[2] - 1) / 2) for q, k, causal, *_ in found]
            total = sum(counts)
            assert sum(t * s for t, s in rows) * size == total * (total + 1) / 2, counts
        every = []
        for capacity in (20 * unit, 31 * unit):
            found.clear()
            attended(mesh, [3 * unit] * 2, 1, capacity=capacity)
            every.append(set(found))
    assert every[0] == every[1]
    assert len({call[:3] for call in every[0]}) == len(every[0]), every[0]


def late(rank, size, mesh):
    """An exchange that never comes is an error of `wait`, in words, and what was sent before it is right."""
    group = SequenceGroup(mesh.get_group("cp"), timeout=3.0)
    mine = torch.arange(size * 3).view(size, 3) + 100 * rank
    others = [other for other in range(size) if other != rank]
    first, second = group.begin_exchange(mine[others]), group.begin_gather(mine)
    assert second.wait().tolist() == [(mine - 100 * rank + 100 * other).tolist() for other in range(size)]
    assert first.wait().tolist() == [(mine[rank] - 100 * rank + 100 * other).tolist() for other in others]
    with group.watch:
        if rank == size - 1:
            time.sleep(8)
            os._exit(0)
        pending = group.begin_exchange(mine[others])
        try:
            pending.wait()
        except RuntimeError as error:
            assert f"rank {size - 1} is behind the others" in str(error), error
        else:
            raise AssertionError("nobody noticed")
    os._exit(0)


if __name__ == "__main__":
    ranks.run_topics(globals(), lambda names: None, mesh_of)
