"""A captured program that outlives its call of `generate`, for the next call of the same kind.

Capturing the steps of a Block Transformer takes about as long as a hundred blocks of a small batch. So the
program of the last call stays with the prepared model, its buffers included: the next call fills its keys and
values into them, and where rows, processors and model are the same, the graph goes on with the new state.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_longattn.generation.prompts import PromptGraphs
from hf_longattn.instance import PLAIN, every_module, plain_settings

# Code that a fingerprint knows: what else takes part in a forward may keep settings where nobody looks.
_KNOWN = ("torch", "transformers", "hf_longattn")


class KeptProgram:
    """At most one program of a prepared model, with all that its graph reads and writes."""

    def __init__(self) -> None:
        self.program: Any = None
        self.prompts = PromptGraphs()
        self._model: tuple[Any, ...] | None = None
        self._busy = threading.Lock()

    def clear(self) -> None:
        """Lets go of the program and of its memory."""
        self.program = self._model = None
        self.prompts.clear()

    @contextlib.contextmanager
    def serving(self) -> Iterator["KeptProgram"]:
        """Around a call, which gets this; one inside it, or beside it in another thread, gets an empty one.

        A call that fails, say for memory, leaves nothing behind.
        """
        if not self._busy.acquire(blocking=False):
            yield KeptProgram()
            return
        try:
            yield self
        except BaseException:
            self.clear()
            raise
        finally:
            self._busy.release()

    def keep(self, program: Any, model: nn.Module, length: int | None = None) -> None:
        """Keeps a program that has a graph, in place of an earlier one.

        Args:
            program: a `BlockProgram` whose cache is nobody else's.
            model: whose steps were captured.
            length: of the prompt, where all of its rows are whole.
        """
        if program.graph is not None and program is not self.program:
            self.clear()
            if program.key() is not None and (seen := fingerprint(model)) is not None:
                self.program, self._model = program, seen
        if self.program is not None and length is not None:
            self.prompts.note(length)

    def lend(self, cache: Any, rows: int, model: nn.Module) -> None:
        """Has an empty cache fill the buffers of the kept program, which is dropped where it cannot serve.

        Args:
            cache: of a call that has no tokens yet; None where it holds some, or outlives the call.
            rows: of the batch.
            model: that generates; what was changed since the capture ends the program.
        """
        if self.program is None:
            return
        if cache is None or self._model != fingerprint(model):
            self.clear()
        elif not cache.borrow(self.program.decoding.cache, rows):
            self.clear()

    def steps_to(self, program: Any) -> int | None:
        """Tokens after which the kept graph could go on in the place of `program`, or None.

        Args:
            program: the `BlockProgram` of this call, without a graph.
        """
        if self.program is None:
            return None
        steps = self.program.steps_from(program)
        if steps is None:
            self.clear()
        return steps


def fingerprint(model: nn.Module) -> tuple[Any, ...] | None:
    """What a captured forward depends on beyond its inputs, to be compared; None where that is not known.

    Args:
        model: whose modules, plain settings and addresses of weights are noted.
    """
    if torch.is_autocast_enabled():
        # A graph reads the weights that autocast has cast, which are gone when autocast ends.
        return None
    noted: list[Any] = [torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled()]
    noted.append(torch.are_deterministic_algorithms_enabled())
    for module in every_module(model):
        if type(module).__module__.partition(".")[0] not in _KNOWN:
            return None
        settings = vars(module)
        implementation = getattr(settings.get("config"), "_attn_implementation", None)
        # The module itself, not its id: an id may come back.
        noted.append((module, settings.get("forward"), implementation, plain_settings(module)))
        own = [*module._parameters.values(), *module._buffers.values()]
        noted.append(
            [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in own if each is not None]
        )
    return tuple(noted)


def settings_of(processors: Any) -> tuple[Any, ...] | None:
    """Types and settings of logits processors, to be compared; None where one holds more than plain values.

    Args:
        processors: of a call.
    """
    found = []
    for processor in processors:
        values = vars(processor)
        if not all(isinstance(value, PLAIN) for value in values.values()):
            return None
        found.append((type(processor), tuple(sorted(values.items()))))
    return tuple(found)


def same_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory.

    Args:
        one: any tensor.
        other: any tensor.
    """
    where = (one.data_ptr(), one.shape, one.stride(), one.dtype)
    return where == (other.data_ptr(), other.shape, other.stride(), other.dtype)
