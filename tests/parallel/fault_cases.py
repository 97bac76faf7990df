"""Topics of `cases.py`: ranks that differ, die, hang, fail or run out of memory."""

import functools
import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import ranks
import tiny
import torch
import torch.distributed as dist
import transformers as tf
from connection_cases import descriptors
from several import BOUND, TIMEOUT, assert_same, build, error_of, expected, generate, prepare
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn
from hf_longattn import LongContextCache
from hf_longattn.cache.files import part_path
from hf_longattn.generation import room
from hf_longattn.parallel.watch import Watch


def refusals(rank, size, mesh):
    """What differs between ranks is named on every rank, and the next call works."""
    if size == 1:
        return
    model, ids = prepare("llama", mesh), tiny.tokens(1, 23)
    other = tiny.tokens(1, 23, seed=5) if rank == 1 else ids
    mask = torch.ones_like(ids)
    mask[:, : 3 * (rank == 1)] = 0
    penalty = tf.LogitsProcessorList([tf.RepetitionPenaltyLogitsProcessor(1.0 + (rank == 1))])
    own = tf.LogitsProcessorList([Negated(rank == 1)])
    cache = generate(model, ids[:, :15], do_sample=False, max_new_tokens=2).past_key_values
    cache.crop(15)
    calls = {
        "`input_ids`": lambda: generate(model, other, do_sample=False),
        "`attention_mask`": lambda: generate(model, ids, mask, do_sample=False),
        "`generation_config` (`max_new_tokens`)": lambda: generate(
            model, ids, do_sample=False, max_new_tokens=9 + (rank == 1)
        ),
        "`arguments` (`logits_processor`)": lambda: generate(model, ids, logits_processor=penalty),
        "`arguments` (`token_type_ids`)": lambda: generate(
            model, ids, **({"token_type_ids": ids} if rank == 1 else {})
        ),
        "`seed`": lambda: generate(model, ids, seed=rank == 1, do_sample=True),
        # A prompt that its rank alone would refuse.
        "`input_ids` ": lambda: generate(model, ids[0] if rank == 1 else ids, mask),
        "`answer`": lambda: generate(model, ids, logits_processor=own, past_key_values=cache),
    }
    for field, call in calls.items():
        message = error_of(ValueError, call)
        assert f"{field.strip()}: rank 1 differs from rank 0" in message, message
        assert_same(field, generate(model, ids, do_sample=False), expected("llama", length=23))
    assert cache.get_seq_length() == 15
    sampling = tf.GenerationConfig(max_new_tokens=9, return_dict_in_generate=True)
    for name, value in (("do_sample", True), ("repetition_penalty", 1.0 + (rank == 1))):
        # What a config leaves open, that of the model says.
        with patch.object(model.generation_config, name, value):
            torch.manual_seed(int(rank == 1))
            message = error_of(ValueError, lambda: model.generate(ids, generation_config=sampling))
        found = "`seed`" if value is True else f"`generation_config` (`{name}`)"
        assert f"{found}: rank 1 differs" in message, message
    for field, values in {"prefill_chunk_size": (8, 16), "cache_dtype": (None, "int8")}.items():
        other = prepare("llama", mesh, **{field: values[rank == 1]})
        message = error_of(ValueError, lambda other=other: generate(other, ids, do_sample=False))
        assert f"`{field}`: rank 1 differs" in message and "same settings" in message, message
    model.config.bos_token_id = 1 + (rank == 1)
    message = error_of(ValueError, lambda: generate(model, ids, do_sample=False))
    assert "`model config` (`bos_token_id`): rank 1 differs" in message, message
    message = error_of(
        ValueError, lambda: prepare("llama", init_device_mesh("cpu", (size,), mesh_dim_names=("dp",)))
    )
    assert "`device_mesh` must name a dimension 'cp'" in message, message


class Negated(tf.LogitsProcessor):
    """A processor of a caller's: nobody knows what it does before it has done it."""

    def __init__(self, acts):
        self.acts = acts

    def __call__(self, ids, scores):
        return -scores if self.acts else scores


