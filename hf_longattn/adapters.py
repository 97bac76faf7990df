"""What adapters of PEFT put around a model and on its modules, where a cut sequence would mislead them."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_longattn.instance import every_module

# An activated LoRA counts its tokens from the end of what a module is given.
_COUNTS_TOKENS = "alora_offsets"
_SCALES, _VELORA = "scalings", "lora_velora_init_type"
# What modules with adapters are set to.
_ACTIVE, _MERGED = "_active_adapter", "merged_adapters"
_OF_ADAPTERS = (_ACTIVE, "_disable_adapters", "scaling", _MERGED)


def check_adapters(model: nn.Module, chunked_loss: bool) -> None:
    """Refuses adapters under which a model prepared for training would not train.

    Args:
        model: as the user has it, wrapped or not.
        chunked_loss: whether the model is to return its loss without logits.

    Raises:
        ValueError: an adapter that fills a cache, or takes the loss from whole logits.
    """
    wrapper: Any = model
    kinds = set()
    while wrapper is not None:
        adapters = getattr(wrapper, "peft_config", None) or {}
        kinds |= {
            str(getattr(adapter.peft_type, "value", adapter.peft_type)) for adapter in adapters.values()
        }
        wrapper = getattr(wrapper, "module", None)
    if "PREFIX_TUNING" in kinds:
        raise ValueError(
            "`model` has a prefix-tuning adapter, which hands every layer keys from a cache, and prepared "
            "layers train without one; use prompt tuning or LoRA, or train this model unprepared."
        )
    if chunked_loss and "CPT" in kinds:
        raise ValueError(
            "`model` has a CPT adapter, which takes its loss from whole logits; use `loss='model'`."
        )


def reads_together(module: nn.Module) -> str | None:
    """The name of a part of `module` whose adapter needs all tokens of a call at once, or None.

    Args:
        module: a model, or a layer.
    """
    # Asked before every prompt: names take longer than the rest.
    return _first_that_reads_together(module, every_module(module))


def _first_that_reads_together(module: nn.Module, parts: list[nn.Module]) -> str | None:
    if not any(map(_reads_together, parts)):
        return None
    return next(name or type(part).__name__ for name, part in module.named_modules() if _reads_together(part))


def _reads_together(part: nn.Module) -> bool:
    # In training this is asked before every call of a layer.
    own = part.__dict__
    if "lily_router" in own["_modules"]:
        # Lily mixes its experts by the average of what they are worth to the tokens of a call.
        return True
    if _VELORA in own and part.training and any(kind != "random" for kind in own[_VELORA].values()):
        # VeLoRA compresses what it keeps for the backward along the average of the tokens.
        return True
    if not own["_forward_pre_hooks"]:
        return False
    keywords = [getattr(hook, "keywords", None) or {} for hook in own["_forward_pre_hooks"].values()]
    # X-LoRA scales each token by its place in the call.
    return any(
        _SCALES in given or any(offset is not None for offset in given.get(_COUNTS_TOKENS) or ())
        for given in keywords
    )


class LayerState:
    """Hooks and settings of a layer's modules in the forward, which its recomputation needs again.

    Who changes the active adapter, or calls `train()` or `eval()`, between a forward and its backward does
    not mean the backward: that runs as the forward did. PEFT hangs the choice of an adapter for each row
    (`adapter_names`) on the modules for one forward, and takes it away before the backward: that is refused.

    Args:
        layer: a decoder layer.

    Raises:
        ValueError: an adapter needs all tokens at once, and its input is a block here.
    """

    def __init__(self, layer: nn.Module) -> None:
        parts = every_module(layer)
        if (name := _first_that_reads_together(layer, parts)) is not None:
            raise ValueError(
                f"`model`: the adapter of `{name}` needs all tokens of a call at once (activated LoRA, "
                "X-LoRA, Lily, VeLoRA by averages), and prepared layers hand it a block at a time; train "
                "this model unprepared."
            )
        self.layer, self.hooks = layer, _hooks(parts)
        tables = [part.__dict__ for part in parts]
        self._settings: list[tuple[dict[str, Any], str, Any]]
        self._settings = [(own, "training", own["training"]) for own in tables]
        for own in tables:
            if _ACTIVE in own:
                self._settings += [(own, name, copy.copy(own[name])) for name in _OF_ADAPTERS if name in own]

    @contextlib.contextmanager
    def as_then(self) -> Iterator[None]:
        """Inside, the modules are set as they were.

        Raises:
            ValueError: names a module with a hook less or more, or whose adapters were merged.
        """
        self._check()
        changed = [(own, name, was) for own, name, was in self._settings if own.get(name) != was]
        before = [(own, name, own.get(name)) for own, name, _ in changed]
        try:
            for own, name, value in changed:
                own[name] = value
            yield
        finally:
            for own, name, value in before:
                own[name] = value

    def _check(self) -> None:
        now = _hooks(every_module(self.layer))
        if now != self.hooks:
            owner, number = next(iter(now ^ self.hooks))
            names = {id(part): name or type(part).__name__ for name, part in self.layer.named_modules()}
            what = (
                "had a forward hook that is gone"
                if (owner, number) in self.hooks
                else "has a new forward hook"
            )
            raise ValueError(
                f"`{names.get(owner, 'every module')}` {what} in the backward, where the layer computes "
                "again; leave hooks as they are until then. For rows with adapters of their own "
                "(`adapter_names`), train this model unprepared."
            )
        for own, name, was in self._settings:
            if name == _MERGED and own.get(name) != was:
                raise ValueError(
                    f"`model`: adapters {was} were merged in the forward, and are {own.get(name)} in the "
                    "backward, where the layer computes again; merge and unmerge after it."
                )


def _hooks(parts: list[nn.Module]) -> frozenset[tuple[int, int]]:
    """Ids of the modules inside a layer with hooks, 0 for all modules, with the numbers of the hooks."""
    # What torch keeps for every module has no public name.
    of_all: Any = nn.modules.module
    tables = [(0, of_all._global_forward_pre_hooks), (0, of_all._global_forward_hooks)]
    # Those of the layer itself run around all of its blocks, and not again.
    for part in parts[1:]:
        own = part.__dict__
        if own["_forward_pre_hooks"] or own["_forward_hooks"]:
            tables += [(id(part), own["_forward_pre_hooks"]), (id(part), own["_forward_hooks"])]
    return frozenset((owner, number) for owner, hooks in tables for number in hooks)
