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
