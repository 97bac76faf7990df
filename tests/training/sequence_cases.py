"""What the ranks of `test_sequence_parallel.py` do. Run as `python sequence_cases.py P,P... TOPIC...`.

Every expectation is computed once, in one process on transformers' own forward, before the ranks start.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn

# fp32 sums in another order; the loss and the gradients of a whole model, relative.
BOUND = 2e-6
FAMILIES = ("llama", "qwen3", "gemma2", "gpt-oss")


def mesh_of(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))


def build(family):
    model = tiny.build(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def batch(layout):
    """Inputs of 43 tokens a row, which neither blocks nor ranks divide, in one of the layouts."""
    ids = tiny.tokens(2, 43)
    if layout == "packed":
        positions = torch.cat([torch.arange(n) for n in (20, 1, 22)])[None]
        labels = ids[:1].masked_fill(positions == 0, -100)
        return {"input_ids": ids[:1], "labels": labels, "position_ids": positions}
    mask = tiny.padding(
        [43, 43] if layout == "full" else [43, 29], 43, "left" if layout == "left" else "right"
    )
    # A padding token sees nothing, and what it would predict is up to the implementation.
    labels = torch.where(mask.bool() & mask.roll(1, 1).bool(), ids, -100)
    return {"input_ids": ids, "labels": labels} | ({} if layout == "full" else {"attention_mask": mask})


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def flat(grads):
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def assert_same(name, result, expected, bound=BOUND):
    error = tiny.relative_error(result[0], expected[0])
    assert error <= bound, f"{name}: the loss differs by {error}"
    assert result[1].keys() == expected[1].keys() and expected[1]
    error = tiny.relative_error(flat(result[1]), flat(expected[1]))
    assert error <= bound, f"{name}: the gradients differ by {error}"


@functools.cache
def expected(family, layout):
    model = build(family)
    if layout == "packed":
        # Eager attention forgets about packing in some families; tests/attention holds ours to it.
        model.set_attn_implementation("blockwise_attention")
    return step(model, **batch(layout), use_cache=False)


def prepare(family, mesh, **fields):
    fields = {"block_size": 5, "loss_chunk_size": 13, **fields}
    return hf_longattn.prepare_training(build(family), device_mesh=mesh, **fields)


LAYOUTS = ("full", "left", "right", "packed")


def families(rank, size, mesh):
    """Loss and every gradient in every layout."""
    for family in FAMILIES:
        model = prepare(family, mesh)
        for layout in LAYOUTS:
            assert_same(f"{family}-{layout}", step(model, **batch(layout)), expected(family, layout))


def expect_families():
    for family in FAMILIES:
        for layout in LAYOUTS:
            expected(family, layout)


# Name to what the ranks do and what is computed before they start.
TOPICS = {"families": (families, expect_families)}


def work(rank, size, topics):
    import time

    mesh = mesh_of(size)
    for topic in topics:
        start = time.monotonic()
        TOPICS[topic][0](rank, size, mesh)
        if rank == 0:
            print(f"P{size} {topic}: {time.monotonic() - start:.1f} s", flush=True)


def main():
    torch.set_num_threads(1)
    topics = sys.argv[2:]
    for topic in topics:
        TOPICS[topic][1]()
    for size in map(int, sys.argv[1].split(",")):
        ranks.run(work, size, topics)


if __name__ == "__main__":
    main()
