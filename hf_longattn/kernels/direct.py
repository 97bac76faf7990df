"""Operators of torch.library, called as the plain functions they are where nobody looks for the operator.

A registered operator with a gradient passes the dispatcher, torch.library's autograd, a guard against Dynamo
and a check of what it returns, all in Python: two to six times what it takes to launch one kernel, forward
and backward. Who traces or intercepts calls needs that; a model that trains waits for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def direct(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradients: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Makes the way to call an operator: by its function, or as torch.library registered it.

    Args:
        operator: what torch.library made of `function`.
        function: computes it and writes to no argument.
        save: the `setup_context` that was registered; None where no gradient was.
        gradients: the `backward` that was registered.

    Returns:
        a function of the operator's arguments, by position, with its gradients. The operator itself is called
        while a graph is traced, under modes and transforms, for tensors of other classes and without data,
        and where a gradient is wanted that was not registered, which it refuses.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            assert save is not None
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            assert gradients is not None
            return gradients(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched() or not all(map(_is_plain, inputs)):
            return operator(*inputs)
        if not (torch.is_grad_enabled() and any(map(_wants_gradient, inputs))):
            return function(*inputs)
        return operator(*inputs) if gradients is None else Direct.apply(*inputs)

    return call


def _is_watched() -> bool:
    """Whether modes, transforms or a tracer are to see every operator."""
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()


def _is_plain(value: Any) -> bool:
    """Whether an argument is no tensor, or one of torch's own with data."""
    return not value.is_meta if type(value) in _PLAIN else not isinstance(value, Tensor)


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
