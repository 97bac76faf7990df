"""Liger's fused linear cross-entropy for the chunks of the loss, where it is installed and computes the same.

It projects and takes the loss of some chunks in one autograd function, whose kernel writes the gradient over
the logits of one. The gradient of the head is added up in fp32 from chunk to chunk inside, which takes the
place of an fp32 sum of ours for every chunk. What it cannot know are soft caps, scales and biases; so it
stands in only for a head that is shown, by running it, to be one matrix product.
"""

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_longattn.instance import is_watched
from hf_longattn.kernels.dispatch import log_once, triton_runs_on

_INSTALLED = importlib.util.find_spec("liger_kernel") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Logits of the probe: far out of the straight part of any soft cap, and finite in fp16.
_LARGE = 1000.0
# Chunks of one call: more would hold more copies of hidden states, and spare little of what is left.
MOST_CHUNKS = 8


@dataclass(frozen=True)
class FusedLoss:
    """Liger's loss of some chunks.

    Args:
        linear: the head.
        chunk: tokens whose logits are in memory, a power of two: Liger rounds up to one.
        chunks: of one call.
    """

    linear: Any
    chunk: int
    chunks: int

    @property
    def tokens(self) -> int:
        """Of one call."""
        return self.chunk * self.chunks

    def __call__(self, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """The summed loss.

        Args:
            hidden: (n, D), at most `tokens`.
            targets: (n,).
            smoothing: of the labels.
        """
        if not len(targets):
            # The kernel divides by the number of tokens; a rank's share may have none that counts.
            return F.linear(hidden, self.linear.weight).sum()
        return _function()(
            hidden,
            self.linear.weight,
            targets,
            reduction="sum",
            label_smoothing=smoothing,
            accum_dtype=torch.float32,
            chunk_mem_const=self.budget(len(targets)),
        )

    def budget(self, tokens: int) -> int:
        """The number that has Liger cut so many tokens into chunks of at most `chunk`.

        It cuts n tokens into ceil(V / (number D)) parts, rounded up to a power of two.

        Args:
            tokens: n.
        """
        width, vocabulary = self.linear.in_features, self.linear.out_features
        parts = -(-tokens // self.chunk)
        return -(-vocabulary // width) if parts == 1 else max(vocabulary // (parts * width), 1)


def _chunks(linear: nn.Linear) -> int:
    # Its sum is rounded to the weight's dtype at the end of a call: fp16 would overflow over many tokens.
    if linear.weight.dtype == torch.float16:
        return 1
    # Liger cuts into no more parts than this.
    return min(MOST_CHUNKS, -(-linear.out_features // linear.in_features))


def fused_loss(
    project: Callable[[Tensor], Tensor], linear: Any, hidden: Tensor, size: int
) -> FusedLoss | None:
    """Liger's loss for the chunks of one batch, or None where plain torch takes it; says once which.

    Args:
        project: the model's own way from (1, n, D) hidden states to (1, n, V) logits.
        linear: the module that the model names as its head, or None.
        hidden: (N, D) hidden states of the batch.
        size: the most tokens whose logits may be in memory.

    Returns:
        the loss of hidden states (n, D), targets (n,) and label smoothing; or None.
    """
    if not triton_runs_on(hidden.device):
        return None
    reason = _obstacle(linear, hidden) or _difference(project, linear, hidden)
    if reason is not None:
        log_once(logging.INFO, f"loss: Liger does not take the chunks, because {reason}")
        return None
    log_once(logging.INFO, "loss: chunks are taken by Liger's fused linear cross-entropy")
    return FusedLoss(linear, 1 << (size.bit_length() - 1), _chunks(linear))


def _obstacle(linear: Any, hidden: Tensor) -> str | None:
    """Why the kernel cannot be used, as far as modules and types show."""
    if not _INSTALLED:
        return "liger-kernel is not installed"
    if "chunk_mem_const" not in inspect.signature(_function()).parameters:
        return "this version of liger-kernel cuts a chunk again, by the vocabulary; 0.8 does not"
    if type(linear) is not nn.Linear or linear.bias is not None:
        return "the head is not a linear layer without bias"
    if is_watched(linear):
        return "the head has hooks"
    if type(linear.weight) is not nn.Parameter or not {linear.weight.dtype, hidden.dtype} <= {*_DTYPES}:
        return "the weights of the head are sharded, quantised or in fp64"
    return None


def _difference(project: Callable[[Tensor], Tensor], linear: Any, hidden: Tensor) -> str | None:
    """Whether the model does more to hidden states than this one product, found out on large logits."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    probe = torch.randn(4, hidden.shape[1], device=hidden.device, generator=generator).to(hidden.dtype)
    with torch.no_grad():
        largest = F.linear(probe, linear.weight).abs().amax().float().clamp(min=1e-6)
        probe = (probe * (_LARGE / largest)).to(hidden.dtype)
        logits = project(probe[None])[0]
        same = torch.equal(logits, F.linear(probe, linear.weight).to(logits.dtype))
    return None if same else "the head scales or caps its logits"


def _function() -> Callable[..., Any]:
    # Imported here: the module imports triton.
    return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
