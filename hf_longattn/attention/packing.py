"""Where packed documents end, as callers say it, checked: wrong numbers would mix documents."""

from typing import Any

import torch
from torch import Tensor

from hf_longattn.masking import LazyMask, is_tracing

Lengths = tuple[Tensor, Tensor]


def read_lengths(module: Any, keywords: dict[str, Any]) -> Lengths | None:
    """Takes the cumulative lengths of queries and keys out of the keywords of a call.

    Args:
        module: the attention module that calls.
        keywords: of the attention interface; `cu_seq_lens_q` and `cu_seq_lens_k` are removed.

    Returns:
        both, (documents + 1,) each, the former for the latter where that is left out; None without them.

    Raises:
        TypeError: they are no tensors of integers.
        ValueError: their shapes do not fit, there are those of the keys alone, or the two differ in an
            encoder-decoder.
    """
    queries, keys = keywords.pop("cu_seq_lens_q", None), keywords.pop("cu_seq_lens_k", None)
    if queries is None and keys is None:
        return None
    if queries is None:
        raise ValueError("`cu_seq_lens_k` came without `cu_seq_lens_q`; pass both, or the latter alone.")
    keys = queries if keys is None else keys
    for name, lengths in (("cu_seq_lens_q", queries), ("cu_seq_lens_k", keys)):
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"`{name}` must be a tensor of int32 or int64, got {kind}.")
        if lengths.shape != queries.shape or lengths.ndim != 1 or len(lengths) < 2:
            raise ValueError(
                f"`{name}` must be (documents + 1,), as many for queries as for keys, got shape "
                f"{tuple(lengths.shape)}, and {tuple(queries.shape)} for `cu_seq_lens_q`."
            )
    _check_encoder_decoder(module, queries, keys)
    return queries, keys


def _check_encoder_decoder(module: Any, queries: Tensor, keys: Tensor) -> None:
    # Its self-attention layers get both as they are, whichever of the two is theirs.
    shared = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if shared and queries is not keys and not is_tracing(queries) and not torch.equal(queries, keys):
        raise ValueError(
            "`cu_seq_lens_q` and `cu_seq_lens_k` differ, but an encoder-decoder hands one pair to the "
            "self-attention of both parts; pack sources and targets to equal lengths, or give masks."
        )


def check_lengths(
    lengths: Lengths, num_queries: int, num_keys: int, mask: LazyMask | None, alike: bool
) -> None:
    """Refuses cumulative lengths of other tokens than those of a call.

    Waits for a GPU, so looks once a forward there, and not at all without the `mask` that its layers share.

    Args:
        lengths: from `read_lengths`.
        num_queries: of all rows, B * T.
        num_keys: of all rows, B * S.
        mask: of the call.
        alike: whether queries and keys are of the same tokens.

    Raises:
        ValueError: they do not rise from 0 to at most these numbers, or those of the same tokens differ.
    """
    queries = lengths[0]
    if is_tracing(queries) or (mask is not None and mask.derived.get("lengths") is queries):
        return
    if mask is not None:
        mask.derived["lengths"] = queries
    elif queries.device.type != "cpu":
        return
    compare_lengths(lengths, num_queries, num_keys, alike)


def compare_lengths(lengths: Lengths, num_queries: int, num_keys: int, alike: bool) -> None:
    """What `check_lengths` looks for, at every call; waits for a GPU.

    Args:
        lengths: from `read_lengths`.
        num_queries: of all rows, B * T.
        num_keys: of all rows, B * S.
        alike: whether queries and keys are of the same tokens.

    Raises:
        ValueError: they do not rise from 0 to at most these numbers, or those of the same tokens differ.
    """
    queries, keys = lengths
    for name, ends, total in (("cu_seq_lens_q", queries, num_queries), ("cu_seq_lens_k", keys, num_keys)):
        first, last, falls = torch.stack([ends[0], ends[-1], (ends.diff() < 0).any()]).tolist()
        if first or falls or last > total:
            raise ValueError(
                f"`{name}` must rise from 0 to the tokens of all rows, {total} here, got "
                f"{'falling numbers' if falls else f'{first} to {last}'}."
            )
    if alike and queries is not keys and not torch.equal(queries, keys):
        raise ValueError(
            "`cu_seq_lens_q` and `cu_seq_lens_k` differ, but queries and keys are of the same tokens; pass "
            "the former alone."
        )


def check_documents(documents: Tensor, batch: int, length: int) -> None:
    """Refuses document ids of another shape than the tokens.

    Args:
        documents: `seq_idx`, (B or 1, T).
        batch: B.
        length: T.

    Raises:
        ValueError: with both shapes.
    """
    if documents.ndim != 2 or documents.shape[0] not in (1, batch) or documents.shape[1] != length:
        raise ValueError(
            f"`seq_idx` must be {(batch, length)}, a document for each token, got {tuple(documents.shape)}."
        )
