"""The keys and values of blocks, in buffers that stay where they are and are written at places on the device.

`HeldBlocks` is what the block decoder sees as its cache while it computes one more block of every row, and
`FirstBlocks` while it reads prompts from their begin; the masks say what is visible in each.
"""

# The tensors of a cache are None until the first tokens come.
# pyright: reportOptionalSubscript=false, reportArgumentType=false

from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.cache_utils import Cache

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import LazyMask, Pattern

from .cache_block_transformer import BlockTransformerCache


class HeldBlocks(Cache):
    """The buffers of a `BlockTransformerCache` for some rows, written at places that lie on the device.

    Args:
        cache: with room for all blocks to come.
        rows: the rows of the batch.
        even: whether they stand at one block for good; None: as they do now.
    """

    def __init__(self, cache: BlockTransformerCache, rows: slice, even: bool | None = None) -> None:
        super().__init__(layers=cache.layers)
        self.buffers = [(layer._keys[rows], layer._values[rows]) for layer in cache.layers]
        batch, _, self.room, _ = self.buffers[0][0].shape
        device = self.buffers[0][0].device
        self.each = cache.keys_per_block
        self.rows = torch.arange(batch, device=device)[:, None]
        # Rows that stand at one block write in one launch.
        if even is None:
            even = bool((cache.num_blocks[rows] == cache.num_blocks[rows.start]).all())
        self.even = even
        start = cache.num_blocks[rows, None] * self.each
        # A number needs no copy, which would wait for all that was launched before.
        start = torch.full_like(start, int(start[0]), device=device) if self.even else start.to(device)
        # (R, n_e), where the block that is computed next goes.
        self.places = start + torch.arange(self.each, device=device)
        self.key_mask = None  # (R, room) bool, False at blocks of pads alone; None: there are none
        if cache.block_mask is not None and not bool(cache.block_mask[rows].all()):
            held = cache.block_mask[rows].repeat_interleave(self.each, dim=1)
            self.key_mask = torch.ones(batch, self.room, dtype=torch.bool, device=device)
            self.key_mask[:, : held.shape[1]] = held

    @property
    def start(self) -> Tensor:
        """(R, 1), where the block that is computed next begins; a view of `places`."""
        return self.places[:, :1]

    def mask(self) -> "EndsMask":
        """What the queries of one new block see: all of it and all before it."""
        return EndsMask((self.start + self.each).expand(-1, self.each), self.room, self.key_mask)

    def views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (R, G, room, K): those of a new block go to `places`."""
        return self.buffers[layer_idx]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes (R, G, n_e, K) at `places`; returns the whole buffers."""
        keys, values = self.buffers[layer_idx]
        if self.even:
            cache_write(keys, values, self.places[0], key_states, value_states)
            return keys, values
        keys.transpose(1, 2)[self.rows, self.places] = key_states.transpose(1, 2)
        values.transpose(1, 2)[self.rows, self.places] = value_states.transpose(1, 2)
        return keys, values

    def advance(self) -> None:
        """Goes on to the next block."""
        self.places.add_(self.each)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given, and the mask says what is visible."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All of the buffers, from their begin."""
        return self.room, 0


class RowBlocks(HeldBlocks):
    """`HeldBlocks` of rows that begin and end one by one; one that nobody uses stays at its last place.

    Args:
        cache: with room for all blocks of a row.
        rows: the rows of the batch.
    """

    def __init__(self, cache: BlockTransformerCache, rows: slice) -> None:
        super().__init__(cache, rows, even=False)
        self._last = torch.arange(self.room - self.each, self.room, device=self.start.device)

    def place(self, rows: Tensor, blocks: Tensor) -> None:
        """Says that `rows` (R,) hold `blocks` (R,) blocks."""
        start = blocks[:, None] * self.each
        self.places.index_copy_(0, rows, start + torch.arange(self.each, device=start.device))

    def advance(self) -> None:
        """Goes on to the next block, where there is room for one."""
        super().advance()
        self.places.clamp_(max=self._last)


class FirstBlocks(Cache):
    """The buffers of `HeldBlocks`, of which a prompt fills the begin.

    Args:
        held: what the steps go on with.
        rows: those that the prompts take, a slice or (R,).
        count: keys that come.
        start: keys that lie in front of those that come.
    """

    def __init__(self, held: HeldBlocks, rows: Tensor | slice, count: int, start: int = 0) -> None:
        super().__init__(layers=held.layers)
        self.held, self.rows, self.start, self.end = held, rows, start, start + count
        # (1, N), the positions of the keys that come, and where they go.
        self.places = torch.arange(start, self.end, device=held.places.device)[None]

    @property
    def in_place(self) -> bool:
        """Whether the rows lie next to each other, so that their keys and values are read where they are."""
        return isinstance(self.rows, slice)

    def views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer where the rows are `in_place`, (R, G, S, K), with those that come."""
        keys, values = (buffer[self.rows, :, : self.end] for buffer in self.held.buffers[layer_idx])
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes (R, G, N, K) behind what lies in front; returns all of it."""
        if self.in_place:
            keys, values = self.views(layer_idx)
            keys[:, :, self.start :].copy_(key_states)
            values[:, :, self.start :].copy_(value_states)
            return keys, values
        keys, values = self.held.buffers[layer_idx]
        return self._scatter(keys, key_states), self._scatter(values, value_states)

    def _scatter(self, buffer: Tensor, states: Tensor) -> Tensor:
        buffer[:, :, self.start : self.end].index_copy_(0, self.rows, states)
        # What was written is at hand, unless there is more in front.
        return buffer[:, :, : self.end].index_select(0, self.rows) if self.start else states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys before those that come."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The blocks of the prompt, from the first."""
        return self.start + query_length, 0


class FirstMask(LazyMask):
    """Causal order among the blocks of prompts, whose positions nobody has to search for documents.

    Args:
        rows: R, prompts.
        keys: T, embedding tokens of the blocks that come.
        device: of the prompts.
        start: keys that lie in front of them.
        each: embedding tokens of a block, which see each other.
    """

    def __init__(self, rows: int, keys: int, device: torch.device, start: int = 0, each: int = 1) -> None:
        self.ends: Tensor | None = None
        seen: Any = masking_utils.causal_mask_function
        if each > 1:
            places = torch.arange(start, start + keys, device=device)
            ends = self.ends = ((places // each + 1) * each).expand(rows, -1)
            seen = lambda batch, head, query, key: key < ends[batch, query - start]  # noqa: E731
        super().__init__(rows, keys, start + keys, start, 0, seen, None, device, Pattern())

    def _build_range(self, pattern: Pattern) -> KeyRange:
        return KeyRange(causal=True) if self.ends is None else KeyRange().narrowed(upper=self.ends)


class EndsMask(LazyMask):
    """Each query sees the first `ends` (R, T) keys of S, but for those that `key_mask` (R, S) leaves out."""

    def __init__(self, ends: Tensor, keys: int, key_mask: Tensor | None) -> None:
        first = keys - ends.shape[1]

        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return key < ends[batch, query - first]

        sizes = (ends.shape[0], ends.shape[1], keys, first, 0)
        super().__init__(*sizes, visible, key_mask, ends.device, Pattern())
        self.ends = ends

    def _build_range(self, pattern: Pattern) -> KeyRange:
        limits = KeyRange().narrowed(upper=self.ends)
        return limits if self.padding is None else limits.masked(self.padding)
