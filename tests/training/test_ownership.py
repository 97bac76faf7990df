"""A gradient is overwritten only where nobody else can see it."""

import pytest
import torch

from hf_longattn.training.ownership import is_unshared


class Overwrite(torch.autograd.Function):
    """Doubles; its backward spoils every gradient that it takes for its own."""

    @staticmethod
    def forward(ctx, tensor, found):
        ctx.found = found
        return tensor * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        result = grad * 2
        ctx.found.append(is_unshared(grad))
        if ctx.found[-1]:
            grad.fill_(float("nan"))
        return result, None


def run(between):
    """(what each backward took for its own, the gradient of the input, what others kept), last node first."""
    found, kept, leaf = [], [], torch.ones(3, requires_grad=True)
    output = Overwrite.apply(between(Overwrite.apply(leaf, found), kept), found)
    (output * torch.ones(3)).sum().backward()
    return (
        found,
        leaf.grad,
        [getattr(tensor, "grad", None) if tensor.requires_grad else tensor for tensor in kept],
    )


def hook(hidden, kept):
    hidden.register_hook(kept.append)
    return hidden


def hook_view(hidden, kept):
    hidden.register_hook(lambda grad: kept.append(grad.detach()[:2]))
    return hidden


def retain(hidden, kept):
    hidden.retain_grad()
    kept.append(hidden)
    return hidden


def later_sum(hidden, kept):
    other = torch.ones(3, requires_grad=True)
    kept.append(other)
    return hidden + Overwrite.apply(other, [])


def earlier_sum(hidden, kept):
    kept.append(torch.ones(3, requires_grad=True))
    return kept[0] + hidden


def two_paths(hidden, kept):
    return hidden + Overwrite.apply(hidden, []) / 2


def test_a_gradient_that_only_the_node_has():
    found, grad, _ = run(lambda hidden, kept: hidden)
    assert found == [True, True] and grad.tolist() == [4.0] * 3


@pytest.mark.parametrize(
    ("between", "factor"),
    [(hook, 1), (hook_view, 1), (retain, 1), (later_sum, 1), (earlier_sum, 1), (two_paths, 2)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_others_see_is_left_alone(between, factor):
    found, grad, kept = run(between)
    assert grad.tolist() == [4.0 * factor] * 3
    for tensor in kept:
        assert not tensor.isnan().any()
    if between in (hook, hook_view):
        assert found == [True, False]


def test_an_expanded_gradient_has_no_room():
    found = []
    Overwrite.apply(torch.ones(3, requires_grad=True), found).sum().backward()
    assert found == [False]
