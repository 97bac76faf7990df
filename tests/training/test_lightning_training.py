"""Prepared lightning models against the same models unprepared: loss and every gradient."""

import functools

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn import LightningConfig, LightningForCausalLM

# fp32 sums in another order; the loss and the gradients of a whole model, relative.
BOUND = 2e-6
KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
MODELS = ("model", "hybrid", "flag", "flag-hybrid", "neox-flag", "minimax")


def build(name):
    """A tiny model of the kind, in training mode."""
    if "flag" in name:
        family = "gpt-neox" if name == "neox-flag" else "llama"
        config = tiny.CONFIGS[family](lightning_layers=[0, 2] if name == "flag-hybrid" else None)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="lightning_attention")
    elif name == "minimax":
        config = tf.MiniMaxConfig(
            vocab_size=97, hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=12, layer_types=KINDS, num_local_experts=2,
            num_experts_per_tok=2, block_size=16, max_position_embeddings=512, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        model = tf.MiniMaxForCausalLM(config)
    else:
        config = LightningConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            lightning_layers=[1, 2] if name == "hybrid" else None, eos_token_id=None,
        )  # fmt: skip
        model = LightningForCausalLM(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[1] > 1:
                parameter.normal_(0, 0.15)
    return model.train()


def step(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def flat(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def batch(layout):
    """Inputs of 43 tokens a row (no multiple of a block) in one of the layouts."""
    ids = tiny.tokens(2, 43)
    if layout == "packed":
        positions = torch.cat([torch.arange(n) for n in (20, 1, 22)])[None]
        labels = ids[:1].masked_fill(positions == 0, -100)
        return {"input_ids": ids[:1], "labels": labels, "position_ids": positions}
    lengths = [43, 43] if layout == "full" else [43, 29]
    mask = tiny.padding(lengths, 43, "left" if layout == "left" else "right")
    labels = torch.where(mask.bool() & mask.roll(1, 1).bool(), ids, -100)
    return {"input_ids": ids, "labels": labels} | ({} if layout == "full" else {"attention_mask": mask})


@functools.cache
def plain(name, layout):
    model = build(name)
    if name == "minimax":
        if layout == "packed":
            # The model's own layers let documents leak: each by itself, the losses weighed by their labels.
            return packed_apart(model)
        if layout == "left":
            # Positions of its rows count from the first column.
            return step(model, **batch(layout), use_cache=False)
    if layout == "packed" and name == "hybrid":
        model.set_attn_implementation("tree_attention")
    return step(model, **batch(layout), use_cache=False)


def packed_apart(model):
    inputs, total, losses = batch("packed"), 0, 0.0
    bounds = [0, 20, 21, 43]
    for begin, stop in zip(bounds, bounds[1:], strict=False):
        labels = inputs["labels"][:, begin:stop]
        if count := int((labels[:, 1:] != -100).sum()):
            loss = model(input_ids=inputs["input_ids"][:, begin:stop], labels=labels, use_cache=False).loss
            losses, total = losses + loss * count, total + count
    (losses / total).backward()
    return (losses / total).detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(result, expected, bound=BOUND):
    assert tiny.relative_error(result[0], expected[0]) <= bound
    assert result[1].keys() == expected[1].keys() and expected[1]
    assert tiny.relative_error(flat(result[1]), flat(expected[1])) <= bound


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["full", "left", "right", "packed"])
def test_loss_and_gradients_equal_the_plain_model(name, layout):
    model = hf_longattn.prepare_training(build(name), block_size=16, loss_chunk_size=13)
    assert_same(step(model, **batch(layout)), plain(name, layout))
