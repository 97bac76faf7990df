"""What the queries of a block see: slices of the model's lazy mask, worked out once a forward."""

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_longattn.attention.packing import check_documents, check_lengths, read_lengths
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import LazyMask, document_bounds, packed_bounds
from hf_longattn.parallel.sequence import SequenceShare

# Arguments of a layer that say how documents are packed into a row; the first three say where they end.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "max_length_q", "max_length_k")


def split_rows(length: int, block_size: int) -> list[slice]:
    """The blocks of a sequence, from left to right; the last may be shorter."""
    return [slice(start, min(start + block_size, length)) for start in range(0, length, block_size)]


@dataclass(frozen=True)
class Window:
    """The keys that a block of queries needs, and which of them each query sees.

    Args:
        rows: the queries, whose own keys are the last of `keys`.
        keys: columns of the whole sequence.
        limits: the range inside `keys`, bottom-right causal.
        bias: (B or 1, H or 1, rows, keys) of a dense mask that the caller made, or None.
    """

    rows: slice
    keys: slice
    limits: KeyRange
    bias: Tensor | None = None

    def parts(self, most: int) -> list["Window"]:
        """The same pairs, as pieces of what lies left of the block, and the block's own keys.

        Args:
            most: keys of a piece on the left.
        """
        cuts = [*range(self.keys.start, self.rows.start, most), self.rows.start, self.rows.stop]
        return [self._part(slice(*ends)) for ends in zip(cuts, cuts[1:], strict=False)]

    def _part(self, keys: slice) -> "Window":
        columns = slice(keys.start - self.keys.start, keys.stop - self.keys.start)
        limits = cut_range(self.limits, slice(None), columns, causal=keys.stop == self.rows.stop)
        return Window(self.rows, keys, limits, None if self.bias is None else self.bias[..., columns])


def cut_range(limits: KeyRange, rows: slice, keys: slice, causal: bool) -> KeyRange:
    """The range of some queries inside some keys.

    Args:
        limits: of the whole problem.
        rows: the queries.
        keys: the keys, with start and stop.
        causal: whether causal order still restricts them; it is bottom-right.
    """
    lower, upper = (
        None if bound is None else (bound[:, rows] - keys.start).clamp(0, keys.stop - keys.start)
        for bound in (limits.lower, limits.upper)
    )
    key_mask = None if limits.key_mask is None else limits.key_mask[:, keys].contiguous()
    return KeyRange(limits.causal and causal, lower, upper, key_mask)


class Visibility:
    """The mask of one forward, cut by blocks of queries.

    Args:
        limits: the causal range of the whole sequence.
        blocks: the blocks of queries that are computed here, in order.
        dense: (B or 1, H or 1, T, T) mask of the caller's, or None.
    """

    def __init__(self, limits: KeyRange, blocks: list[slice], dense: Tensor | None = None) -> None:
        self.limits, self.dense = limits, dense
        self.starts = _first_keys(limits, blocks)

    def window(self, index: int, rows: slice) -> Window:
        """The keys of one block.

        Args:
            index: of the block.
            rows: its queries.
        """
        keys = slice(self.starts[index], rows.stop)
        limits = cut_range(self.limits, rows, keys, causal=True)
        return Window(rows, keys, limits, None if self.dense is None else self.dense[:, :, rows, keys])


def _first_keys(limits: KeyRange, blocks: list[slice]) -> list[int]:
    """The first key that any query of each block may see, at most the block's own first."""
    lower = limits.lower
    if lower is None:
        return [0] * len(blocks)
    # The only read of device memory on the host: once a mask, not once a layer.
    first = torch.stack([lower[:, rows].amin() for rows in blocks]).clamp(min=0).tolist()
    return [min(start, rows.start) for start, rows in zip(first, blocks, strict=True)]


