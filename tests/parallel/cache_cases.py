"""Topics of `cases.py`: what the shared cache holds, and what is done to it."""

import functools
from unittest.mock import patch

import tiny
import torch
import torch.distributed as dist
import transformers as tf
from several import (
    BOUND,
    MODES,
    TIMEOUT,
    assert_same,
    batch_for,
    build,
    generate,
    logits_beside,
    prepare,
    result,
)

from hf_longattn.attention import quantized
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.cache.shares import ShardedLayer
from hf_longattn.parallel.group import SequenceGroup

TALKING = ("llama", "gemma2", "gemma3n")


def turns(rank, size, mesh):
    """A conversation on a filled cache, and no rank with more than its share of it."""
    for family in TALKING:
        model = prepare(family, mesh, prefill_chunk_size=16)
        conversation, cache = tiny.tokens(1, 30), None
        for turn, tokens in enumerate(conversations(family)):
            kwargs = {} if cache is None else {"past_key_values": cache}
            output = generate(model, conversation, do_sample=False, max_new_tokens=40, **kwargs)
            assert torch.equal(output.sequences, tokens), f"{family}, turn {turn}"
            cache = output.past_key_values
            conversation = torch.cat([tokens, tiny.tokens(1, 13, seed=turn)], 1)
        assert_shares(cache, size)


@functools.cache
def conversations(family):
    model, conversation, every = tiny.build(family), tiny.tokens(1, 30), []
    for turn in range(3):
        output = generate(model, conversation, do_sample=False, max_new_tokens=40)
        every.append(output.sequences)
        conversation = torch.cat([output.sequences, tiny.tokens(1, 13, seed=turn)], 1)
    return every


def assert_shares(cache, size):
    assert isinstance(cache, ShardedCache) == (size > 1)
    if size == 1:
        return
    for layer in cache.layers:
        if isinstance(layer, ShardedLayer):
            held = torch.tensor([layer.keys.shape[2]])
            total, most = held.clone(), held.clone()
            dist.all_reduce(total)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            length = cache.get_seq_length()
            assert total == length, f"{total} tokens are held of {length}"
            # A block of 32, and a remainder of 2P - 1 and the last token a prompt or chunk.
            assert most <= length / size + 32 + 9 * 2 * size, f"a rank holds {most} of {length}"
        else:
            assert layer._keys.shape[2] <= 2 * (layer.sliding_window + 64) + 64, layer._keys.shape


