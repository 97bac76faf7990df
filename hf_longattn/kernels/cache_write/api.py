"""The public function that writes new keys and values into a cache, and its registration with torch."""

import torch
from torch import Tensor

from hf_longattn.kernels.cache_write.reference import write_reference
from hf_longattn.kernels.dispatch import check_impl

_NAME = "cache_write"
# More new tokens than this are a prefill, whose copies are bound by bytes and not by launches.
MAX_TOKENS = 16


def cache_write(
    keys: Tensor, values: Tensor, index: Tensor, key: Tensor, value: Tensor, *, impl: str = "auto"
) -> None:
    """Writes the keys and values of new tokens in place, at slots that the device knows.

        keys[:, :, index[t]] = key[:, :, t]        values[:, :, index[t]] = value[:, :, t]

    The copy is exact. One launch on a GPU; nothing waits for the device, so a CUDA graph may be replayed
    after `index` changed.

    Args:
        keys: (B, G, S, K), written in place. Any strides, for all tensors.
        values: (B, G, S, V), written in place; V may be 0.
        index: (T,) int64, a slot for each new token, from 0 to S - 1; a slot given twice holds either token.
            On a GPU, a token whose slot is outside is not written.
        key: (B, G, T, K) of the dtype of `keys`.
        value: (B, G, T, V) of the dtype of `values`.
        impl: "triton", "reference", or "auto" for the faster one that runs on the device.

    Raises:
        ValueError: shapes that do not fit, an `impl` that cannot run here, or a gradient asked of it.
        TypeError: dtypes that do not fit.

    Example:
        >>> cache_write(keys, values, torch.tensor([length]), key, value)
    """
    check_impl(_NAME, impl, keys.device)
    _check(keys, values, index, key, value)
    if impl == "triton" or (impl == "auto" and keys.is_cuda and key.shape[2] <= MAX_TOKENS):
        # A compiler knows no launch with strides that vary.
        run = _call if torch.compiler.is_compiling() else _run
        run(keys, values, index, key, value)
        return
    write_reference(keys, values, index, key, value)


def _check(keys: Tensor, values: Tensor, index: Tensor, key: Tensor, value: Tensor) -> None:
    for name, buffer, states in (("key", keys, key), ("value", values, value)):
        wanted = (*buffer.shape[:2], index.numel(), buffer.shape[3])
        if states.shape != wanted or buffer.shape[:3] != keys.shape[:3] or index.dim() != 1:
            raise ValueError(
                f"`{name}` of {_NAME} must be {wanted} for `{name}s` {tuple(buffer.shape)} and `index` "
                f"{tuple(index.shape)}, one slot a token, got {tuple(states.shape)}."
            )
        if states.dtype != buffer.dtype:
            raise TypeError(
                f"`{name}` of {_NAME} must have the dtype of `{name}s`, {buffer.dtype}, got {states.dtype}; "
                f"convert with `.to({buffer.dtype})`."
            )
        if torch.is_grad_enabled() and states.requires_grad:
            raise ValueError(f"`{name}` of {_NAME} must not require a gradient; run under `torch.no_grad()`.")


def _run(keys: Tensor, values: Tensor, index: Tensor, key: Tensor, value: Tensor) -> None:
    from hf_longattn.kernels.cache_write.triton import write_forward

    write_forward(keys, values, index, key, value)


_call = torch.library.custom_op("hf_longattn::cache_write", _run, mutates_args=("keys", "values"))


@_call.register_fake
def _fake(keys: Tensor, values: Tensor, index: Tensor, key: Tensor, value: Tensor) -> None:
    """Nothing: what it writes to is there."""
