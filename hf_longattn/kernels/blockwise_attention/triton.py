"""Blockwise attention by the Triton kernels of `triton_forward.py` and `triton_backward.py`."""

from .triton_backward import backward
from .triton_forward import forward

__all__ = ["backward", "forward"]
