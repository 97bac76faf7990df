"""Decoding from a CUDA graph: one launch a step, lengths on the device, the cache written in place.

The model's own forward is captured once for a cache and a number of new tokens, and replayed as long as the
buffers stay where they are. Everything else (sampling, processors, streamers, stopping) stays in
transformers' loop.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import Clock, PreallocatedLayer, lasting_buffers
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.fusion import fused
from hf_longattn.generation.capture import capture
from hf_longattn.generation.casts import WeightCasts
from hf_longattn.generation.linear import Products
from hf_longattn.instance import Setup, every_module
from hf_longattn.kernels.dispatch import warn_slow
from hf_longattn.kernels.mask_runs import extend_runs, is_known_full

logger = logging.getLogger("hf_longattn")

_GRAPH_DEVICES = ("cuda",)
# More new tokens than this are a prefill.
_MAX_TOKENS = 16
# A mask that outgrows its buffer gets this much more room.
_MASK_ROOM = 4096
_NOT_COMPILED = (
    "a prepared model captures its decoding steps: compile it without `fullgraph`, compile its layers, or "
    "prepare it with `cuda_graph=False`"
)
_TENSORS = ("input_ids", "position_ids", "attention_mask")
# Keywords of a decoding step that are the same at every step, with the values that a graph may hold.
_CONSTANT = {"use_cache": (True, None), "return_dict": (True, None), "logits_to_keep": None}


@contextlib.contextmanager
def device_lengths(cache: LongContextCache, clocks: dict[Any, Clock], count: int) -> Iterator[None]:
    """Inside, `cache` takes its lengths from clocks on the device, one a group of equal layers.

    Args:
        cache: a filled cache with room for `count` more tokens.
        clocks: kept from one step to the next; filled here.
        count: new tokens of the step.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        layer.make_room(count)
    for layer in layers:
        clock = clocks.setdefault(layer.group, Clock(layer.device))
        layer.set_clock(clock)
        layer.clock = clock
    try:
        yield
    finally:
        for layer in layers:
            layer.clock = None


@contextlib.contextmanager
def rehearsal(cache: LongContextCache) -> Iterator[None]:
    """Inside, a step leaves no trace: keys are written again by the replay, states would be added to twice.

    Args:
        cache: a filled cache.
    """
    layers: list[Any] = cache.layers
    states: list[Any] = [layer.recurrent_state for layer in layers if isinstance(layer, RecurrentLayer)]
    before = [state.clone() for state in states]
    try:
        yield
    finally:
        for state, copy in zip(states, before, strict=True):
            state.copy_(copy)


def _can_be_captured(layer: Any) -> bool:
    """Whether a replay does all that the layer's own code would do in a step."""
    # The common kind first: asking an abstract class about another one takes as long as all the rest.
    if isinstance(layer, PreallocatedLayer):
        return layer.is_initialized
    # What is recorded for a rollback is kept on the host.
    return isinstance(layer, RecurrentLayer) and layer.recurrent_state is not None and not layer.record_past


