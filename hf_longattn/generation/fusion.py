"""Fewer launches: norms, gates and rotary embeddings in one kernel each, and faster products.

A decoding step of a large model is some 1500 launches, most of them elementwise on one token; a chunk of a
prompt moves every intermediate result through memory several times. While a step is being captured, or a
prompt being read, modules and functions that are proven, by running them, to be plain norms, gates or rotary
embeddings are replaced by single kernels, and put back afterwards.
"""

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_longattn.generation.kept import plain_settings
from hf_longattn.generation.linear import Products
from hf_longattn.instance import Setup
from hf_longattn.kernels.gated_activation import gated_activation
from hf_longattn.kernels.rotary_embedding import rotary_embedding
from hf_longattn.kernels.row_norm import row_norm

_ROTARY = "apply_rotary_pos_emb"
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
# From a module, the forward that stands in for its own.
_Maker = Callable[[Any], Callable[[Tensor], Tensor]]
# What a module of another structure raises at a probe.
_OTHER = (TypeError, RuntimeError, ValueError, IndexError, AttributeError)

# What running a model's modules has shown, so that every call of `generate` need not run them again.
_FOUND: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
# Two threads that replace the same function at once would put back each other's.
_LOCK = threading.RLock()


@contextlib.contextmanager
def fused(model: Any, rows: int = 0, products: Products | None = None) -> Iterator[None]:
    """Inside, the model's norms, gates and rotary embeddings are single kernels, products the faster ones.

    Args:
        model: a transformers model on a CUDA device.
        rows: tokens of the step, all sequences together.
        products: which linear layers to replace; `None` leaves them alone.
    """
    changes = Setup(model)
    # A probe may fail, say for memory: what was replaced before it is put back, too.
    try:
        with _LOCK:
            _replace_modules(changes, model, _norm_key, _fused_norm)
            _replace_rotations(changes, model)
            if products is not None:
                products.replace(changes, model, rows, _close)
            _replace_modules(changes, model, _gated_key, _fused_gate)
        yield
    finally:
        with _LOCK:
            changes.undo()


def fused_prompt(model: Any) -> contextlib.AbstractContextManager[None]:
    """`fused` for the chunks of a prompt, where the model is on a GPU, evaluates, and asks for no gradient.

    Args:
        model: a transformers model.
    """
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    plain = model.device.type == "cuda" and not spread and not model.training
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled()
    return fused(model) if plain and not asked else contextlib.nullcontext()


def _replace_modules(
    changes: Setup,
    model: Any,
    key_of: Callable[[Any], Any],
    make: Callable[[Any], _Maker | None],
) -> None:
    """Replaces every module with a key, by what `make` finds for the first of each key."""
    found = _FOUND.setdefault(model, {})
    for module in model.modules():
        # A forward that somebody else put there does more than the class says.
        key = None if "forward" in vars(module) or module._forward_hooks else key_of(module)
        if key is None:
            continue
        if key not in found:
            with torch.no_grad():
                found[key] = make(module)
        if (replacement := found[key]) is not None:
            changes.set(module, "forward", functools.partial(_run, replacement(module), module.forward))


def _run(
    replacement: Callable[[Tensor], Tensor], original: Callable[..., Any], *args: Any, **keywords: Any
) -> Any:
    """Calls the replacement with the states; what else a module takes, only its own forward knows."""
    return replacement(*args) if len(args) == 1 and not keywords else original(*args, **keywords)


def _norm_key(module: Any) -> Any:
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if not name.endswith(("RMSNorm", "LayerNorm")) or not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if not _is_whole(weight) or not isinstance(_eps(module), float):
        return None
    return type(module), weight.shape, weight.dtype, weight.device, plain_settings(module)


def _is_whole(weight: Tensor) -> bool:
    """An ordinary parameter: neither sharded, nor quantised, nor elsewhere."""
    return type(weight) is nn.Parameter and weight.numel() > 0 and weight.device.type != "meta"


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _fused_norm(module: Any) -> _Maker | None:
    """The kind of norm that a module computes, found out by running it: Gemma's adds 1 to its weight."""
    weight, eps = module.weight, _eps(module)
    probe = _draw(weight, 4, *weight.shape)
    # Rows small enough for eps to count, and large ones.
    probe = probe * torch.tensor([1.0, 1e-3, 0.05, 30.0]).to(probe)[:, None]
    try:
        expected = module(probe)
    except _OTHER:
        return None
    layer = type(module).__name__.endswith("LayerNorm")
    kinds = ("layer",) if layer else ("rms", "rms_wide", "rms_plus_one")
    makers = [functools.partial(_norm_maker, eps, kind) for kind in kinds]
    return _nearest(makers, module, probe, expected)


def _norm_maker(eps: float, kind: str, module: Any) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return row_norm(hidden_states, module.weight, getattr(module, "bias", None), eps=eps, kind=kind)

    return forward


