"""What the ranks of lightning attention's tests do. Run as `python lightning_cases.py P,P... TOPIC...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import several
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.sharded import ShardedCache, ShardedRecurrentLayer
from hf_longattn.cache.shares import ShardedLayer
from hf_longattn.cache.token_rows import TokenRows, scan_rows
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.lightning import scan_slices

TIMEOUT = several.TIMEOUT

# One scan of a sequence in slices, against one scan of the whole


def rows_of(layout, batch, length):
    """(exists, starts) of the whole rows; a document begins inside, at and across the edges of slices."""
    exists = starts = None
    if "left" in layout:
        exists = tiny.padding([length, length // 3][:batch], length, "left").bool()
    if "right" in layout:
        exists = tiny.padding([length, length // 2][:batch], length, "right").bool()
    if "holes" in layout:
        exists = torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) > 0.4
        exists[0, : length // 2] = False
    if "packed" in layout:
        starts = torch.zeros(batch, length, dtype=torch.bool)
        starts[0, [0, 7, length // 2, length // 2 + 1]] = True
        starts[-1, [length // 4, length - 2]] = True
        if exists is not None:
            starts &= exists
    return exists, starts


SHAPES = {"plain": (2, 4, 4, 8, 8), "gqa": (2, 4, 2, 16, 5)}
LAYOUTS = ("full", "left", "right", "holes", "packed", "packed-left", "packed-holes")


def inputs_of(shape, length, given, dtype):
    batch, heads, groups, key_dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, length, key_dim), (batch, groups, length, key_dim)]
    shapes += [(batch, groups, length, value_dim), (batch, heads, key_dim, value_dim)]
    tensors = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    slopes = torch.tensor([0.8, 0.1, 4e-3, 4e-8][:heads], dtype=dtype, requires_grad=True)
    weights = torch.randn(batch, length, heads, value_dim, generator=generator).to(dtype)
    last = torch.randn(batch, heads, key_dim, value_dim, generator=generator).to(dtype)
    return [*tensors[:3], slopes, tensors[3] if given else None], weights, last


def whole_scan(shape, layout, length, given, dtype):
    """Output, final state and the gradients of one process, the outputs of missing tokens left out."""
    tensors, weights, last = inputs_of(shape, length, given, dtype)
    q, k, v, slopes, state = tensors
    exists, starts = rows_of(layout, q.shape[0], length)
    output, left = scan_rows(q, k, v, slopes, 0.3, TokenRows(exists, starts), state, stateful=True)
    output = output if exists is None else output * exists[..., None, None]
    ((output * weights).sum() + (left * last).sum()).backward()
    return [output.detach(), left.detach(), *(t.grad for t in tensors if t is not None)]


def own_tokens(rank, size, length, zigzag):
    pieces = torch.arange(length).chunk(2 * size if zigzag else size)
    own = [rank, 2 * size - 1 - rank] if zigzag else [rank]
    return [slice(int(pieces[i][0]), int(pieces[i][-1]) + 1) for i in own]


def sliced_scan(rank, size, group, shape, layout, length, given, zigzag, dtype=torch.float32):
    """The same from slices, put together: shares of replicated gradients are added up."""
    tensors, weights, last = inputs_of(shape, length, given, dtype)
    q, k, v, slopes, state = tensors
    own = own_tokens(rank, size, length, zigzag)
    exists, starts = rows_of(layout, q.shape[0], length)
    whole = TokenRows(exists, starts)
    mine = [torch.cat([x[:, :, part] for part in own], 2) for x in (q, k, v)]
    rows = [whole.part(part) for part in own]
    output, left = scan_slices(group, *mine, slopes, 0.3, rows, state, stateful=True)
    everyone = group.gather(left.detach())
    assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "the last state differs between ranks"
    index = torch.cat([torch.arange(part.start, part.stop) for part in own])
    if exists is not None:
        output = output * exists[:, index][..., None, None]
    # Every rank has the last state: its gradient counts once in all.
    ((output * weights[:, index]).sum() + (left * last).sum() / size).backward()
    placed = torch.zeros(q.shape[0], length, *output.shape[2:], dtype=dtype)
    placed[:, index] = output.detach()
    parts = [placed, *(t.grad for t in tensors if t is not None)]
    placed, *grads = [group.add_up(part.clone().contiguous()) for part in parts]
    return [placed, left.detach(), *grads]


def scans():
    """Shape, layout, tokens, whether a state enters."""
    yield "plain", "full", 24, False
    yield "gqa", "full", 144, True
    for layout in LAYOUTS[1:]:
        yield "gqa", layout, 48, True
    yield "plain", "packed-holes", 24, False


EXPECTED = {}


def scan(rank, size, mesh):
    """Output, last state and all gradients: as close to fp64 as the scan of one process."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    eps = torch.finfo(torch.float32).eps
    names = ("output", "state", "query", "key", "value", "slopes", "entering")
    for case in scans():
        exact, single = EXPECTED[case]
        for zigzag in (False, True):
            found = sliced_scan(rank, size, group, *case, zigzag)
            for name, got, standard, want in zip(names, found, single, exact, strict=False):
                # The gradient of what every slice shares is a sum over them, rounded at each.
                roundings = size * (1 + zigzag) if name in ("slopes", "entering") else 1
                bound = 1.5 * (tiny.relative_error(standard, want) + roundings * eps)
                error = tiny.relative_error(got, want)
                assert error <= bound, f"{case}, {zigzag=}: {name} is off by {error}, more than {bound}"


