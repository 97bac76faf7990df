"""Where each token stands: which slot of which block, and which row of the token decoder predicts the next.

A row of the batch is cut into blocks of L slots. A token with rank r in its document stands in slot r mod L
of block r div L, and every document starts a new block. The token after it is predicted by row (r + 1) mod L
of the token decoder on block (r + 1) div L, whose context is the block before that one.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from hf_longattn.attention.packing import check_documents, compare_lengths, read_lengths
from hf_longattn.masking import is_tracing


@dataclass
class BlockLayout:
    """The blocks of a batch, (B, N + 1, L): N that can be complete and one more that can only be predicted.

    Tensors of shape (B, T) may have a first dimension of 1.
    """

    token_ids: torch.Tensor  # (B, N + 1, L) ids, filled where there is no token
    target_block: torch.Tensor  # (B, T) the block of which a column predicts a token
    target_slot: torch.Tensor  # (B, T) which of its L tokens
    has_context: torch.Tensor  # (B, T) bool: whether a block of its document stands before `target_block`
    predictable: torch.Tensor  # (B, T) bool: whether the column's own token was predicted from a context
    leading: torch.Tensor  # (B, T) bool: attended tokens of block 0, which has a context only in a cache
    token_mask: torch.Tensor | None = None  # (B, N + 1, L) bool: slots that hold attended tokens; None: all
    block_mask: torch.Tensor | None = None  # (B, N) bool: blocks with an attended token; None: all
    position_ids: torch.Tensor | None = None  # (B, N) block index in its document; None: one document
    pair_mask: torch.Tensor | None = None  # (B, N - 1) bool: block and its successor complete, same document
    dense: bool = False  # column i is slot i of the blocks

    def last_columns(self, count: int) -> "BlockLayout":
        """The same blocks, seen by the last `count` columns."""
        names = ("target_block", "target_slot", "has_context", "predictable", "leading")
        whole = self.dense and count == self.target_block.shape[1]
        return replace(self, dense=whole, **{name: getattr(self, name)[:, -count:] for name in names})

    def label_mask(self, batch: int, held: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """(B, T + 1): tokens that some row predicts, the token to come included; 1 or 0.

        `held[1]` (B,) says which rows of the batch have a context from before for block 0.
        """
        mask = torch.cat([self.predictable, self.has_context[:, -1:]], dim=1)
        if held is not None:
            leading = torch.cat([self.leading, self.target_block[:, -1:] == 0], dim=1)
            mask = mask | leading & held[1].to(mask.device)[:, None]
        return mask.expand(batch, -1).long()

    @property
    def num_blocks(self) -> int:
        """N, the number of blocks that are embedded."""
        return self.token_ids.shape[1] - 1


@dataclass
class TokenWindow:
    """The blocks that some columns predict: `count` a row from `start` on, `length` tokens of each."""

    layout: BlockLayout
    start: torch.Tensor | int  # (B, 1), or the same for all rows
    count: int
    length: int

    @classmethod
    def over(cls, layout: BlockLayout, first: int, last: int, length: int) -> "TokenWindow":
        """The window of all columns of `layout`, within blocks `first` .. `last`."""
        columns, block_length = layout.target_block.shape[1], layout.token_ids.shape[2]
        count = (columns + block_length - 2) // block_length + 1
        # Packed documents leave slots empty, so that a few columns can reach over many blocks.
        if count > last - first or layout.position_ids is not None:
            return cls(layout, first, last - first + 1, length)
        start = layout.target_block.amin(dim=1, keepdim=True).clamp(first, last - count + 1)
        return cls(layout, start.expand(layout.token_ids.shape[0], -1), count, length)

    def take(self, blocks: torch.Tensor, first: int) -> torch.Tensor:
        """The window of (B, N, ...), whose place 0 is block `first`; (B x count, ...)."""
        if isinstance(self.start, int):
            return blocks[:, self.start - first : self.start - first + self.count].flatten(0, 1)
        rows = torch.arange(blocks.shape[0], device=blocks.device)[:, None]
        places = self.start - first + torch.arange(self.count, device=blocks.device)
        return blocks[rows, places].flatten(0, 1)

    def rows(self, states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """One state a column, (B, T, D), of (B x count, length, D); zeros where `valid` (B, T) is false."""
        layout, batch = self.layout, self.layout.token_ids.shape[0]
        if layout.dense and isinstance(self.start, int) and self.start == 1:
            first = layout.token_ids.shape[2] - 1
            states = states.reshape(batch, -1, states.shape[-1])[:, : layout.target_block.shape[1] - first]
            return F.pad(states, (0, 0, first, 0))
        index = (layout.target_block - self.start) * self.length + layout.target_slot
        index = index + torch.arange(batch, device=states.device)[:, None] * (self.count * self.length)
        valid = valid.expand_as(index)
        taken = states.flatten(0, 1)[torch.where(valid, index, 0)]
        return torch.where(valid[:, :, None], taken, 0)


@dataclass
class PendingTokens:
    """What stands before the columns of a call: tokens that no block has yet, or pads of a short prompt."""

    token_ids: torch.Tensor  # (B, p)
    slotted: torch.Tensor | None = None  # (B, p) bool: columns that take a slot; None: all
    attended: torch.Tensor | None = None  # (B, p) bool: columns with attended tokens; None: all


def check_offset(block_offset: torch.Tensor, batch: int, block_length: int) -> None:
    """Refuses pads of the first blocks, `block_offset`, that are not (B,) numbers in 0 .. L - 1."""
    shape = tuple(block_offset.shape)
    if shape != (batch,) or bool(((block_offset < 0) | (block_offset >= block_length)).any()):
        raise ValueError(
            f"`block_offset` must be {(batch,)}, pads in the first block of each row, 0 to "
            f"{block_length - 1} of them, got {block_offset.tolist()}."
        )


def offset_pads(block_offset: torch.Tensor, block_length: int, fill_id: int) -> PendingTokens:
    """The pads that fill the first block of each row: `block_offset` (B,) of them, at most L - 1."""
    places = torch.arange(block_length - 1, 0, -1, device=block_offset.device)
    slotted = places <= block_offset[:, None]
    return PendingTokens(
        torch.full_like(slotted, fill_id, dtype=torch.long), slotted, torch.zeros_like(slotted)
    )


def lay_out(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    starts: torch.Tensor | None,
    pending: PendingTokens | None,
    *,
    block_length: int,
    fill_id: int,
    by_column: bool,
) -> BlockLayout:
    """Lays new tokens out behind the pending ones; only the new columns keep their predictions.

    Args:
        input_ids: (B, T).
        mask: (B, T) bool, attended tokens; None: all.
        starts: (B, T) bool, the first tokens of packed documents after the first; None: one document a row.
        pending: what stands before `input_ids` in the first blocks.
        block_length: L.
        fill_id: the id of slots without a token.
        by_column: whether pads take slots.
    """
    if pending is None:
        pending = PendingTokens(input_ids[:, :0])
    ids = torch.cat([pending.token_ids, input_ids], dim=1)
    if all(part is None for part in (pending.slotted, pending.attended, mask, starts)):
        return dense_layout(ids, block_length, fill_id).last_columns(input_ids.shape[1])
    every = torch.ones_like(ids, dtype=torch.bool)
    before, new = every[:, : pending.token_ids.shape[1]], every[:, pending.token_ids.shape[1] :]
    own = new if mask is None else mask
    held = before if pending.slotted is None else pending.slotted
    slotted, attended = torch.cat([held, new if by_column else own], dim=1), None
    if by_column or pending.attended is not pending.slotted:
        held = before if pending.attended is None else pending.attended
        attended = torch.cat([held, own], dim=1)
    layout = block_layout(ids, slotted, attended, starts, block_length=block_length, fill_id=fill_id)
    if not by_column:
        # A block of tokens holds at least one.
        layout.block_mask = None
    return layout.last_columns(input_ids.shape[1])


def column_mask(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The part of `attention_mask` (B, >= T) that belongs to `input_ids` (B, T), as booleans."""
    if input_ids.ndim != 2:
        raise ValueError(f"`input_ids` must be of shape (B, T), got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(f"`attention_mask` must be a tensor, got {type(attention_mask).__name__}.")
    shape, (batch, length) = tuple(attention_mask.shape), input_ids.shape
    if attention_mask.ndim != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(
            f"`attention_mask` must be of shape (B, T) with B={batch} and T={length} or more, those of the "
            f"cache in front, got {shape}; blocks are cut from it."
        )
    return attention_mask[:, shape[1] - length :].to(input_ids.device, torch.bool)


def prompt_offset(
    mask: torch.Tensor, block_length: int, by_column: bool, whole: bool = False
) -> torch.Tensor | None:
    """How many pads a prompt gets in its first block: (B,), or None if no row needs any.

    By column every prompt is filled to a multiple of L; by token only those shorter than a block, which would
    have no context otherwise. Looks at the device where the columns and `whole` do not tell: no row has pads.
    """
    columns = mask.shape[1]
    if by_column or whole:
        pads = -columns % block_length if by_column else max(block_length - columns, 0)
        return mask.new_full(mask.shape[:1], pads) if pads else None
    offset = (block_length - mask.sum(dim=1)).clamp(0, block_length - 1)
    return offset if bool((offset > 0).any()) else None


def document_starts(
    position_ids: torch.Tensor | None, mask: torch.Tensor, keywords: dict[str, Any]
) -> torch.Tensor | None:
    """Finds packed documents, by the first of `cu_seq_lens_q`, `seq_idx` and `position_ids` that is given.

    Args:
        position_ids: (B, T) or (1, T); an attended token whose position is not above that of the attended
            token before it starts a document.
        mask: (B, T) bool, false at pads, whose positions mean nothing.
        keywords: `cu_seq_lens_q` (documents + 1,), where documents start and the last ends, counted through
            all rows; `seq_idx` (B or 1, T), the document of each token.

    Returns:
        (B, T) bool, true at the first token of every document but a row's first; None if no row has two.

    Raises:
        TypeError: `cu_seq_lens_q` is no tensor of integers.
        ValueError: one of the three does not fit the tokens.
    """
    lengths, documents = read_lengths(None, dict(keywords)), keywords.get("seq_idx")
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if lengths is not None:
        if not is_tracing(lengths[0]):
            compare_lengths(lengths, mask.numel(), mask.numel(), alike=True)
        places = torch.arange(mask.numel(), device=mask.device).view_as(mask)
        # What comes behind the last document is none of it.
        starts = torch.isin(places, lengths[0][1:].to(mask.device)) & (columns > 0)
        return starts if bool(starts.any()) else None
    if documents is None and position_ids is None:
        return None
    before = F.pad(torch.where(mask, columns, -1).cummax(dim=1).values, (1, -1), value=-1)
    starts, before = mask & (before >= 0), before.clamp(min=0)
    if documents is not None:
        check_documents(documents, *mask.shape)
        documents = documents.to(mask.device).expand_as(mask)
        starts &= documents != documents.gather(1, before)
    else:
        position_ids = _position_of_each(position_ids, mask)
        starts &= position_ids <= position_ids.gather(1, before)
    return starts if bool(starts.any()) else None


def _position_of_each(position_ids: Any, mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, T), where they are given as those or for all rows at once."""
    shape = tuple(position_ids.shape)
    if shape not in (tuple(mask.shape), (1, mask.shape[1]), (mask.shape[1],)):
        raise ValueError(
            f"`position_ids` must be of shape {tuple(mask.shape)}, one a token, got {shape}; they say where "
            "packed documents start, and can be left out otherwise."
        )
    return position_ids.to(mask.device).expand_as(mask)


def dense_layout(input_ids: torch.Tensor, block_length: int, fill_id: int) -> BlockLayout:
    """The layout of rows without pads and of one document each: column i is slot i.

    Args:
        input_ids: (B, T).
        block_length: L.
        fill_id: the id of slots without a token.
    """
    length = input_ids.shape[1]
    blocks = length // block_length
    columns = torch.arange(length, device=input_ids.device)[None]
    padded = F.pad(input_ids, (0, (blocks + 1) * block_length - length), value=fill_id)
    return BlockLayout(
        token_ids=padded.view(-1, blocks + 1, block_length),
        target_block=(columns + 1) // block_length,
        target_slot=(columns + 1) % block_length,
        has_context=columns + 1 >= block_length,
        predictable=columns >= block_length,
        leading=columns < block_length,
        dense=True,
    )


def block_layout(
    input_ids: torch.Tensor,
    slotted: torch.Tensor,
    attended: torch.Tensor | None,
    starts: torch.Tensor | None,
    *,
    block_length: int,
    fill_id: int,
) -> BlockLayout:
    """Lays rows with pads or packed documents out in blocks.

    Args:
        input_ids: (B, T).
        slotted: (B, T) bool, the columns that take a slot: attended tokens, and pads that belong to a block.
        attended: (B, T) bool, the columns that hold attended tokens; None: as `slotted`.
        starts: (B, T) bool, where later documents start; None: rows of one document.
        block_length: L.
        fill_id: the id of slots without a token.

    Returns:
        The layout. A column without a slot predicts what the last slot before it predicts.
    """
    rank = slotted.cumsum(dim=1) - 1
    if starts is None:
        block = rank.div(block_length, rounding_mode="floor")
        blocks = rank.shape[1] // block_length
    else:
        rank = rank - torch.where(starts, rank, 0).cummax(dim=1).values
        block = (slotted & (rank % block_length == 0)).cumsum(dim=1) - 1
        blocks = int(block.max()) + 1
    size = (blocks + 1) * block_length
    slot = torch.where(slotted, block * block_length + rank % block_length, size)

    def to_slots(values: torch.Tensor, fill: int | bool) -> torch.Tensor:
        # Columns without a slot write to one more place, which is cut off.
        table = values.new_full((values.shape[0], size + 1), fill)
        return table.scatter(1, slot, values)[:, :size].view(-1, blocks + 1, block_length)

    held = slotted if attended is None else attended
    layout = BlockLayout(
        token_ids=to_slots(input_ids, fill_id),
        target_block=block + ((rank + 1) % block_length == 0),
        target_slot=(rank + 1) % block_length,
        has_context=rank + 1 >= block_length,
        predictable=held & (rank >= block_length),
        leading=held & (block == 0),
    )
    complete = to_slots(slotted, False).all(dim=-1)[:, :blocks]
    layout.pair_mask = complete[:, :-1] & complete[:, 1:]
    if starts is not None:
        layout.position_ids = to_slots(rank // block_length, 0)[:, :blocks, 0]
        layout.pair_mask &= layout.position_ids[:, 1:] > 0
    if attended is not None:
        _leave_out_empty_blocks(layout, to_slots(attended, False), block)
    return layout


def _leave_out_empty_blocks(layout: BlockLayout, token_mask: torch.Tensor, block: torch.Tensor) -> None:
    """A block of pads alone is no context: rows that would need one predict nothing and are not scored."""
    layout.token_mask, layout.block_mask = token_mask, token_mask[:, :-1].any(dim=-1)
    # One more entry in front: block -1 is no context either.
    valid = F.pad(layout.block_mask, (1, 1), value=False)
    layout.has_context = layout.has_context & valid.gather(1, layout.target_block)
    layout.predictable = layout.predictable & valid.gather(1, block.clamp(min=0))
    assert layout.pair_mask is not None
    layout.pair_mask = layout.pair_mask & layout.block_mask[:, :-1] & layout.block_mask[:, 1:]