def memory(rank, size, mesh):
    """A long prompt: shares of buffers and of computed tokens, and nothing whole anywhere."""
    model = prepare("gemma2", mesh, prefill_chunk_size=64)
    widths = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    output = generate(model, tiny.tokens(1, 400), do_sample=False, max_new_tokens=2)
    assert_same("gemma2-T400", output, long_answer())
    cache = output.past_key_values
    assert_shares(cache, size)
    if size == 1:
        return
    assert max(widths) == 64 // (2 * size) * 2, widths
    share = -(-402 // size)
    for layer in cache.layers:
        bound = share + share // 64 + 128 if isinstance(layer, ShardedLayer) else 2 * (7 + 64) + 64
        assert layer._keys.shape[2] <= bound, f"a buffer of {layer._keys.shape[2]} tokens, more than {bound}"


@functools.cache
def long_answer():
    return result(generate(tiny.build("gemma2"), tiny.tokens(1, 400), do_sample=False, max_new_tokens=2))


def operations(rank, size, mesh):
    """crop, reset, reorder, repeat and select, as on a cache of one process, plain and in 8 bits."""
    for cache_dtype in (None, "int8"):
        operate(size, mesh, cache_dtype)


def operate(size, mesh, cache_dtype):
    dtype = torch.float32 if cache_dtype is None else torch.float64
    model, plain = prepare("llama", mesh, dtype), build("llama", dtype, "tree_attention")
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    ids = tiny.tokens(2, 60)
    cache = ShardedCache(model.config, group, cache_dtype=cache_dtype)

    def make_reference():
        return tf.DynamicCache() if cache_dtype is None else LongContextCache(plain.config, 0, cache_dtype)

    def feed(tokens):
        kwargs = {"input_ids": tokens, "logits_to_keep": 3}
        with torch.no_grad():
            got = model(**kwargs, past_key_values=cache).logits
            want = plain(**kwargs, past_key_values=reference).logits
        assert tiny.relative_error(got, want) <= BOUND
        assert cache.get_seq_length() == reference.get_seq_length()

    reference = make_reference()
    feed(ids[:, :41])
    for count in (-1, -7, -30):
        cache.crop(count), reference.crop(count)
        feed(ids[:, 10:45])
    for step in range(35):
        feed(ids[:, step : step + 1])
    for change, argument in (
        ("reorder_cache", torch.tensor([1, 0])),
        ("batch_repeat_interleave", 2),
        ("batch_select_indices", torch.tensor([3, 0])),
    ):
        getattr(cache, change)(argument), getattr(reference, change)(argument)
        rows = reference.layers[0].keys.shape[0]
        feed(tiny.tokens(rows, 20, seed=rows))
    twin, size_before = cache.fork(), cache.get_seq_length()
    twin.crop(-20)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (size_before - 20, size_before)
    cache.crop(50 - cache.get_seq_length()), reference.crop(50 - reference.get_seq_length())
    feed(tiny.tokens(2, 5, seed=9))
    cache.reset()
    reference = make_reference()
    feed(ids[:, :33])


def clocks(rank, size, mesh):
    """Steps with lengths and slots on the device, as a CUDA graph takes them, against one process."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    for family, cache_dtype in (("llama", None), ("gemma2", None), ("gpt-oss", None), ("gemma2", "int8")):
        dtype = torch.float32 if cache_dtype is None else torch.float64
        model, plain = prepare(family, mesh, dtype), build(family, dtype, "tree_attention")
        ids, mask = tiny.tokens(2, 160), tiny.padding([160, 129], 160, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = (
            ShardedCache(model.config, group, 18, cache_dtype),
            LongContextCache(model.config, 0, cache_dtype),
        )
        known, start = {}, 0
        for count in (23, 1, 1, 3, *[1] * 40, -5, 4, 1, 30, *[1] * 20):
            if count < 0:
                for cache in caches:
                    cache.crop(count)
                start += count
                continue
            stop = start + count
            batch = ids, mask, positions
            got, want = logits_beside((model, plain), caches, batch, known, slice(start, stop))
            assert tiny.relative_error(got, want) <= BOUND, (family, start, count)
            capacities = group.gather(torch.tensor([layer.capacity for layer in caches[0].layers]))
            assert (capacities == capacities[0]).all(), "ranks made room at different steps"
            start = stop


# In fp64, where no rounding moves a number of 8 bits to the next one.
IN_8_BITS = [
    ("llama", "sampling", "int8"),
    ("gemma2", "beams", "fp8"),
    ("mistral-window", "greedy", "int8"),
    ("gpt-oss", "lookup", "fp8"),
    ("gemma4-shared", "greedy", "int8"),
]
MORE_IN_8_BITS = [
    (family, mode, kind)
    for index, family in enumerate(("qwen3", "gemma2", "gpt-oss", "llama4"))
    for place, mode in enumerate(MODES)
    for kind in ("int8", "fp8")[(index + place) % 2 :][:1]
]


def eight_bits(rank, size, mesh):
    """Tokens and logits of a cache in 8 bits in one process, in small pieces and chunks."""
    answer_in_8_bits(mesh, size, IN_8_BITS)


def more_eight_bits(rank, size, mesh):
    """The same over more families and all modes."""
    answer_in_8_bits(mesh, size, MORE_IN_8_BITS)


def answer_in_8_bits(mesh, size, cases):
    for index, (family, mode, kind) in enumerate(cases):
        chunk = (9, None, 24)[index % 3]
        model = prepare(family, mesh, torch.float64, cache_dtype=kind, prefill_chunk_size=chunk)
        with patch.object(quantized, "PIECE_TOKENS", 8):
            output = generate(model, *batch_for(mode), **MODES[mode])
        first, second = expected_in_8_bits(family, mode, kind)
        assert_same(f"{family}-{mode}-{kind}", output, first)
        for layer in output.past_key_values.layers:
            assert layer._keys.dtype == layer._values.dtype == torch.int8
            assert layer._keys.shape[:3] == layer.scales._keys.shape[:3]
        if mode == "greedy":
            turn = next_turn(output.sequences)
            again = generate(model, *turn, do_sample=False, past_key_values=output.past_key_values)
            assert_same(f"{family}-{kind}, second turn", again, second)


def next_turn(tokens):
    turn = torch.cat([tokens, tiny.tokens(2, 29, seed=3)], 1)
    pads = batch_for("greedy")[1]
    return turn, torch.nn.functional.pad(pads, (0, turn.shape[1] - pads.shape[1]), value=1)


@functools.cache
def expected_in_8_bits(family, mode, kind):
    """transformers' own loop on a cache of one process, and a second turn where it is greedy."""
    model = build(family, torch.float64, "tree_attention")
    call = MODES["greedy" if mode == "lookup" else mode]

    def answer(*inputs):
        return result(
            generate(model, *inputs, past_key_values=LongContextCache(model.config, 0, kind), **call)
        )

    first = answer(*batch_for(mode))
    return first, answer(*next_turn(first[0])) if mode == "greedy" else None


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "memory" in topics:
        long_answer()
    if "turns" in topics:
        for family in TALKING:
            conversations(family)
    for topic, cases in (("eight_bits", IN_8_BITS), ("more_eight_bits", MORE_IN_8_BITS)):
        for case in cases if topic in topics else ():
            expected_in_8_bits(*case)
