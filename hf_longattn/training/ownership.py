"""Whether a gradient that autograd hands to a node is the node's alone, so that it may be written over.

The same of the input of a layer, which the layer's output may be written over, and of what a call returned.

Autograd passes the same tensor to several nodes where it can (both sides of a sum), and hooks may keep it.
Each of these holds a reference, so a gradient is the node's alone if it has no more references than one that
certainly is; how many those are depends on the versions of torch and Python, and is measured once.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def references(tensor: Tensor) -> tuple[int, ...] | None:
    """References to a tensor in C++ and in Python, and to its memory; None where torch cannot tell.

    Args:
        tensor: bound to one name by the caller.
    """
    tensors, storages = getattr(tensor, "_use_count", None), getattr(torch._C, "_storage_Use_Count", None)
    if tensors is None or storages is None:
        return None
    return tensors(), sys.getrefcount(tensor), storages(tensor.untyped_storage()._cdata)


def has_saving_hooks() -> bool:
    """Whether hooks decide what becomes of tensors that autograd saves, as checkpointing has them."""
    extension: Any = torch._C
    return extension._autograd._top_saved_tensors_default_hooks(True) is not None


def is_unshared(grad: Tensor) -> bool:
    """Whether nothing but the running backward can see a gradient.

    Args:
        grad: an argument of the running `backward`, bound to one name there.
    """
    allowed, found = _references_alone(), references(grad)
    return (
        allowed is not None
        and found is not None
        and all(count <= most for count, most in zip(found, allowed, strict=True))
        and grad.is_contiguous()
    )


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, found: list[Any]) -> Tensor:
        ctx.found = found
        return tensor * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(_look(grad))
        return grad * 2, None


def _look(grad: Tensor) -> tuple[int, ...] | None:
    # As deep in calls as `is_unshared`.
    return references(grad)


@functools.cache
def _references_alone() -> tuple[int, ...] | None:
    found: list[Any] = []
    with torch.enable_grad():
        tensor = torch.ones(2, requires_grad=True)
        output = _Probe.apply(_Probe.apply(tensor, found), [])
        torch.autograd.grad(output.sum(), tensor)
    return found[0]


def is_held_once(output: Tensor) -> bool:
    """Whether only its caller has what a call returned, so that it may be written over.

    Nobody else does where no other name, view or saved copy shares the memory: of an operation whose backward
    reads its output, autograd saves such a copy.

    Args:
        output: with a gradient to come, bound to one name there.
    """
    alone, found = _references_of_output(), references(output)
    return (
        alone is not None
        and found is not None
        and all(count <= most for count, most in zip(found, alone, strict=True))
    )


@functools.cache
def _references_of_output() -> tuple[int, ...] | None:
    with torch.enable_grad():
        output = torch.ones(2, requires_grad=True) * 2
    return _look(output)


class LayerInputs:
    """Whether the input of a prepared layer is the output of the one before, and nobody's any more.

    A model goes from layer to layer by `hidden = layer(hidden)`: what has more references than a tensor in
    such a call is kept by somebody, as a model does that returns all its hidden states.
    """

    def __init__(self) -> None:
        self._made: weakref.ref[Tensor] | None = None
        self._alone: dict[bool, tuple[int, ...] | None] = {}
        self._probing: bool | None = None

    def note(self, output: Tensor) -> None:
        """Remembers what a prepared layer returned."""
        self._made = weakref.ref(output)

    def answer(self, found: tuple[int, ...] | None) -> bool:
        """Takes the references of the probe, where a layer is called with it; else False."""
        if self._probing is None:
            return False
        self._alone[self._probing] = found
        return True

    def may_overwrite(
        self, call: Callable[..., Any], hidden: Tensor, found: tuple[int, ...] | None, keywords: bool
    ) -> bool:
        """Whether a layer's output may be written over its input.

        Args:
            call: calls the layer as models do.
            hidden: the input.
            found: its references in the layer's forward.
            keywords: whether models call it with keywords, which they unpack, or with the input alone.
        """
        made = self._made is not None and self._made() is hidden
        if not made or found is None or hidden.is_leaf or hidden._base is not None or hidden._backward_hooks:
            return False
        if keywords not in self._alone:
            self._probing = keywords
            try:
                self._probe(call)
            finally:
                self._probing = None
        alone = self._alone.get(keywords)
        return alone is not None and all(count <= most for count, most in zip(found, alone, strict=True))

    def _probe(self, call: Callable[..., Any]) -> None:
        hidden = torch.empty(0)
        # As models do: calls of other forms keep more or fewer copies of their arguments.
        if self._probing:
            keywords = {"use_cache": False}
            hidden = call(hidden, **keywords)
        else:
            hidden = call(hidden)
