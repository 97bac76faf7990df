"""Parameters that DeepSpeed's ZeRO stage 3 cuts: whole for the time of a layer's forward, then its backward.

DeepSpeed gathers what a module holds before each call and takes it away after it. A layer that runs by blocks
calls its modules once a block, and again in its backward; ranks with sequences of different lengths would ask
for different numbers of gathers. So each layer is marked as what DeepSpeed calls a leaf module: all of it is
gathered once before its forward and once before its backward, and nothing hangs on the modules inside.
The head runs inside one call of its module, however many chunks the loss takes.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# What DeepSpeed reads on a module in `initialize`, and what it puts on parameters there.
LEAF = "_z3_leaf"
_IS_CUT, _LEAF_OF = "ds_id", "ds_z3_leaf_module"


def is_cut(module: nn.Module) -> bool:
    """Whether ZeRO stage 3 cuts parameters of a module."""
    return any(hasattr(parameter, _IS_CUT) for parameter in module.parameters())


def can_be_leaf(head: nn.Module, trunk: nn.Module) -> bool:
    """Whether a head must be marked too, and may be.

    The gradients of a leaf are reduced after its own backward: too early for a weight of the embedding.

    Args:
        head: what makes logits; one without modules inside is gathered once as it is.
        trunk: the rest of the model.
    """
    shared = {id(parameter) for parameter in trunk.parameters()}
    trains = (parameter for parameter in head.parameters() if parameter.requires_grad)
    return any(True for _ in head.children()) and not any(id(parameter) in shared for parameter in trains)


def check_whole(module: nn.Module) -> None:
    """Refuses a module whose parameters would be gathered and taken away inside its call.

    Args:
        module: whose own parameters are whole for the time of its call, as DeepSpeed has it.

    Raises:
        ValueError: a module inside has cut parameters, and DeepSpeed does not know `module` as a leaf.
    """
    for child in module.children():
        for parameter in child.parameters():
            if hasattr(parameter, _IS_CUT) and getattr(parameter, _LEAF_OF, None) is not module:
                raise ValueError(
                    f"`model`: DeepSpeed's ZeRO stage 3 takes the parameters of {type(module).__name__} away "
                    "inside its call, before the backward of a block needs them; call `prepare_training` "
                    "before `deepspeed.initialize`, or use ZeRO stage 2 or FSDP2."
                )


def check_input(module: nn.Module, hidden: Tensor) -> None:
    """Refuses the input under which DeepSpeed would reduce the gradients of a leaf before they are there.

    Args:
        module: what is called, with gradient.
        hidden: its input.

    Raises:
        ValueError: `module` is a leaf with parameters that want a gradient, and its input wants none.
    """
    if hidden.requires_grad:
        return
    if any(parameter.requires_grad and hasattr(parameter, _LEAF_OF) for parameter in module.parameters()):
        raise ValueError(
            f"`model`: under DeepSpeed's ZeRO stage 3 the input of {type(module).__name__} must want a "
            "gradient where its parameters do, and all before it is frozen; call "
            "`model.enable_input_require_grads()`."
        )


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def in_one_call(module: nn.Module, compute: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """`compute(hidden)` as one call of a module, for the time of which its parameters are whole.

    Args:
        module: whose hooks run once, around all of it.
        compute: may use the parameters of the module, but not call it.
        hidden: what it is given.
    """
    check_whole(module)
    if torch.is_grad_enabled():
        check_input(module, hidden)
    with _forward_of(module, compute):
        return module(hidden)
