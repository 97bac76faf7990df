"""Layers whose functions write over what they are given, as Liger's do, against functions that do not."""

import types

import pytest
import tiny
import torch
from host_blocks import keep_on_host
from torch import nn
from transformers.models.llama import modeling_llama

import hf_longattn
from hf_longattn.training.layer import _GradientSums

WIDTH, BLOCK = 64, 16
BOUND = 2e-6


def over(grad, result, in_place):
    """The result in the memory of the gradient, in another view of it where strides allow, or apart."""
    if not in_place:
        return result
    rows = grad.contiguous().view(-1, grad.shape[-1])
    # As a kernel writes: autograd is not told.
    rows.data.copy_(result.reshape(rows.shape))
    return rows.view(grad.shape)


class Normed(torch.autograd.Function):
    """An RMS norm."""

    @staticmethod
    def forward(ctx, states, weight, eps, in_place):
        scale = (states.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(states, weight, scale)
        ctx.in_place = in_place
        return weight * (states * scale)

    @staticmethod
    def backward(ctx, grad):
        states, weight, scale = ctx.saved_tensors
        unit, inner = states * scale, grad * weight
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        result = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
        return over(grad, result, ctx.in_place), grad_weight, None, None


class Gated(torch.autograd.Function):
    """silu(gate) up, whose gradients are written over gate and up."""

    @staticmethod
    def forward(ctx, gate, up, in_place):
        ctx.save_for_backward(gate, up)
        ctx.in_place = in_place
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        grads = grad * up * share * (1 + gate * (1 - share)), grad * gate * share
        return *(over(own, part, ctx.in_place) for own, part in zip((gate, up), grads, strict=True)), None


class Turned(torch.autograd.Function):
    """A rotary embedding that turns (B, H, T, K) heads in the memory of the (B, T, H, K) projection."""

    @staticmethod
    def forward(ctx, heads, cos, sin, in_place):
        ctx.save_for_backward(cos, sin)
        ctx.in_place = in_place
        return Turned.turn(heads, cos, sin, in_place)

    @staticmethod
    def turn(heads, cos, sin, in_place):
        result = heads * cos[:, None] + modeling_llama.rotate_half(heads) * sin[:, None]
        return over(heads.transpose(1, 2), result.transpose(1, 2), in_place).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Turned.turn(grad, cos, -sin, ctx.in_place), None, None, None


class Scaled(torch.autograd.Function):
    """Half of a sum; both summands get the same gradient."""

    @staticmethod
    def forward(ctx, states, others, in_place):
        ctx.in_place = in_place
        return (states + others) / 2

    @staticmethod
    def backward(ctx, grad):
        result = over(grad, grad / 2, ctx.in_place)
        return result, result, None


def norms(model, monkeypatch, in_place):
    for norm in (part for part in model.modules() if isinstance(part, modeling_llama.LlamaRMSNorm)):
        norm.forward = types.MethodType(
            lambda self, x: Normed.apply(x, self.weight, self.variance_epsilon, in_place), norm
        )


def gates(model, monkeypatch, in_place):
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(
            lambda self, x: self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x), in_place)),
            layer.mlp,
        )


def angles(model, monkeypatch, in_place):
    def turn(query, key, cos, sin, **options):
        return tuple(Turned.apply(heads, cos, sin, in_place) for heads in (query, key))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)


def change_layers(model, change):
    for layer in model.model.layers:
        layer.forward = types.MethodType(change, layer)


def ends(model, monkeypatch, in_place):
    own = modeling_llama.LlamaDecoderLayer.forward
    change_layers(
        model,
        lambda self, hidden_states, **kwargs: Scaled.apply(
            own(self, hidden_states, **kwargs), hidden_states, in_place
        ),
    )


def summands(model, monkeypatch, in_place):
    """A sum of such a function, which is the first to run and the last in a backward, and a product."""

    def forward(self, hidden_states, **kwargs):
        first = Scaled.apply(hidden_states, hidden_states, in_place)
        states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return first + self.mlp(self.post_attention_layernorm(hidden_states + states))

    change_layers(model, forward)


def everything(*arguments):
    for change in (norms, gates, angles, ends):
        change(*arguments)


PLACES = (norms, gates, angles, ends, summands, everything)


def build(change, monkeypatch, in_place, **fields):
    model = tiny.build_to_train("llama")
    change(model, monkeypatch, in_place)
    return hf_longattn.prepare_training(model, block_size=BLOCK, **fields) if in_place else model


def of_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def of_products(model, ids):
    states = model.model(input_ids=ids).last_hidden_state
    return (states * torch.linspace(-1, 1, states[0].numel()).view_as(states[:1])).sum()


def of_sums(model, ids):
    """Of sums over all tokens, whose gradient is one row of memory for them all."""
    return (model.model(input_ids=ids).last_hidden_state.sum(1) * torch.linspace(-1, 1, WIDTH)).sum()


def gradients(model, ids, value):
    model.zero_grad()
    value(model, ids).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("value", "rows", "kept"),
    [
        (of_loss, 1, "device"),
        (of_products, 2, "device"),
        (of_sums, 1, "device"),
        (of_products, 1, "host"),
        (of_sums, 2, "every second"),
    ],
)
@pytest.mark.parametrize("change", PLACES)
def test_gradients_are_those_of_functions_that_write_apart(change, value, rows, kept, monkeypatch):
    # The last block is one token.
    ids = tiny.tokens(rows, 2 * BLOCK + 1)
    expected = gradients(build(change, monkeypatch, False), ids, value)
    if kept == "host":
        keep_on_host(monkeypatch)
    model = build(change, monkeypatch, True, keep_every=2 if kept == "every second" else 1)
    assert tiny.relative_error(gradients(model, ids, value), expected) <= BOUND


@pytest.mark.parametrize("length", [BLOCK, 2 * BLOCK + 1])
def test_what_a_hook_saw_of_a_gradient_stays(length, monkeypatch):
    ids, seen = tiny.tokens(1, length), []
    for in_place in (False, True):
        model = build(ends, monkeypatch, in_place)
        model.model.layers[-1].register_forward_hook(
            lambda layer, args, output: output.register_hook(seen.append) and None
        )
        of_products(model, ids).backward()
    assert tiny.relative_error(seen[1], seen[0]) <= BOUND


def test_a_parameter_that_is_added_to_every_token(monkeypatch):
    """Its gradient of a block of one token is the memory of the block's own."""

    def shifted(model, monkeypatch, in_place):
        own = modeling_llama.LlamaDecoderLayer.forward
        for layer in model.model.layers:
            layer.shift = nn.Parameter(torch.linspace(-1, 1, WIDTH)[None, None])
        change_layers(
            model, lambda self, hidden_states, **kwargs: own(self, hidden_states, **kwargs) + self.shift
        )

    ids, found = tiny.tokens(1, 2 * BLOCK + 1), []
    for in_place in (False, True):
        model = build(shifted, monkeypatch, in_place)
        gradients(model, ids, of_products)
        found.append(torch.cat([layer.shift.grad.flatten() for layer in model.model.layers]))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_of_the_input_goes_over_that_of_the_output(rows, monkeypatch):
    results, seen = _GradientSums.results, []

    def spy(self):
        seen.append(self.room is not None and self.hidden is self.room)
        return results(self)

    monkeypatch.setattr(_GradientSums, "results", spy)
    gradients(build(everything, monkeypatch, True), tiny.tokens(rows, 2 * BLOCK + 1), of_loss)
    # The final norm and three layers.
    assert seen == [True] * 4
