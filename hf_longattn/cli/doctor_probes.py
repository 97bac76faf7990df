"""Small inputs for the operators beside attention, on which `hf-longattn doctor` runs each of them once."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.cross_entropy import cross_entropy
from hf_longattn.kernels.few_key_attention import few_key_attention
from hf_longattn.kernels.few_row_linear import few_row_gated_linear, few_row_linear
from hf_longattn.kernels.gated_activation import gated_activation
from hf_longattn.kernels.normed_linears import normed_linears, residual_linears
from hf_longattn.kernels.quantized_states import dequantized_states, quantized_states
from hf_longattn.kernels.residual_norms import residual_norms
from hf_longattn.kernels.rotary_cache_write import rotary_cache_write
from hf_longattn.kernels.rotary_embedding import rotary_embedding
from hf_longattn.kernels.row_norm import gated_row_norm, row_norm

# Of the implementation, the dtype and the `device`.
Run = Callable[..., list[Tensor]]
_EPS = 1e-5
# Slots of a buffer of nine that five new tokens go to.
_SLOTS = (7, 0, 3, 8, 4)


def heads(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random states, (1, 2, `length`, 64), other ones for another length.

    Args:
        length: T.
        device: where they go.
        dtype: of the result; the same numbers in every dtype of 16 bits or more.
    """
    # Rounded to the 16-bit types first, so that every dtype computes on the same numbers.
    generator = torch.Generator().manual_seed(length)
    return torch.randn(1, 2, length, 64, generator=generator).bfloat16().to(device, dtype)


def _heads_of(count: int, *seeds: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [heads(seed, device, dtype)[:, :, :count] for seed in seeds]


def _rows_of(count: int, *seeds: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [states[0, 0] for states in _heads_of(count, *seeds, device=device, dtype=dtype)]


def _angles(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """What stands for cosine and sine of five tokens: the operators are linear in both."""
    halves = (states[:, 0, :, :32] for states in _heads_of(5, 8, 9, device=device, dtype=dtype))
    return [torch.cat([half, half], dim=-1) for half in halves]


def _rotary(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    query, key = _heads_of(5, 5, 6, device=device, dtype=dtype)
    return list(rotary_embedding(query, key, *_angles(device, dtype), impl=impl))


def _write(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    buffers = [states.clone() for states in _heads_of(9, 9, 10, device=device, dtype=dtype)]
    new = _heads_of(5, 5, 6, device=device, dtype=dtype)
    cache_write(buffers[0], buffers[1], torch.tensor(_SLOTS, device=device), new[0], new[1], impl=impl)
    return buffers


def _rotary_write(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    keys, values = (states.clone() for states in _heads_of(9, 9, 10, device=device, dtype=dtype))
    query, key, value = _heads_of(5, 5, 6, 7, device=device, dtype=dtype)
    cos, sin = _angles(device, dtype)
    slots = torch.tensor([_SLOTS], device=device)
    return [rotary_cache_write(query, key, value, cos, sin, keys, values, slots, impl=impl), keys, values]


def _few_keys(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    keys, values = (states.clone() for states in _heads_of(9, 9, 10, device=device, dtype=dtype))
    query, key, value = _heads_of(2, 5, 6, 7, device=device, dtype=dtype)
    return [few_key_attention(query, key, value, keys, values, 4, impl=impl), keys, values]


def _eight_bits(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    states = _heads_of(5, 5, 6, device=device, dtype=dtype)
    key, value, scales = quantized_states(states[0], states[1], torch.int8, impl=impl)
    parts = zip((key, value), scales.split(1, dim=-1), strict=True)
    return [dequantized_states(part, scale, dtype) for part, scale in parts]


def _loss(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    logits = _rows_of(5, 5, device=device, dtype=dtype)[0]
    losses, gradient = cross_entropy(logits, torch.tensor(_SLOTS, device=device), gradient=True, impl=impl)
    return [losses] if gradient is None else [losses, gradient]


def _norm(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    states, gate, weight = _rows_of(5, 5, 6, 7, device=device, dtype=dtype)
    gated = gated_row_norm(states, gate, weight[0], eps=_EPS, impl=impl)
    return [row_norm(states, weight[0], eps=_EPS, impl=impl), gated]


def _residual(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    states, one, other, first, second = _rows_of(5, 5, 6, 7, 8, 9, device=device, dtype=dtype)
    affine = (first[0], first[1]), (second[0], second[1])
    results = residual_norms(states, (one, other), *affine, eps=_EPS, impl=impl)
    return [states for states in results if states is not None]


def _activation(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    gate, up = _rows_of(5, 5, 6, device=device, dtype=dtype)
    return [gated_activation(gate, up, impl=impl)]


def _few_rows(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    gate, up = (weight / 8 for weight in _rows_of(48, 48, 49, device=device, dtype=dtype))
    states = _rows_of(5, 5, device=device, dtype=dtype)[0]
    return [few_row_linear(states, gate, impl=impl), few_row_gated_linear(states, gate, up, impl=impl)]


def _branches(impl: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    states, one, other, affine = _rows_of(2, 5, 6, 7, 8, device=device, dtype=dtype)
    first, second = (weight / 8 for weight in _rows_of(64, 64, 65, device=device, dtype=dtype))
    scale, shift = affine
    maps = (scale, shift, first, one[0]), (shift, scale, second, other[0])
    begun = normed_linears(states, *maps, eps=_EPS, impl=impl)
    ended = residual_linears(states, (one, first, one[0]), (other, second, other[0]), impl=impl)
    return [*begun, ended]


def small_probes() -> Iterator[tuple[str, Run]]:
    """Name and run of every operator beside attention; a run returns what it computed."""
    yield "norms", _norm
    yield "residual norms", _residual
    yield "gated activation", _activation
    yield "linear maps of few rows", _few_rows
    yield "linear maps of parallel branches", _branches
    yield "rotary embedding", _rotary
    yield "cache write", _write
    yield "rotary embedding and cache write", _rotary_write
    yield "attention to few keys", _few_keys
    yield "keys and values in 8 bits", _eight_bits
    yield "cross-entropy", _loss
