"""The public operator `merge_partials`: contract, checks, gradient and choice of implementation."""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.kernels.dispatch import check_impl, triton_runs_on
from hf_longattn.kernels.merge_partials.reference import merge_backward, merge_reference

# The kernel for parts that lie apart is compiled for each number of them; more are joined in turns.
_MOST_APART = 8


def merge_partials(outputs: Tensor, lse: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Joins attention results over disjoint sets of keys into the result over all of them, exactly.

        lse = log sum_n exp(lse_n)        output = sum_n exp(lse_n - lse) output_n

    The join is associative and commutative, and an empty part (lse -inf) is its identity; so splits of one
    GPU, GPUs of a node and nodes may be merged in any grouping. Differentiable in both arguments; usable
    inside `torch.compile(fullgraph=True)`.

    Args:
        outputs: (N, B, H, T, V) normalised partial outputs, N >= 1, any floating dtype, any strides. What an
            empty part holds is never read.
        lse: (N, B, H, T) log-sum-exp of each part's scores, natural logarithm, -inf for an empty part; fp32,
            or fp64 where `outputs` is fp64. Flash kernels return +inf for no keys: map it to -inf first.
        impl: "triton", "reference", or "auto" for the faster one that runs on the device.

    Returns:
        output (B, H, T, V) in the dtype of `outputs`, accumulated in that of `lse`, and lse (B, H, T). Where
        every part is empty, output 0 and lse -inf.

    Raises:
        ValueError: shapes or devices that do not fit, no part at all, or an `impl` that cannot run here.
        TypeError: dtypes that do not fit, or lists in the place of tensors.

    Example:
        >>> halves = [decode_attention(query, k, v) for k, v in ((key_0, value_0), (key_1, value_1))]
        >>> output, lse = merge_partials(*(torch.stack(part) for part in zip(*halves)))

    Source: Shyam et al., Tree Attention, arXiv 2408.04093, section 4 (the reduction of Algorithm 3).
    """
    if not isinstance(outputs, Tensor) or not isinstance(lse, Tensor):
        kinds = f"{type(outputs).__name__} and {type(lse).__name__}"
        raise TypeError(f"`outputs` and `lse` must be tensors, got {kinds}; `torch.stack` the parts.")
    if outputs.dim() != 5 or outputs.shape[0] < 1:
        raise ValueError(
            f"`outputs` must be (N, B, H, T, V) with N >= 1, got shape {tuple(outputs.shape)}; "
            f"stack the parts along a new first dimension."
        )
    if lse.shape != outputs.shape[:-1] or lse.device != outputs.device:
        raise ValueError(
            f"`lse` must be {tuple(outputs.shape[:-1])} on {outputs.device} like `outputs`, got "
            f"{tuple(lse.shape)} on {lse.device}."
        )
    wanted = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    if not outputs.is_floating_point() or lse.dtype != wanted:
        raise TypeError(
            f"`lse` must be {wanted} for floating-point `outputs` of {outputs.dtype}, got {lse.dtype}; "
            f"convert it with `.to({wanted})`."
        )
    return _merge(outputs, lse, impl)


def merge_over_first(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`merge_partials` of parts that lie apart, without stacking them: on a GPU, written over the first.

    For code that owns the parts: afterwards none of them may be read. No gradient.

    Args:
        parts: N >= 1 pairs of an output (B, H, T, V), all of one dtype, any strides, and equal ones are
            fastest; and its log-sum-exp (B, H, T), as in `merge_partials`.

    Returns:
        output (B, H, T, V), laid out as the first part where that was written over, and lse (B, H, T).

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) > _MOST_APART:
        return merge_over_first([merge_over_first(parts[:_MOST_APART]), *parts[_MOST_APART:]])
    outputs, lse = (list(kind) for kind in zip(*parts, strict=True))
    apart = triton_runs_on(outputs[0].device)
    alike = all(_alike(x, like) for kind in (outputs, lse) for x in kind for like in kind[:1])
    if not apart or not alike or lse[0].dtype != torch.float32 or lse[0].shape != outputs[0].shape[:3]:
        return merge_partials(torch.stack(outputs), torch.stack(lse))
    from hf_longattn.kernels.merge_partials.triton import merge_over_first as launch

    launch(outputs, lse)
    return outputs[0], lse[0]


def _alike(tensor: Tensor, like: Tensor) -> bool:
    same = tensor.shape == like.shape and tensor.dtype == like.dtype and tensor.device == like.device
    # A dimension of one element has whatever stride its tensor was cut from.
    return same and all(
        size == 1 or stride == wanted
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    )


@torch.library.custom_op("hf_longattn::merge_partials", mutates_args=())
def _merge(outputs: Tensor, lse: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    check_impl("merge_partials", impl, outputs.device)
    if impl == "reference" or not triton_runs_on(outputs.device):
        return merge_reference(outputs, lse)
    from hf_longattn.kernels.merge_partials.triton import merge_forward

    return merge_forward(outputs, lse)


@_merge.register_fake
def _(outputs: Tensor, lse: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return outputs.new_empty(outputs.shape[1:]), lse.new_empty(lse.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor, None]:
    outputs, lse, merged_lse = ctx.saved_tensors
    return *merge_backward(outputs, lse, merged_lse, grad_output, grad_lse), None


_merge.register_autograd(_backward, setup_context=_setup_context)
