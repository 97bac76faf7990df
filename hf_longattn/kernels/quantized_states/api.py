"""The public operators `quantized_states` and `dequantized_states`: contract, checks, implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import check_impl, interpreting, lacks_fp8, triton_runs_on
from hf_longattn.kernels.quantized_states.reference import LARGEST, quantize_reference


def quantized_states(
    key: Tensor, value: Tensor, dtype: torch.dtype, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in 8 bits, each row (one token of one head) with a scale of its own.

        scale = max_k |x[k]| / largest number of `dtype`        y[k] = round(x[k] / scale)

    so that a token added later changes nothing about those before it. int8 divides the row in even steps, fp8
    in steps that shrink with the value. A row of zeros stays zeros; a row with an infinity or a NaN comes
    back as NaN. Not differentiable.

    Args:
        key: (B, G, T, K), floating point; any strides.
        value: (B, G, T, V), floating point.
        dtype: int8 or float8_e4m3fn (largest numbers 127 and 448).
        impl: "triton", "reference", or "auto" for the faster one that runs on the device.

    Returns:
        key (B, G, T, K) and value (B, G, T, V) in `dtype`, and scales (B, G, T, 2) fp32, that of the key
        first.

    Raises:
        ValueError: shapes or devices that do not fit, or an `impl` that cannot run here.
        TypeError: a `dtype` that is neither of the two, or states that are not floating point.

    Example:
        >>> key, value, scales = quantized_states(key, value, torch.int8)
        >>> output, lse = decode_attention(query, key, value, scales=scales)
    """
    if dtype not in LARGEST:
        raise TypeError(f"`dtype` must be torch.int8 or torch.float8_e4m3fn, got {dtype}.")
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3] or key.device != value.device:
        raise ValueError(
            "`key` and `value` must be (B, G, T, K) and (B, G, T, V) on one device, got "
            f"{tuple(key.shape)} on {key.device} and {tuple(value.shape)} on {value.device}."
        )
    if not (key.is_floating_point() and value.is_floating_point()):
        raise TypeError(f"`key` and `value` must be floating point, got {key.dtype} and {value.dtype}.")
    return _quantize(key.detach(), value.detach(), dtype, impl)


def dequantized_states(states: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`states * scales` in `dtype`, rounded once.

    Args:
        states: (B, G, S, K), int8 or float8_e4m3fn.
        scales: (B, G, S, 1) fp32.
        dtype: of the result; holds every number of 8 bits exactly.

    Returns:
        (B, G, S, K).
    """
    return states.to(dtype).mul_(scales)


@torch.library.custom_op("hf_longattn::quantized_states", mutates_args=())
def _quantize(key: Tensor, value: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    check_impl("quantized_states", impl, key.device)
    # The interpreter rounds to fp8 wrongly, and reads bf16 wrongly, so only an explicit choice runs it.
    if impl == "reference" or not triton_runs_on(key.device) or (impl == "auto" and interpreting()):
        return quantize_reference(key, value, dtype)
    if torch.float64 in (key.dtype, value.dtype) or (dtype != torch.int8 and lacks_fp8(key.device)):
        return quantize_reference(key, value, dtype)
    from hf_longattn.kernels.quantized_states.triton import quantize_forward

    return quantize_forward(key, value, dtype)


@_quantize.register_fake
def _(key: Tensor, value: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    scales = key.new_empty((*key.shape[:3], 2), dtype=torch.float32)
    return key.new_empty(key.shape, dtype=dtype), value.new_empty(value.shape, dtype=dtype), scales
