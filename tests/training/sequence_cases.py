"""What the ranks of `test_sequence_parallel.py` do. Run as `python sequence_cases.py P,P... TOPIC...`.

Every expectation is computed once, in one process on transformers' own forward, before the ranks start.
"""

import contextlib
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import pytest
import ranks
import tiny
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hf_longattn

# fp32 sums in another order; the loss and the gradients of a whole model, relative.
BOUND = 2e-6
FAMILIES = ("llama", "qwen3", "gemma2", "gpt-oss")


def mesh_of(size):
    return init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))


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
    model = tiny.build_to_train(family)
    if layout == "packed":
        # Eager attention forgets about packing in some families; tests/attention holds ours to it.
        model.set_attn_implementation("blockwise_attention")
    return step(model, **batch(layout), use_cache=False)


def prepare(family, mesh, **fields):
    fields = {"block_size": 5, "loss_chunk_size": 13, **fields}
    return hf_longattn.prepare_training(tiny.build_to_train(family), device_mesh=mesh, **fields)


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


def trajectory(rank, size, mesh):
    """Three steps of AdamW on batches of several kinds: the losses and the weights of one process."""
    model = prepare("qwen3", mesh)
    losses, weights = train(model)
    expected_losses, expected_weights = expected_training()
    assert losses == approx(expected_losses), (losses, expected_losses)
    # Adam divides by the roots of tiny second moments, which makes rounding grow.
    error = tiny.relative_error(weights, expected_weights)
    assert error <= 1e-3, f"three steps moved the weights apart by {error}"


def approx(values):
    return pytest.approx(values, rel=2e-6)


def train(model):
    """(losses, how far the weights moved) of three steps, each of two accumulated batches."""
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        for layout in ("left", "packed"):
            inputs = {**batch(layout), "num_items_in_batch": torch.tensor(91), "use_cache": False}
            loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@functools.cache
def expected_training():
    model = tiny.build_to_train("qwen3")
    model.set_attn_implementation("blockwise_attention")
    return train(model)


def options(rank, size, mesh):
    """What the loss and the layers are asked for beyond the plain case."""
    for name, fields in FIELDS.items():
        for family in ("llama", "gemma2"):
            model = prepare(family, mesh, **fields)
            assert_same(f"{family}-{name}", step(model, **batch("left")), expected(family, "left"))
    model = prepare("llama", mesh, label_smoothing=0.1)
    assert_same("smoothing", step(model, **batch("left")), expected_smoothing())
    for name, inputs in expected_inputs().items():
        model = prepare("llama", mesh)
        assert_same(name, step(model, **inputs[0]), inputs[1])


FIELDS = {
    "recomputed": {"save_attention": False},
    "whole-logits": {"loss": "model"},
    "one-block": {"block_size": 64},
    "offload": {"offload": True},
    "every-third": {"keep_every": 3},
    "every-second-recomputed": {"keep_every": 2, "save_attention": False},
}


@functools.cache
def expected_smoothing():
    model, inputs = tiny.build_to_train("llama"), batch("left")
    labels = inputs.pop("labels")
    output = model(**inputs, use_cache=False)
    smoother = tf.trainer_pt_utils.LabelSmoother(epsilon=0.1)
    loss = smoother(output, labels, shift_labels=True)
    loss.backward()
    return loss.detach(), gradients(model)


@functools.cache
def expected_inputs():
    """Name to (inputs, loss and gradients of the plain model)."""
    inputs = batch("left")
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    bounds = torch.tensor([0, 20, 21, 43], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 22, "max_length_k": 22}
    cases = {
        "shift-labels": {**inputs, "labels": inputs["labels"], "shift_labels": shifted},
        "num-items": {**inputs, "num_items_in_batch": torch.tensor(30)},
        "few-labels": {**inputs, "labels": inputs["labels"].index_fill(1, torch.arange(3, 43), -100)},
        "short": {name: value[:, -2:] for name, value in batch("full").items()},
    }
    cases = {
        name: (case, step(tiny.build_to_train("llama"), **case, use_cache=False))
        for name, case in cases.items()
    }
    return cases | {"lengths": ({**batch("packed"), **lengths}, expected("llama", "packed"))}


