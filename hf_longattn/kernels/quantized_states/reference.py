"""Keys and values in 8 bits in plain PyTorch: what is correct, and the CPU's path."""

import torch
from torch import Tensor

# The largest number of each dtype.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A row below this is zero: its scale would leave the normal numbers of fp32.
SMALLEST = 2.0**-100


def quantize_reference(key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises in fp32; arguments as in `quantized_states`."""
    (key, key_scale), (value, value_scale) = _rows(key, dtype), _rows(value, dtype)
    return key, value, torch.cat([key_scale, value_scale], -1)


def _rows(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    states = states.float()
    scale = states.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST[dtype]
    states = states / scale
    # A row with an infinity or a NaN becomes NaN as a whole, by its scale: int8 has no word for either.
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    if dtype == torch.int8:
        states = states.nan_to_num(0.0).round()
    return states.to(dtype, memory_format=torch.contiguous_format), scale
