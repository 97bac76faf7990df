"""The public function of the cross-entropy: checks and choice of implementation."""

import torch
from torch import Tensor

from hf_longattn.kernels.cross_entropy.reference import cross_entropy_reference
from hf_longattn.kernels.dispatch import check_impl, in_its_own_dtypes, interpreting, triton_runs_on

_NAME = "cross_entropy"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@in_its_own_dtypes
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    gradient: bool = False,
    overwrite: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The loss of every row, and the gradient of their sum, taken at once and not through autograd.

        loss[i] = lse(x[i]) - (1 - e) x[i, target[i]] - e mean(x[i])        e: label smoothing
        dx[i] = softmax(x[i]) - (1 - e) onehot(target[i]) - e / V

    All sums are fp32 (fp64 for fp64 logits); the gradient is rounded once. A logit of -inf has probability 0.

    Args:
        logits: (n, V), any stride between rows.
        targets: (n,) int64, from 0 to V - 1; on a GPU the loss of any other is NaN.
        label_smoothing: e, from 0 to 1.
        gradient: whether to take it.
        overwrite: whether the gradient may be written over the logits. Without `gradient` nothing is.
        impl: "triton", "reference", or "auto" for the faster one that runs on the device.

    Returns:
        losses (n,) in fp32 (fp64), and the gradient (n, V) in the dtype of `logits`, or None.

    Raises:
        ValueError: shapes, a smoothing or targets that do not fit, or what "triton" does not do.

    Source: Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567, section 7.

    Example:
        >>> losses, gradient = cross_entropy(logits, targets, gradient=True)
    """
    check_impl(_NAME, impl, logits.device)
    _check(logits, targets, label_smoothing)
    if _takes_triton(logits, impl):
        from hf_longattn.kernels.cross_entropy.triton import cross_entropy_forward as run
    else:
        run = cross_entropy_reference
    # Rows that share memory, as expanded ones do, must all be read before one is written.
    apart = len(logits) == 1 or logits.stride(0) >= logits.shape[1]
    return run(logits.detach(), targets, label_smoothing, gradient, overwrite and apart)


def _check(logits: Tensor, targets: Tensor, smoothing: float) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"`targets` of {_NAME} must be (n,) in int64, one for each row of (n, V) `logits`, got "
            f"{tuple(targets.shape)} in {targets.dtype} for {tuple(logits.shape)}."
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"`label_smoothing` of {_NAME} must be from 0 to 1, got {smoothing}.")


def _takes_triton(logits: Tensor, impl: str) -> bool:
    """Whether the kernel runs; raises where it is asked for by name and cannot."""
    if impl == "triton" and logits.dtype not in _DTYPES:
        raise ValueError(f"`impl='triton'` of {_NAME} has no {logits.dtype}; use 'auto'.")
    if impl != "auto":
        return impl == "triton"
    # The interpreter reads bf16 wrongly, so only an explicit choice runs it. Shards have no single memory.
    plain = type(logits) is Tensor and logits.dtype in _DTYPES
    return plain and not interpreting() and triton_runs_on(logits.device)