def embeddings(rank, size, mesh):
    """Inputs that have a gradient themselves, and tables of positions."""
    table = torch.nn.Embedding.from_pretrained(fixed_table(), freeze=False)
    ids, labels = tiny.tokens(2, 43), tiny.tokens(2, 43)
    result = step(prepare("llama", mesh), inputs_embeds=table(ids), labels=labels)
    loss, grads, grad_table = expected_embeddings()
    grads.pop("model.embed_tokens.weight", None)
    assert_same("inputs_embeds", result, (loss, grads))
    assert tiny.relative_error(table.weight.grad, grad_table) <= BOUND
    loss, grads = expected("gpt2", "right")
    # The table ends with the sequence, and not with the tokens that are added to it.
    grads = {**grads, TABLE: grads[TABLE][:43]}
    assert_same("gpt2", step(with_short_table(mesh), **batch("right")), (loss, grads))


TABLE = "transformer.wpe.weight"


def with_short_table(mesh):
    model = tiny.build_to_train("gpt2")
    table = model.get_parameter(TABLE).detach()[:43].clone()
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(table, freeze=False)
    return hf_longattn.prepare_training(model, device_mesh=mesh, block_size=5, loss_chunk_size=13)


def fixed_table():
    return torch.randn(97, 64, generator=torch.Generator().manual_seed(3))


@functools.cache
def expected_embeddings():
    table = torch.nn.Embedding.from_pretrained(fixed_table(), freeze=False)
    ids, labels = tiny.tokens(2, 43), tiny.tokens(2, 43)
    loss, grads = step(tiny.build_to_train("llama"), inputs_embeds=table(ids), labels=labels, use_cache=False)
    return loss, grads, table.weight.grad


def evaluation(rank, size, mesh):
    """Loss, logits and tokens outside training; the model is as it was when it is restored."""
    model = prepare("gemma2", mesh).eval()
    loss, logits, answer = expected_evaluation()
    with torch.no_grad():
        output = model(**batch("left"))
        assert output.logits is None
        assert tiny.relative_error(output.loss, loss) <= BOUND
        inputs = {name: value for name, value in batch("left").items() if name != "labels"}
        assert tiny.relative_error(real(model(**inputs).logits), real(logits)) <= 2e-5
        assert tiny.relative_error(model(**inputs, logits_to_keep=3).logits, logits[:, -3:]) <= 2e-5
    assert torch.equal(generate(model), answer)
    hf_longattn.restore(model)
    with torch.no_grad():
        assert tiny.relative_error(real(model(**inputs).logits), real(logits)) <= 2e-5


def real(logits):
    """Without the rows of padding tokens, which are up to the implementation."""
    return logits[batch("left")["attention_mask"].bool()]


def generate(model):
    inputs = {name: value for name, value in batch("left").items() if name != "labels"}
    return model.generate(**inputs, max_new_tokens=5, do_sample=False)


@functools.cache
def expected_evaluation():
    model = tiny.build_to_train("gemma2").eval()
    with torch.no_grad():
        output = model(**batch("left"), use_cache=False)
    return output.loss, output.logits, generate(model)


def dropout(rank, size, mesh):
    """The numbers of one process, where the slices are whole blocks."""
    for length in (6 * 4 * size, 43):
        torch.manual_seed(5)
        result = step(with_dropout(mesh), input_ids=tiny.tokens(2, length), labels=tiny.tokens(2, length))
        if length == 43:
            assert result[0].isfinite()
        else:
            assert_same(f"dropout-T{length}", result, expected_dropout(length))
    model = with_adapters(dropout=0.2)
    hf_longattn.prepare_training(model, device_mesh=mesh, block_size=5, loss_chunk_size=3)
    torch.manual_seed(5)
    for _ in range(2):
        # The head drops too, in other numbers of chunks: the second call would find ranks that ran apart.
        step(model, **batch("left"))
    model = with_dropout(mesh)
    torch.manual_seed(rank)
    with (
        contextlib.nullcontext() if size == 1 else pytest.raises(ValueError, match="`random state`.*set_seed")
    ):
        model(input_ids=tiny.tokens(2, 43))


