"""Operators of torch.library, called as the plain functions they are where nobody looks for the operator.

A registered operator with a gradient passes the dispatcher, torch.library's autograd, a guard against Dynamo
and a check of what it returns, all in Python: two to six times what it takes to launch one kernel, forward
and backward. Who traces or intercepts calls needs that; a model that trains waits for it.
"""

from collections.abc import Callable
from types import new_class
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)
_BEFORE_AUTOGRAD = torch._C.DispatchKey.PreDispatch


def direct_operator(
    name: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    gradients: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Registers an operator with torch.library, and makes the way to call it.

    Args:
        name: with its namespace, as in `torch.ops`.
        function: computes it and writes to no argument; its annotations are the schema.
        fake: empty outputs for the same arguments.
        save: `setup_context` of `register_autograd`; None where there is no gradient.
        gradients: `backward` of `register_autograd`.

    Returns:
        a function of the operator's arguments, by position, with its gradients. The operator itself is called
        while a graph is traced, under modes and transforms, for tensors of other classes and without data,
        and where a gradient is wanted that was not registered, which it refuses.
    """
    operator = torch.library.custom_op(name, function, mutates_args=())
    operator.register_fake(fake)
    if gradients is not None:
        operator.register_autograd(gradients, setup_context=save)
    return _direct(operator, function, save, gradients)


def wants_operator(*tensors: Tensor | None) -> bool:
    """Whether a call that nobody else watches is to be an operator, and not the launch alone.

    It is where a gradient is wanted, and where a compiler traces: of launches it knows none whose strides
    vary.

    Args:
        tensors: that the call is given.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _direct(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None] | None,
    gradients: Callable[..., tuple[Any, ...]] | None,
) -> Callable[..., Any]:
    """The way to call an operator: by its function, or as torch.library registered it."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        assert save is not None
        save(ctx, inputs, output)
        return output

    def backward(ctx: Any, *grads: Tensor) -> Any:
        assert gradients is not None
        return gradients(ctx, *grads)

    # Profilers, `grad_fn` and the detection of anomalies show the name of the class.
    name = getattr(operator, "_name", "direct")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    differentiable: Any = new_class(
        name, (torch.autograd.Function,), exec_body=lambda body: body.update(methods)
    )

    def call(*inputs: Any) -> Any:
        _refuse_tangents(name, inputs)
        if torch.compiler.is_compiling() or _is_watched() or not all(map(_is_plain, inputs)):
            return operator(*inputs)
        if not (_records_gradients() and any(map(_wants_gradient, inputs))):
            return function(*inputs)
        return operator(*inputs) if gradients is None else differentiable.apply(*inputs)

    return call


def _refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    """Forward mode would find no derivative, and take that for 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    tensors = (value for value in inputs if isinstance(value, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"`{name}` has no derivative in forward mode (`torch.func.jvp`, `torch.autograd.forward_ad`); "
            "differentiate in reverse mode."
        )


def _is_watched() -> bool:
    """Whether modes, transforms or a tracer are to see every operator."""
    modes = torch._C._len_torch_dispatch_stack()
    if modes > 0 or torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return True
    # Modes that trace what comes before autograd lie on a stack of their own.
    return torch._C._dispatch_tls_is_dispatch_key_included(_BEFORE_AUTOGRAD)


def _records_gradients() -> bool:
    """Whether autograd does; it never does in inference mode, where `enable_grad` may be asked for too."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _is_plain(value: Any) -> bool:
    """Whether an argument is no tensor, or one of torch's own with data."""
    return not value.is_meta if type(value) in _PLAIN else not isinstance(value, Tensor)


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
