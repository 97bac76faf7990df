"""What transformers makes of the settings of a call before its prompt is read, in less of the host's time.

Results, warnings and refusals are its own. What it finds out anew for every call is found out once, and what
it asks the device, which has to be waited for, is asked of the host.
"""

import functools
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_longattn.instance import Setup

# A type checker does not bind its methods to it.
_Mixin: Any = GenerationMixin
_TOKENS = ("_bos_token_tensor", "_eos_token_tensor", "_pad_token_tensor", "_decoder_start_token_tensor")


class _StandIn:
    """An object in all but some of its attributes.

    Args:
        original: has all others.
        own: the attributes, by name.
    """

    def __init__(self, original: Any, **own: Any) -> None:
        vars(self).update(own, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def check_config_once(model: PreTrainedModel, changes: Setup) -> None:
    """Looks for settings of generation in a model's config where it has new fields, not at every call.

    To look, transformers makes a config of that class and spells it out, which takes the host longer than all
    else before a prompt. What it finds depends on which fields are set, not on what they say.

    Args:
        model: the transformers model; one that prepares its settings in a way of its own is left alone.
        changes: where the change is noted, to be undone.
    """
    original: Any = model._prepare_generation_config
    if getattr(original, "__func__", None) is not _Mixin._prepare_generation_config:
        return
    checked: set[Any] = set()

    @functools.wraps(original)
    def prepare(generation_config: Any = None, **kwargs: Any) -> Any:
        fields = _set_fields(model.config)
        if fields in checked:
            plain = _StandIn(model.config, _get_generation_parameters=dict)
            known = _StandIn(model, config=plain)
            return _Mixin._prepare_generation_config(known, generation_config, **kwargs)
        prepared = original(generation_config, **kwargs)
        if generation_config is None:
            checked.add(fields)
        return prepared

    changes.set(model, "_prepare_generation_config", prepare)


def _set_fields(config: Any) -> Any:
    return type(config), frozenset([name for name, value in vars(config).items() if value is not None])


def make_tokens_on_host(model: PreTrainedModel, changes: Setup) -> None:
    """Has the special tokens of a call checked on the host before they go to the device.

    Args:
        model: the transformers model; one that prepares its tokens in a way of its own is left alone.
        changes: where the change is noted, to be undone.
    """
    original: Any = model._prepare_special_tokens
    if getattr(original, "__func__", None) is not _Mixin._prepare_special_tokens:
        return

    @functools.wraps(original)
    def prepare(
        generation_config: Any,
        kwargs_has_attention_mask: bool | None = None,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        original(generation_config, kwargs_has_attention_mask, device="cpu", batch_size=batch_size)
        for name in _TOKENS:
            if (token := getattr(generation_config, name)) is not None:
                token = token.to(model.device if device is None else device, non_blocking=True)
                setattr(generation_config, name, token)

    changes.set(model, "_prepare_special_tokens", prepare)
