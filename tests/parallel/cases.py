"""What the ranks of the tests beside this file do. Run as `python cases.py P,P... TOPIC...`.

Every expectation is computed once, in one process without this package's sharding, before the ranks start.
"""

import functools
import itertools
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import tiny
import torch
import torch.distributed as dist
import transformers as tf
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from transformers.generation.streamers import BaseStreamer

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.cache.sharded import ShardedCache, ShardedLayer
from hf_longattn.generation import room
from hf_longattn.generation.graph import device_lengths
from hf_longattn.kernels.merge_partials.reference import merge_reference
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.reduction import gather_merge, three_reductions, tree_merge
from hf_longattn.parallel.watch import Watch

FAMILIES = ["llama", "qwen3", "gemma2", "mistral-window", "gpt-oss", "llama4"]
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}
TIMEOUT = 30.0
# Rounding of fp32: the bound that one process keeps against transformers too.
BOUND = 2e-5


def mesh_of(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))


def prepare(family, mesh, **fields):
    model = tiny.build(family)
    return hf_longattn.prepare_generation(model, device_mesh=mesh, **{"timeout": TIMEOUT, **fields})


def generate(model, ids, mask=None, seed=7, **kwargs):
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs)


def result(output):
    """Tokens and logits, (sequences, (steps, rows, vocabulary))."""
    return output.sequences, torch.stack(output.logits)


def assert_same(name, output, expected):
    """The tokens of one process, its logits to rounding, and the same bits on every rank."""
    tokens, logits = result(output)
    assert torch.equal(tokens, expected[0]), f"{name}: {tokens.tolist()} != {expected[0].tolist()}"
    error = tiny.relative_error(logits, expected[1])
    assert error <= BOUND, f"{name}: logits differ by {error}"
    everyone = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, logits.contiguous())
    assert all(torch.equal(other, logits) for other in everyone), f"{name}: bits differ between ranks"


def batch_for(mode):
    lengths = [23] if mode == "lookup" else [23, 10]
    return tiny.tokens(len(lengths), 23), tiny.padding(lengths, 23, "left")


@functools.cache
def expected(family, mode="greedy", length=None, seed=1):
    ids, mask = batch_for(mode) if length is None else (tiny.tokens(1, length, seed), None)
    return result(generate(tiny.build(family), ids, mask, **MODES[mode]))


# Topics: each is a function (rank, size, mesh) and what to compute before the ranks start


def models(rank, size, mesh):
    """Every family in every mode, the prompt in chunks and whole."""
    for family in FAMILIES:
        for mode, kwargs in MODES.items():
            for chunk in (9, None) if mode == "greedy" else (None,):
                model = prepare(family, mesh, prefill_chunk_size=chunk)
                output = generate(model, *batch_for(mode), **kwargs)
                assert_same(f"{family}-{mode}-{chunk}", output, expected(family, mode))


def lengths(rank, size, mesh):
    """Prompts shorter than the number of ranks, and every remainder."""
    for family in ("llama", "gemma2"):
        model = prepare(family, mesh)
        for length in LENGTHS:
            output = generate(model, tiny.tokens(1, length), do_sample=False)
            assert_same(f"{family}-T{length}", output, expected(family, length=length))


LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40, 64)


def last_tokens(rank, size, mesh):
    """The last logits of a prompt that is shared whole are those of rank 0."""
    model, plain = prepare("llama", mesh), tiny.build("llama")
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    sent, steps = [], []
    model.model.norm.register_forward_hook(lambda *args: steps.append(1))
    broadcast = SequenceGroup.broadcast
    counted = patch.object(SequenceGroup, "broadcast", lambda *args: (sent.append(1), broadcast(*args))[1])
    lengths = (*range(1, 2 * size + 2), 4 * size, 6 * size + 1)
    for length, keep, side in itertools.product(lengths, (1, 2), (None, "left", "right")):
        ids, mask = tiny.tokens(2, length), torch.ones(2, length, dtype=torch.long)
        if side is not None:
            mask = tiny.padding([length, max(length - 2, 1)], length, side)
        call = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": keep}
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), counted:
            got = model(**call, past_key_values=ShardedCache(model.config, group)).logits
            want = plain(**call).logits
        real = mask[:, -keep:].bool()
        assert tiny.relative_error(got[real], want[real]) <= BOUND, (length, keep, side)
        whole = size > 1 and length % (2 * size) == 0 and keep <= length // (2 * size)
        assert len(sent) == whole and len(steps) == (
            1 if whole or size == 1 or length < 2 * size + keep else 2
        )
        everyone = group.gather(got)
        assert torch.equal(everyone, got.expand_as(everyone)), f"T{length}: bits differ"
        sent.clear(), steps.clear()


