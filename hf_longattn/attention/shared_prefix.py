"""Attention of many sequences that begin alike: the common prefix is read once for all of them.

The rows of a batch become queries of one sequence, (B, H, T, K) -> (1, H, B T, K), for every suffix token
sees the prefix whatever the row; each row attends its own suffix; one merge joins the two. Windows count
tokens that exist: padding before a short suffix moves nothing out of sight, as if each row ran alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_longattn.attention.exact import MAX_DECODE_QUERIES, Options, of_one_dtype, unsupported
from hf_longattn.cache.shared_prefix import SharedStates
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_over_first, merge_partials
from hf_longattn.masking import LazyMask, Pattern, is_tracing


@dataclass(frozen=True)
class Limits:
    """What the queries see.

    Args:
        first: (B, T) the first visible key of the prefix, or None where all of it is visible.
        suffix: the range within the suffixes.
    """

    first: Tensor | None
    suffix: KeyRange


def shared_prefix_attention(
    query: Tensor, key: SharedStates, value: SharedStates, mask: LazyMask | Tensor | None, options: Options
) -> Tensor:
    """Softmax attention of suffix tokens over the common prefix and their own suffix.

        (o, l) = merge((o, l) over the prefix, (o, l) over the suffix)

    Args:
        query: (B, H, T, K).
        key: (1, G, P, K) and (B, G, S, K).
        value: (1, G, P, V) and (B, G, S, V).
        mask: the `LazyMask` of the P + S keys.
        options: what the call asks beyond query, key and value.

    Returns:
        (B, T, H, V), contiguous, in the dtype of `query`.

    Raises:
        ValueError: a mask or an option that is not supported here, or a mask that hides tokens of the prefix.

    Source: Shyam et al., Tree Attention, arXiv 2408.04093: the same merge, over prefix and suffix.
    """
    name = unsupported(mask, options) or _unsupported_pattern(mask)
    if name is not None:
        raise ValueError(
            f"`{name}`: this kind of attention is not supported on a cache forked with `rows`; masks must be "
            "made of causal order, windows, chunks and padding, and windows not be compiled. Fork with "
            "`batch_size`."
        )
    assert isinstance(mask, LazyMask)
    states = (key.prefix, value.prefix, key.suffix, value.suffix)
    query, prefix_key, prefix_value, suffix_key, suffix_value = of_one_dtype(query, *states)
    if "suffix" not in mask.derived:
        mask.derived["suffix"] = _limits(mask, prefix_key.shape[2], suffix_key.shape[2], query.device)
    limits: Limits = mask.derived["suffix"]
    differentiated = torch.is_grad_enabled() and query.requires_grad
    terms: dict[str, Any] = {"scale": options.scale, "softcap": options.softcap}
    # A sink is one more logit of the row: it is counted once, with the suffix.
    few = query.shape[2] <= MAX_DECODE_QUERIES and not differentiated
    attend = decode_attention if few else blockwise_attention
    own = attend(query, suffix_key, suffix_value, mask=limits.suffix, sinks=options.sinks, **terms)
    if prefix_key.shape[2] == 0:
        return own[0].transpose(1, 2).contiguous()
    # Grouped heads let the decoding kernel read a key once for all heads that share it.
    most = 0 if differentiated else MAX_DECODE_QUERIES * (query.shape[1] // prefix_key.shape[1])
    common = _attend_prefix(query, prefix_key, prefix_value, limits.first, most, terms)
    if few or differentiated or torch.compiler.is_compiling():
        output, _ = merge_partials(*(torch.stack(pair) for pair in zip(common, own, strict=True)))
    else:
        # Large outputs of one layout are merged where they are.
        output, _ = merge_over_first([own, (common[0], common[1].contiguous())])
    return output.transpose(1, 2).contiguous()


def _unsupported_pattern(mask: LazyMask | Tensor | None) -> str | None:
    pattern = mask.pattern if isinstance(mask, LazyMask) else None
    known = pattern is not None and pattern.radius is None and pattern.documents is None
    return None if known else "attention_mask"


def _attend_prefix(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, most: int, terms: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, V) and lse (B, H, T) over the prefix, by the decoding kernel for up to `most` rows."""
    shape = query.shape[:3]
    rows = shape[0] * shape[2]
    pieces = -(-rows // MAX_DECODE_QUERIES) if rows <= most else 1
    queries = _fold(query, pieces)
    limits = KeyRange(lower=None if first is None else _fold(first[:, None, :, None], pieces)[:, 0, :, 0])
    # The same keys for every piece, without a copy.
    key, value = (states.expand(pieces, -1, -1, -1) for states in (key, value))
    attend = decode_attention if rows <= most else blockwise_attention
    output, lse = attend(queries, key, value, mask=limits, **terms)
    return _unfold(output, shape), _unfold(lse[..., None], shape)[..., 0]


def _fold(tensor: Tensor, pieces: int) -> Tensor:
    """(B, H, T, K) -> (pieces, H, R, K): the B T rows of a head, cut in equal pieces, zeros behind them."""
    flat = tensor.transpose(0, 1).flatten(1, 2)
    if missing := -flat.shape[1] % pieces:
        flat = F.pad(flat, (0, 0, 0, missing))
    return flat.unflatten(1, (pieces, -1)).transpose(0, 1)


def _unfold(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_fold`, for the `shape` (B, H, T)."""
    batch, _, length = shape
    flat = tensor.transpose(0, 1).flatten(1, 2)[:, : batch * length]
    return flat.unflatten(1, (batch, length)).transpose(0, 1)


def _limits(mask: LazyMask, num_shared: int, num_own: int, device: torch.device) -> Limits:
    """Cuts the range of a mask in two, at the end of the prefix; once a forward for all layers of a kind."""
    assert mask.pattern is not None
    _check_prefix(mask, num_shared, num_own)
    padding = None if mask.padding is None else mask.padding[:, num_shared:]
    start = mask.kv_offset + num_shared
    causal = Pattern(causal=mask.pattern.causal)
    suffix = LazyMask(
        mask.batch_size, mask.q_length, num_own, mask.q_offset, start, mask.mask_function, padding,
        mask.device, causal,
    ).key_range(device)  # fmt: skip
    assert suffix is not None
    if mask.pattern.window is None and mask.pattern.chunk is None:
        return Limits(None, suffix)
    slots = torch.arange(num_own, device=device)[None]
    # Positions as the rows have them alone: padding takes none.
    positions = (slots if padding is None else padding.to(device).cumsum(-1) - 1) + start
    queries = torch.arange(mask.q_length, device=device) + (mask.q_offset - start)
    first = _first_position(mask.pattern, positions[:, queries])
    lower = torch.searchsorted(positions.expand(len(first), -1).contiguous(), first.contiguous())
    batch = first.expand(mask.batch_size, -1)
    return Limits((batch - mask.kv_offset).to(torch.int32), suffix.narrowed(lower=lower))


def _first_position(pattern: Pattern, position: Tensor) -> Tensor:
    """The first position that a query at `position` sees through its window or chunk."""
    first = torch.zeros_like(position)
    if pattern.window is not None:
        first = torch.maximum(first, position - pattern.window + 1)
    if pattern.chunk is not None:
        first = torch.maximum(first, position // pattern.chunk[0] * pattern.chunk[0])
    return first


def _check_prefix(mask: LazyMask, num_shared: int, num_own: int) -> None:
    """Refuses padding in the prefix. Looks at the first forward of a prompt: later masks begin like it."""
    if mask.padding is None or is_tracing(mask.padding):
        return
    begins = num_own == mask.q_length
    if (begins or mask.padding.device.type == "cpu") and not bool(mask.padding[:, :num_shared].all()):
        raise ValueError(
            "`attention_mask` hides tokens of the prefix that a cache forked with `rows` shares; its first "
            "columns must be ones. Read the prefix without padding, and put the padding of short suffixes "
            "between the prefix and them."
        )
