"""RMS and layer norms in one launch."""

from hf_longattn.kernels.row_norm.api import add_row_norm, gated_row_norm, row_norm

__all__ = ["add_row_norm", "gated_row_norm", "row_norm"]