# Generation: prompts in slices, states that are the same on every rank

MODELS = ["model", "hybrid", "flag", "flag-hybrid", "minimax"]
KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]


def prepare(name, mesh=None, **fields):
    return hf_longattn.prepare_generation(
        tiny.build_lightning(name), device_mesh=mesh, timeout=TIMEOUT, **fields
    )


def alone(name):
    """The model in one process; MiniMax of transformers loses its state in beam search."""
    return prepare(name) if name == "minimax" else tiny.build_lightning(name)


def answer(name, mode, length=None):
    ids, mask = several.batch_for(mode) if length is None else (tiny.tokens(1, length), None)
    key = (name, mode, length)
    if key not in EXPECTED:
        EXPECTED[key] = several.result(several.generate(alone(name), ids, mask, **several.MODES[mode]))
    return EXPECTED[key]


def generation(rank, size, mesh):
    """Every kind of model in every mode, left padding, the prompt in chunks and whole."""
    for name in MODELS:
        for mode, kwargs in several.MODES.items():
            for chunk in (9, None) if mode == "greedy" else (None,):
                model = prepare(name, mesh, prefill_chunk_size=chunk)
                output = several.generate(model, *several.batch_for(mode), **kwargs)
                several.assert_same(f"{name}-{mode}-{chunk}", output, answer(name, mode))
                if size > 1:
                    assert_shared(output.past_key_values)


def assert_shared(cache):
    assert isinstance(cache, ShardedCache)
    kinds = {type(layer) for layer in cache.layers}
    assert ShardedRecurrentLayer in kinds and kinds <= {ShardedRecurrentLayer, ShardedLayer}
    for layer in cache.layers:
        if isinstance(layer, ShardedRecurrentLayer):
            everyone = cache.group.gather(layer.recurrent_state)
            assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "states differ between ranks"


LENGTHS = (1, 2, 3, 5, 8, 13)


def lengths(rank, size, mesh):
    """Prompts shorter than the number of ranks, and remainders."""
    for name in ("model", "flag-hybrid", "minimax"):
        model = prepare(name, mesh)
        for length in LENGTHS:
            output = several.generate(model, tiny.tokens(1, length), do_sample=False)
            several.assert_same(f"{name}-T{length}", output, answer(name, "greedy", length))


def prompts(rank, size, mesh):
    """A rank computes its slices of a prompt, and no more of it."""
    for name in ("model", "flag", "minimax"):
        model, widths = prepare(name, mesh), []
        layer = model.model.layers[0]
        hook = lambda module, args, kwargs, widths=widths: widths.append((args or (*kwargs.values(),))[0])  # noqa: E731
        layer.register_forward_pre_hook(hook, with_kwargs=True)
        several.generate(model, tiny.tokens(1, 61), do_sample=False, max_new_tokens=1)
        shared = 60 // (2 * size) * 2
        tokens = [hidden.shape[1] for hidden in widths]
        assert tokens == ([61] if size == 1 else [shared, 61 - shared * size]), tokens


def turns(rank, size, mesh):
    """A conversation on a filled cache: the tokens of one process."""
    for name in ("hybrid", "flag", "minimax"):
        model, conversation, cache = prepare(name, mesh, prefill_chunk_size=16), tiny.tokens(1, 30), None
        for turn, tokens in enumerate(conversations(name)):
            kwargs = {} if cache is None else {"past_key_values": cache}
            output = several.generate(model, conversation, do_sample=False, max_new_tokens=12, **kwargs)
            assert torch.equal(output.sequences, tokens), f"{name}, turn {turn}"
            cache = output.past_key_values
            conversation = torch.cat([tokens, tiny.tokens(1, 13, seed=turn)], 1)


