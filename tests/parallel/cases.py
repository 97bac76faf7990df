"""What the ranks of the tests beside this file do. Run as `python cases.py P,P... TOPIC...`.

Every expectation is computed once, in one process without this package's sharding, before the ranks start.
"""

import functools
import itertools
import operator
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import cache_cases
import connection_cases
import fault_cases
import ranks
import tiny
import torch
import transformers as tf
from accelerate import Accelerator
from several import (
    BOUND,
    MODES,
    TIMEOUT,
    Uneven,
    assert_same,
    batch_for,
    error_of,
    expected,
    generate,
    mesh_of,
    prepare,
    result,
)
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.kernels.merge_partials.reference import merge_reference
from hf_longattn.parallel import prefill as parallel_prefill
from hf_longattn.parallel.cost import Links, message_bytes, received_bytes
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.reduction import gather_merge, three_reductions, tree_merge

FAMILIES = ["llama", "qwen3", "gemma2", "mistral-window", "gpt-oss", "llama4", "gemma4-shared"]


# Topics: each is a function (rank, size, mesh); `expect` computes beforehand what they compare with


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


def control(rank, size, mesh):
    """Streamers, criteria that differ, a clock, restore."""
    model, ids = prepare("llama", mesh), tiny.tokens(1, 23)
    streamer = tiny.Collect()
    output = generate(model, ids, do_sample=False, streamer=streamer)
    assert streamer.ended == (rank == 0)
    if rank == 0:
        assert sum(streamer.parts, []) == output.sequences[0].tolist()
    # Who iterates over the tokens comes to an end on every rank.
    parts = tf.TextIteratorStreamer(Words(), timeout=TIMEOUT)
    generate(model, ids, do_sample=False, streamer=parts)
    assert len("".join(parts).split()) == (output.sequences.shape[1] if rank == 0 else 0)
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


def embeddings(rank, size, mesh):
    """A prompt of embeddings gives the tokens of its ids, and a word that it is not cut."""
    model, ids = prepare("llama", mesh), tiny.tokens(1, 70)
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    want = model.generate(ids, **call)[:, 70:]
    with patch.object(parallel_prefill, "warn_slow") as warned:
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **call)[:, 70:], want)
        assert not warned.called
        states = model.get_input_embeddings()(ids).detach()
        assert torch.equal(model.generate(inputs_embeds=states, **call), want)
    assert warned.called == (size > 1) and (size == 1 or "`inputs_embeds`" in str(warned.call_args))


class Words:
    """A tokenizer that writes ids."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(token)} " for token in ids)


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


def volume(rank, size, mesh):
    """A token moves the bytes that are planned: one message of every other rank a layer that is cut."""
    assert_volume(prepare("gemma2", mesh), SequenceGroup(mesh.get_group("cp") if size > 1 else None), Links())


@torch.no_grad()
def assert_volume(model, group, links):
    cache, received = ShardedCache(model.config, group), []
    gather = SequenceGroup._gather

    def counted(self, link, tensor, async_op):
        pending = gather(self, link, tensor, async_op)
        received.append(pending._received.nbytes - tensor.nbytes)
        return pending

    model(input_ids=tiny.tokens(3, 41), past_key_values=cache, logits_to_keep=1)
    with patch.object(SequenceGroup, "_gather", counted):
        model(input_ids=tiny.tokens(3, 1), past_key_values=cache)
    message = message_bytes(3, 4, 16, torch.float32.itemsize)
    assert sum(received) == received_bytes(message, group.world_size, links), received


def nodes(rank, size, mesh):
    """Two nodes of two ranks: joined inside, then across."""
    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("cp_inter", "cp_intra"))
    for family in ("llama", "gpt-oss"):
        model = prepare(family, both, prefill_chunk_size=16)
        assert_same(family, generate(model, *batch_for("greedy"), do_sample=False), expected(family))
    group = SequenceGroup.from_mesh(both, TIMEOUT)
    assert group.levels == 2 and (group.rank, group.world_size) == (rank, size)
    assert_volume(prepare("gemma2", both), group, Links(node_size=size // 2))
    model, started = hf_longattn.prepare_generation(model, device_mesh=both, timeout=4.0), time.time()

    class Fail(tf.LogitsProcessor):
        def __call__(self, ids, scores):
            if rank == 3 and ids.shape[1] == 28:
                raise MemoryError("no room for another token")
            return scores

    fail = tf.LogitsProcessorList([Fail()])
    call = functools.partial(generate, model, *batch_for("greedy"), do_sample=False)
    message = error_of(MemoryError if rank == 3 else RuntimeError, lambda: call(logits_processor=fail))
    assert "no room for another token" in message and time.time() - started < 4.0 + 8.0, message
    assert_same("after an error", call(), expected("gpt-oss"))


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
    with torch.autocast("cpu", torch.bfloat16):
        mixed, alone = (
            generate(m, tiny.tokens(1, 23), do_sample=False, max_new_tokens=1)
            for m in (model, tiny.build("llama"))
        )
    errors = [
        tiny.relative_error(output.logits[0].float(), expected("llama", length=23)[1][0])
        for output in (mixed, alone)
    ]
    assert errors[0] <= 1.5 * (errors[1] + torch.finfo(torch.bfloat16).eps), errors
    hf_longattn.restore(wrapper)


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
    if "nodes" in topics:
        for family in ("llama", "gpt-oss"):
            expected(family)
    if "tensor_parallel" in topics:
        even_vocabulary("llama"), even_vocabulary("qwen3")
    if "tensor_parallel_alone" in topics:
        even_vocabulary("llama")
    if {"refusals", "strangers", "wrapped", "fails"} & set(topics):
        expected("llama", length=23)
    cache_cases.expect(topics)
    connection_cases.expect(topics)


if __name__ == "__main__":
    topics = [vars(module) for module in (cache_cases, connection_cases, fault_cases)]
    ranks.run_topics(functools.reduce(operator.or_, topics, globals()), expect, mesh_of)
