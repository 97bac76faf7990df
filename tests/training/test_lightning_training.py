"""Prepared lightning models against the same models unprepared: loss and every gradient."""

import functools
from pathlib import Path

import preloaded
import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.training import layer
from hf_longattn.training.layer import _fill as fill
from hf_longattn.training.states import BlockRows, BlockStates

# fp32 sums in another order; the loss and the gradients of a whole model, relative.
BOUND = 2e-6
# MiniMax's plain gradients are 1.3e-6 from those of fp64; within 1.5 times that is within 2.5 times of them.
BOUNDS = {"minimax": 2.5 * 1.3e-6}
KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
MODELS = ("model", "hybrid", "flag", "flag-hybrid", "neox-flag", "minimax")


def build(name):
    """A tiny model of the kind, in training mode."""
    return tiny.build_lightning(name).train()


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


def assert_same(name, result, expected):
    bound = BOUNDS.get(name, BOUND)
    assert tiny.relative_error(result[0], expected[0]) <= bound
    assert result[1].keys() == expected[1].keys() and expected[1]
    assert tiny.relative_error(flat(result[1]), flat(expected[1])) <= bound


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["full", "left", "right", "packed"])
def test_loss_and_gradients_equal_the_plain_model(name, layout):
    model = hf_longattn.prepare_training(build(name), block_size=16, loss_chunk_size=13)
    assert_same(name, step(model, **batch(layout)), plain(name, layout))


@pytest.mark.parametrize("name", ["hybrid", "flag", "minimax"])
@pytest.mark.parametrize("block_size", [5, 42, 43])
def test_the_block_size_changes_nothing(name, block_size):
    model = hf_longattn.prepare_training(build(name), block_size=block_size, save_attention=False)
    assert_same(name, step(model, **batch("left")), plain(name, "left"))


@pytest.mark.parametrize("name", ["flag-hybrid", "neox-flag"])
def test_cumulative_lengths_keep_documents_apart(name):
    bounds = torch.tensor([0, 20, 21, 43], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 22, "max_length_k": 22}
    model = hf_longattn.prepare_training(build(name), block_size=16)
    assert_same(name, step(model, **batch("packed"), **lengths), plain(name, "packed"))


@pytest.mark.parametrize("name", ["model", "flag-hybrid", "minimax"])
def test_restore_gives_back_what_was_there(name):
    model = build(name)
    before = [set(vars(module)) for module in model.modules()]
    hf_longattn.restore(hf_longattn.prepare_training(model))
    assert [set(vars(module)) for module in model.modules()] == before
    result = step(model, **batch("full"), use_cache=False)
    assert all(torch.equal(grad, plain(name, "full")[1][key]) for key, grad in result[1].items())


@pytest.mark.parametrize("name", ["model", "minimax"])
def test_a_model_prepared_for_both_generates_while_it_trains(name):
    model, ids = hf_longattn.prepare_generation(build(name).eval()), tiny.tokens(2, 12)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    hf_longattn.prepare_training(model, block_size=8)
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(result, expected)
    assert_same(name, step(model.train(), **batch("full")), plain(name, "full"))


def test_windows_beside_lightning_attention_are_refused():
    config = tiny.CONFIGS["mistral-window"]()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="lightning_attention")
    hf_longattn.prepare_training(model.train(), block_size=16)
    with pytest.raises(ValueError, match="`sliding_window`"):
        model(**batch("full"))


SLOW = [pytest.param(n, ("models", "trajectory"), marks=pytest.mark.slow) for n in ("1", "3", "4")]


@pytest.mark.parametrize(("size", "topics"), [("2", ("models",)), *SLOW])
def test_a_sequence_over_several_processes(size, topics):
    cases = Path(__file__).parent / "lightning_sequence_cases.py"
    preloaded.run(cases, size, *topics)


@pytest.mark.parametrize("prepare", [hf_longattn.prepare_training, hf_longattn.prepare_generation])
def test_positions_that_are_written_over_are_looked_at_again(prepare):
    model = prepare(build("minimax").eval())
    positions = torch.arange(40)[None]
    call = {"input_ids": tiny.tokens(1, 40, seed=9), "use_cache": False}
    whole = model(**call, position_ids=positions).logits
    positions[:, 15:] -= 15
    packed = model(**call, position_ids=positions).logits
    torch.testing.assert_close(packed, model(**call, position_ids=positions.clone()).logits, rtol=0, atol=0)
    assert (packed[:, 15:] - whole[:, 15:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["hybrid", "flag", "minimax"])
@pytest.mark.parametrize("keep_every", [1, 2])
def test_states_of_the_forward_spare_the_backward_their_computation(monkeypatch, name, keep_every):
    """The same bits as with states that are computed again, twice through one graph, on all layouts."""
    fills = []
    monkeypatch.setattr(layer, "_fill", lambda run, *rest: (fills.append(run), fill(run, *rest)))
    model = hf_longattn.prepare_training(build(name), block_size=16, keep_every=keep_every)
    has_state = {True: 0, False: 0}
    for layout in ("full", "left", "packed"):
        found = {}
        for share in (1e-9, 1e9):
            monkeypatch.setattr(layer, "_STATE_SHARE", share)
            fills.clear()
            model.zero_grad()
            loss = model(**batch(layout)).loss
            loss.backward(retain_graph=keep_every == 1)
            has_state[share < 1] = len(fills)
            once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            if keep_every == 1:
                loss.backward()
                assert all(torch.equal(p.grad, 2 * once[n]) for n, p in model.named_parameters() if n in once)
            found[share] = loss.detach(), once
        # Softmax layers of the model, and the last of a group, whose forward does not run again.
        assert has_state[True] < has_state[False]
        (loss, kept), (again, filled) = found.values()
        assert torch.equal(loss, again) and kept.keys() == filled.keys()
        assert all(torch.equal(kept[n], filled[n]) for n in kept)


def test_states_are_kept_where_they_are_little_beside_the_input():
    states = BlockStates(BlockRows([], [], [[0, 1, 2]]), "past_key_values")
    states.states = {2: torch.full((1, 2, 4, 4), 2.0), 1: torch.ones(1, 2, 4, 4)}
    assert states.kept(2 * 32 * 4 - 1) is None
    kept = states.kept(2 * 32 * 4)
    assert kept is not None and kept.shape == (2, 1, 2, 4, 4) and kept[:, 0, 0, 0, 0].tolist() == [1, 2]
    again = BlockStates(states.block_rows, "past_key_values")
    again.put_back(kept)
    assert again.states.keys() == {1, 2} and all(
        torch.equal(again.states[i], states.states[i]) for i in (1, 2)
    )