def turns(rank, size, mesh):
    """A conversation on a filled cache, and no rank with more than its share of it."""
    for family in ("llama", "gemma2"):
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


def operations(rank, size, mesh):
    """crop, reset, reorder, repeat and select, as on a cache of one process."""
    model, plain = prepare("llama", mesh), tiny.build("llama")
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    ids = tiny.tokens(2, 60)
    cache, reference = ShardedCache(model.config, group), tf.DynamicCache()

    def feed(tokens):
        kwargs = {"input_ids": tokens, "logits_to_keep": 3}
        with torch.no_grad():
            got = model(**kwargs, past_key_values=cache).logits
            want = plain(**kwargs, past_key_values=reference).logits
        assert tiny.relative_error(got, want) <= BOUND
        assert cache.get_seq_length() == reference.get_seq_length()

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
    reference = tf.DynamicCache()
    feed(ids[:, :33])


@functools.cache
def long_answer():
    return result(generate(tiny.build("gemma2"), tiny.tokens(1, 400), do_sample=False, max_new_tokens=2))


class Collect(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class Uneven(tf.StoppingCriteria):
    """Wants to stop after as many tokens as the rank is late: rank 0's wish counts."""

    def __init__(self, rank):
        self.limit = 30 + 3 * rank

    def __call__(self, ids, scores, **kwargs):
        return torch.full((ids.shape[0],), ids.shape[1] >= self.limit)


def control(rank, size, mesh):
    """Streamers, criteria that differ, a clock, restore."""
    model, ids = prepare("llama", mesh), tiny.tokens(1, 23)
    streamer = Collect()
    output = generate(model, ids, do_sample=False, streamer=streamer)
    assert streamer.ended == (rank == 0)
    if rank == 0:
        assert sum(streamer.parts, []) == output.sequences[0].tolist()
    stop = tf.StoppingCriteriaList([Uneven(rank)])
    assert generate(
        model, ids, do_sample=False, max_new_tokens=40, stopping_criteria=stop
    ).sequences.shape == (1, 30)

    class Slow(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            time.sleep(0.02 * (1 + rank))
            return scores

    slow = tf.LogitsProcessorList([Slow()])
    timed = generate(model, ids, do_sample=False, max_new_tokens=400, max_time=0.3, logits_processor=slow)
    assert_same("max_time", timed, (timed.sequences, torch.stack(timed.logits)))
    assert 23 < timed.sequences.shape[1] < 200
    hf_longattn.restore(model)
    assert "generate" not in vars(model) and "forward" not in vars(model)
    assert type(model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values) is (
        tf.DynamicCache
    )


def clocks(rank, size, mesh):
    """Steps with lengths and slots on the device, as a CUDA graph takes them, against one process."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    for family in ("llama", "gemma2", "gpt-oss"):
        model, plain = prepare(family, mesh), tiny.build(family, "tree_attention")
        ids, mask = tiny.tokens(2, 160), tiny.padding([160, 129], 160, "left")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        caches = ShardedCache(model.config, group, capacity=18), LongContextCache(model.config)
        known, start = {}, 0
        for count in (23, 1, 1, 3, *[1] * 40, -5, 4, 1, 30, *[1] * 20):
            if count < 0:
                for cache in caches:
                    cache.crop(count)
                start += count
                continue
            stop = start + count
            step = {
                "input_ids": ids[:, start:stop],
                "position_ids": positions[:, start:stop],
                "logits_to_keep": 2,
            }
            with torch.no_grad():
                want = plain(**step, attention_mask=mask[:, :stop], past_key_values=caches[1]).logits
                if count > 16:
                    got = model(**step, attention_mask=mask[:, :stop], past_key_values=caches[0]).logits
                else:
                    future = torch.nn.functional.pad(mask[:, :stop], (0, 64), value=1)
                    got = step_by_clock(model, {**step, "attention_mask": future}, caches[0], known, count)
            assert tiny.relative_error(got, want) <= BOUND, (family, start, count)
            capacities = group.gather(torch.tensor([layer.capacity for layer in caches[0].layers]))
            assert (capacities == capacities[0]).all(), "ranks made room at different steps"
            start = stop


def step_by_clock(model, step, cache, known, count):
    with device_lengths(cache, known, count):
        used = {id(layer.clock): layer.clock for layer in cache.layers}.values()
        for clock in used:
            clock.begin(count)
        logits = model(**step, past_key_values=cache).logits
        for clock in used:
            clock.advance(count)
    for clock in used:
        clock.advanced(count)
    for layer in cache.layers:
        layer.advanced(count)
    return logits


def reductions(rank, size, mesh):
    """Every form of the reduction against the merge in one process: empty shards, odd widths, far logits."""
    group = SequenceGroup(mesh.get_group("cp") if size > 1 else None, timeout=TIMEOUT)
    for dtype, width in ((torch.float32, 7), (torch.bfloat16, 7), (torch.float16, 16), (torch.float64, 5)):
        outputs = torch.randn(size, 2, 4, 3, width).to(dtype)
        lse = torch.randn(size, 2, 4, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        lse = 300 * lse
        lse[0, 0], lse[:, 1, 2] = -torch.inf, -torch.inf
        outputs[lse == -torch.inf] = torch.nan if size > 1 else 0.0
        want = merge_reference(outputs.double(), lse.double())
        eps = torch.finfo(dtype).eps
        for form in (tree_merge, gather_merge, three_reductions):
            got = form(group, outputs[rank], lse[rank])
            assert (got[0].double() - want[0]).abs().max() <= 2 * eps * want[0].abs().max(), (form, dtype)
            finite = want[1] > -torch.inf
            assert torch.equal(got[1] > -torch.inf, finite)
            # One rounding of the largest lse, of some 1000, and one of the sum.
            error = (got[1].double() - want[1])[finite].abs().max()
            assert error <= 2 * torch.finfo(lse.dtype).eps * want[1][finite].abs().max(), (form, dtype)
            for part in got:
                everyone = group.gather(part)
                assert torch.equal(everyone, part.expand_as(everyone)), f"{form}: bits differ"


def nodes(rank, size, mesh):
    """Two nodes of two ranks: joined inside, then across."""
    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("cp_inter", "cp_intra"))
    for family in ("llama", "gpt-oss"):
        model = prepare(family, both, prefill_chunk_size=16)
        assert_same(family, generate(model, *batch_for("greedy"), do_sample=False), expected(family))
    group = SequenceGroup.from_mesh(both, TIMEOUT)
    assert group.levels == 2 and (group.rank, group.world_size) == (rank, size)


def tensor_parallel(rank, size, mesh):
    """Half of the heads on each rank of "tp", half of the sequence on each rank of "cp"."""
    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("cp", "tp"))
    for family in ("llama", "qwen3"):
        folder, want = even_vocabulary(family)
        model = tf.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="tree_attention", tp_plan="auto", device_mesh=both["tp"]
        )
        hf_longattn.prepare_generation(model, device_mesh=both, timeout=TIMEOUT, prefill_chunk_size=16)
        output = generate(model, *batch_for("greedy"), do_sample=False)
        assert_same(family, output, want)
        timed = generate(model, *batch_for("greedy"), do_sample=False, max_new_tokens=400, max_time=0.2)
        assert_same("max_time", timed, (timed.sequences, torch.stack(timed.logits)))
        keys = output.past_key_values.layers[0].keys
        assert keys.shape[1] == 1 and keys.shape[2] < 32, (
            "each rank holds half of the heads and of the tokens"
        )


def tensor_parallel_alone(rank, size, mesh):
    """All ranks in "tp": a chunk is one forward of all its tokens, on layers of one process."""
    both = init_device_mesh("cpu", (1, size), mesh_dim_names=("cp", "tp"))
    folder, want = even_vocabulary("llama")
    model = tf.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="tree_attention", tp_plan="auto", device_mesh=both["tp"]
    )
    hf_longattn.prepare_generation(model, device_mesh=both, timeout=TIMEOUT, prefill_chunk_size=16)
    ids, mask = batch_for("greedy")
    shapes = []
    handle = model.model.norm.register_forward_hook(lambda *args: shapes.append(args[2].shape[1]))
    output = generate(model, ids, mask, do_sample=False)
    handle.remove()
    assert_same("llama", output, want)
    assert shapes == [16, 7, *[1] * 8]
    cache = output.past_key_values
    assert isinstance(cache, ShardedCache) and {type(layer) for layer in cache.layers} == {PreallocatedLayer}
    turn = torch.cat([output.sequences[:1], tiny.tokens(1, 13, seed=4)], 1)
    first = generate(model, ids[:1], mask[:1], do_sample=False)
    again = generate(model, turn, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(again.sequences, generate(model, turn, do_sample=False).sequences)


@functools.cache
def even_vocabulary(family):
    """(folder, expectation) of a model whose head divides among the ranks."""
    folder, config = tempfile.mkdtemp(), tiny.CONFIGS[family](vocab_size=98)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.15)
    model.save_pretrained(folder)
    return folder, result(generate(model, *batch_for("greedy"), do_sample=False))


def wrapped(rank, size, mesh):
    """An accelerator in the place of a mesh, and a wrapper around the model."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == size
    model = tiny.build("llama")
    wrapper = torch.nn.parallel.DistributedDataParallel(model) if size > 1 else model
    assert hf_longattn.prepare_generation(wrapper, accelerator=accelerator, timeout=TIMEOUT) is wrapper
    assert_same("wrapped", generate(model, tiny.tokens(1, 23), do_sample=False), expected("llama", length=23))
    hf_longattn.restore(wrapper)


def refusals(rank, size, mesh):
    """What differs between ranks is named on every rank, and the next call works."""
    if size == 1:
        return
    model, ids = prepare("llama", mesh), tiny.tokens(1, 23)
    other = tiny.tokens(1, 23, seed=5) if rank == 1 else ids
    mask = torch.ones_like(ids)
    mask[:, : 3 * (rank == 1)] = 0
    calls = {
        "input_ids": lambda: generate(model, other, do_sample=False),
        "attention_mask": lambda: generate(model, ids, mask, do_sample=False),
        "generation_config": lambda: generate(model, ids, do_sample=False, max_new_tokens=9 + (rank == 1)),
        "seed": lambda: generate(model, ids, seed=rank == 1, do_sample=True),
    }
    for field, call in calls.items():
        message = error_of(ValueError, call)
        assert f"`{field}`: rank 1 differs from rank 0" in message, message
        assert_same(field, generate(model, ids, do_sample=False), expected("llama", length=23))
    model.config.bos_token_id = 1 + (rank == 1)
    message = error_of(ValueError, lambda: generate(model, ids, do_sample=False))
    assert "`model config`: rank 1 differs" in message, message
    message = error_of(
        ValueError, lambda: prepare("llama", init_device_mesh("cpu", (size,), mesh_dim_names=("dp",)))
    )
    assert "`device_mesh` must name a dimension 'cp'" in message, message


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def dies(rank, size, mesh):
    """The last rank goes without a word in the middle of an answer."""
    model, ids = prepare("llama", mesh, timeout=8.0), tiny.tokens(1, 23)
    generate(model, ids, do_sample=False, max_new_tokens=2)
    started = time.time()

    class Die(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            if rank == size - 1 and ids.shape[1] == 28:
                ranks.os._exit(0)
            return scores

    die = tf.LogitsProcessorList([Die()])
    message = error_of(RuntimeError, lambda: generate(model, ids, do_sample=False, logits_processor=die))
    assert f"rank {size - 1} is gone" in message, message
    assert time.time() - started < 8.0 + 8.0
    ranks.os._exit(0)


def hangs(rank, size, mesh):
    """Rank 1 sleeps on; the others say so within the timeout."""
    model, ids = prepare("llama", mesh, timeout=5.0), tiny.tokens(1, 23)
    started = time.time()

    class Sleep(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            if rank == 1 and ids.shape[1] == 28:
                time.sleep(20)
            return scores

    sleep = tf.LogitsProcessorList([Sleep()])
    message = error_of(RuntimeError, lambda: generate(model, ids, do_sample=False, logits_processor=sleep))
    if rank != 1:
        assert "rank 1 is behind the others" in message, message
        assert time.time() - started < 5.0 + 8.0
    ranks.os._exit(0)


def stays_away(rank, size, mesh):
    """Rank 1 never calls `generate`: the others name it within the timeout, blocked as they are."""
    model, aborted = prepare("llama", mesh, timeout=4.0), []
    if rank == 1:
        time.sleep(16)
        ranks.os._exit(0)
    started = time.time()
    message = error_of(RuntimeError, lambda: generate(model, tiny.tokens(1, 23), do_sample=False))
    assert "rank 1 is gone" in message, message
    assert time.time() - started < 4.0 + 6.0
    watch = Watch(0, [0, 1, 2], 1.0, lambda: aborted.append(True))
    if rank == 0:
        # What would end an operation that no timeout reaches: called once, some seconds after the fault.
        with watch:
            time.sleep(10)
        assert aborted == [True]
    ranks.os._exit(0)


def fails(rank, size, mesh):
    """An error on one rank reaches the others with its reason."""
    model, ids = prepare("llama", mesh, timeout=10.0), tiny.tokens(1, 23)

    class Fail(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            if rank == 1 and ids.shape[1] == 28:
                raise MemoryError("no room for another token")
            return scores

    fail = tf.LogitsProcessorList([Fail()])
    call = functools.partial(generate, model, ids, do_sample=False, logits_processor=fail)
    message = error_of(MemoryError if rank == 1 else RuntimeError, call)
    assert "no room for another token" in message, message
    ranks.os._exit(0)


def runs_out(rank, size, mesh):
    """Too little memory on one rank is refused by all; memory that runs out there stops all."""
    model, ids = prepare("gemma2", mesh, timeout=10.0), tiny.tokens(1, 23)
    first = generate(model, ids, do_sample=False)
    cache, held = first.past_key_values, first.past_key_values.get_seq_length()
    conversation = torch.cat([first.sequences, tiny.tokens(1, 17, seed=4)], 1)
    call = functools.partial(generate, model, conversation, past_key_values=cache, do_sample=False)
    with patch.object(room, "free_memory", lambda device: 100 if rank == 1 else 1 << 40):
        message = error_of(ValueError, call)
    assert "tokens of prompt and answer fit" in message, message
    assert cache.get_seq_length() == held

    def hook(module, args):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[-1].mlp.register_forward_pre_hook(hook)
    message = error_of(torch.OutOfMemoryError if rank == 1 else RuntimeError, call)
    assert "58 tokens of prompt and answer were asked for and about" in message, message
    assert all(layer.get_seq_length() == held for layer in cache.layers)
    assert cache.placement.length == held
    ranks.os._exit(0)


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if "models" in topics:
        for family in FAMILIES:
            for mode in MODES:
                expected(family, mode)
    if "lengths" in topics:
        for family in ("llama", "gemma2"):
            for length in LENGTHS:
                expected(family, length=length)
    if "memory" in topics:
        long_answer()
    if "nodes" in topics:
        for family in ("llama", "gpt-oss"):
            expected(family)
    if "tensor_parallel" in topics:
        even_vocabulary("llama"), even_vocabulary("qwen3")
    if "tensor_parallel_alone" in topics:
        even_vocabulary("llama")
    if "refusals" in topics or "wrapped" in topics:
        expected("llama", length=23)
    if "turns" in topics:
        conversations("llama"), conversations("gemma2")


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, mesh_of)
