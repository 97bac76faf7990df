"""Products that a backward never reads: which are left out, and that nobody can tell."""

import gc
import weakref

import pytest
import tiny
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hf_longattn
from hf_longattn.training import unread

WIDTH = 24


class Double(torch.autograd.Function):
    """Looks at numbers where no graph is recorded."""

    @staticmethod
    def forward(ctx, states):
        return 2 * states

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Layer(nn.Module):
    """A feed-forward layer that does something with its product."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, states):
        product = self.down(self.up(states).tanh())
        return getattr(self, self.way)(states, product)

    def summed(self, states, product):
        return states + nn.functional.dropout(product, 0.0, True)

    def summed_twice(self, states, product):
        assert product.shape == states.shape and product.size(-1) == WIDTH and product.ndim == 3
        return product + (states * self.weight + product.add(states))

    def scaled(self, states, product):
        return states + self.weight * product

    def read_by_a_sum(self, states, product):
        total = states + product
        return total + total.tanh()

    def read_apart_from_the_graph(self, states, product):
        return states + product + self.weight * product.detach()

    def read_by_a_function(self, states, product):
        return states + product + Double.apply(states + product)

    def read_without_graph(self, states, product):
        with torch.no_grad():
            size = product.norm()
        return states + product + self.weight * size

    def added_in_place(self, states, product):
        total = states * 1
        total += product
        return total

    def changed_in_place(self, states, product):
        total = states + product
        product *= 2
        return total

    def changed_beside_it(self, states, product):
        copy = states * 1
        total = copy + product
        copy *= 2
        return total

    def spread(self, states, product):
        return states[:, :1] + product + self.weight

    def dropped(self, states, product):
        return states * self.weight


WAYS = {name for name in vars(Layer) if not name.startswith("_")} - {"forward"}
LEFT_OUT = {"summed"}


def gradients(layer, terms):
    torch.manual_seed(2)
    states = torch.randn(2, 7, WIDTH).requires_grad_()
    grad = torch.randn(2, 7, WIDTH)
    found = terms(lambda: layer(states))
    wanted = [states, *(part for part in layer.parameters() if part.requires_grad)]
    return torch.autograd.grad(found, wanted, [grad] * len(found), allow_unused=True)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_gradients_are_those_of_the_layer(way, monkeypatch):
    torch.manual_seed(1)
    layer, made = Layer(way), []
    node = unread._node
    monkeypatch.setattr(unread, "_node", lambda promise: (made.append(promise), node(promise))[1])
    expected = gradients(layer, lambda run: [run()])
    products = unread.UnreadProducts(layer)
    for _ in range(3):
        for result, exact in zip(gradients(layer, products.terms), expected, strict=True):
            assert (result is None) == (exact is None)
            assert exact is None or tiny.relative_error(result, exact) <= 2e-6
        assert "forward" not in vars(layer.down)
    # The first run shows which they are.
    assert len(made) == (2 if way in LEFT_OUT else 0)


@pytest.mark.parametrize(
    "change", ["hook", "hook of a part", "forward", "subclass", "frozen", "autocast", "weight"]
)
def test_layers_that_are_more_than_a_product_are_called(change):
    torch.manual_seed(1)
    layer, calls = Layer("summed"), []
    products = unread.UnreadProducts(layer)
    gradients(layer, products.terms)
    if change == "hook":
        layer.down.register_forward_hook(lambda *args: calls.append(1))
    elif change == "hook of a part":
        layer.up.register_full_backward_hook(lambda *args: calls.append(1))
    elif change == "forward":
        own = layer.down.forward
        layer.down.forward = lambda states: (calls.append(1), own(states))[1]
    elif change == "subclass":
        layer.down = type("Other", (nn.Linear,), {})(40, WIDTH)
    elif change == "weight":
        # As PEFT does for one call, so that the weight is another afterwards.
        class Doubled(nn.Module):
            def forward(self, weight):
                return 2 * weight

        def doubled(states, product):
            parametrize.register_parametrization(layer.down, "weight", Doubled())
            product = layer.down(layer.up(states).tanh())
            parametrize.remove_parametrizations(layer.down, "weight", leave_parametrized=False)
            return states + product

        layer.summed = doubled
    elif change == "frozen":
        layer.down.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        expected = gradients(layer, lambda run: [run()])
        count = len(calls)
        result = gradients(layer, products.terms)
    assert len(calls) == 2 * count
    for ours, exact in zip(result, expected, strict=True):
        assert (ours is None) == (exact is None)
        assert exact is None or tiny.relative_error(ours, exact) <= 2e-6


def used_to(layer, products):
    """The layer, of which products have been left out."""
    for _ in range(2):
        gradients(layer, products.terms)
    return layer


def test_products_that_checkpointing_begins_to_save_are_computed():
    torch.manual_seed(1)
    layer = Layer("summed")
    products = unread.UnreadProducts(layer)
    used_to(layer, products)
    layer.summed = lambda states, product: states + checkpoint(torch.sin, product, use_reentrant=False)
    expected = gradients(layer, lambda run: [run()])
    for result, exact in zip(gradients(layer, products.terms), expected, strict=True):
        assert exact is None or tiny.relative_error(result, exact) <= 2e-6


def test_what_a_layer_put_aside_can_be_read_without_a_graph():
    torch.manual_seed(1)
    layer, aside = Layer("summed"), []
    layer.summed = lambda states, product: (aside.append(product), states + product)[1]
    used_to(layer, unread.UnreadProducts(layer))
    with torch.no_grad():
        assert type(aside[-1]) is not torch.Tensor
        assert torch.equal(aside[-1] * 1, aside[0])


def test_modules_that_were_replaced_are_not_held():
    torch.manual_seed(1)
    layer = Layer("summed")
    products = unread.UnreadProducts(layer)
    old = weakref.ref(used_to(layer, products).down)
    layer.down = nn.Linear(40, WIDTH)
    gradients(layer, products.terms)
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("way", ["part", "wrapper"])
def test_compiled_parts_are_compiled_once(way):
    torch.manual_seed(1)
    layer, graphs = Layer("summed"), []
    layer.mlp = Layer("scaled")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    layer.summed = lambda states, product: states + layer.mlp(states)
    if way == "part":
        layer.mlp.compile(backend=backend)
    else:
        layer.mlp = torch.compile(layer.mlp, backend=backend)
    products = unread.UnreadProducts(layer)
    try:
        for _ in range(4):
            gradients(layer, products.terms)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_layers_of_one_block_train():
    ids, results = tiny.tokens(2, 33), []
    for compiled in (False, True):
        model = hf_longattn.prepare_training(tiny.build_to_train("llama"), block_size=64)
        if compiled:
            model.model.layers[1].compile(backend="eager")
        try:
            # With other lengths, sizes are symbols.
            for length in (33, 29):
                model.zero_grad()
                model(input_ids=ids[:, :length], labels=ids[:, :length]).loss.backward()
        finally:
            torch._dynamo.reset()
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, found in zip(*results, strict=True):
        assert tiny.relative_error(found, plain) <= 1e-5


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += func.overloadpacket.__name__ in ("mm", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "left_out"), [("llama", 1), ("gpt-neox", 2), ("gemma2", 0)])
def test_second_runs_of_a_model_leave_products_out(family, left_out, monkeypatch):
    counts, ids = [], tiny.tokens(1, 33)
    for plain in (True, False):
        model = hf_longattn.prepare_training(tiny.build_to_train(family), block_size=64)
        if plain:
            monkeypatch.setattr(unread.UnreadProducts, "terms", lambda self, run: [run()])
        else:
            monkeypatch.undo()
        for _ in range(2):
            with Products() as mode:
                model(input_ids=ids, labels=ids).loss.backward()
        counts.append(mode.found)
    assert counts[0] - counts[1] == left_out * model.config.num_hidden_layers
