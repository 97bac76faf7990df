"""Fewer launches in a captured step: norms and rotary embedding in one kernel each, and faster products.

A decoding step of a large model is some 1500 launches, most of them elementwise on one token. While a step is
being captured, modules and functions that are proven, by running them, to be plain RMS norms or rotary
embeddings are replaced by single kernels, and put back afterwards. Nothing outside the graph changes.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_longattn.generation.linear import Products
from hf_longattn.instance import Setup
from hf_longattn.kernels.rotary_embedding import rotary_embedding

_ROTARY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def fused(model: Any, rows: int = 0, products: Products | None = None) -> Iterator[None]:
    """Inside, the model's norms and rotary embeddings are single kernels, and its products the faster ones.

    Args:
        model: a transformers model on a CUDA device.
        rows: tokens of the step, all sequences together.
        products: which linear layers to replace; `None` leaves them alone.
    """
    changes = Setup(model)
    proven: dict[Any, bool] = {}
    for module in model.modules():
        replacement = _fused_norm(module)
        if replacement is None:
            continue
        key = (type(module), module.weight.shape, module.weight.dtype)
        if key not in proven:
            proven[key] = _same_norm(module, replacement)
        if proven[key]:
            changes.set(module, "forward", replacement)
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules.get(name)
        original = vars(source).get(_ROTARY) if source is not None else None
        like = next(model.parameters())
        if original is not None and _same_rotation(original, like, 16):
            widths = (True, _same_rotation(original, like, 24))
            changes.set(source, _ROTARY, functools.partial(_rotate, original, widths))
    if products is not None:
        products.replace(changes, model, rows, _close)
    try:
        yield
    finally:
        changes.undo()


def _fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if isinstance(module, nn.RMSNorm):
        return None
    return functools.partial(_norm, module, eps)


def _norm(module: Any, eps: float, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, module.weight.shape, module.weight, eps)


def _same_norm(module: nn.Module, replacement: Callable[[Tensor], Tensor]) -> bool:
    """Whether the module is what its name says: Gemma's, for one, adds 1 to its weight."""
    weight: Any = module.weight
    generator = torch.Generator(weight.device).manual_seed(0)
    probe = torch.randn(4, *weight.shape, device=weight.device, dtype=weight.dtype, generator=generator)
    return _close(replacement(probe), module(probe))


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
    query, key = q[..., :width], k[..., :width]
    if unsqueeze_dim == 2:
        query, key = rotary_embedding(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    else:
        query, key = rotary_embedding(query, key, cos, sin)
    if not part:
        return query, key
    return torch.cat([query, q[..., width:]], dim=-1), torch.cat([key, k[..., width:]], dim=-1)


def _same_rotation(original: Callable[..., Any], like: Tensor, head_dim: int) -> bool:
    """Whether `original` turns the first 16 of `head_dim` as our kernel does, and leaves the others."""
    generator = torch.Generator(like.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=like.device, dtype=like.dtype, generator=generator)

    query, key, angle = draw(2, 4, 3, head_dim), draw(2, 2, 3, head_dim), draw(2, 3, 8).repeat(1, 1, 2)
    try:
        expected = original(query, key, angle.cos(), angle.sin())
    except (TypeError, RuntimeError, ValueError, IndexError):
        # Another signature or layout: not this embedding.
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    result = _rotate(original, (True, True), query, key, angle.cos(), angle.sin())
    return all(a.shape == b.shape and _close(a, b) for a, b in zip(result, expected, strict=True))


def _close(result: Tensor, expected: Tensor) -> bool:
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    # Two roundings of the model's own against one of ours.
    bound = 2 * torch.finfo(expected.dtype).eps * expected.double().norm()
    return bool((result.double() - expected.double()).norm() <= bound)
