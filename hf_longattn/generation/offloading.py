"""Which layers of a cache wait in host memory, and what that costs.

Of L layers of full attention, n wait in host memory and `BUFFERS` of them have room on the device at a time:
the device holds the keys and values of L - n + min(n, BUFFERS) layers, so that up to two save nothing. Every
token reads the n layers from the host while the layers between them compute:

    a token       max(expected without offload, n * context * bytes of a layer's token / rate of the link)
    recomputing   the whole prompt, which is what a token costs where nothing is kept

Over PCIe 5 x16 a token of a layer of an 8B shape (4 KiB in bf16) takes 0.08 us; the products that make it
again, 0.44 GFLOP, take 1 us at the rate of a measured prefill, so fetching wins.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.offloaded import OffloadedLayer, offload, offloaded_layers
from hf_longattn.generation.planning import Plan
from hf_longattn.generation.sizes import Ranks, fewest_layers, layer_bytes, number_of_layers, saved_bytes

# PCIe 5 x16 moves 63 GB/s by its specification; large copies are taken to reach four fifths of that.
HOST_RATE = 50e9


@dataclass(frozen=True)
class OffloadPlan:
    """What a prompt costs that fits because layers wait in host memory.

    Args:
        layers: that must wait there; None where all of them are not enough.
        number: layers that could.
        host: bytes of host memory, page-locked.
        fetched: bytes that every token brings to the device.
        rate: bytes a second at which they come, an assumption.
        expected_a_token: seconds, at least.
        expected_recomputing: seconds of a token where the prompt is read again in the place of it.
    """

    layers: int | None
    number: int
    host: int
    fetched: int
    rate: float
    expected_a_token: float
    expected_recomputing: float


def read_offload(offload_layers: Any) -> None:
    """Refuses what is no setting of `offload_layers`.

    Args:
        offload_layers: "auto", or a number of layers.

    Raises:
        ValueError: anything else.
    """
    number = isinstance(offload_layers, int) and not isinstance(offload_layers, bool) and offload_layers >= 0
    if offload_layers != "auto" and not number:
        raise ValueError(
            f"`offload_layers` must be a number of layers, or 'auto', got {offload_layers!r}; 0 keeps all of "
            "them on the device."
        )


def check_setup(setup: Any, config: PreTrainedConfig, processes: int) -> None:
    """Refuses a set-up of `prepare_generation` whose layers cannot wait in host memory.

    Args:
        setup: a `GenerationSetup`.
        config: of the model.
        processes: that share a prompt.

    Raises:
        ValueError: several processes, a graph that is required, or more layers than there are.
    """
    count = setup.offload_layers
    if not count:
        return
    if processes > 1:
        raise ValueError(
            f"`offload_layers` must be 0 where several processes share a prompt, got {count!r}; prepare "
            "without `accelerator` and `device_mesh` to have layers in host memory."
        )
    if count == "auto" or config.model_type == "block_transformer":
        return
    if setup.cuda_graph is True:
        raise ValueError(
            f"`cuda_graph=True` cannot be honoured with `offload_layers={count}`: copies from host memory "
            "grow with every token; use `cuda_graph='auto'`."
        )
    # Names a number that is too large, before anything is changed.
    LongContextCache(config, offload_layers=count)


def is_empty(cache: LongContextCache) -> bool:
    """Whether no layer has memory yet."""
    layers: list[Any] = cache.layers
    return not any(layer.is_initialized for layer in layers)


def place_layers(cache: Any, count: int, config: PreTrainedConfig) -> None:
    """Has `count` layers of the cache of a call wait in host memory.

    Args:
        cache: that `generate` has made, or was given.
        count: as `prepare_generation` was told.
        config: the text config.

    Raises:
        ValueError: a cache of another kind, or one that holds memory and was made for another number.
    """
    if not count:
        return
    if not isinstance(cache, LongContextCache):
        raise ValueError(
            f"`offload_layers`={count} cannot be honoured: this call keeps keys and values in a "
            f"{type(cache).__name__}; leave `offload_layers` out for it."
        )
    if cache.offload_layers == count:
        return
    if cache.offload_layers or not is_empty(cache):
        raise ValueError(
            f"`offload_layers` of `past_key_values` is {cache.offload_layers}, but that of "
            f"`prepare_generation` is {count}; make the cache with `LongContextCache(..., "
            f"offload_layers={count})`."
        )
    offload(cache.layers, count, config)


def held_buffers(cache: LongContextCache) -> list[tuple[torch.Tensor, int]]:
    """The device buffers of keys and values, and how many tokens each of them holds.

    Args:
        cache: of a call.
    """
    every: list[Any] = cache.layers
    layers = [layer for layer in every if not isinstance(layer, OffloadedLayer)]
    # A layer in 8 bits has a second one, for its scales, which stays.
    layers += [layer.scales for layer in every if hasattr(layer, "scales")]
    held = [
        (buffer, layer.end)
        for layer in layers
        for buffer in (getattr(layer, "_keys", None), getattr(layer, "_values", None))
        if buffer is not None
    ]
    length = int(cache.get_seq_length())
    for layer in offloaded_layers(cache.layers)[:1]:
        slots = [slot for lane in layer.carrier.lanes.values() for slot in lane.slots]
        held += [(buffer, length) for slot in slots for buffer in slot.buffers]
    return held


@dataclass(frozen=True)
class PlanWithOffload(Plan):
    """A plan, and what offload makes of a prompt that does not fit one GPU.

    Args:
        offload: None where the prompt fits as it is, or several GPUs share it.
    """

    offload: OffloadPlan | None = None


def with_offload(
    config: PreTrainedConfig, plan: Plan, ranks: Ranks, batch_size: int, dtype: torch.dtype
) -> PlanWithOffload:
    """The plan with its `plan_offload`, whose arguments these are."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return PlanWithOffload(**fields, offload=plan_offload(config, plan, ranks, batch_size, dtype))


def plan_offload(
    config: PreTrainedConfig, plan: Plan, ranks: Ranks, batch_size: int, dtype: torch.dtype
) -> OffloadPlan | None:
    """What it takes to fit a prompt that does not fit one GPU; None where it fits, or several GPUs share it.

    None of a Block Transformer too, whose blocks do not wait there.

    Args:
        config: the text config.
        plan: without offload.
        ranks: the GPUs.
        batch_size: sequences.
        dtype: of keys and values.
    """
    if plan.fits or ranks.total > 1 or plan.block_length > 1:
        return None
    number = number_of_layers(config)
    a_layer = batch_size * layer_bytes(config, plan.context, dtype)
    needed = plan.cache + plan.workspace.activations

    def need(count: int) -> int:
        return needed - batch_size * saved_bytes(config, plan.context, dtype, count)

    count = fewest_layers(need, plan.room, number)
    size = (number if count is None else count) * a_layer
    return OffloadPlan(
        layers=count,
        number=number,
        host=size,
        fetched=size,
        rate=HOST_RATE,
        expected_a_token=max(plan.expected_a_token, size / HOST_RATE),
        expected_recomputing=plan.expected_first_token,
    )
