"""A captured program that outlives its call of `generate`, for the next call of the same kind.

Capturing the steps of a Block Transformer takes about as long as a hundred blocks of a small batch. So the
program of the last call stays with the prepared model, its buffers included: the next call fills its keys and
values into them, and where rows, processors and model are the same, the graph goes on with the new state.
"""

import contextlib
import operator
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
        self._model: SeenModel | None = None
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
            if program.key() is not None and (seen := SeenModel(model)).noted is not None:
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
        if self.program is None or self._model is None:
            return
        if cache is None or not self._model.is_still(model):
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


class SeenModel:
    """A model as it was when its steps were captured, for the question before every prompt: is it still?

    Most often every module holds the very objects that it held, which is seen in a fraction of the time that
    their settings take.

    Args:
        model: whose `fingerprint` is noted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.noted = fingerprint(model)
        self._look(model)

    def is_still(self, model: nn.Module) -> bool:
        """Whether nothing has changed that the captured steps depend on.

        Args:
            model: perhaps another one.
        """
        if model is self._modules[0] and self._holds_the_same():
            return True
        if self.noted is None or self.noted != fingerprint(model):
            return False
        self._look(model)
        return True

    def _look(self, model: nn.Module) -> None:
        self._modules = every_module(model)
        tables = [(part._modules, part._parameters, part._buffers) for part in self._modules]
        # A table that was empty may be filled; only those with something in them are read.
        self._empty = [table for each in tables for table in each if not table]
        self._parts, *tensors = ([table for table in kind if table] for kind in zip(*tables, strict=True))
        self._tensors = tensors[0] + tensors[1]
        configs = {
            id(config): config for part in self._modules if (config := vars(part).get("config")) is not None
        }
        self._configs = list(configs.values())
        self._objects, self._values = self._held(), self._told()

    def _holds_the_same(self) -> bool:
        # Asked by identity first: `==` between what was exchanged could be a tensor.
        held = self._held()
        same = len(held) == len(self._objects) and all(map(operator.is_, held, self._objects))
        return same and self._told() == self._values

    def _held(self) -> list[Any]:
        """All that the modules hold under a name, and the parts of each."""
        held: list[Any] = []
        for module in self._modules:
            held += vars(module).values()
        for parts in self._parts:
            held += parts.values()
        return held

    def _told(self) -> list[Any]:
        """What may change within the same objects."""
        tensors = [each for table in self._tensors for each in table.values() if each is not None]
        told: list[Any] = [*_switches(), torch.is_autocast_enabled(), any(self._empty)]
        told += [getattr(config, "_attn_implementation", None) for config in self._configs]
        return [*told, *map(type, self._modules), *_places(tensors)]


def fingerprint(model: nn.Module) -> tuple[Any, ...] | None:
    """What a captured forward depends on beyond its inputs, to be compared; None where that is not known.

    Args:
        model: whose modules, plain settings and addresses of weights are noted.
    """
    if torch.is_autocast_enabled():
        # A graph reads the weights that autocast has cast, which are gone when autocast ends.
        return None
    noted: list[Any] = _switches()
    for module in every_module(model):
        if type(module).__module__.partition(".")[0] not in _KNOWN:
            return None
        settings = vars(module)
        implementation = getattr(settings.get("config"), "_attn_implementation", None)
        # The module itself, not its id: an id may come back.
        noted.append((module, settings.get("forward"), implementation, plain_settings(module)))
        own = [*module._parameters.values(), *module._buffers.values()]
        noted.append(_places([each for each in own if each is not None]))
    return tuple(noted)


def _switches() -> list[Any]:
    """What the whole process may have set."""
    precision, inference = torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled()
    return [precision, inference, torch.are_deterministic_algorithms_enabled()]


def _places(tensors: list[Tensor]) -> list[Any]:
    return [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in tensors]


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
    return _places([one]) == _places([other])
