"""A call of a layer as one node of the graph, and groups of layers of which the first keeps its input.

Parameters are inputs of the node, so that their summed gradients arrive once, and the hooks of DDP and FSDP
run once. A node whose input is, bit for bit, the output of the node before it need not keep it:

    forward     layer 0 keeps x_0;   layers 1 .. n - 1 keep nothing
    backward    the first node that runs calls layers 0, 1, .. forward again, up to its own input, and each
                keeps its input now;   then every layer backward, from the last to the first, as ever

The second forward draws the numbers of the first, under its autocast. Where a model changes hidden states
between two layers, or hooks on saved tensors decide what becomes of them, a layer keeps its own input.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from hf_longattn.fusion import fused_layer
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.training.layer import BlockRun, Runtime, Saved, layout_of, run_backward, run_forward
from hf_longattn.training.offload import DeviceBlocks
from hf_longattn.training.ownership import has_saving_hooks, is_unshared
from hf_longattn.training.shards import check_one_unit, whole_parameters
from hf_longattn.training.zero import check_input, check_whole


class _Output:
    """What a node returned: whether a later tensor is the same, unchanged, without holding it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.form, self.version = _form(tensor), tensor._version

    def is_still(self, tensor: Tensor) -> bool:
        """Whether a tensor, or another view of the same memory, has the same values."""
        same = not self.storage.expired() and self.storage.cdata == tensor.untyped_storage()._cdata
        return same and self.form == _form(tensor) and self.version == tensor._version


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


@dataclass
class _Place:
    """The place of a layer in its group.

    Args:
        every: layers of a group.
        number: of the layer in it.
        before: the node of the layer before it, None for the first.
        output: what the layer returned.
    """

    every: int
    number: int = 0
    before: Any = None
    output: _Output | None = None


class _BlockFunction(torch.autograd.Function):
    """`run_forward` and `run_backward` as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        run: BlockRun,
        runtime: Runtime,
        module: nn.Module,
        place: _Place,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        keeps = place.before is None
        with fused_layer(module, hidden):
            output, saved = run_forward(run, hidden, runtime if keeps else None)
        if output is hidden:
            ctx.mark_dirty(hidden)
        ctx.saved, ctx.place = saved, place
        ctx.run, ctx.runtime, ctx.module, ctx.num_parameters = run, runtime, module, len(parameters)
        # What stays on the device is autograd's to free and to guard against changes in place.
        tensors = () if saved is None else (blocks.hand_over() for blocks in saved.on_device())
        ctx.save_for_backward(*parameters, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = _load(ctx)
        saved: Saved = _recall(ctx) if ctx.saved is None else ctx.saved
        # On a line of its own: arguments of a pending call count as references.
        may_overwrite = is_unshared(grad)
        with _as_then(ctx.run), _trained(parameters), fused_layer(ctx.module, grad):
            grad_hidden, grads = run_backward(
                ctx.run, saved, grad, parameters, ctx.needs_input_grad[4], may_overwrite
            )
        for blocks in saved.all():
            blocks.release()
        if ctx.place.before is not None:
            ctx.saved = None
        return None, None, None, None, grad_hidden, *grads


def _as_then(run: BlockRun) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if run.state is None else run.state.as_then()


@contextlib.contextmanager
def _trained(parameters: list[Tensor]) -> Iterator[None]:
    """Inside, parameters want a gradient, though they were frozen since the forward."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _load(node: Any) -> list[Tensor]:
    """Puts what autograd kept for a node in its place, and returns the parameters."""
    # Read once: checkpointing of the caller's recomputes at every look.
    tensors = node.saved_tensors
    if node.place.before is None:
        for blocks, tensor in zip(node.saved.on_device(), tensors[node.num_parameters :], strict=True):
            blocks.tensor = tensor
    return list(tensors[: node.num_parameters])


