"""Keys and values in 8 bits: `quantized_states`, and back."""

from hf_longattn.kernels.quantized_states.api import dequantized_states, quantized_states

__all__ = ["dequantized_states", "quantized_states"]
