"""What changes plain softmax attention: scale, mask, bias, softcap, sinks, dropout."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_longattn.kernels.key_range import KeyRange


class Gradients(NamedTuple):
    """Gradients of the five differentiable inputs, None where there is no such input or nobody asked."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Terms:
    """The validated options of one call.

    Args:
        scale: factor on the scores.
        mask: which keys each query may see.
        bias: (B or 1, H or 1, T or 1, S), bool (True = may attend) or floating (added after the softcap).
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (H,) one more logit a head in the denominator.
        dropout: (probability, seed).
    """

    scale: float
    mask: KeyRange
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: tuple[float, int] | None = None

    def columns(self, rows: slice, num_queries: int, num_keys: int) -> slice:
        """The keys that some query of `rows` may see: tight on the CPU, from causal order alone elsewhere."""
        start, stop = 0, num_keys
        if self.mask.causal:
            stop = min(stop, rows.stop + num_keys - num_queries)
        # Reading a bound of another device would stall its queue.
        if self.mask.lower is not None and self.mask.lower.device.type == "cpu":
            start = max(start, int(self.mask.lower[:, rows].min()))
        if self.mask.upper is not None and self.mask.upper.device.type == "cpu":
            stop = min(stop, int(self.mask.upper[:, rows].max()))
        return slice(start, max(start, stop))

    def visible(
        self, rows: slice, columns: slice, sizes: tuple[int, int], device: torch.device
    ) -> Tensor | None:
        """Which pairs of a tile may attend.

        Args:
            rows: queries of the tile.
            columns: keys of the tile.
            sizes: (T, S) of the whole problem.
            device: where to build the tile.

        Returns:
            bool, (B or 1, H or 1, rows, columns), or None where nothing is hidden.
        """
        bias = self.bias_tile(rows, columns)
        hidden_by_bias = None if bias is None else (bias if bias.dtype == torch.bool else bias > -torch.inf)
        if self.mask.is_dense and not self.mask.causal:
            return hidden_by_bias
        visible = self.mask.tile(rows, columns, *sizes, device)
        return visible if hidden_by_bias is None else visible & hidden_by_bias

    def bias_tile(self, rows: slice, columns: slice) -> Tensor | None:
        """The part of the bias that a tile reads, (B or 1, H or 1, rows or 1, columns)."""
        if self.bias is None:
            return None
        return self.bias[:, :, rows if self.bias.shape[2] > 1 else slice(None), columns]


def without_unseen(tensor: Tensor, visible: Tensor) -> Tensor:
    """Zeroes the keys (or values) that no query of a tile sees, for 0 * NaN is NaN.

    Args:
        tensor: (B, G, S, D) slots, which may hold anything where nobody looks.
        visible: bool, (B or 1, H or 1, T, S).
    """
    seen = visible.any(dim=2)
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (tensor.shape[1], -1)).any(dim=2)
    return tensor.masked_fill(~seen[..., None], 0)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks: -sum over rows of exp(sink - lse) * delta.

    Args:
        sinks: (H,).
        lse: (B, H, T), with the sink in it.
        delta: (B, H, T), sum of grad_output * output, less the gradient of lse.
    """
    share = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)


def row_delta(grad_output: Tensor, output: Tensor, grad_lse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """delta = sum(grad_output * output) - grad_lse, (B, H, T) in `dtype`."""
    delta = (grad_output.to(dtype) * output.to(dtype)).sum(dim=-1)
    return delta if grad_lse is None else delta - grad_lse
