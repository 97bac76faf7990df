"""The backward of a layer computes again what the forward computed, whatever happened in between."""

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call

import hf_longattn

BOUND = 5e-6
IDS = tiny.tokens(2, 43)
EVERY = pytest.mark.parametrize("keep_every", [1, 2])


def prepared(model, keep_every=1):
    return hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9, keep_every=keep_every)


def loss_of(model):
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat([found[name].flatten() for name in sorted(found)])


def with_dropout():
    model = tiny.build("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model.eval()


@EVERY
def test_the_mode_of_the_forward(keep_every):
    found = []
    for model in (with_dropout(), prepared(with_dropout(), keep_every)):
        loss = loss_of(model)
        model.train()
        loss.backward()
        assert all(module.training for module in model.modules())
        found.append(gradients(model))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


def adapted():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny.build_to_train("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    return model


def one_then_both(model):
    """Two adapters in one backward, the first of them alone in a part of it."""
    first = loss_of(model)
    model.base_model.set_adapter(["one", "two"])
    (2 * first + loss_of(model)).backward()


def scaled_later(model):
    loss = loss_of(model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 3.0)
    loss.backward()


@EVERY
@pytest.mark.parametrize("order", [one_then_both, scaled_later], ids=lambda order: order.__name__)
def test_the_adapters_of_the_forward(order, keep_every):
    found = []
    for model in (adapted(), prepared(adapted(), keep_every)):
        order(model)
        found.append(gradients(model))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


def test_the_adapter_that_is_active_stays_so():
    model = prepared(adapted())
    loss = loss_of(model)
    model.set_adapter("two")
    # As without us: frozen meanwhile, it takes no gradient.
    loss.backward()
    assert not any(p.grad is not None for p in model.parameters())
    assert {m.active_adapter[0] for m in model.modules() if hasattr(m, "lora_A")} == {"two"}
    assert all(p.requires_grad == (".two." in n) for n, p in model.named_parameters() if "lora" in n)


def test_adapters_that_were_merged_meanwhile_are_refused():
    model = prepared(adapted())
    loss = loss_of(model)
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="adapters.*merged"):
        loss.backward()


def test_a_hook_for_all_modules_that_is_gone_is_refused():
    model = prepared(tiny.build_to_train("llama"))
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 1.1 if isinstance(module, nn.Linear) else None
    )
    try:
        loss = loss_of(model)
    finally:
        hook.remove()
    with pytest.raises(ValueError, match="`every module` had a forward hook that is gone"):
        loss.backward()


def test_a_hook_that_is_new_is_refused():
    model = prepared(tiny.build_to_train("llama"))
    loss = loss_of(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="`mlp` has a new forward hook"):
        loss.backward()


def test_a_hook_on_a_whole_layer_may_go():
    found = []
    for model in (tiny.build_to_train("llama"), prepared(tiny.build_to_train("llama"))):
        kept = []
        hook = model.model.layers[1].register_forward_hook(
            lambda m, a, output, kept=kept: kept.append(output)
        )
        loss = loss_of(model) + kept[0].square().mean()
        hook.remove()
        loss.backward()
        found.append(gradients(model))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


def steered(inside):
    """A vector that is added inside a layer, and belongs to the layer or to the whole model."""
    model = tiny.build_to_train("llama")
    owner = model.model.layers[1].mlp if inside else model
    torch.manual_seed(2)
    owner.vector = nn.Parameter(torch.randn(64) / 10)
    model.model.layers[1].mlp.register_forward_hook(lambda m, args, output: output + owner.vector)
    return model


def test_a_tensor_of_others_inside_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer reads a tensor of shape \(64,\)"):
        loss_of(prepared(steered(inside=False))).backward()
    found = []
    for model in (steered(inside=True), prepared(steered(inside=True))):
        loss_of(model).backward()
        found.append(gradients(model))
    assert tiny.relative_error(found[1], found[0]) <= BOUND


def test_a_tensor_of_others_inside_the_head_is_refused():
    model, vector = prepared(tiny.build_to_train("llama")), torch.randn(97, requires_grad=True)
    model.lm_head.register_forward_hook(lambda module, args, output: output + vector)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM reads a tensor of shape \(97,\)"):
        loss_of(model)


def test_parameters_lent_for_one_call_are_refused():
    model = prepared(tiny.build_to_train("llama"))
    lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    call = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    loss = functional_call(model, lent, kwargs=call).loss
    with pytest.raises(ValueError, match="none of its parameters in the forward"):
        loss.backward()
    model.zero_grad()
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
