"""What adapters of PEFT put around a model and on its modules, where a cut sequence would mislead them."""

from typing import Any

from torch import nn

from hf_longattn.instance import every_module

# An activated LoRA counts its tokens from the end of what a module is given.
_COUNTS_TOKENS = "alora_offsets"


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


def counts_tokens(module: nn.Module) -> str | None:
    """The name of a part of `module` that counts tokens from the end of its input, or None."""
    # Asked before every prompt: names take longer than the rest.
    if not any(part._forward_pre_hooks for part in every_module(module)):
        return None
    for name, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            offsets = (getattr(hook, "keywords", None) or {}).get(_COUNTS_TOKENS) or ()
            if any(offset is not None for offset in offsets):
                return name or type(part).__name__
    return None


class ForwardHooks:
    """The hooks before and after the forward of a layer's modules, which its recomputation needs again.

    PEFT hangs the choice of an adapter for each row (`adapter_names`) on the modules for one forward, and
    takes it away before the backward.

    Args:
        layer: a decoder layer.

    Raises:
        ValueError: one of its modules counts tokens from the end of its input, which is a block here.
    """

    def __init__(self, layer: nn.Module) -> None:
        if (name := counts_tokens(layer)) is not None:
            raise ValueError(
                f"`model`: the activated LoRA of `{name}` counts tokens from the end of its input, and "
                "prepared layers hand it a block at a time; train this model unprepared."
            )
        self.layer, self.names = layer, _hooks(layer)

    def check(self) -> None:
        """Refuses a backward whose recomputation would lack a hook of the forward.

        Raises:
            ValueError: names the module.
        """
        now = _hooks(self.layer)
        for key, name in self.names.items():
            if key not in now:
                raise ValueError(
                    f"`{name}` had a forward hook that is gone in the backward, where the layer computes "
                    "again; keep hooks until then. For rows with adapters of their own (`adapter_names`), "
                    "train this model unprepared."
                )


def _hooks(layer: nn.Module) -> dict[tuple[int, int], str]:
    """The names of the modules with hooks, by the ids of module and hook."""
    found = {}
    for name, part in layer.named_modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            found |= {(id(part), number): name or type(part).__name__ for number in hooks}
    return found