class VisibilityCache:
    """Layers that share a mask share its blocks."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[LazyMask, tuple[Any, Visibility]] = weakref.WeakKeyDictionary()

    def get(
        self,
        mask: LazyMask | Tensor | None,
        arguments: dict[str, Any],
        blocks: list[slice],
        device: torch.device,
        share: SequenceShare | None = None,
    ) -> Visibility:
        """The blocks of a layer's mask.

        Args:
            mask: what the model hands to its layers.
            arguments: of the layer: positions, cumulative lengths or document ids.
            blocks: of queries, as places in the sequence.
            device: of the hidden states.
            share: what this rank computes of a sequence over several.

        Returns:
            the `Visibility`.

        Raises:
            ValueError: the mask is not causal, or does not cover every token with every token.
        """
        if share is not None:
            return self._get_shared(mask, arguments, blocks, device, share)
        length = blocks[-1].stop
        if not isinstance(mask, LazyMask):
            return _dense_visibility(mask, arguments, blocks, device)
        if mask.q_length != length or mask.kv_length != length:
            raise ValueError(
                f"`attention_mask` must cover {length} queries and as many keys, got {mask.q_length} and "
                f"{mask.kv_length}; a prepared model trains without a cache."
            )
        return self._find(mask, mask, arguments, blocks, device)

    def _find(
        self,
        key: LazyMask,
        mask: LazyMask,
        arguments: dict[str, Any],
        blocks: list[slice],
        device: torch.device,
    ) -> Visibility:
        options = (blocks[0].stop, device, *(arguments.get(name) is None for name in PACKING))
        found = self._known.get(key)
        if found is None or found[0] != options:
            found = (options, Visibility(_limits(mask, arguments, mask.kv_length, device), blocks))
            self._known[key] = found
        return found[1]

    def _get_shared(
        self,
        mask: LazyMask | Tensor | None,
        arguments: dict[str, Any],
        blocks: list[slice],
        device: torch.device,
        share: SequenceShare,
    ) -> Visibility:
        """The model made its mask from this rank's tokens: the pattern is right, and the lengths are not."""
        assert isinstance(mask, LazyMask), "dense masks are refused where the sequence is split"
        count, padding = share.slices.count, share.filled_padding()
        pattern = mask.pattern
        if pattern is not None and share.documents is not None:
            pattern = replace(pattern, documents=share.fill(share.documents, 1, -1))
        whole = LazyMask(
            mask.batch_size, count, count, 0, 0, mask.mask_function, padding, mask.device, pattern
        )
        documents = arguments.get("seq_idx")
        whole_arguments = {
            **arguments,
            "position_ids": share.filled_positions(),
            "seq_idx": None if documents is None else share.fill(documents, 1, -1),
        }
        return self._find(mask, whole, whole_arguments, blocks, device)


def _dense_visibility(
    mask: Tensor | None, arguments: dict[str, Any], blocks: list[slice], device: torch.device
) -> Visibility:
    packed = [name for name in PACKING[:3] if arguments.get(name) is not None]
    length = blocks[-1].stop
    if mask is not None and (packed or mask.ndim != 4 or mask.shape[-2:] != (length, length)):
        raise ValueError(
            f"`attention_mask` must be (batch, tokens), or (B, H, {length}, {length}) without packing, got "
            f"shape {tuple(mask.shape)}{' and ' + ', '.join(packed) if packed else ''}."
        )
    limits = KeyRange(causal=True)
    return Visibility(_pack(limits, arguments, length, None) if packed else limits, blocks, mask)


def _limits(mask: LazyMask, arguments: dict[str, Any], length: int, device: torch.device) -> KeyRange:
    limits = mask.key_range(device)
    if limits is None or not limits.causal:
        name = getattr(mask.mask_function, "__qualname__", repr(mask.mask_function))
        raise ValueError(
            "`prepare_training` needs causal layers whose mask leaves each query one interval of keys, got "
            f"mask function {name!r}; train this model unprepared, with gradient checkpointing."
        )
    positions = arguments.get("position_ids")
    if any(arguments.get(name) is not None for name in PACKING[:3]):
        return _pack(limits, arguments, length, mask)
    return limits if positions is None else mask.apart(limits, positions)


def _pack(limits: KeyRange, arguments: dict[str, Any], length: int, mask: LazyMask | None) -> KeyRange:
    lengths, documents = read_lengths(None, dict(arguments)), arguments.get("seq_idx")
    batch = 1 if mask is None else mask.batch_size
    if lengths is not None:
        check_lengths(lengths, batch * length, batch * length, mask, alike=True)
        lower, upper, diagonal = packed_bounds(*lengths, length, batch, length)
        return limits.narrowed(lower=lower, upper=torch.minimum(upper, diagonal))
    if documents is None:
        return limits
    check_documents(documents, len(documents) if mask is None else batch, length)
    return limits.narrowed(*document_bounds(documents))
