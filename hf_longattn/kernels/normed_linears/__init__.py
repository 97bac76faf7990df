"""A layer with parallel branches on one row or two: all of it but attention, in two launches."""

from hf_longattn.kernels.normed_linears.api import normed_linears, residual_linears

__all__ = ["normed_linears", "residual_linears"]
