"""Products of a few rows with a weight matrix, at the speed of reading the matrix."""

from hf_longattn.kernels.few_row_linear.api import few_row_gated_linear, few_row_linear

__all__ = ["few_row_gated_linear", "few_row_linear"]