def _recall(node: Any) -> Saved:
    """The input of a node; those of the nodes before it in its group are found on the way, and stay there."""
    path = [node]
    while path[-1].saved is None:
        path.append(path[-1].place.before)
        # The parameters must be those of the forward, which autograd checks when they are asked for.
        _load(path[-1])
    first, *rest = reversed(path)
    hidden, first.run.may_overwrite = _whole(first.saved, first.run)
    hidden, _ = _forward_again(first, hidden, None, first.saved)
    for later in rest[:-1]:
        # Nobody but us has seen this tensor.
        later.run.may_overwrite = True
        hidden, later.saved = _forward_again(later, hidden, later.runtime)
    return _kept(node.run, hidden, node.runtime)


def _forward_again(
    node: Any, hidden: Tensor, runtime: Runtime | None, known: Saved | None = None
) -> tuple[Tensor, Saved | None]:
    with _as_then(node.run), whole_parameters(node.module), fused_layer(node.module, hidden):
        return run_forward(node.run, hidden, runtime, known)


def _whole(saved: Saved, run: BlockRun) -> tuple[Tensor, bool]:
    """The kept input on the device, and whether it is a copy."""
    if isinstance(saved.hidden, DeviceBlocks):
        assert saved.hidden.tensor is not None
        return saved.hidden.tensor, False
    whole: Tensor | None = None
    for rows, block in zip(run.rows, saved.hidden.read(list(range(len(run.rows)))), strict=True):
        if whole is None:
            whole = block.new_empty(block.shape[0], run.rows[-1].stop, *block.shape[2:])
        whole[:, rows] = block
    assert whole is not None
    return whole, True


def _kept(run: BlockRun, hidden: Tensor, runtime: Runtime) -> Saved:
    saved = Saved(runtime.offloader.keep(layout_of(hidden, run.rows), hidden))
    for index, rows in enumerate(run.rows):
        saved.hidden.write(index, hidden[:, rows])
    saved.hidden.settle()
    return saved


def _node_before(hidden: Tensor) -> Any:
    """The node of a prepared layer whose output, unchanged, a tensor is; else None."""
    node = hidden.grad_fn
    if node is None:
        return None
    # FSDP2 hands layers a view of their input, by a node of its own.
    for found in (node, *(parent for parent, _ in node.next_functions)):
        place = getattr(found, "place", None)
        if isinstance(place, _Place) and place.output is not None and place.output.is_still(hidden):
            return found
    return None


def _find_place(run: BlockRun, runtime: Runtime, module: nn.Module, hidden: Tensor) -> _Place:
    before = _node_before(hidden)
    if before is None:
        every = runtime.groups.pick(layout_of(hidden, run.rows), module, run.share)
    else:
        every = before.place.every
    if every > 1 and has_saving_hooks():
        words = (
            "`keep_every=%d`: every layer keeps its input where hooks on saved tensors are active, as those "
            "of gradient checkpointing and of offloading are"
        )
        log_once(logging.WARNING, words % every)
        return _Place(every)
    if before is None or before.place.number + 1 == every:
        return _Place(every)
    return _Place(every, before.place.number + 1, before)


def run_blocks(
    run: BlockRun, runtime: Runtime, module: nn.Module, hidden: Tensor, grouped: bool = False
) -> Tensor:
    """A module on (B, T, D) hidden states by blocks, differentiable.

    Args:
        run: the call.
        runtime: settings.
        module: whose parameters take part.
        hidden: (B, T, D).
        grouped: whether it may share its kept input with the layers before it.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    check_whole(module)
    check_one_unit(module)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or parameters):
        with torch.no_grad(), fused_layer(module, hidden):
            return run_forward(run, hidden, None)[0]
    check_input(module, hidden)
    place = _find_place(run, runtime, module, hidden) if grouped else _Place(1)
    output = _BlockFunction.apply(run, runtime, module, place, hidden, *parameters)
    if grouped:
        place.output = _Output(output)
    return output
