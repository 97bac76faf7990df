"""Decoding that queues the next step before the host has read whether the last one ended the answer.

transformers' loop asks the device after every token whether any row goes on, and the GPU waits for the host
to ask, to prepare the next step and to launch it. Its `DeferredStopCheck` reads the answer one step later and
takes back the one step too many; it serves Apple's GPUs only. Here it serves the calls of a prepared model
whose results cannot tell: nobody else's code runs once a token, the cache can forget a token, and so can the
generator of random numbers. Streamers get the same tokens in the same order, the first at once, the others a
step later.

Processes that share a prompt agree once a call, before the prompt: a step more on one of them would wait for
the others for ever. What ends an answer is the same numbers on every rank, and so is the step at which the
host reads it.

The loop takes its method from the class of the model, and the check from its module, so no instance can have
another one. While such calls are under way, the name in the module is a subclass that asks whose call it is:
other models, in this thread or another, get what transformers' own class says.
"""

import contextlib
import functools
import inspect
import threading
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import utils
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.devices import default_generator
from hf_longattn.generation.graph import obstacle
from hf_longattn.instance import Setup
from hf_longattn.parallel.group import SequenceGroup

_NAME = "DeferredStopCheck"
_DEVICES = ("cuda",)
# Whose code is known to do nothing else.
_OWN = ("transformers.", "hf_longattn.")
# Processors that call a function of the caller's, or the model.
_CALLING = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


@dataclass
class _Call:
    """What one call of `generate` has said so far; it runs ahead once both lists are known to be plain."""

    streamed: bool
    # By a class of the caller's, which may draw random numbers too.
    streamed_to_others: bool = False
    sampled: bool = False
    plain_processors: bool = False
    plain_criteria: bool = False

    def takes(self, device: torch.device, cache: Any, cache_is_returned: bool) -> bool:
        """Whether the host may read one step late, asked once: what a streamer generates is not this call."""
        plain = self.plain_processors and self.plain_criteria
        self.plain_processors = False
        # A streamer may end the call with an error; a cache that outlives it then holds what was streamed.
        safe = not (self.streamed and cache_is_returned)
        return plain and safe and device.type in _DEVICES and _forgets_a_token(cache)

    def agree(self, group: SequenceGroup, device: torch.device) -> None:
        """Has every rank know what all of them say: streamers and hooks may be those of one."""
        plain = self.plain_processors and self.plain_criteria
        said = torch.tensor([not plain, self.streamed], device=device)
        odd, self.streamed = group.gather(said).any(0).tolist()
        self.plain_processors = self.plain_criteria = not odd


_current: ContextVar[_Call | None] = ContextVar("hf_longattn_call", default=None)
_lock = threading.Lock()
_users = 0


def _chosen_by_call(base: Any) -> Any:
    """A class that is `base` for all calls but those that may run ahead; that of transformers stays.

    Args:
        base: `DeferredStopCheck`.
    """

    class DeferredStopCheck(base):
        chosen_by_call = base

        @staticmethod
        def is_supported(
            device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool
        ) -> Any:
            call = _current.get()
            ahead = call is not None and call.takes(device, cache, cache_is_returned) and not is_assistant
            return ahead or base.is_supported(device, cache, cache_is_returned, is_assistant=is_assistant)

        def __init__(
            self, input_ids: Any, max_length: Any, cache: Any, cache_is_returned: bool, streamer: Any = None
        ) -> None:
            # Our layers forget one token as they are; recorded, a window would grow to the whole answer.
            recorded = cache_is_returned and not _forgets_a_token(cache)
            super().__init__(input_ids, max_length, cache, recorded, streamer)
            self.cache = cache if cache_is_returned else None
            call, device = _current.get(), input_ids.device
            draws = call is not None and call.sampled and device.type in _DEVICES
            self.generator = default_generator(device) if draws else None
            # Behind the numbers of the last step but one, and of the last.
            self.random_states = deque(maxlen=2)

        def __call__(self, unfinished_sequences: Any, tokens: Any, length: int) -> Any:
            if self.generator is not None:
                self.random_states.append(self.generator.get_state())
            streamer = self.streamer if self.is_first_step else None
            stopping = super().__call__(unfinished_sequences, tokens, length)
            if streamer is not None:
                # Whoever waits for the first token need not wait for the capture of the second step too.
                streamer.put(tokens.cpu())
                self.streamer = _AllButFirst(streamer)
            return stopping

        def finish(self) -> Any:
            steps_to_undo = super().finish()
            if steps_to_undo and self.generator is not None:
                self.generator.set_state(self.random_states[0])
            return steps_to_undo

    return DeferredStopCheck


class _AllButFirst(BaseStreamer):
    """Hands on every token but the first, which has been handed on before.

    Args:
        streamer: the caller's.
    """

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.is_first = streamer, True

    def put(self, value: Tensor) -> None:
        """Hands on tokens, (B,), after those of the first call."""
        if not self.is_first:
            self.streamer.put(value)
        self.is_first = False

    def end(self) -> None:
        """Ends the caller's streamer."""
        self.streamer.end()


def _forgets_a_token(cache: Any) -> bool:
    if not isinstance(cache, LongContextCache):
        return False
    return all(isinstance(layer, PreallocatedLayer) for layer in cache.layers)


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    """Puts the choice by call in the place of the class until the last call that is under way ends."""
    global _users
    with _lock:
        _users += 1
        base: Any = getattr(utils, _NAME, None)
        if base is not None and not hasattr(base, "chosen_by_call"):
            setattr(utils, _NAME, _chosen_by_call(base))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            now: Any = getattr(utils, _NAME, None)
            if not _users and "chosen_by_call" in getattr(now, "__dict__", {}):
                setattr(utils, _NAME, now.chosen_by_call)


def run_ahead(model: PreTrainedModel, changes: Setup, group: SequenceGroup | None = None) -> None:
    """Lets greedy and sampled calls of `generate` of one model run ahead of the host.

    Args:
        model: the transformers model.
        changes: where the changes are noted, to be undone.
        group: the ranks that make the same calls, inside the watch of which they are made; None for this
            process alone.
    """
    original_generate: Any = model.generate
    original_processors: Any = model._get_logits_processor
    original_criteria: Any = model._get_stopping_criteria
    signature = inspect.signature(original_generate)

    @functools.wraps(original_generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        streamer = given.get("streamer")
        token = _current.set(
            _Call(streamer is not None, not _is_plain([] if streamer is None else [streamer]))
        )
        try:
            with _patched():
                return original_generate(*args, **kwargs)
        finally:
            _current.reset(token)

    def get_logits_processor(generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original_processors(generation_config, *args, **kwargs)
        if (call := _current.get()) is not None:
            call.sampled = bool(generation_config.do_sample)
            told = call.sampled and call.streamed_to_others
            # A hook sees every call of a module: one too many would show.
            call.plain_processors = not told and _is_plain(processors) and not obstacle(model)
        return processors

    def get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
        criteria = original_criteria(*args, **kwargs)
        if (call := _current.get()) is not None:
            call.plain_criteria = _is_plain(criteria)
            if group is not None:
                call.agree(group, model.device)
        return criteria

    changes.set(model, "generate", generate)
    changes.set(model, "_get_logits_processor", get_logits_processor)
    changes.set(model, "_get_stopping_criteria", get_stopping_criteria)


def _is_plain(steps: Any) -> bool:
    """Whether all processors, criteria or streamers are transformers' or ours, and call nobody else's."""
    return all(type(step).__module__.startswith(_OWN) and not isinstance(step, _CALLING) for step in steps)
