"""Whether a gradient that autograd hands to a node is the node's alone, so that it may be written over.

Autograd passes the same tensor to several nodes where it can (both sides of a sum), and hooks may keep it.
Each of these holds a reference, so a gradient is the node's alone if it has no more references than one that
certainly is; how many those are depends on the versions of torch and Python, and is measured once.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _references(tensor: Tensor) -> tuple[int, ...] | None:
    """References to the tensor in C++ and in Python, and to its memory; None where torch cannot tell."""
    tensors, storages = getattr(tensor, "_use_count", None), getattr(torch._C, "_storage_Use_Count", None)
    if tensors is None or storages is None:
        return None
    return tensors(), sys.getrefcount(tensor), storages(tensor.untyped_storage()._cdata)


def is_unshared(grad: Tensor) -> bool:
    """Whether nothing but the running backward can see a gradient.

    Args:
        grad: an argument of the running `backward`, bound to one name there.
    """
    allowed, found = _references_alone(), _references(grad)
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
    return _references(grad)


@functools.cache
def _references_alone() -> tuple[int, ...] | None:
    found: list[Any] = []
    with torch.enable_grad():
        tensor = torch.ones(2, requires_grad=True)
        output = _Probe.apply(_Probe.apply(tensor, found), [])
        torch.autograd.grad(output.sum(), tensor)
    return found[0]