def conversations(name):
    if (name, "turns") not in EXPECTED:
        model, conversation, every = prepare(name), tiny.tokens(1, 30), []
        for turn in range(3):
            every.append(several.generate(model, conversation, do_sample=False, max_new_tokens=12).sequences)
            conversation = torch.cat([every[-1], tiny.tokens(1, 13, seed=turn)], 1)
        EXPECTED[name, "turns"] = every
    return EXPECTED[name, "turns"]


class Pair:
    """A model on a shared cache beside one on a cache of one process; both are done to alike."""

    def __init__(self, name, mesh, group):
        self.name, models = name, (prepare(name, mesh), prepare(name))
        self.models, config = models, models[0].config
        self.caches = [ShardedCache(config, group), LongContextCache(config)]
        self.mask = torch.ones(2, 0, dtype=torch.long)

    def change(self, method, *args):
        """Calls a method of the caches; the caller changes the rows of the mask alike."""
        for cache in self.caches:
            getattr(cache, method)(*args)

    def crop(self, count):
        self.change("crop", -count)
        self.mask = self.mask[:, :-count]

    def feed(self, count, mask=None):
        ids = tiny.tokens(len(self.mask), count, seed=count)
        self.mask = torch.cat([self.mask, torch.ones_like(ids) if mask is None else mask], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        call = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        with torch.no_grad():
            got, want = (
                model(**call, logits_to_keep=3, past_key_values=cache).logits
                for model, cache in zip(self.models, self.caches, strict=True)
            )
        error = tiny.relative_error(got, want)
        assert error <= several.BOUND, (self.name, self.mask.shape, error)
        assert self.caches[0].get_seq_length() == self.caches[1].get_seq_length() == self.mask.shape[1]


def operations(rank, size, mesh):
    """Crops into a shared prompt and behind it, reorder, repeat, select, fork and reset, as one process."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    for name in ("hybrid", "flag"):
        pair = Pair(name, mesh, group)
        pair.change("activate_past_recording")
        pair.feed(41, tiny.padding([30, 41], 41, "left"))
        # The prompt is recorded: a crop may reach into it, past what followed it, and change its rows first.
        for count in (1, 11, 40):
            pair.crop(count)
            pair.feed(41)
        pair.feed(3)
        pair.crop(20)
        pair.feed(41)
        pair.change("reorder_cache", torch.tensor([1, 0]))
        pair.mask = pair.mask[[1, 0]]
        pair.crop(7)
        pair.change("batch_repeat_interleave", 2)
        pair.mask = pair.mask.repeat_interleave(2, 0)
        pair.feed(20)
        pair.change("batch_select_indices", torch.tensor([3, 0]))
        pair.mask = pair.mask[[3, 0]]
        pair.crop(5)
        pair.caches = [cache.fork() for cache in pair.caches]
        pair.feed(9)
        pair.change("reset")
        pair.mask = pair.mask[:, :0]
        pair.feed(33)


def clocks(rank, size, mesh):
    """Steps with lengths on the device, as a CUDA graph takes them, states beside shares of keys."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    for name in ("flag-hybrid", "hybrid", "model"):
        model, plain = prepare(name, mesh), prepare(name)
        ids, mask = tiny.tokens(2, 90), tiny.padding([90, 75], 90, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = ShardedCache(model.config, group, capacity=18), LongContextCache(plain.config)
        known, start = {}, 0
        for count in (23, 1, 1, 3, *[1] * 30, 17, *[1] * 8):
            stop = start + count
            batch = ids, mask, positions
            got, want = several.logits_beside((model, plain), caches, batch, known, slice(start, stop))
            error = tiny.relative_error(got, want)
            assert error <= several.BOUND, (name, start, count, error)
            assert len({layer.capacity for layer in caches[0].layers}) == 1
            start = stop


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "scan" in topics:
        for case in scans():
            EXPECTED[case] = [whole_scan(*case, dtype) for dtype in (torch.float64, torch.float32)]
    if "generation" in topics:
        for name in MODELS:
            for mode in several.MODES:
                answer(name, mode)
    if "lengths" in topics:
        for name in ("model", "flag-hybrid", "minimax"):
            for length in LENGTHS:
                answer(name, "greedy", length)
    if "turns" in topics:
        for name in ("hybrid", "flag", "minimax"):
            conversations(name)


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, several.mesh_of)
