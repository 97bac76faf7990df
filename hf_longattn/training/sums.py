"""Sums of the gradients that the blocks of a layer give a parameter.

In bf16, hundreds of blocks would cost a percent of the gradient: the sum is fp32. Two parts alone wait as
they are, for their sum rounds once, whether fp32 is in between or not; mixing dtypes costs more than adding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

# Bytes of a part that is not copied: smaller ones may be views of what is written over later.
_LARGE = 1 << 20


class GradientSum:
    """The sum of parts in one dtype, in the order they come: its bits are those of an fp32 sum."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, part: Tensor | None) -> None:
        """Adds a part, which may be kept until the next one.

        Args:
            part: of the parameter's shape, or None for nothing.
        """
        if part is None:
            return
        narrow = part.dtype.itemsize < torch.float32.itemsize
        if narrow and self._total is None and len(self._parts) < 2:
            self._parts.append(part if _is_alone(part) else part.clone())
            return
        total = self.wide()
        self._total = part.clone() if total is None else total.add_(part)

    def wide(self) -> Tensor | None:
        """The sum in fp32 or wider, a tensor of its own; None where no part came."""
        if self._total is None and self._parts:
            first, *rest = self._parts
            self._parts = []
            self._total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
            for part in rest:
                self._total.add_(part)
        return self._total

    def wide_like(self, parameter: Tensor) -> Tensor:
        """The same, zeros where no part came.

        Args:
            parameter: whose gradient it is.
        """
        total = self.wide()
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return torch.zeros_like(parameter, dtype=dtype) if total is None else total

    def rounded(self, dtype: torch.dtype) -> Tensor | None:
        """The sum in a dtype; None where no part came.

        Args:
            dtype: of the parameter.
        """
        if self._total is None and self._parts and all(part.dtype == dtype for part in self._parts):
            first, *rest = self._parts
            return first + rest[0] if rest else first
        total = self.wide()
        return None if total is None else total.to(dtype)


def local_gradients(
    outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor] | None
) -> list[Tensor | None]:
    """Gradients of one block, of which hooks on parameters see nothing: they wait for the sum of all blocks.

    Args:
        outputs: what the block made.
        inputs: tensors that want a gradient, leaves of the block's graph.
        grads: of the outputs; None for the one output, a scalar.

    Returns:
        one for each input, None where the outputs do not depend on it.
    """
    leaves = map(_leaf_of, inputs)
    hooked = [(tensor, hooks) for tensor in leaves if (hooks := tensor._backward_hooks) and tensor.is_leaf]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        return list(torch.autograd.grad(outputs, inputs, grads, allow_unused=True))
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def _leaf_of(tensor: Tensor) -> Tensor:
    """The leaf itself: where hooks look at what autograd saves, it hands out others of the same node."""
    if isinstance(tensor, nn.Parameter) or not tensor.is_leaf:
        return tensor
    node: Any = get_gradient_edge(tensor).node
    return node.variable


def _is_alone(part: Tensor) -> bool:
    """Whether nothing else can be in the memory of a tensor."""
    if type(part) is not Tensor or part.nbytes < _LARGE:
        return False
    return part.untyped_storage().nbytes() == part.nbytes
