"""What `generate` of a prepared model is given, checked before any work."""

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_longattn.instance import Setup


def watch_inputs(model: PreTrainedModel, changes: Setup) -> None:
    """Refuses prompts and masks of another shape where `generate` of one model is called.

    Args:
        model: the transformers model.
        changes: where the change is noted, to be undone.
    """
    original: Any = model.generate
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if model.main_input_name == "input_ids":
            given = signature.bind_partial(*args, **kwargs).arguments
            keywords = given.get("kwargs", {})
            check_prompt(given.get("inputs"), keywords)
            check_cache(model, keywords.get("past_key_values"))
        return original(*args, **kwargs)

    changes.set(model, "generate", generate)


def check_prompt(inputs: Any, keywords: dict[str, Any]) -> None:
    """Refuses a prompt that no model can read, and a mask that is not the prompt's.

    Args:
        inputs: the first argument of `generate`, or None.
        keywords: the others: `input_ids` in its place, `attention_mask`, `position_ids`, `past_key_values`.

    Raises:
        ValueError: a shape that does not fit, by name.
        TypeError: ids that are no tensor of integers, a mask that is none, or a cache that is none, by name.
    """
    name = "input_ids" if inputs is None else "inputs"
    ids = keywords.get("input_ids") if inputs is None else inputs
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        way = "`**inputs`" if hasattr(ids, "keys") else "`torch.tensor(...)`"
        raise TypeError(f"`{name}` must be a tensor of token ids, got {type(ids).__name__}; pass {way}.")
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"`{name}` must hold token ids, integers, got {ids.dtype}; cast with `.long()`.")
    needed = 0 if keywords.get("inputs_embeds") is not None else 1
    if ids.ndim != 2 or ids.shape[1] < needed or ids.shape[0] < 1:
        way = "`[None]` makes a batch of one row" if ids.ndim == 1 else "a row and a token in it are needed"
        raise ValueError(f"`{name}` must be (batch, tokens), got shape {tuple(ids.shape)}; {way}.")
    cache = keywords.get("past_key_values")
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise TypeError(
            f"`past_key_values` must be a cache, got {type(cache).__name__}; pass "
            "`LongContextCache(model.config)`, one of transformers, or nothing."
        )
    mask = keywords.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(
            f"`attention_mask` must be a tensor, got {type(mask).__name__}; pass `torch.tensor(...)`."
        )
    if needed and mask is not None and mask.ndim == 2:
        _check_mask(mask, ids, cache)
    positions = keywords.get("position_ids")
    if needed and isinstance(positions, Tensor):
        _check_positions(positions, ids.shape[1], cache)


def check_cache(model: PreTrainedModel, cache: Any) -> None:
    """Refuses a cache of transformers that holds keys of another width than those of the model's layers.

    Args:
        model: the transformers model.
        cache: of a call, or None; ours knows for which model it was made.

    Raises:
        ValueError: names the layer and both widths.
    """
    # With tensor parallelism a cache holds the heads of one process.
    apart = hasattr(cache, "check_model") or getattr(model, "tp_size", None)
    layers = [] if cache is None or apart else getattr(cache, "layers", [])
    held: dict[Any, Any] = {index: getattr(layer, "keys", None) for index, layer in enumerate(layers)}
    # Layers of another tower count from 0 too.
    for part in model.get_decoder().modules() if held else ():
        keys = held.get(getattr(part, "layer_idx", None))
        width = getattr(getattr(part, "k_proj", None), "out_features", None)
        if type(width) is not int or not isinstance(keys, Tensor) or keys.ndim != 4:
            continue
        if keys.shape[1] * keys.shape[3] != width:
            raise ValueError(
                f"`past_key_values` holds keys of {keys.shape[1]} heads x {keys.shape[3]} in layer "
                f"{part.layer_idx}, but those of this model are {width} wide: another model filled it; pass "
                "a cache made from this model's config."
            )


def _check_positions(positions: Tensor, tokens: int, cache: Any) -> None:
    count = positions.shape[-1] if positions.ndim else 0
    if count == tokens:
        return
    held = 0 if cache is None else int(cache.get_seq_length())
    if not held or count not in (tokens - held, tokens + held):
        raise ValueError(
            f"`position_ids` must have one for each of the {tokens} token ids, or of those that "
            f"`past_key_values` does not hold yet, got shape {tuple(positions.shape)}."
        )


def _check_mask(mask: Tensor, ids: Tensor, cache: Any) -> None:
    rows, tokens = ids.shape
    held = 0
    if mask.shape[1] != tokens and cache is not None:
        held = int(cache.get_seq_length())
    if mask.shape[0] != rows or mask.shape[1] not in (tokens, held + tokens):
        also = f", or {(rows, held + tokens)} with what `past_key_values` holds" if held else ""
        raise ValueError(
            f"`attention_mask` must be {(rows, tokens)} as the token ids{also}, got {tuple(mask.shape)}."
        )
