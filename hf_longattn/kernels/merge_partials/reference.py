"""The merge of partial attention results in plain PyTorch: the definition of correct."""

import torch
from torch import Tensor


def merge_reference(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges N partial results; shapes as in `merge_partials`, accumulated in the dtype of `lse`."""
    peak = lse.amax(0)
    # A row whose parts are all empty has no peak; any finite stand-in gives it weights of zero.
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(lse - peak)
    total = weights.sum(0)
    # What an empty part holds is undefined, so it is replaced: a weight of zero would let NaN through.
    parts = outputs.to(lse.dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    merged = (parts * weights.unsqueeze(-1)).sum(0) / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return merged.to(outputs.dtype), peak + torch.log(total)


def merge_backward(
    outputs: Tensor, lse: Tensor, merged_lse: Tensor, grad_output: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge_partials` in `outputs` and `lse`.

    With w_n = exp(lse_n - lse) and d_n = dO . o_n:

        do_n = w_n dO        dlse_n = w_n (d_n - sum_m w_m d_m + dlse)

    Args:
        outputs: (N, B, H, T, V) parts.
        lse: (N, B, H, T) of the parts.
        merged_lse: (B, H, T), the result.
        grad_output: (B, H, T, V).
        grad_lse: (B, H, T).
    """
    empty = lse == -torch.inf
    # Where everything is empty merged_lse is -inf too, and the difference would be NaN.
    weights = torch.exp(lse - merged_lse).masked_fill(empty, 0.0)
    grad_output = grad_output.to(lse.dtype)
    dots = (outputs.to(lse.dtype) * grad_output).sum(-1).masked_fill(empty, 0.0)
    mean = (weights * dots).sum(0)
    grad_parts = weights.unsqueeze(-1) * grad_output
    # A gradient of lse that is not finite (of a log of zero, say) must not reach the parts that are empty.
    grad_part_lse = (weights * (dots - mean + grad_lse)).masked_fill(empty, 0.0)
    return grad_parts.to(outputs.dtype), grad_part_lse
