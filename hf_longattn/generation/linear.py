"""Linear maps in a captured step: the vendor's product or our kernel, whichever the clock says is faster.

Decoding reads every weight once a token. For a handful of rows the vendor's library often splits the sum and
adds the parts in a second launch; `few_row_linear` reads the weight in one, and `FewRowLayer` those of a
layer in two. Which one wins depends on the shape and on the GPU, so both are timed, captured in a graph as
they will run, on all layers that share the shape (more bytes than any cache holds). What is not faster is
left alone.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_longattn.branches import FewRowLayer, in_five_launches, without_attention
from hf_longattn.fusion import is_fused
from hf_longattn.generation.capture import capture
from hf_longattn.instance import Setup, every_module, is_watched, plain_settings
from hf_longattn.kernels.few_row_linear import few_row_gated_linear, few_row_linear
from hf_longattn.kernels.few_row_linear.api import MAX_ROWS
from hf_longattn.kernels.normed_linears import api as normed_linears

# Bytes of weights that are read to time a shape: several times the cache of any GPU.
_TIMED_BYTES = 512 * 2**20
_DTYPES = (torch.bfloat16, torch.float16)
# What the first part of a layer, or of a feed-forward layer, that reads the states is called.
_FIRST = ("gate_proj", "dense_h_to_4h", "input_layernorm")
Call = Callable[[], Any]
_Forward = Callable[[Tensor], Tensor]


class _Kind(NamedTuple):
    """Modules that a kernel of ours may run: which, what those of one shape share, and two ways to time."""

    most_rows: int
    fits: Callable[[Any], bool]
    key_of: Callable[[Any], tuple[Any, ...]]
    ours: Callable[[Any], _Forward]
    theirs: Callable[[Any], _Forward]


def graph_time(calls: list[Call]) -> float:
    """Seconds that the calls take when replayed from a CUDA graph, the better of three replays."""

    def run_all() -> None:
        for call in calls:
            call()

    # All calls are of one shape: the first compiles for the others.
    graph, _ = capture(calls[0], run_all)
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times)


class Products:
    """Which linear maps, feed-forward and whole layers our kernels compute faster, found out once a shape.

    Args:
        clock: seconds that a list of calls takes.
    """

    def __init__(self, clock: Callable[[list[Call]], float] = graph_time) -> None:
        self.clock = clock
        self.ours: dict[tuple[Any, ...], bool] = {}

    def replace(
        self, changes: Setup, model: nn.Module, rows: int, agree: Callable[[Tensor, Tensor], bool]
    ) -> None:
        """Gives the layers of a model the faster of two ways to compute the same.

        Args:
            changes: undone after the capture.
            model: in evaluation mode.
            rows: tokens of the step, all sequences together; nothing happens above 16.
            agree: whether two results differ by rounding only.
        """
        if rows > MAX_ROWS or torch.is_autocast_enabled():
            return
        # What fits is asked before anything stands in for its parts.
        found = [
            (kind, list(filter(kind.fits, model.modules()))) for kind in _KINDS if rows <= kind.most_rows
        ]
        for kind, modules in found:
            groups: dict[Any, list[Any]] = defaultdict(list)
            for module in modules:
                groups[(rows, *kind.key_of(module))].append(module)
            for key, group in groups.items():
                if key not in self.ours:
                    self.ours[key] = self._ours_wins(group, kind, rows, agree)
                for module in group if self.ours[key] else ():
                    changes.set(module, "forward", kind.ours(module))

    @torch.no_grad()
    def _ours_wins(
        self, group: list[Any], kind: _Kind, rows: int, agree: Callable[[Tensor, Tensor], bool]
    ) -> bool:
        """Whether ours agrees with modules of one shape, and is faster on them."""
        weights = list(group[0].parameters())
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        timed = group[: max(_TIMED_BYTES // max(size, 1), 1)]
        states = _probe(rows, _first(group[0]).weight)
        probes = [states, *_large(group[0], states)]
        with without_attention(timed):
            if not all(agree(kind.ours(group[0])(probe), group[0](probe)) for probe in probes):
                return False
            theirs = self.clock([functools.partial(kind.theirs(module), states) for module in timed])
            return self.clock([functools.partial(kind.ours(module), states) for module in timed]) < theirs


def _probe(rows: int, weight: Tensor) -> Tensor:
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (rows, 1, weight.shape[-1])
    return torch.randn(shape, device=weight.device, dtype=weight.dtype, generator=generator)


def _large(module: Any, states: Tensor) -> list[Tensor]:
    """States at which a gated layer shows whether it cuts large values off, at 7 or 10."""
    if not hasattr(module, "gate_proj"):
        return []
    gate, up = (part(states).abs().max() for part in (module.gate_proj, module.up_proj))
    return [states * (100 / torch.minimum(gate, up).clamp(min=1e-3))]


def _first(module: Any) -> Any:
    """The part that reads the states."""
    return next((part for name, part in module.named_children() if name in _FIRST), module)


def _is_plain(module: nn.Module) -> bool:
    """An ordinary linear layer: neither quantised, nor adapted, nor sharded, nor hooked."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.dtype in _DTYPES and weight.stride(1) == 1


