"""Products that a layer's backward never reads, left out of the layer's second run.

    y = x + attention(norm(x)),   z = y + W f(norm(y))         dy = dz + ..,   dW = dz f^T,   df = W^T dz

No gradient reads W f, nor z: what such a product and its sums would be, the second run need not know. Which
products these are is read off the graph of a layer's first run in a backward: those that nothing but sums
leads from to the output. From then on they stand in the second run as a promise, a tensor without numbers
that knows sums alone; whatever else is asked of it, it is computed first, so that a layer that does read it
computes what it always did. Of a gated layer that is a third of the feed-forward products of that run.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from hf_longattn.instance import Setup, every_module, is_compiled
from hf_longattn.training.ownership import has_saving_hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_names: Any = Tensor
_FORMS = (
    *(getattr(_names, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.is_floating_point),
)


# Whether the layer is running that promises stand in.
_running: ContextVar[bool] = ContextVar("hf_longattn_running_on_promises", default=False)


class _ReadError(Exception):
    """A promise was asked for its numbers where they, or their graph, would not be those of its place."""


class _Unread(torch.autograd.Function):
    """The product x W^T + b as a node of the graph, without its numbers."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return states.new_empty(()).expand(*states.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            (rows @ weight).view(states.shape) if wants[0] else None,
            rows.t() @ states.flatten(0, -2) if wants[1] else None,
            rows.sum(0) if wants[2] else None,
        )


class _Product(NamedTuple):
    """States (..., D) and what they meet in a linear layer."""

    states: Tensor
    module: nn.Linear
    weight: Tensor
    bias: Tensor | None


class _Promise(Tensor):
    """A product, or a sum with products, that nobody has read yet.

    Args:
        like: shape, dtype and device.
        parts: the two summands, or none of a product.
        product: of a product, what it is made of.
    """

    parts: tuple[Tensor, ...]
    product: _Product | None
    value: Tensor | None
    # Of what it is made of, and of its value, when they were new.
    versions: list[int]
    version: int

    def __new__(cls, shape: torch.Size, parts: tuple[Tensor, ...], product: _Product | None) -> "_Promise":
        like = parts[0] if product is None else product.states
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        # What was read, and perhaps changed in place, is as good as any tensor.
        made.parts = tuple(_value_of(part) for part in parts)
        made.product, made.value, made.version = product, None, 0
        made.versions = [_version(part) for part in made.inputs()]
        return made

    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors it is made of, parameters apart."""
        return self.parts if self.product is None else (self.product.states,)

    def check(self) -> None:
        """Refuses where one of them, or what was computed of it, was changed in place since."""
        if any(map(int.__ne__, self.versions, map(_version, self.inputs()))):
            raise _ReadError

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _SUMS and not kwargs and _can_wait(args):
            with torch._C.DisableTorchFunctionSubclass():
                return _Promise(args[0].shape, args, None)
        if func in _FORMS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is F.dropout and kwargs and (kwargs["p"] == 0 or not kwargs["training"]):
            return args[0]
        args, kwargs = tree_map_only(_Promise, _kept, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _ReadError


def _can_wait(parts: tuple[Any, ...]) -> bool:
    """Whether a sum is one of two tensors of the same form, which rounds nothing but itself."""
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        forms = [(part.shape, part.dtype, part.device) for part in parts]
    return forms[0] == forms[1]


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; of a promise, since it was read."""
    if not isinstance(tensor, _Promise):
        return tensor._version
    return 0 if tensor.value is None else tensor.value._version - tensor.version


def _value_of(tensor: Tensor) -> Tensor:
    return tensor.value if isinstance(tensor, _Promise) and tensor.value is not None else tensor


def _kept(promise: _Promise) -> Tensor:
    """The numbers of a promise, as they would have been computed in its place."""
    if promise.value is None:
        # What hooks save here, as those of checkpointing do, is not theirs in the place of the promise.
        if _running.get() and (not torch.is_grad_enabled() or has_saving_hooks()):
            raise _ReadError
        promise.check()
        if promise.product is not None:
            states, _, weight, bias = promise.product
            promise.value = F.linear(states, weight, bias)
        else:
            first, second = (_kept(x) if isinstance(x, _Promise) else x for x in promise.parts)
            promise.value = first + second
        promise.version = promise.value._version
    return promise.value


def _terms(output: Tensor) -> list[Tensor]:
    """Tensors with graphs, and promised products, whose sum a tensor is."""
    if not isinstance(output, _Promise):
        return [output]
    if output.value is not None:
        return [output.value]
    output.check()
    return [term for part in output.parts for term in _terms(part)] if output.product is None else [output]