@dataclass
class Step:
    """One captured step: its inputs and output, where the cache was, and casts of weights that it reads."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output_type: Any
    tensors: dict[str, Tensor]
    leaders: list[tuple[Clock, Any]]
    buffers: tuple[int, ...]
    casts: WeightCasts | None = None

    def holds(self, cache: LongContextCache) -> bool:
        """Whether what it reads is where it was, and what it was."""
        return self.buffers == _buffers(cache) and (self.casts is None or self.casts.hold())


@dataclass
class CacheGraphs:
    """The captured steps of one cache."""

    steps: dict[Any, Step] = field(default_factory=dict)
    clocks: dict[Any, Clock] = field(default_factory=dict)
    seen: set[Any] = field(default_factory=set)


class GraphDecoder:
    """Stands in for the forward of one model: replays a graph where a step allows it, else calls the model.

    Args:
        model: the model whose forward is replaced.
        original: its forward.
        required: raise where a step cannot be captured, in place of a warning and an eager step.
    """

    def __init__(self, model: PreTrainedModel, original: Callable[..., Any], required: bool = False) -> None:
        self.model = model
        self.original = original
        self.required = required
        self.products = Products()
        self.graphs: weakref.WeakKeyDictionary[LongContextCache, CacheGraphs] = weakref.WeakKeyDictionary()
        self.casts: weakref.WeakValueDictionary[torch.dtype, WeightCasts] = weakref.WeakValueDictionary()
        self.given_up = False
        self.stand_in: Any = None
        # What captures and replays is no part of a graph that a compiler makes of the model.
        self._uncompiled_step: Any = torch.compiler.disable(self._step, reason=_NOT_COMPILED)

    def owns_forward(self) -> bool:
        """Whether the model's forward is its class's, or ours: `stand_in` is what the instance was given."""
        found = vars(self.model).get("forward")
        plain = getattr(self.original, "__func__", None) is type(self.model).forward
        return plain and getattr(found, "__func__", found) is self.stand_in

    def forward(self) -> Callable[..., Any]:
        """A function with the signature of the model's forward."""

        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or self.given_up or not self._fits(kwargs):
                return self.original(*args, **kwargs)
            return self._uncompiled_step(kwargs)

        return forward

    def _fits(self, kwargs: dict[str, Any]) -> bool:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if (
            ids is None
            or ids.device.type not in _GRAPH_DEVICES
            or ids.shape[1] > _MAX_TOKENS
            or not isinstance(cache, LongContextCache)
        ):
            return False
        if torch.is_grad_enabled() or self.model.training:
            return False
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if cache.offload_layers:
            self.refuse("layers in host memory come by copies whose length changes with every token")
            return False
        layers = cache.layers
        if not all(_can_be_captured(layer) for layer in layers):
            return False
        mask = kwargs.get("attention_mask")
        return (mask is None or mask.ndim == 2) and all(
            value is None or name in (*_TENSORS, "past_key_values") or _is_constant(name, value)
            for name, value in kwargs.items()
        )

    def _step(self, kwargs: dict[str, Any]) -> Any:
        kwargs = without_full_mask(kwargs)
        cache: LongContextCache = kwargs["past_key_values"]
        count = kwargs["input_ids"].shape[1]
        graphs = self.graphs.setdefault(cache, CacheGraphs())
        key = _step_key(kwargs)
        if key not in graphs.seen and count > 1:
            # The number of guesses changes from step to step: only one that comes back is worth a capture.
            graphs.seen.add(key)
            return self.original(**kwargs)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.make_room(count)
        step = graphs.steps.get(key)
        if step is None or not step.holds(cache) or not _copy_inputs(step.inputs, kwargs):
            if (reason := obstacle(self.model)) is not None:
                self.give_up(reason)
                return self.original(**kwargs)
            try:
                step = graphs.steps[key] = self._capture(kwargs, cache, graphs, count)
            except RuntimeError as error:
                self.give_up(reason_of(self.model, error))
                return self.original(**kwargs)
        for clock, layer in step.leaders:
            layer.set_clock(clock)
        step.graph.replay()
        for clock, _ in step.leaders:
            clock.advanced(count)
        for layer in layers:
            layer.advanced(count)
        # The next replay writes over the graph's own tensors.
        tensors = {name: value.clone() for name, value in step.tensors.items()}
        return step.output_type(**tensors, past_key_values=cache)

    def _capture(
        self, kwargs: dict[str, Any], cache: LongContextCache, graphs: CacheGraphs, count: int
    ) -> Step:
        inputs = _make_inputs(kwargs)
        call = {**kwargs, **inputs}
        fusion = fused(self.model, inputs["input_ids"].numel(), self.products)
        with device_lengths(cache, graphs.clocks, count), fusion, rehearsal(cache):
            layers: list[Any] = cache.layers
            # One layer of a group speaks for all of it.
            leaders = list({id(layer.clock): (layer.clock, layer) for layer in layers}.values())
            clocks = [clock for clock, _ in leaders]

            def rehearse() -> Any:
                for clock in clocks:
                    clock.begin(count)
                return self.original(**call)

            def step() -> Any:
                output = rehearse()
                for clock in clocks:
                    clock.advance(count)
                return output

            casts = self._casts_on(inputs["input_ids"].device.type)
            # The rehearsal writes what the replay will write again.
            if casts is None:
                graph, output = capture(rehearse, step)
            else:
                graph, output = capture(casts.rehearsing(rehearse), casts.reading(step))
        tensors = {name: value for name, value in output.items() if isinstance(value, Tensor)}
        return Step(graph, inputs, type(output), tensors, leaders, _buffers(cache), casts)

    def _casts_on(self, device: str) -> WeightCasts | None:
        """The casts of the weights under autocast, one for the steps of all caches; None without it."""
        if not torch.is_autocast_enabled(device):
            return None
        dtype = torch.get_autocast_dtype(device)
        casts = self.casts.get(dtype)
        if casts is None or not (casts.hold() and casts.are_equal()):
            casts = self.casts[dtype] = WeightCasts(dtype)
        return casts

    def give_up(self, reason: str) -> None:
        """Captures nothing more.

        Args:
            reason: for the warning, or the error where a graph is required.

        Raises:
            ValueError: `cuda_graph=True`.
        """
        self.given_up = True
        self.graphs.clear()
        self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Says why what comes is not captured; raises as `give_up` does."""
        first = reason.strip().splitlines()[0] if reason.strip() else "the capture failed"
        if self.required:
            raise ValueError(f"`cuda_graph=True` cannot be honoured: {first}; use `cuda_graph='auto'`.")
        warn_slow("decoding", f"the model's step could not be captured in a CUDA graph ({first})")

    def forget(self, cache: Any) -> None:
        """Drops the graphs of a cache: adapters or hooks may change between two calls of `generate`."""
        if isinstance(cache, LongContextCache):
            self.graphs.pop(cache, None)


def without_full_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a step without a mask that is known to hide nothing.

    Args:
        kwargs: of a forward.
    """
    return {**kwargs, "attention_mask": None} if is_known_full(kwargs.get("attention_mask")) else kwargs


