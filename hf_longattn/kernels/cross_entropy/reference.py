"""The cross-entropy and its gradient in plain torch: the definition of correct."""

import torch
from torch import Tensor


def cross_entropy_reference(
    logits: Tensor, targets: Tensor, smoothing: float, gradient: bool, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """In fp32, or fp64 for such logits; arguments and results as in `cross_entropy`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype, copy=not (gradient and overwrite))
    # One copy of the logits becomes differences, exponentials and probabilities; torch's logsumexp makes
    # another. The losses are made of differences too, which lose nothing where all logits are large.
    scores.sub_(scores.amax(-1, keepdim=True))
    chosen, mean = scores.gather(-1, targets[:, None])[:, 0], scores.mean(-1) if smoothing else None
    exponentials = scores.exp_()
    total = exponentials.sum(-1, keepdim=True)
    log_total = total.log()[:, 0]
    losses = (log_total - chosen) * (1 - smoothing)
    if mean is not None:
        losses = losses + (log_total - mean) * smoothing
    if not gradient:
        return losses, None
    grad = exponentials.div_(total).sub_(smoothing / scores.shape[-1])
    grad.scatter_add_(-1, targets[:, None], grad.new_full((len(targets), 1), smoothing - 1))
    return losses, grad.to(logits.dtype)
