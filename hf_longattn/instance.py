"""Changing one model instance, and changing it back: what `prepare_*` and `restore` are made of."""

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_longattn.masking import check_config

logger = logging.getLogger("hf_longattn")

_ATTRIBUTE = "_hf_longattn_setups"
_MISSING = object()
# Types of settings that compare by value.
PLAIN = (bool, int, float, str, type(None))
# Tables of parameters, parts and hooks that every module has: most of its attributes.
_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
_Fields = TypeVar("_Fields")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, torch.compile and PEFT wrappers.

    Args:
        model: a model, wrapped or not.

    Raises:
        TypeError: there is no transformers model inside.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            raise TypeError(
                f"`model` must be a transformers model, perhaps wrapped by PEFT, accelerate or torch, got "
                f"{type(model).__name__}."
            )
    return inner


def plain_settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes of a module: two of one class and size may compute different things.

    Args:
        module: any module.
    """
    values = vars(module).items()
    # `isinstance` would ask a config for its `__class__`, and a config takes its time to look that up.
    return tuple([pair for pair in values if pair[0] not in _TABLES and issubclass(type(pair[1]), PLAIN)])


def looks_ahead(module: nn.Module) -> bool:
    """Whether the tokens in a module see later ones: it has attention, and none of it is causal.

    Cross-attention is not causal either, beside attention that is.

    Args:
        module: a layer, or a decoder of which the first causal part settles it.
    """
    causal = (part.is_causal for part in module.modules() if hasattr(part, "is_causal"))
    return not next(causal, True) and not any(causal)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks run around the forward or the backward of a module: its own, or those for all modules.

    Args:
        module: any module.
    """
    # What torch keeps for every module has no public name.
    of_all: Any = nn.modules.module
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or module._backward_hooks or module._backward_pre_hooks or of_all._has_any_global_hook())


def is_compiled(modules: list[nn.Module]) -> bool:
    """Whether a user has compiled one of these modules that has parts: in place, wrapped, or its forward.

    For every forward that is put in the place of a part's it would be compiled again, until the compiler
    gives up.

    Args:
        modules: a module and what is in it.
    """
    return any(
        module._compiled_call_impl is not None
        or "_orig_mod" in module._modules
        # What `torch.compile` leaves on a function, and `functools.wraps` on those around it.
        or hasattr(vars(module).get("forward"), "get_compiler_config")
        for module in modules
        if module._modules
    )


