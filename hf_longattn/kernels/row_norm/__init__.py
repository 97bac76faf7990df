"""RMS and layer norms in one launch."""

from hf_longattn.kernels.row_norm.api import gated_row_norm, row_norm

__all__ = ["gated_row_norm", "row_norm"]
