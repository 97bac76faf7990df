"""Feed-forward layers of one activation in a captured step: one launch less, where the clock says so."""

import pytest
import tiny
import torch
from torch import nn

from hf_longattn.fusion import fused
from hf_longattn.generation import linear


def products(ours):
    """Products whose clock says that ours are always, or never, the faster ones."""
    clocked = []

    def clock(calls):
        clocked.append(len(calls))
        for call in calls:
            call()
        return -float(len(clocked)) if ours else float(len(clocked))

    return linear.Products(clock)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
@torch.no_grad()
def test_the_activation_of_gpt_neox_is_taken_with_the_product(ours, monkeypatch):
    model, states = tiny.build("gpt-neox", dtype=torch.bfloat16), torch.randn(2, 1, 64, dtype=torch.bfloat16)
    layer, calls, real = model.gpt_neox.layers[0].mlp, [], linear.few_row_linear

    def spy(*args, **options):
        calls.append(options.get("activation"))
        return real(*args, **options)

    expected = layer(states)
    monkeypatch.setattr(linear, "few_row_linear", spy)
    with fused(model, 2, products(ours)):
        calls.clear()
        assert torch.equal(layer(states), expected)
    assert calls == (["gelu", None] if ours else [])
    assert not any("forward" in vars(module) for module in layer.modules())


@pytest.mark.parametrize("change", ["activation", "part", "forward", "dtype"])
@torch.no_grad()
def test_layers_of_another_kind_are_left_alone(change):
    model = tiny.build("gpt-neox", dtype=torch.float32 if change == "dtype" else torch.bfloat16)
    layers = [each.mlp for each in model.gpt_neox.layers]
    for layer in layers:
        if change == "activation":
            layer.act = nn.GELU(approximate="tanh")
        elif change == "part":
            layer.dense_h_to_4h = nn.Sequential(layer.dense_h_to_4h)
        elif change == "forward":
            layer.forward = layer.forward
    before = [vars(layer).get("forward") for layer in layers]
    with fused(model, 2, products(True)):
        assert [vars(layer).get("forward") for layer in layers] == before