def follow_masks(model: PreTrainedModel, changes: Setup) -> None:
    """Has what is known of a prompt's mask stay known while transformers appends a one for every new token.

    Args:
        model: the transformers model; one that updates its inputs in a way of its own is left alone.
        changes: where the changes are noted, to be undone.
    """
    original: Any = model._update_model_kwargs_for_generation
    if getattr(original, "__func__", None) is not GenerationMixin._update_model_kwargs_for_generation:
        return

    @functools.wraps(original)
    def update(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        before = model_kwargs.get("attention_mask")
        updated = original(outputs, model_kwargs, *args, **kwargs)
        extend_runs(before, updated.get("attention_mask"))
        return updated

    changes.set(model, "_update_model_kwargs_for_generation", update)


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a replay would not do what the model's forward does, or None.

    Args:
        model: whose hooks and placement are looked at.
    """
    placement = getattr(model, "hf_device_map", None) or {}
    if len(set(placement.values())) > 1:
        return "the model is spread over several devices"
    of_all: Any = nn.modules.module
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return "there are forward hooks for all modules, which a replay would skip"
    for module in every_module(model):
        if module._forward_hooks or module._forward_pre_hooks:
            name = next(name for name, each in model.named_modules() if each is module)
            return f"`{name or type(module).__name__}` has forward hooks, which a replay would skip"
    return None


def reason_of(model: PreTrainedModel, error: RuntimeError) -> str:
    """Why a capture failed, in one line, with a way out where one is known.

    Args:
        model: whose step was captured.
        error: what the capture ended with.
    """
    while isinstance(error.__context__, RuntimeError):
        # What broke the capture, rather than that it was broken.
        error = error.__context__
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "the capture failed"
    grouped = "grouped_mm" in model.get_experts_implementation().values()
    if not grouped or model.dtype == torch.bfloat16:
        return first
    # torch has a kernel for bf16; for other dtypes it copies the bounds of the groups to the host.
    return (
        f"the grouped products of the experts wait for the device in {model.dtype}; a model in "
        f"torch.bfloat16 can be captured. torch said: {first}"
    )


def _is_constant(name: str, value: Any) -> bool:
    if name not in _CONSTANT or isinstance(value, Tensor):
        return False
    allowed = _CONSTANT[name]
    return allowed is None or value in allowed


def _step_key(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    present = tuple(name for name in _TENSORS if kwargs.get(name) is not None)
    constants = tuple((name, kwargs.get(name)) for name in _CONSTANT)
    ids, device = kwargs["input_ids"], kwargs["input_ids"].device.type
    # A graph goes on casting, or not, as it did when it was captured.
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return tuple(ids.shape), present, constants, cast


def _buffers(cache: LongContextCache) -> tuple[int, ...]:
    layers: list[Any] = cache.layers
    states = [
        layer._keys if isinstance(layer, PreallocatedLayer) else layer.recurrent_state for layer in layers
    ]
    return tuple([state.data_ptr() for state in states])  # pyright: ignore[reportOptionalMemberAccess]


def _make_inputs(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    with lasting_buffers():
        inputs = {name: kwargs[name].clone() for name in _TENSORS if kwargs.get(name) is not None}
        if (mask := inputs.get("attention_mask")) is not None:
            # Tokens that are still to come exist once they are written; causal order hides them until then.
            inputs["attention_mask"] = torch.nn.functional.pad(mask.bool(), (0, _MASK_ROOM), value=True)
    return inputs


def _copy_inputs(inputs: dict[str, Tensor], kwargs: dict[str, Any]) -> bool:
    """Copies a step's tensors into the graph's own; False where the mask has outgrown its buffer."""
    for name, buffer in inputs.items():
        value = kwargs[name]
        if name == "attention_mask":
            if value.shape[1] > buffer.shape[1]:
                return False
            buffer[:, : value.shape[1]].copy_(value, non_blocking=True)
        else:
            buffer.copy_(value, non_blocking=True)
    return True