def with_dropout(mesh=None):
    """GPT-2 that drops weights of attention and hidden states inside its layers."""
    model = tiny.build("gpt2").train()
    model.transformer.drop.p = 0.0
    return hf_longattn.prepare_training(model, device_mesh=mesh, block_size=6, loss_chunk_size=13)


@functools.cache
def expected_dropout(length):
    torch.manual_seed(5)
    return step(with_dropout(), input_ids=tiny.tokens(2, length), labels=tiny.tokens(2, length))


def refusals(rank, size, mesh):
    """Every rank raises, and names the field and the rank."""
    if size == 1:
        return
    model, last = prepare("llama", mesh), rank == size - 1
    odd = f"rank {size - 1} differs"
    cases = {
        "input_ids": {"input_ids": tiny.tokens(2, 43, seed=9)},
        "labels": {"labels": tiny.tokens(2, 43, seed=9)},
        "attention_mask": {"attention_mask": tiny.padding([43, 29], 43, "right")},
        "position_ids": {"position_ids": torch.arange(1, 44)[None]},
    }
    for name, changes in cases.items():
        with pytest.raises(ValueError, match=f"`{name}`: {odd} from rank 0 in one sequence.*same batch"):
            model(**{**batch("full"), **(changes if last else {})})
    with pytest.raises(ValueError, match=f"`labels`: {odd}"):
        model(input_ids=tiny.tokens(2, 43), labels=None if last else tiny.tokens(2, 43))
    with pytest.raises(ValueError, match="`output_hidden_states=True`"):
        model(**batch("full"), output_hidden_states=True)
    with pytest.raises(ValueError, match=r"`attention_mask` must be \(batch, tokens\)"):
        model(**{**batch("full"), "attention_mask": torch.ones(2, 1, 43, 43, dtype=torch.bool)})
    with pytest.raises(ValueError, match="`attention_mask` must cover 43 tokens"):
        model(**{**batch("full"), "attention_mask": torch.ones(2, 40, dtype=torch.long)})
    with pytest.raises(ValueError, match="`token_type_ids` of shape"):
        model(**batch("full"), token_type_ids=torch.zeros(2, 43, dtype=torch.long))
    odd_model = tiny.build_to_train("llama")
    odd_model.model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="uses extra outside its layers"):
        hf_longattn.prepare_training(odd_model, device_mesh=mesh)
    tensors = init_device_mesh("cpu", (1, size), mesh_dim_names=("cp", "tp"))
    assert_same("one in cp", step(prepare("llama", tensors), **batch("full")), expected("llama", "full"))
    if size == 4:
        with pytest.raises(ValueError, match="tensor parallelism does not go together"):
            prepare("llama", init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp")))


def wrapped(rank, size, mesh):
    """DDP, FSDP2, LoRA, checkpointing of the caller's, rotary waves that depend on the length, autocast."""
    full = expected("llama", "left")
    parallel = DistributedDataParallel(prepare("llama", mesh))
    with parallel.no_sync():
        (parallel(**batch("left")).loss / 2).backward()
    loss = parallel(**batch("left")).loss
    (loss / 2).backward()
    assert_same("ddp", (loss.detach(), gradients(parallel.module)), full)
    assert_same("fsdp", sharded_step(prepare("llama", mesh), mesh, batch("left")), full)
    for reentrant in (False, True):
        model = prepare("llama", mesh)
        for layer in model.model.layers:
            layer.forward = functools.partial(checkpointed, layer.forward, reentrant)
        assert_same(f"checkpoint-{reentrant}", step(model, **batch("left")), full)
    for kind in ("longrope", "dynamic"):
        model = hf_longattn.prepare_training(with_rope(kind), device_mesh=mesh, block_size=5)
        assert_same(kind, step(model, **batch("full")), expected_rope(kind))
    model = hf_longattn.prepare_training(with_adapters(), device_mesh=mesh, block_size=5)
    assert_same("lora", step(model, **batch("left")), expected_adapters())
    with torch.autocast("cpu", torch.bfloat16):
        result = step(prepare("llama", mesh), **batch("left"))
    error = errors(result)
    assert error <= 1.5 * expected_autocast_error(), f"under autocast gradients are off by {error}"


def checkpointed(forward, reentrant, hidden, **kwargs):
    return checkpoint(functools.partial(forward, **kwargs), hidden, use_reentrant=reentrant)


def expect_wrapped():
    expected_autocast_error()
    expected_adapters()
    for kind in ("longrope", "dynamic"):
        expected_rope(kind)


def errors(result):
    return tiny.relative_error(flat(result[1]), flat(expected("llama", "left")[1]))


@functools.cache
def expected_autocast_error():
    with torch.autocast("cpu", torch.bfloat16):
        result = step(tiny.build_to_train("llama"), **batch("left"), use_cache=False)
    return errors(result)


def sharded_step(model, mesh, inputs):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss, grads = step(model, **inputs)
    return loss, {name: grad.full_tensor() for name, grad in grads.items()}


def with_rope(kind):
    config = tiny.CONFIGS["llama"]()
    # 43 tokens are past the length from which the waves change, and the slices of most ranks are not.
    config.original_max_position_embeddings = config.max_position_embeddings = 40
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | {
        "original_max_position_embeddings": 40
    }
    config.rope_parameters |= factors if kind == "longrope" else {}
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


@functools.cache
def expected_rope(kind):
    return step(with_rope(kind), **batch("full"), use_cache=False)


def with_adapters(dropout=0.0):
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"]
    adapters = LoraConfig(r=4, target_modules=names, lora_dropout=dropout)
    model = get_peft_model(tiny.build_to_train("llama"), adapters)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def expected_adapters():
    return step(with_adapters(), **batch("left"), use_cache=False)


def groups(rank, size, mesh):
    """Two groups with batches of their own: DDP and FSDP average over them, and no group hears the other."""
    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    mine = LAYOUTS[both.get_local_rank("dp")]
    assert_same("plain", step(prepare("gemma2", both), **batch(mine)), expected("gemma2", mine))
    parallel = DistributedDataParallel(prepare("gemma2", both))
    result = step(parallel, **batch(mine))
    result = result[0], gradients(parallel.module)
    assert_same("ddp", result, (expected("gemma2", mine)[0], expected_mean()))
    result = sharded_step(prepare("gemma2", both), mesh, batch(mine))
    assert_same("fsdp", result, (expected("gemma2", mine)[0], expected_mean()))
    inner = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("cp_inter", "cp_intra"))
    assert_same("nodes", step(prepare("gemma2", inner), **batch("left")), expected("gemma2", "left"))


@functools.cache
def expected_mean():
    grads = [expected("gemma2", layout)[1] for layout in LAYOUTS[:2]]
    return {name: (grads[0][name] + grads[1][name]) / 2 for name in grads[0]}


# Name to what the ranks do and what is computed before they start.
TOPICS = {
    "families": (families, expect_families),
    "trajectory": (trajectory, expected_training),
    "options": (options, lambda: (expected("gemma2", "left"), expected_smoothing(), expected_inputs())),
    "embeddings": (embeddings, lambda: (expected_embeddings(), expected("gpt2", "right"))),
    "evaluation": (evaluation, expected_evaluation),
    "dropout": (dropout, lambda: [expected_dropout(24 * size) for size in SIZES]),
    "refusals": (refusals, lambda: expected("llama", "full")),
    "wrapped": (wrapped, expect_wrapped),
    "groups": (groups, lambda: (expected_mean(), expected("gemma2", "left"))),
}
SIZES = [int(size) for size in sys.argv[1].split(",")] if __name__ == "__main__" else []


def expect(names):
    for name in names:
        TOPICS[name][1]()


if __name__ == "__main__":
    ranks.run_topics({name: topic for name, (topic, _) in TOPICS.items()}, expect, mesh_of)