class UnreadProducts:
    """The products of one layer that its second run leaves out.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        # None until a run in a backward has shown them.
        self.modules: list[weakref.ref[nn.Module]] | None = None

    def terms(self, run: Callable[[], Tensor]) -> list[Tensor]:
        """Runs the layer on a block in a backward.

        Args:
            run: the layer, with gradient; may be called twice.

        Returns:
            tensors of the output's shape, each with the output's gradient; without promises it is the output.
        """
        linear = self._linear_layers()
        if self.modules is None:
            return [self._look(run, linear)]
        promised = {id(known()) for known in self.modules}
        known = [module for module in linear if id(module) in promised]
        if not known:
            return [run()]
        made: list[_Promise] = []
        found = self._try(run, known, made)
        left = {id(term) for term in found if isinstance(term, _Promise)}
        lost = [promise for promise in made if promise.value is None and id(promise) not in left]
        if lost or not found or len(left) < sum(isinstance(term, _Promise) for term in found):
            # What became of a promise is not known.
            self.modules = []
            # Their graph must not wait beside that of the next run.
            del found, lost
            made.clear()
            return [run()]
        read = [promise.product.module for promise in made if promise.value is not None and promise.product]
        self.modules = [known for known in self.modules if known() not in read]
        return [_node(term) if isinstance(term, _Promise) else term for term in found]

    def _linear_layers(self) -> list[nn.Module]:
        """Those that are nothing but a product of plain parameters; none where hooks look at results."""
        modules = every_module(self.layer)
        watched = torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook()
        watched = watched or is_compiled(modules)
        # Those of the layer itself are called outside of its forward.
        if watched or any(vars(part)[name] for part in modules[1:] for name in _HOOKS):
            return []
        return [part for part in modules if _is_plain(part)]

    def _look(self, run: Callable[[], Tensor], linear: list[nn.Module]) -> Tensor:
        nodes: dict[Any, nn.Module] = {}
        with self._replaced(linear, functools.partial(_note, nodes)):
            output = run()
        if not linear or output.grad_fn is None:
            return output
        # Not held: somebody may put another module in the place of one.
        found = _only_summed(output.grad_fn)
        self.modules = [weakref.ref(nodes[node]) for node in found if node in nodes]
        return output

    def _try(self, run: Callable[[], Tensor], known: list[nn.Module], made: list[_Promise]) -> list[Tensor]:
        token = _running.set(True)
        with self._replaced(known, functools.partial(_promise, made)):
            try:
                return _terms(run())
            except _ReadError:
                return []
            finally:
                _running.reset(token)

    @contextlib.contextmanager
    def _replaced(self, modules: list[nn.Module], make: Callable[..., Tensor]) -> Iterator[None]:
        changes = Setup(self.layer)  # type: ignore[arg-type]
        try:
            for module in modules:
                changes.set(module, "forward", functools.partial(make, module))
            yield
        finally:
            changes.undo()


def _only_summed(output: Any) -> list[Any]:
    """The nodes of a graph from which nothing but sums lead to its output."""
    sums, others = [], []
    ahead = [output]
    while ahead:
        node = ahead.pop()
        adds = node.name() == "AddBackward0"
        (sums if adds else others).append(node)
        ahead += [before for before, _ in node.next_functions if before is not None] if adds else []
    read, ahead = set[Any](), list(others)
    while ahead:
        found = [before for before, _ in ahead.pop().next_functions if before not in read]
        ahead += [before for before in found if before is not None]
        read.update(found)
    return [node for node in others if node not in read]


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer computes what its class says, on parameters of torch's own."""
    return _has_own_weights(module) and "forward" not in vars(module) and module._compiled_call_impl is None


def _has_own_weights(module: nn.Module) -> bool:
    # While a module is parametrised, it is of another class.
    own = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return own and type(module.bias) in (nn.Parameter, type(None))


def _note(nodes: dict[Any, nn.Module], module: nn.Linear, input: Tensor) -> Tensor:
    output = F.linear(input, module.weight, module.bias)
    if output.grad_fn is not None and _has_own_weights(module):
        nodes[output.grad_fn] = module
    return output


def _promise(made: list[_Promise], module: nn.Linear, input: Tensor) -> Tensor:
    states = _kept(input) if isinstance(input, _Promise) else input
    mixed = torch.is_autocast_enabled(states.device.type) or states.dtype != module.weight.dtype
    graph = torch.is_grad_enabled() and not has_saving_hooks()
    if mixed or not (graph and states.numel() and _has_own_weights(module)):
        return F.linear(states, module.weight, module.bias)
    shape = torch.Size((*states.shape[:-1], module.out_features))
    made.append(_Promise(shape, (), _Product(states, module, module.weight, module.bias)))
    return made[-1]


def _node(promise: _Promise) -> Tensor:
    assert promise.product is not None
    states, _, weight, bias = promise.product
    return _Unread.apply(states, weight, bias)