def every_module(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())`, found in a fraction of the time: it is asked before every prompt.

    Args:
        model: any module.
    """
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if parts := module._modules:
                ahead += reversed(parts.values())
    return list(found.values())


@dataclass(slots=True)
class _Change:
    owner: Any
    name: str
    before: Any
    value: Any


class Setup:
    """The changes that one `prepare_*` made to one model; `undo` takes all of them back.

    Args:
        model: the transformers model.
        lasting: whether the model may be copied or pickled meanwhile, which leaves the changes out.
    """

    def __init__(self, model: PreTrainedModel, lasting: bool = False) -> None:
        self.model, self.lasting = model, lasting
        self._changes: list[_Change] = []
        # What is changed is also kept in the list, so that an id stays one object's.
        self._owners: set[int] = set()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of one instance and remembers what the instance itself had."""
        if self.lasting and isinstance(owner, nn.Module) and id(owner) not in self._owners:
            self._set(owner, "__reduce_ex__", functools.partial(_reduce_plain, owner, self.model))
        self._set(owner, name, value)

    def set_forward(self, model: nn.Module, function: Callable[..., Any]) -> None:
        """Sets the forward of a whole model, so that accelerate can wrap it and unwrap it again.

        `Accelerator.unwrap_model(keep_fp32_wrapper=False)` follows `__wrapped__` to the last function, and
        binds that one to the model as a method: here it finds ours, which takes the model itself for granted.

        Args:
            model: the module whose forward is replaced.
            function: called with the arguments of a call.
        """

        @functools.wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return function(*(args[1:] if args and args[0] is model else args), **kwargs)

        stand_in: Any = forward
        stand_in.__signature__ = inspect.signature(function)
        del stand_in.__wrapped__
        self.set(model, "forward", forward)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append(_Change(owner, name, vars(owner).get(name, _MISSING), value))
        self._owners.add(id(owner))
        if _is_no_part(owner, value):
            object.__setattr__(owner, name, value)
        else:
            setattr(owner, name, value)

    def undo(self) -> None:
        """Puts every attribute back, last change first; what others put on top of ours since stays."""
        others = self._of_others() if self._changes else {}
        for change in reversed(self._changes):
            on_top = others.get((id(change.owner), change.name), ()) if others else ()
            later = next((other for other in on_top if other.before is change.value), None)
            if later is not None:
                later.before = change.before
            elif _is_own_method(change.owner, change.name):
                # Whoever replaced ours has put the model's own back, as prompt tuning of PEFT does.
                continue
            elif not _is_same(vars(change.owner).get(change.name, _MISSING), change.value):
                # A wrapper that somebody put around ours, say for mixed precision, is theirs to take away.
                logger.warning(
                    "`%s` of %s was replaced after the set-up and is left as it is; restore the model before "
                    "wrapping it again",
                    change.name,
                    type(change.owner).__name__,
                )
            elif change.before is _MISSING and _is_no_part(change.owner, change.value):
                object.__delattr__(change.owner, change.name)
            elif change.before is _MISSING:
                delattr(change.owner, change.name)
            else:
                setattr(change.owner, change.name, change.before)
        self._changes.clear()
        self._owners.clear()

    def _of_others(self) -> "dict[tuple[int, str], list[_Change]]":
        """The changes that other set-ups have made to the model, by owner and name."""
        found: dict[tuple[int, str], list[_Change]] = {}
        for setup in vars(self.model).get(_ATTRIBUTE, {}).values():
            for change in setup._changes if setup is not self else ():
                found.setdefault((id(change.owner), change.name), []).append(change)
        return found

    def use_attention(self, implementation: str) -> None:
        """Switches the model to an attention implementation, on a config of its own.

        A config object may be shared with other models: they keep theirs.

        Args:
            implementation: a registered name.

        Raises:
            ValueError: the model computes attention in its own code, or only takes the name when it is
                loaded, or is one of lightning attention, whose results would not be the same.
        """
        current = self.model.config._attn_implementation
        if current == implementation:
            return
        if current == "lightning_attention":
            raise ValueError(
                f"`attn_implementation`: this set-up needs {implementation!r}, and under it a model of "
                "'lightning_attention' would be another model; leave out what needs it, or load the model "
                f"with `attn_implementation={implementation!r}`."
            )
        for module in self.model.modules():
            if isinstance(module, PreTrainedModel):
                check_config(module.config)
        self._own_configs()
        self.model.set_attn_implementation(implementation)
        if any(config._attn_implementation != implementation for config in _used_configs(self.model)):
            self.undo()
            raise ValueError(
                f"{type(self.model).__name__} cannot change its attention implementation once loaded; load "
                f"it with `from_pretrained(..., attn_implementation={implementation!r})`."
            )
        logger.info("attention implementation: %s -> %s", current, implementation)

    def _own_configs(self) -> None:
        memo: dict[int, Any] = {}
        for module in self.model.modules():
            config = vars(module).get("config")
            if config is not None:
                self.set(module, "config", copy.deepcopy(config, memo))


def _is_no_part(owner: Any, value: Any) -> bool:
    """Whether a module need not look through its tables for a tensor or a part of that name."""
    return isinstance(owner, nn.Module) and isinstance(value, functools.partial)


def _is_same(found: Any, ours: Any) -> bool:
    """Whether an attribute is still the one that was set, perhaps bound to its owner since."""
    return found is ours or (isinstance(found, MethodType) and found.__func__ is ours)


def _is_own_method(owner: Any, name: str) -> bool:
    """Whether an instance was given the method of its class, bound to itself."""
    found = vars(owner).get(name)
    is_bound = isinstance(found, MethodType) and found.__self__ is owner
    return is_bound and found.__func__ is getattr(type(owner), name, None)


def _reduce_plain(owner: nn.Module, model: PreTrainedModel, protocol: Any) -> tuple[Any, ...]:
    """What `copy` and `pickle` take of a changed module: our changes would still call the first model."""
    reduced: Any = type(owner).__reduce_ex__(owner, protocol)
    build, arguments, state, *rest = reduced
    state = {name: value for name, value in state.items() if name != _ATTRIBUTE}
    changes = [change for setup in setups(model).values() for change in setup._changes]
    for change in reversed([change for change in changes if change.owner is owner]):
        state.pop(change.name, None)
        if change.before is not _MISSING:
            state[change.name] = change.before
    return build, arguments, state, *rest


def _used_configs(model: PreTrainedModel) -> list[Any]:
    """The configs of the model's own kind; T5's stacks keep copies that the switch does not reach."""
    configs = [vars(module).get("config") for module in model.modules()]
    return [config for config in configs if type(config) is type(model.config)]


def read_setup(kind: type[_Fields], config: Any, fields: dict[str, Any]) -> _Fields:
    """The settings of a `prepare_*` call.

    Args:
        kind: their dataclass.
        config: one of that kind, or None for its defaults.
        fields: what the call gave beside it, which goes first.

    Raises:
        TypeError: `config` is of another kind, or has no such field.
    """
    if config is not None and not isinstance(config, kind):
        raise TypeError(
            f"`config` must be a {kind.__name__}, got {type(config).__name__}; give the fields of a dict as "
            "keywords."
        )
    chosen: Any = kind() if config is None else config
    known = [field.name for field in dataclasses.fields(chosen)]
    if unknown := [name for name in fields if name not in known]:
        raise TypeError(f"`{unknown[0]}` is no field of {kind.__name__}, which has {', '.join(known)}.")
    return dataclasses.replace(chosen, **fields)


def setups(model: PreTrainedModel) -> dict[str, Setup]:
    """The set-ups that are active on a model, by kind, in the order they were made."""
    return vars(model).setdefault(_ATTRIBUTE, {})


def begin(model: PreTrainedModel, kind: str) -> Setup:
    """A new set-up of a kind; an earlier one of the same kind is undone first.

    Args:
        model: the transformers model.
        kind: "generation" or "training".
    """
    active = vars(model).get(_ATTRIBUTE, {})
    if kind in active:
        active.pop(kind).undo()
    return Setup(model, lasting=True)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `prepare_generation` and `prepare_training`: implementation, config and methods are what they
    were.

    Args:
        model: the model that was prepared, wrapped as it was then or not.

    Returns:
        the same model.

    Raises:
        TypeError: there is no transformers model inside.
    """
    inner = unwrap(model)
    active = setups(inner)
    for setup in reversed(list(active.values())):
        setup.undo()
    vars(inner).pop(_ATTRIBUTE, None)
    return model
