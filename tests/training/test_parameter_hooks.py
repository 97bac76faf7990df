"""Hooks on parameters see the gradient of a whole step, once; what a step does not use has none."""

import pytest
import tiny
import torch
from torch import nn

import hf_longattn

BOUND = 5e-6
IDS = tiny.tokens(2, 43)


def build(prepared, **fields):
    model = tiny.build_to_train("llama")
    if prepared:
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9, **fields)
    return model


def gradients(model):
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"keep_every": 2}, {"loss": "model"}], ids=str)
def test_a_hook_on_a_parameter_is_called_once_with_the_whole_gradient(fields):
    found = []
    for prepared in (False, True):
        model, calls = build(prepared, **(fields if prepared else {})), []
        for name, parameter in model.named_parameters():
            # The reversal of a gradient, done twice, is none.
            parameter.register_hook(lambda grad, name=name, calls=calls: calls.append(name) or -grad)
        found.append(gradients(model))
        assert sorted(calls) == sorted(found[0])
    for name, expected in found[0].items():
        assert tiny.relative_error(found[1][name], expected) <= BOUND, name


def test_hooks_on_parameters_beside_hooks_on_saved_tensors():
    found = []
    for prepared in (False, True):
        model = build(prepared)
        for parameter in model.parameters():
            parameter.register_hook(torch.neg)
        with torch.autograd.graph.save_on_cpu():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


def test_a_part_of_the_model_that_no_loss_uses_has_no_gradient():
    found = []
    for prepared in (False, True):
        model = build(prepared)
        model.critic = nn.Linear(64, 1)
        found.append(gradients(model))
    assert found[1].keys() == found[0].keys() and "critic.weight" not in found[0]


def test_without_a_token_that_counts_the_head_has_a_gradient_of_zeros():
    model = build(True)
    labels = torch.full_like(IDS, -100)
    model(input_ids=IDS, labels=labels, num_items_in_batch=7).loss.backward()
    assert model.lm_head.weight.grad.eq(0).all()