def strangers(rank, size, mesh):
    """Attention that knows of one share alone is refused the shared cache, and what follows works."""
    if size == 1:
        return
    for family, attention, kind in (
        ("llama", "sdpa", None),
        ("llama", "sdpa", "int8"),
        ("gemma2", "eager", None),
    ):
        model, caches = filled(family, attention, mesh, 6, cache_dtype=kind)
        others = build(family, attention=attention), build(family, attention="blockwise_attention")
        seen = torch.ones(1, caches[0].get_seq_length() + 1, dtype=torch.long)
        for other, cache in zip(others, caches, strict=False):
            assert_refused(size, other, past_key_values=cache)
        switched(model, attention, size)
        assert_refused(size, model, past_key_values=caches[2])
        hf_longattn.restore(model)
        assert_refused(size, model, past_key_values=caches[3])
        assert_refused(size, model, past_key_values=caches[4], attention_mask=seen)
        assert_refused(size, model, count=2, past_key_values=caches[5])
    # Windows are the same on every rank, and any attention may read them; slices of a prompt are not.
    model, caches = filled("mistral-window", "sdpa", mesh, 2)
    switched(model, "sdpa", size)
    assert_windows_are_whole(hf_longattn.restore(model), caches)
    output = generate(prepare("llama", mesh), tiny.tokens(1, 23), do_sample=False)
    assert_same("after refusals", output, expected("llama", length=23))


def filled(family, attention, mesh, number, **fields):
    """A prepared model and some caches that hold what it has read."""
    model = build(family, attention=attention)
    hf_longattn.prepare_generation(model, device_mesh=mesh, timeout=TIMEOUT, **fields)
    call = {"do_sample": False, "max_new_tokens": 2}
    return model, [generate(model, tiny.tokens(1, 43), **call).past_key_values for _ in range(number)]


def switched(model, attention, size):
    """Refuses the prompt of a model whose attention was changed behind its set-up."""
    model.set_attn_implementation(attention)
    message = error_of(ValueError, lambda: generate(model, tiny.tokens(1, 43), do_sample=False))
    assert f"a cache shared by {size} processes" in message, message


@torch.no_grad()
def assert_refused(size, model, count=1, **call):
    message = error_of(ValueError, lambda: model(input_ids=tiny.tokens(1, count), **call))
    assert f"a cache shared by {size} processes" in message and "Pass a fresh cache" in message, message


@torch.no_grad()
def assert_windows_are_whole(model, caches):
    known = build("mistral-window", attention="tree_attention")
    got, want = (
        m(input_ids=tiny.tokens(1, 3), past_key_values=cache).logits
        for m, cache in zip((model, known), caches, strict=True)
    )
    assert tiny.relative_error(got, want) <= BOUND


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
            watch.check()
            time.sleep(10)
        assert aborted == [True]
    ranks.os._exit(0)


def fails(rank, size, mesh):
    """An error on one rank reaches the others with its reason, and the next calls work, on its cache too."""
    model, ids = prepare("llama", mesh, timeout=4.0), tiny.tokens(1, 23)
    cache = generate(model, ids[:, :15], do_sample=False, max_new_tokens=2).past_key_values

    class Fail(tf.LogitsProcessor):
        def __init__(self, who):
            self.who = who

        def __call__(self, ids, scores):
            if rank in self.who and ids.shape[1] == 28:
                raise MemoryError("no room for another token")
            return scores

    # A cache that an earlier set-up has filled goes over the connections that are opened anew, too.
    hf_longattn.prepare_generation(model, device_mesh=mesh, timeout=4.0)
    counts, path = [], Path(tempfile.gettempdir()) / f"fails-{os.getppid()}.safetensors"
    for who, given in (([0], {"past_key_values": cache}), ([1], {}), (range(size), {})):
        fail = tf.LogitsProcessorList([Fail(who)])
        call = functools.partial(generate, model, ids, do_sample=False, logits_processor=fail, **given)
        message = error_of(MemoryError if rank in who else RuntimeError, call)
        assert "no room for another token" in message, message
        assert cache.get_seq_length() == 16
        cache.crop(15)
        # What does not need them leaves it to the next call to open new connections.
        cache.save(path)
        again = generate(model, ids, do_sample=False, past_key_values=cache)
        assert_same(f"after {who}", again, expected("llama", length=23))
        cache.crop(16)
        counts.append(descriptors())
    assert len(set(counts)) == 1, counts
    assert LongContextCache.load(path, model).get_seq_length() == 15
    dist.barrier()
    part_path(path, rank, size).unlink()
    # A call that one rank never makes leaves the ranks out of step, until they prepare the model again.
    hf_longattn.prepare_generation(model, device_mesh=mesh, timeout=2.0)
    if rank == 0:
        assert "gone" in error_of(RuntimeError, lambda: generate(model, ids, do_sample=False))
    hf_longattn.prepare_generation(model, device_mesh=mesh, timeout=TIMEOUT)
    assert_same("prepared again", generate(model, ids, do_sample=False), expected("llama", length=23))


def runs_out(rank, size, mesh):
    """Too little memory on one rank is refused by all; memory that runs out there stops all."""
    model, ids = prepare("gemma2", mesh, timeout=10.0, cache_dtype="int8"), tiny.tokens(1, 23)
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