def _is_gated(module: Any) -> bool:
    """A feed-forward layer with the names that SwiGLU layers have throughout transformers."""
    parts: list[Any] = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation = getattr(module, "act_fn", None)
    if not all(type(part) is nn.Linear for part in parts) or "forward" in vars(module):
        return False
    gate, up, down = parts
    known = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    plain = all(type(part.weight) is nn.Parameter and part.bias is None for part in (gate, up, down))
    return known and plain and gate.weight.dtype in _DTYPES and gate.weight.shape == up.weight.shape


def _is_activated(module: Any) -> bool:
    """A feed-forward layer of one activation, with the names that it has in GPT-NeoX."""
    parts = [getattr(module, name, None) for name in ("dense_h_to_4h", "dense_4h_to_h")]
    if not all(type(part) is nn.Linear for part in parts) or "forward" in vars(module):
        return False
    activation: Any = getattr(module, "act", None)
    exact = type(activation).__name__ == "GELUActivation" and activation.act is nn.functional.gelu
    weight = parts[0].weight  # pyright: ignore[reportOptionalMemberAccess]
    return exact and type(weight) is nn.Parameter and weight.dtype in _DTYPES


def _has_plain_branches(layer: Any) -> bool:
    """A layer of GPT-NeoX with parallel branches, none of whose parts is another than it was made with."""
    if type(layer).__name__ != "GPTNeoXLayer" or not layer.use_parallel_residual or layer.training:
        return False
    attention, mlp, norms = (
        layer.attention,
        layer.mlp,
        (layer.input_layernorm, layer.post_attention_layernorm),
    )
    if type(attention).__name__ != "GPTNeoXAttention" or not _is_activated(mlp):
        return False
    maps = (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, mlp.dense_4h_to_h)
    if not all(map(_is_plain, maps)) or not all(type(norm) is nn.LayerNorm for norm in norms):
        return False
    if not all(map(_is_own, every_module(layer))) or norms[0].eps != norms[1].eps:
        return False
    given = [(part.weight, part.bias) for part in (*maps, *norms)]
    dtypes = {tensor.dtype for pair in given for tensor in pair if type(tensor) is nn.Parameter}
    whole = all(type(tensor) is nn.Parameter and tensor.stride(-1) == 1 for pair in given for tensor in pair)
    return whole and len(dtypes) == 1 and attention.dense.in_features <= normed_linears.MAX_WIDTH


def _is_own(module: nn.Module) -> bool:
    """Whether a module runs its own forward, or ours, and nobody watches."""
    watched = is_watched(module) or module._compiled_call_impl is not None
    return not watched and ("forward" not in vars(module) or is_fused(module))


def _layer_key(layer: Any) -> tuple[Any, ...]:
    parts = layer.attention.query_key_value, layer.mlp.dense_h_to_4h
    shapes = tuple(part.weight.shape for part in parts)
    return type(layer), shapes, parts[0].weight.dtype, layer.input_layernorm.eps, plain_settings(layer)


def _linear_key(module: Any) -> tuple[Any, ...]:
    return (module.weight.shape, module.weight.dtype, module.bias is None)


def _feed_forward_key(module: Any) -> tuple[Any, ...]:
    weight = _first(module).weight
    return type(module), weight.shape, weight.dtype, plain_settings(module)


# A captured step writes to no parameter, and its replay begins when all that was launched before has ended.
def _few_rows(module: Any) -> _Forward:
    return lambda states: few_row_linear(states, module.weight, module.bias, settled_weight=True)


def _gated_few_rows(module: Any) -> _Forward:
    gate, up = module.gate_proj.weight, module.up_proj.weight
    return lambda states: module.down_proj(few_row_gated_linear(states, gate, up, settled_weight=True))


def _activated_few_rows(module: Any) -> _Forward:
    first = module.dense_h_to_4h
    options: dict[str, Any] = {"activation": "gelu", "settled_weight": True}
    return lambda states: module.dense_4h_to_h(few_row_linear(states, first.weight, first.bias, **options))


def _itself(module: Any) -> _Forward:
    return module


# Whole layers come last: they are compared with their parts as these are then, which run more rows.
_KINDS = (
    _Kind(MAX_ROWS, _is_plain, _linear_key, _few_rows, _itself),
    _Kind(MAX_ROWS, _is_gated, _feed_forward_key, _gated_few_rows, _itself),
    _Kind(MAX_ROWS, _is_activated, _feed_forward_key, _activated_few_rows, _itself),
    _Kind(normed_linears.MAX_ROWS, _has_plain_branches, _layer_key, FewRowLayer, in_five_launches),
)
