"""Layers whose parameters are cut over processes, and are whole only for the time of their own passes.

A layer that runs forward again in the backward of another one needs its parameters then. FSDP2 has a call for
it. Stage 3 of ZeRO and the older FSDP gather them in hooks of the layer's own forward and backward alone.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch import nn

from hf_longattn.training import zero

# What the older FSDP sets on the parameters that it keeps in one flat tensor.
_IS_FLAT = "_fsdp_flattened"


def _shards(module: nn.Module) -> list[Any]:
    """The modules inside a layer that FSDP2 cuts, itself among them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    # Imported here: it takes long, and where nothing is cut nobody needs it.
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _wrappers(module: nn.Module) -> list[nn.Module]:
    """The modules inside a layer, itself among them, that the older FSDP put around others."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [part for part in module.modules() if isinstance(part, FullyShardedDataParallel)]


def check_one_unit(module: nn.Module) -> None:
    """Refuses a module whose parameters are gathered and taken away inside its call, a block at a time.

    Args:
        module: a layer or a norm, called for all of its blocks at once.

    Raises:
        ValueError: FSDP cuts a module inside it by itself, or keeps the parameters where they cannot be seen.
    """
    inside = [part for part in (*_shards(module), *_wrappers(module)) if part is not module]
    kind = type(module).__name__
    if inside:
        raise ValueError(
            f"`model`: FSDP cuts {type(inside[0]).__name__} inside {kind} by itself, and takes its "
            f"parameters away before the backward of a block needs them; shard {kind} as a whole, with "
            "`fully_shard(layer)` or TRANSFORMER_BASED_WRAP of accelerate."
        )
    if next(module.parameters(), None) is None and any(map(_has_views, module.modules())):
        raise ValueError(
            f"`model`: FullyShardedDataParallel keeps the parameters of {kind} in a flat tensor of another "
            "module; give it `use_orig_params=True`, or use FSDP2."
        )


def _has_views(module: nn.Module) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in vars(module).values())


def find_unit(children: list[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    """The one of a head's modules that FSDP2 cuts by itself, with its name, or None.

    Args:
        children: the modules of the head.

    Raises:
        ValueError: several, one inside of another, or one of the older FSDP.
    """
    units = [part for _, child in children for part in (*_shards(child), *_wrappers(child))]
    found = [(name, child) for name, child in children if child in units and child in _shards(child)]
    if len(units) > len(found) or len(found) > 1:
        names = ", ".join(type(part).__name__ for part in units)
        raise ValueError(
            f"`loss='chunked'` knows heads that FSDP2 cuts as one module, got {names}; use `loss='model'`, "
            "or leave the head to the shards of the whole model."
        )
    return found[0] if found else None


def _is_flat(module: nn.Module) -> bool:
    # With `use_orig_params=True` there are views of the flat one in their place for the time of a forward.
    return any(getattr(p, _IS_FLAT, False) or not isinstance(p, nn.Parameter) for p in module.parameters())


def is_sharded(layer: nn.Module) -> bool:
    """Whether processes hold parts of the parameters of a layer.

    Args:
        layer: a decoder layer.
    """
    return zero.is_cut(layer) or _is_flat(layer) or bool(_shards(layer))


def check_recallable(layer: nn.Module, every: int) -> None:
    """Refuses groups of layers whose parameters are gone when one of them runs forward again.

    Args:
        layer: a decoder layer.
        every: layers of a group.

    Raises:
        ValueError: names what cuts them.
    """
    if every == 1 or not (zero.is_cut(layer) or _is_flat(layer)):
        return
    kind = "DeepSpeed's ZeRO stage 3" if zero.is_cut(layer) else "FullyShardedDataParallel"
    raise ValueError(
        f"`keep_every={every}` runs a layer forward again in the backward of another one, where {kind} has "
        f"taken the parameters of {type(layer).__name__} away; use `keep_every=1`, FSDP2 (`fully_shard`), "
        "DDP or ZeRO stage 2."
    )


@contextlib.contextmanager
def whole_parameters(layer: nn.Module) -> Iterator[None]:
    """Inside, the parameters of a layer that FSDP2 cuts are whole on every rank.

    Args:
        layer: a decoder layer, which every rank of its mesh enters here in the same order.
    """
    # Those that another layer's pass holds whole just now are not ours to take away.
    cut = [part for part in _shards(layer) if any(isinstance(p, _dtensor()) for p in part.parameters())]
    for part in cut:
        part.unshard()
    try:
        yield
    finally:
        for part in cut:
            part.reshard()


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
