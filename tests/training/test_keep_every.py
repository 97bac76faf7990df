"""Groups of layers of which the first keeps its input: the gradients of the plain model, and what is kept."""

import dataclasses
import functools
import logging
import types

import pytest
import tiny
import torch
from torch.utils.checkpoint import checkpoint

import hf_longattn
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.training import groups, node
from hf_longattn.training.offload import Layout, Offloader

BOUND = 2e-6
FAMILIES = ["llama", "gemma2", "gpt-oss", "gpt2"]


def batch():
    """Two rows of 43 and 29 tokens, no multiple of a block."""
    ids, mask = tiny.tokens(2, 43), tiny.padding([43, 29], 43, "left")
    labels = torch.where(mask.bool() & mask.roll(1, 1).bool(), ids, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model, **inputs):
    """(loss, gradients) of one backward."""
    model.zero_grad()
    loss = model(**(inputs or batch()), use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(result, expected):
    assert tiny.relative_error(result[0], expected[0]) <= BOUND
    assert result[1].keys() == expected[1].keys() and expected[1]
    whole = [torch.cat([found[1][name].flatten() for name in expected[1]]) for found in (result, expected)]
    assert tiny.relative_error(*whole) <= BOUND


@functools.cache
def expected_of(family):
    return step(tiny.build_to_train(family))


@pytest.fixture
def forwards(monkeypatch):
    """Calls of layers, forward."""
    calls, forward = [], node.run_forward

    def count(run, *args):
        if run.attention is not None:
            calls.append(run)
        return forward(run, *args)

    monkeypatch.setattr(node, "run_forward", count)
    return calls


# Three layers: a short last group, one group, a group that is not full.
@pytest.mark.parametrize(("every", "again"), [(2, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_plain_model(family, every, again, forwards):
    model = hf_longattn.prepare_training(tiny.build_to_train(family), block_size=16, keep_every=every)
    assert_same(step(model), expected_of(family))
    assert len(forwards) == 3 + again


def test_lightning_layers():
    model = tiny.build_lightning("hybrid").train()
    ids = tiny.tokens(2, 43)
    expected = step(model, input_ids=ids, labels=ids)
    hf_longattn.prepare_training(model, block_size=16, keep_every=3, save_attention=False)
    assert_same(step(model, input_ids=ids, labels=ids), expected)


def test_dropout_draws_the_same_numbers_again():
    results = []
    for every in (1, 3):
        model = tiny.build("gpt2").train()
        hf_longattn.prepare_training(model, block_size=16, keep_every=every)
        torch.manual_seed(5)
        results.append(step(model))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_frozen_layers(forwards):
    models = [
        tiny.build_to_train("llama"),
        hf_longattn.prepare_training(tiny.build_to_train("llama"), block_size=16, keep_every=3),
    ]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1.mlp" in name or "layers.2.self_attn.q" in name)
    expected, result = (step(model) for model in models)
    assert_same(result, expected)
    # The first layer has no gradient and is in no group.
    assert len(forwards) == 4


def test_lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    results = []
    for every in (None, 2):
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny.build_to_train("llama"), config)
        if every is not None:
            hf_longattn.prepare_training(model, block_size=16, keep_every=every)
        results.append(step(model))
    assert_same(results[1], results[0])


def test_what_changes_between_layers_is_kept(forwards):
    """Layers after which the model, or a hook, puts other hidden states, in place or not."""
    for change in (lambda output: output * 2, lambda output: output.mul_(2), in_secret):
        models = [tiny.build_to_train("llama"), tiny.build_to_train("llama")]
        hf_longattn.prepare_training(models[1], block_size=16, keep_every=3)
        results = []
        for model in models:
            hook = model.model.layers[0].register_forward_hook(lambda *args, change=change: change(args[2]))
            forwards.clear()
            results.append(step(model))
            hook.remove()
        assert_same(*reversed(results))
        # The first layer is alone; the third one finds its input by the second.
        assert len(forwards) == 4


def in_secret(output):
    with torch.no_grad():
        return output.mul_(2)


def test_backward_twice_and_from_the_middle():
    models = [tiny.build_to_train("llama"), tiny.build_to_train("llama")]
    hf_longattn.prepare_training(models[1], block_size=16, keep_every=3)
    found = []
    for model in models:
        states = model.model(tiny.tokens(2, 43), output_hidden_states=True, use_cache=False).hidden_states
        weights = torch.randn(states[0].shape, generator=torch.Generator().manual_seed(2))
        for state in (states[2], states[3], states[3], states[1]):
            (state * weights).sum().backward(retain_graph=True)
        found.append((torch.zeros(1) + 1, gradients(model)))
    assert_same(found[1], found[0])


def test_in_a_checkpoint_of_the_callers_every_layer_keeps_its_input(forwards, caplog):
    log_once.cache_clear()
    model = hf_longattn.prepare_training(tiny.build_to_train("llama"), block_size=16, keep_every=3)
    hidden = torch.randn(2, 43, 64, requires_grad=True)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(43)[None])

    def call(hidden):
        for layer in model.model.layers:
            hidden = layer(hidden, position_embeddings=cos_sin)
        return hidden

    expected = torch.autograd.grad(call(hidden).sum(), [hidden, *model.model.layers.parameters()])
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        output = checkpoint(call, hidden, use_reentrant=False)
    found = torch.autograd.grad(output.sum(), [hidden, *model.model.layers.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert "`keep_every=3`" in caplog.text


def test_sums():
    # Eight layers, an input of 10 bytes, attention of 3.
    assert sum(groups.waiting(8, 1, 10, [3])) == 8 * 13
    assert sum(groups.waiting(8, 3, 10, [3])) == max(3 * 13 + 10, 2 * 13 + 13 + 10)
    assert sum(groups.waiting(8, 8, 10, [3])) == 13 + 6 * 13 + 10
    assert sum(groups.waiting(9, 3, 10, [])) == 50


@pytest.mark.parametrize(("room", "every"), [(80, 1), (79, 2), (50, 2), (49, 3), (5, 3)])
def test_the_fewest_that_find_room(room, every):
    # 80, 50 and 40 bytes: eight layers, five inputs at a time, four.
    sizes = lambda number: groups.waiting(8, number, 10, [])  # noqa: E731
    assert [sum(sizes(number)) for number in (1, 2, 3)] == [80, 50, 40]
    assert groups.pick_every(8, sizes, lambda found: sum(found) <= room) == every


def groups_of(every, offload, free):
    """Groups of eight layers without attention, and the layout of an input of 640 bytes on a GPU."""
    offloader = Offloader(offload, lambda size: 100)
    offloader.free = lambda device: free
    layout = Layout((2, 40, 8), torch.int8, torch.device("cuda"), [slice(0, 40)])
    return groups.Groups(every, 8, (), offloader), layout


# 8, 5 and 4 inputs of 640 bytes; the computation needs 100.
@pytest.mark.parametrize(
    ("offload", "free", "host", "every"),
    [
        (True, 0, 5120, 1), (True, 9999, 5119, 2), (True, 0, 3199, 3), ("auto", 740, 4480, 1),
        ("auto", 739, 4480, 2), ("auto", 740, 2560, 2), (False, 5220, 0, 1), (False, 5219, 9999, 2),
    ],
)  # fmt: skip
def test_auto_counts_what_is_free(monkeypatch, offload, free, host, every):
    monkeypatch.setattr(groups, "host_memory", lambda device: 2 * host)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found, layout = groups_of("auto", offload, free)
    assert found.pick(layout, torch.nn.Linear(2, 2), None) == every
    # Ranks of one sequence take the largest that any of them needs.
    share = types.SimpleNamespace(
        group=types.SimpleNamespace(gather=lambda own: torch.cat([own * 0 + 3, own]))
    )
    monkeypatch.setattr(
        torch, "tensor", functools.partial(lambda make, data, device: make(data), torch.tensor)
    )
    assert found.pick(layout, torch.nn.Linear(2, 2), share) == 3


def test_auto_is_one_where_ranks_could_differ_or_nothing_is_known():
    found, layout = groups_of("auto", False, 0)
    layer = torch.nn.Linear(2, 2)
    layer.weight.ds_id = 1
    assert found.pick(layout, layer, None) == 1
    layout = dataclasses.replace(layout, device=torch.device("cpu"))
    assert found.pick(layout, torch.nn.Linear(2, 2), None) == 1


@pytest.mark.parametrize("value", [0, -1, "all", 1.5, True])
def test_the_number_is_checked(value):
    with pytest.raises(ValueError, match="`keep_every`"):
        hf_longattn.TrainingSetup(keep_every=value)


@pytest.mark.parametrize(("mark", "words"), [("ds_id", "ZeRO stage 3"), ("_fsdp_flattened", "FullySharded")])
def test_parameters_that_are_gone_are_refused(mark, words):
    model = hf_longattn.prepare_training(tiny.build_to_train("llama"), block_size=16, keep_every=2)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            setattr(parameter, mark, True)
            parameter.ds_z3_leaf_module = layer
    with pytest.raises(ValueError, match=f"`keep_every=2`.*{words}.*`keep_every=1`"):
        model(**batch())
    hf_longattn.prepare_training(model, block_size=16)
    assert_same(step(model), expected_of("llama"))
