"""`generate()` of one prompt by several processes: the same call, the same tokens, one streamer."""

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from hf_longattn.instance import Setup
from hf_longattn.kernels.dispatch import warn_slow
from hf_longattn.parallel.checks import check_same, digest
from hf_longattn.parallel.group import SequenceGroup

# These look at the tokens alone, which are the same on every rank.
_DETERMINISTIC = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


class _Silent(BaseStreamer):
    """Stands in for the streamer of every rank but the first.

    Args:
        streamer: the caller's.
    """

    def __init__(self, streamer: Any) -> None:
        # Who iterates over one would wait for its end for ever.
        self._awaited = streamer if hasattr(streamer, "__next__") or hasattr(streamer, "__anext__") else None

    def put(self, value: Tensor) -> None:
        """Drops the tokens."""

    def end(self) -> None:
        """Ends a streamer that somebody waits for."""
        if self._awaited is not None:
            self._awaited.end()


class GroupStopping(StoppingCriteriaList):
    """Stopping criteria decided by rank 0: clocks and states of their own differ from rank to rank.

    Args:
        criteria: those of this rank.
        group: the ranks.
    """

    def __init__(self, criteria: StoppingCriteriaList, group: SequenceGroup) -> None:
        super().__init__(criteria)
        self.group = group

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """(B,) bool, where generation ends, as rank 0 has it."""
        self.group.watch.check()
        done = super().__call__(cast(Any, input_ids), scores, **kwargs)
        if all(isinstance(criterion, _DETERMINISTIC) for criterion in self):
            return done
        return self.group.broadcast(done.to(torch.uint8)).bool()


def compare_answers(model: PreTrainedModel, group: SequenceGroup, changes: Setup) -> None:
    """Refuses answers of `generate` that have parted: what the ranks hold is then of no use to anyone.

    Weights, adapters and processors of the caller's are too much to compare before the first token.

    Args:
        model: the transformers model.
        group: the ranks.
        changes: where the change is noted, to be undone.
    """
    original: Any = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        tokens = getattr(output, "sequences", output)
        check_same(group, {"answer": tokens if isinstance(tokens, Tensor) else None}, model.device)
        return output

    changes.set(model, "generate", generate)


def share_generation(
    model: PreTrainedModel, group: SequenceGroup, changes: Setup, settings: dict[str, Any]
) -> None:
    """Makes `generate` of a model check, watch and stop as one over a group.

    Args:
        model: the transformers model.
        group: the ranks.
        changes: where the changes are noted, to be undone.
        settings: of `prepare_generation`, those that must be the same on every rank, by their name.
    """
    original_generate: Any = model.generate
    shared, groups = group, {id(each): each for each in (group, group.control)}
    group = group.control
    original_criteria: Any = model._get_stopping_criteria
    signature = inspect.signature(original_generate)

    @functools.wraps(original_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with group.watch:
            if group.watch.is_out_of_step:
                for each in groups.values():
                    each.renew()
                group.watch.is_out_of_step = False
            call = signature.bind_partial(*args, **kwargs)
            check_same(group, {**settings, **_fields(model, call.arguments)}, model.device)
            if shared.world_size > 1:
                _warn_of_whole_cache(kwargs.get("past_key_values"))
                _take_over(kwargs.get("past_key_values"), shared)
            if call.arguments.get("streamer") is not None and group.rank > 0:
                call.arguments["streamer"] = _Silent(call.arguments["streamer"])
            return original_generate(*call.args, **call.kwargs)

    def get_stopping_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
        return GroupStopping(original_criteria(*args, **kwargs), group)

    changes.set(model, "generate", generate)
    changes.set(model, "_get_stopping_criteria", get_stopping_criteria)


def _warn_of_whole_cache(cache: Any) -> None:
    if cache is not None and getattr(cache, "group", None) is None:
        warn_slow(
            "generate", f"`past_key_values` is a {type(cache).__name__}, which every process holds whole"
        )


def _take_over(cache: Any, group: SequenceGroup) -> None:
    """Has a cache that another set-up of the same ranks has filled go on over the connections of this one.

    They are the ones that are watched, and opened anew after an error.
    """
    former = getattr(cache, "group", None)
    if not isinstance(former, SequenceGroup) or former is group or former.ranks != group.ranks:
        return
    cache.group = group
    for layer in cache.layers:
        for part in (layer, getattr(layer, "scales", layer)):
            if hasattr(part, "group_of_ranks"):
                part.group_of_ranks = group


def _fields(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """What must be the same on every rank, by the name that an error gives it."""
    given = arguments | arguments.get("kwargs", {})
    given.pop("kwargs", None)
    ids = given.pop("inputs", None)
    ids = given.pop("input_ids", None) if ids is None else ids
    cache, mask = given.pop("past_key_values", None), given.pop("attention_mask", None)
    config = _effective(model, given)
    given.pop("streamer", None)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "generation_config": _described(config),
        "past_key_values": None if cache is None else _of_cache(cache),
        "arguments": _described(given),
        "model config": _described(model.config),
        "model dtype": str(model.dtype),
        "seed": _random_state(model) if config.get("do_sample") else None,
    }


def _effective(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a call comes to, which are taken out of its arguments."""
    defaults = model.generation_config
    config: Any = given.pop("generation_config", None)
    chosen = {} if config is None else config.to_dict()
    settings = defaults.to_dict() | {name: value for name, value in chosen.items() if value is not None}
    return settings | {name: given.pop(name) for name in list(given) if hasattr(defaults, name)}


def _of_cache(cache: Any) -> list[Any]:
    length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else None
    return [type(cache).__name__, length, str(getattr(cache, "cache_dtype", None))]


def _described(value: Any) -> Any:
    """The value without addresses and states, which differ from process to process: objects by their type.

    Processors of transformers are what their parameters are: those of a caller may differ by rank on purpose.
    """
    if isinstance(value, dict):
        return {str(name): _described(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(entry) for entry in value]
    if isinstance(value, Tensor):
        return digest(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    described: dict[str, Any] = {"type": type(value).__name__}
    if isinstance(value, PreTrainedModel):
        described |= {name: _described(getattr(value, name)) for name in ("config", "generation_config")}
    elif isinstance(value, LogitsProcessor) and type(value).__module__.startswith("transformers."):
        described |= _described(vars(value))
    elif isinstance(value, (PreTrainedConfig, GenerationConfig)):
        described |= _described(value.to_dict())
    return described


def _random_state(model: PreTrainedModel) -> list[int]:
    states = [torch.get_rng_state()]
    if model.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(model.device))
    return [digest(state) for state in states]
