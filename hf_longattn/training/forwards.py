"""What stands in for the forwards of a prepared model's modules: a block of tokens at a time."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_longattn.adapters import LayerState
from hf_longattn.fusion import fused_norm
from hf_longattn.parallel.sequence import SequenceShare, current_share
from hf_longattn.training.arguments import named_arguments
from hf_longattn.training.attention import PrefixAttention
from hf_longattn.training.captured import CapturedTensors
from hf_longattn.training.layer import BlockRun, Runtime
from hf_longattn.training.node import run_blocks
from hf_longattn.training.ownership import has_saving_hooks, references
from hf_longattn.training.randomness import BlockRandomness
from hf_longattn.training.shared_attention import SharedAttention
from hf_longattn.training.states import BlockStates
from hf_longattn.training.unread import UnreadProducts
from hf_longattn.training.visibility import PACKING

_CACHES = ("past_key_values", "past_key_value", "layer_past")


def _new_seed(module: nn.Module) -> int | None:
    # Drawn on the CPU, without a stall; dropout of every block follows from it.
    return int(torch.randint(2**62, ()).item()) if module.training else None


def blockwise_forward(layer: nn.Module, runtime: Runtime, has_state: bool = False) -> Callable[..., Any]:
    """What stands in for the forward of a decoder layer.

    Args:
        layer: the layer, its forward still its own.
        runtime: settings of the model.
        has_state: whether it is lightning attention, not softmax.

    Returns:
        a function with the same signature.
    """
    original = layer.forward
    signature = inspect.signature(original)
    hidden_name = next(iter(signature.parameters))
    cache_name = next((name for name in _CACHES if name in signature.parameters), _CACHES[0])
    # Once it did, its calls do not begin by finding that out.
    draws = False
    unread, captured = UnreadProducts(layer), CapturedTensors(layer)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal draws
        hidden = args[0] if args else kwargs[hidden_name]
        found = references(hidden)
        if runtime.inputs.answer(found):
            return hidden
        arguments = named_arguments(signature, args, kwargs)
        del arguments[hidden_name]
        caches = [arguments[name] for name in _CACHES if arguments.get(name) is not None]
        trains = layer.training and torch.is_grad_enabled()
        if not runtime.active or hidden.ndim != 3 or hidden.numel() == 0 or (caches and not trains):
            return original(*args, **kwargs)
        # As gradient checkpointing does: a layer that trains fills no cache.
        _check_empty(caches)
        arguments = {name: value for name, value in arguments.items() if name not in _CACHES}
        if arguments.get("use_cache"):
            arguments["use_cache"] = False
        share = runtime.block_rows.share_of(arguments)
        rows = runtime.rows(hidden, share, has_state)
        if has_state:
            attention = _states(runtime, arguments, rows, hidden, share, cache_name)
        else:
            attention = _attention(runtime, arguments, rows, hidden, share)
        arguments = {name: value for name, value in arguments.items() if name not in PACKING}
        state = LayerState(layer)
        room = _may_overwrite(runtime, layer, hidden, found, keywords=True)
        numbers = BlockRandomness(_new_seed(layer), hidden.device, draws)
        run = BlockRun(
            original, arguments, rows, attention, numbers, hidden.device, state, share, room, unread=unread,
            captured=captured,
        )  # fmt: skip
        output = run_blocks(run, runtime, layer, hidden, grouped=True)
        draws = numbers.draws
        runtime.inputs.note(output)
        return run.as_returned(output)

    return forward


def _check_empty(caches: list[Any]) -> None:
    held = max((cache.get_seq_length() for cache in caches if hasattr(cache, "get_seq_length")), default=0)
    if held:
        raise ValueError(
            f"`past_key_values` holds {held} tokens: a prepared model trains without a cache; hand it whole "
            "sequences, or `hf_longattn.restore` the model."
        )


def _attention(
    runtime: Runtime,
    arguments: dict[str, Any],
    rows: list[slice],
    hidden: Tensor,
    share: SequenceShare | None,
) -> Callable[[], PrefixAttention]:
    places = rows if share is None else [share.place(part) for part in rows]
    mask = arguments.get("attention_mask")
    visibility = runtime.visibility.get(mask, arguments, places, hidden.device, share)
    if share is not None:
        return functools.partial(SharedAttention, visibility, share)
    return functools.partial(PrefixAttention, visibility, hidden.shape[1])


def _states(
    runtime: Runtime,
    arguments: dict[str, Any],
    rows: list[slice],
    hidden: Tensor,
    share: SequenceShare | None,
    cache_name: str,
) -> Callable[[], BlockStates]:
    places = rows if share is None else [share.place(part) for part in rows]
    own = runtime.block_rows.get(arguments, places, hidden, share)
    return functools.partial(BlockStates, own, cache_name, share)


def _may_overwrite(
    runtime: Runtime, module: nn.Module, hidden: Tensor, found: tuple[int, ...] | None, keywords: bool
) -> bool:
    if module._forward_pre_hooks or module._forward_hooks or not torch.is_grad_enabled():
        return False
    # Checkpointing of the caller's counts what is saved and runs the layer again: it keeps the input, and a
    # probe in the first run alone would be counted.
    if has_saving_hooks():
        return False
    return runtime.inputs.may_overwrite(module, hidden, found, keywords)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its class: not the embeddings and layers of a "PreLayerNorm" model.

    Args:
        module: a child of a decoder.
    """
    return "Norm" in type(module).__name__ and not any(module.children())


def tokenwise_forward(module: nn.Module, runtime: Runtime) -> Callable[[Tensor], Tensor]:
    """What stands in for the forward of a module that treats every token alone, as the final norm.

    Args:
        module: the module, its forward still its own; an `nn.Embedding` or `nn.Dropout` computes as ever
            where no sequence lies on several ranks.
        runtime: settings of the model.
    """
    original = module.forward

    @functools.wraps(original)
    def forward(hidden: Tensor) -> Tensor:
        found = references(hidden)
        if runtime.inputs.answer(found):
            return hidden
        share = current_share()
        if not runtime.active or hidden.numel() == 0 or (share is None and hidden.ndim != 3):
            return original(hidden)
        drops = isinstance(module, nn.Dropout)
        if drops and (share is None or not module.training or module.p == 0):
            return original(hidden)
        # A row of an embedding's gradient is small, and a block of it is as large as the whole.
        is_table = isinstance(module, nn.Embedding)
        rows = [slice(0, hidden.shape[1])] if is_table else runtime.rows(hidden, share)
        compute = fused_norm(module, original, hidden)
        if len(rows) == 1 and share is None:
            return compute(hidden)
        numbers = BlockRandomness(_new_seed(module) if drops else None, hidden.device, draws=True)
        room = not (drops or is_table) and _may_overwrite(runtime, module, hidden, found, keywords=False)
        run = BlockRun(compute, {}, rows, None, numbers, hidden.device, share=share, may_overwrite=room)
        return run_blocks(run, runtime, module, hidden)

    return forward
