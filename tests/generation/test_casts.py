"""The weights of steps that are captured under autocast: cast once, and again where they have changed."""

import weakref

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.generation import casts, graph
from hf_longattn.generation.casts import WeightCasts
from hf_longattn.generation.graph import GraphDecoder

BF16 = torch.bfloat16


class Seen(TorchDispatchMode):
    """The weights that are cast inside, and all operands."""

    def __init__(self):
        super().__init__()
        self.weights, self.operands = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.weights.append(args[0])
        self.operands |= {each.data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        return func(*args, **(kwargs or {}))


class Captured:
    """Stands in for a graph, which replays nothing."""

    def replay(self):
        pass


@pytest.fixture
def seen(monkeypatch):
    """Captures on a CPU; what each captured step did."""
    found = []

    def capture(rehearse, step):
        rehearse()
        found.append(Seen())
        with found[-1]:
            return Captured(), step()

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "_GRAPH_DEVICES", ("cpu",))
    return found


def products(model):
    return [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]


def fill(model, tokens=8):
    cache = LongContextCache(model.config, 64)
    model(input_ids=tiny.tokens(1, tokens), past_key_values=cache)
    return cache


def capture_step(decoder, cache):
    call = {"input_ids": tiny.tokens(1, 9)[:, 8:], "past_key_values": cache}
    return decoder._capture(call, cache, graph.CacheGraphs(), 1)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trains", [True, False], ids=["trains", "frozen"])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "unkept"])
def test_a_captured_step_reads_casts_that_live_as_long_as_it_does(seen, family, trains, keeps):
    model = tiny.build(family, "tree_attention").requires_grad_(trains)
    decoder = GraphDecoder(model, model.forward)
    with torch.no_grad(), torch.autocast("cpu", BF16, cache_enabled=keeps):
        expected = model(input_ids=tiny.tokens(1, 9)[:, 8:], past_key_values=fill(model)).logits
        step = capture_step(decoder, fill(model))
        assert torch.is_autocast_cache_enabled() == keeps
        assert torch.equal(step.tensors["logits"], expected)
        # Those that autocast keeps are not made once more.
        with casts._Operand() as operand:
            torch.nn.functional.linear(torch.ones(1, model.lm_head.in_features), model.lm_head.weight)
        shared = operand.found.data_ptr() == step.casts.kept[id(model.lm_head.weight)].cast.data_ptr()
        assert shared == (trains and keeps)
    assert not seen[0].weights
    kept = {key: kept.cast for key, kept in step.casts.kept.items()}
    assert all(torch.equal(kept[id(weight)], weight.to(BF16)) for weight in products(model))
    assert {cast.data_ptr() for cast in kept.values()} <= seen[0].operands


def test_without_autocast_nothing_is_kept(seen):
    model = tiny.build("llama")
    with torch.no_grad():
        step = capture_step(GraphDecoder(model, model.forward), fill(model))
    assert step.casts is None and not seen[0].weights


def test_caches_share_casts_until_a_weight_changes(seen):
    model = tiny.build("llama")
    decoder, weight = GraphDecoder(model, model.forward), model.lm_head.weight
    with torch.no_grad(), torch.autocast("cpu", BF16):
        first, second = (capture_step(decoder, fill(model)) for _ in range(2))
        assert first.casts is second.casts and first.casts.hold()
        # Not seen before the next capture, which compares numbers.
        weight.data.mul_(2)
        third = capture_step(decoder, fill(model))
        assert first.casts.hold() and third.casts is not first.casts
        assert torch.equal(third.casts.kept[id(weight)].cast, weight.to(BF16))
        weight.mul_(2)
        assert not third.casts.hold()
    alive = weakref.ref(third.casts)
    del third
    assert alive() is None and not list(decoder.casts.values())


def test_a_step_is_captured_anew_once_a_weight_changes(seen):
    model = hf_longattn.prepare_generation(tiny.build("llama"))
    found = []
    with torch.no_grad(), torch.autocast("cpu", BF16):
        cache = fill(model)
    for place in range(4):
        # Each ends before the next begins, and takes what autocast keeps with it.
        with torch.no_grad(), torch.autocast("cpu", BF16):
            model(input_ids=tiny.tokens(1, 1), past_key_values=cache)
        found.append(len(seen))
        if place == 1:
            with torch.no_grad():
                model.model.norm.weight.mul_(2), model.lm_head.weight.mul_(2)
    assert found == [1, 1, 2, 2]


def test_without_room_for_casts_each_step_makes_its_own(seen, monkeypatch, caplog):
    def full(weight, dtype):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(casts, "_cast_of", full)
    model = tiny.build("llama")
    with torch.no_grad(), torch.autocast("cpu", BF16):
        step = capture_step(GraphDecoder(model, model.forward), fill(model))
    assert {id(weight) for weight in products(model)} <= {id(weight) for weight in seen[0].weights}
    assert not step.casts.kept and "each step casts them" in caplog.text


def test_weights_of_inference_mode_are_left_to_the_step():
    with torch.inference_mode():
        weight = torch.nn.Parameter(torch.ones(2, 3))
        made, expected = WeightCasts(BF16), weight.to(BF16)
        work = made.rehearsing(lambda: weight.to(BF16))
        work()
        assert not made.kept and torch.equal(made.reading(lambda: weight.to(BF16))(), expected)


def test_parts_that_are_compiled_stay_so():
    part, states, compiled = torch.nn.Linear(4, 4), torch.randn(2, 4), []

    def backend(module, inputs):
        compiled.append(module)
        return module

    run = torch.compile(part, backend=backend)
    made = WeightCasts(BF16)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        made.rehearsing(lambda: run(states))()
        assert torch.equal(made.reading(lambda: run(states))(), part(states))
    assert len(compiled) == 1
    torch._dynamo.reset()