def _gated_key(module: Any) -> Any:
    """A feed-forward layer with the names that gated layers have throughout transformers."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")]
    linear = [part for part in parts if part is not None]
    # Experts keep several matrices in one parameter.
    if not linear or not all(type(part) is nn.Linear for part in linear) or parts[3] is None:
        return None
    if _activation_of(module) is None or (parts[2] is None) == (None in parts[:2]):
        return None
    weight = linear[0].weight
    if not all(_is_whole(part.weight) and part.weight.device == weight.device for part in linear):
        return None
    activation = repr(_activation_of(module))
    return type(module), weight.shape, weight.dtype, weight.device, activation, plain_settings(module)


def _activation_of(module: Any) -> Any:
    found = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    # One that is watched, or changed, must go on being called.
    watched = isinstance(found, nn.Module) and (
        found._forward_hooks or found._forward_pre_hooks or "forward" in vars(found)
    )
    return found if callable(found) and not watched else None


def _fused_gate(module: Any) -> _Maker | None:
    first = getattr(module, "gate_up_proj", None)
    width = (module.gate_proj if first is None else first).weight
    steps = torch.linspace(-6, 6, 97, device=width.device)
    try:
        values = _activation_of(module)(steps)
        probe = _draw(width, 2, 2, width.shape[1])
        expected = module(probe)
    except _OTHER:
        return None
    # In fp32 the two forms of GELU, which bf16 cannot tell apart, are far from each other.
    same = [name for name in _ACTIVATIONS if _is_activation(name, steps, values)]
    makers = [functools.partial(_gate_maker, name) for name in same]
    return _nearest(makers, module, probe, expected)


def _is_activation(name: str, steps: Tensor, values: Any) -> bool:
    """Whether `values` are those of an activation at `steps`, in fp32."""
    result = gated_activation(steps, torch.ones_like(steps), activation=name)
    return isinstance(values, Tensor) and bool((result - values).abs().max() <= 1e-5)


def _gate_maker(activation: str, module: Any) -> Callable[[Tensor], Tensor]:
    fused_projection = getattr(module, "gate_up_proj", None)

    def forward(hidden_states: Tensor) -> Tensor:
        if fused_projection is not None:
            gate, up = fused_projection(hidden_states).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(hidden_states), module.up_proj(hidden_states)
        return module.down_proj(gated_activation(gate, up, activation=activation))

    return forward


def _nearest(makers: list[Any], module: Any, probe: Tensor, expected: Any) -> _Maker | None:
    """Of the ways that agree with a module up to rounding the nearest, or None."""
    if not isinstance(expected, Tensor):
        return None
    results = [(make, make(module)(probe)) for make in makers]
    agree = [(make, result) for make, result in results if _close(result, expected)]
    distances = [float((result.double() - expected.double()).norm()) for _, result in agree]
    return agree[distances.index(min(distances))][0] if agree else None


def _replace_rotations(changes: Setup, model: Any) -> None:
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules.get(name)
        original = vars(source).get(_ROTARY) if source is not None else None
        # Another thread may be generating with a model of this kind: one replacement is enough for both.
        if original is None or getattr(original, "func", None) is _rotate:
            continue
        like, found = next(model.parameters()), _FOUND.setdefault(model, {})
        key = (original, like.dtype, like.device)
        if key not in found:
            with torch.no_grad():
                found[key] = _same_rotation(original, like, 16), _same_rotation(original, like, 24)
        if found[key][0]:
            changes.set(source, _ROTARY, functools.partial(_rotate, original, found[key]))


def _rotate(
    original: Callable[..., Any],
    widths: tuple[bool, bool],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """`widths` says whether `original` is proven where all of a head turns, and where its first part does."""
    width = cos.shape[-1]
    part = width < q.shape[-1]
    if cos.dtype != q.dtype or width > q.shape[-1] or not widths[part]:
        return original(q, k, cos, sin, unsqueeze_dim)
    if unsqueeze_dim == 2:
        query, key = rotary_embedding(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2)
    return rotary_embedding(q, k, cos, sin)


def _same_rotation(original: Callable[..., Any], like: Tensor, head_dim: int) -> bool:
    """Whether `original` turns the first 16 of `head_dim` as our kernel does, and leaves the others."""
    query, key = _draw(like, 2, 4, 3, head_dim), _draw(like, 2, 2, 3, head_dim)
    angle = _draw(like, 2, 3, 8).repeat(1, 1, 2)
    try:
        expected = original(query, key, angle.cos(), angle.sin())
    except _OTHER:
        # Another signature or layout: not this embedding.
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    result = _rotate(original, (True, True), query, key, angle.cos(), angle.sin())
    return all(a.shape == b.shape and _close(a, b) for a, b in zip(result, expected, strict=True))


def _draw(like: Tensor, *shape: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(sum(shape))
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(*shape, device=like.device, dtype=dtype, generator=generator)


def _close(result: Tensor, expected: Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    # Two roundings of the model's own against one of ours.
    bound = 2 * torch.finfo(expected.dtype).eps * expected.double().norm()
    return bool((result.double() - expected.double()).norm() <= bound)
