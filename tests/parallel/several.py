"""What the files of cases share: models, calls, and the comparison with one process."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn
from hf_longattn.generation.graph import device_lengths

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


def build(family, dtype=torch.float32, attention="eager"):
    model = tiny.build(family, attention, dtype)
    if family == "gpt-oss" and dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model


def prepare(family, mesh, dtype=torch.float32, **fields):
    model = build(family, dtype)
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


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


class Uneven(tf.StoppingCriteria):
    """Wants to stop after as many tokens as the rank is late: rank 0's wish counts."""

    def __init__(self, rank):
        self.limit = 30 + 3 * rank

    def __call__(self, ids, scores, **kwargs):
        return torch.full((ids.shape[0],), ids.shape[1] >= self.limit)


def logits_beside(models, caches, batch, known, new):
    """The logits of the tokens `new` on a shared cache, and on a cache of one process."""
    (model, plain), (ids, mask, positions) = models, batch
    step = {"input_ids": ids[:, new], "position_ids": positions[:, new], "logits_to_keep": 2}
    seen, count = mask[:, : new.stop], new.stop - new.start
    with torch.no_grad():
        want = plain(**step, attention_mask=seen, past_key_values=caches[1]).logits
        if count > 16:
            return model(**step, attention_mask=seen, past_key_values=caches[0]).logits, want
        future = torch.nn.functional.pad(seen, (0, 64), value=1)
        return step_by_clock(model, {**step, "attention_mask": future}, caches[0], known, count), want


def step_by_clock(model, step, cache, known, count):
    """The logits of tokens whose slots and lengths are on the device, as in a CUDA graph."""
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
