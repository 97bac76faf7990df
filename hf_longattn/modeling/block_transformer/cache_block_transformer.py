"""The cache of a Block Transformer: keys and values of whole blocks, and the tokens that no block has yet.

Every row has a block count of its own, because blocks of unequal prompts fill up at different steps: row b
keeps its blocks in places 0 .. n_b - 1 of each layer, and what lies beyond is masked. Token ids are kept as
well (8 bytes a token), so that `crop` can take a closed block apart again.
"""

# The tensors of a cache are None until the first tokens come.
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportReturnType=false

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_longattn.cache.preallocated import lasting_buffers

from .layout import PendingTokens

# Blocks by which a layer grows at a time, so that a block step copies the cache only now and then.
GROWTH = 64


@dataclass
class BlockWrite:
    """Where the keys of one block step go: `rows` write `starts` .. `starts + count` and read `length`."""

    starts: torch.Tensor  # (R,) on the CPU, in key positions
    count: int
    rows: torch.Tensor | None = None  # (R,) on the CPU; None: all

    @functools.cached_property
    def length(self) -> int:
        """Key positions that are read: those of the longest row."""
        return int(self.starts.max()) + self.count

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all rows write at the same place."""
        return bool((self.starts == self.starts[0]).all())


class BlockLayer(CacheLayerMixin):
    """Keys and values of one layer of the block decoder, (B, G, capacity, K); `keys` is the part in use.

    Args:
        capacity: key positions to make room for at the first write; more are added as needed.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        # Buffers of an earlier layer, for the first write.
        self.borrowed: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Notes dtype and device; the memory comes with the first write."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = key_states[:, :, :0], value_states[:, :, :0]
        self.length = 0
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the states of `kwargs["write"]` for a batch of `kwargs["batch_size"]` rows; returns what is
        read.
        """
        write: BlockWrite = kwargs["write"]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A write of every row from its begin leaves nothing of an earlier batch in front of its end.
        whole = write.rows is None and write.uniform and write.count == write.length
        self.reserve(kwargs["batch_size"], write.length, write.count if whole else 0)
        self.extend(write.length)
        return self._write(self._keys, key_states, write), self._write(self._values, value_states, write)

    @property
    def used(self) -> int:
        """Slots of the buffers that are in use."""
        return self.length

    def extend(self, length: int) -> None:
        """Notes that the first `length` key positions are in use."""
        self.length = max(self.length, length)
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]

    def reserve(self, batch_size: int, length: int, written: int = 0) -> None:
        """Makes room for `length` key positions of `batch_size` rows.

        The first `written` of them are about to be written, so that nobody has to clear them.
        """
        held = self._keys.shape
        if held[0] == batch_size and held[2] >= length:
            return
        if self.borrowed is not None:
            (self._keys, self._values), self.borrowed = self.borrowed, None
            self._keys[:, :, written:].zero_()
            self._values[:, :, written:].zero_()
            return self.reserve(batch_size, length)
        room = (
            max(length, self.capacity)
            if held[2] == 0
            else -(-max(length, held[2] + held[2] // 8) // GROWTH) * GROWTH
        )

        def grown(old: torch.Tensor) -> torch.Tensor:
            with lasting_buffers():
                new = old.new_empty((batch_size, old.shape[1], room, old.shape[3]))
            if held[2]:
                new[:, :, : held[2]] = old
            # Zeros, because masked places are still multiplied by a weight of 0.
            new[:, :, max(held[2], written) :].zero_()
            return new

        self._keys, self._values = grown(self._keys), grown(self._values)

    def _write(self, held: torch.Tensor, states: torch.Tensor, write: BlockWrite) -> torch.Tensor:
        if write.rows is None and write.uniform:
            held[:, :, write.length - write.count : write.length] = states
            return held[:, :, : write.length]
        rows = torch.arange(held.shape[0]) if write.rows is None else write.rows
        places = write.starts[:, None] + torch.arange(write.count)
        index = rows.to(held.device)[:, None], places.to(held.device)
        held.transpose(1, 2)[index] = states.transpose(1, 2)
        read = held[:, :, : write.length]
        return read if write.rows is None else read.index_select(0, index[0][:, 0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The cache answers for its layers: see `BlockTransformerCache.get_mask_sizes`."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Key positions in use."""
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def truncate(self, length: int) -> None:
        """Forgets the key positions from `length` on."""
        if self.is_initialized and length < self.length:
            self.length = length
            self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]

    def select(self, index: torch.Tensor) -> None:
        """Keeps the rows `index` of the batch, in this order."""
        if self.is_initialized:
            index = index.to(self._keys.device)
            if index.shape[0] == self._keys.shape[0]:
                # The buffers stay where they are, and a second copy of one is all that is needed.
                for buffer in (self._keys, self._values):
                    buffer.copy_(buffer.index_select(0, index))
                return
            with lasting_buffers():
                self._keys, self._values = (
                    buffer.index_select(0, index) for buffer in (self._keys, self._values)
                )
            self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]


class BlockTransformerCache(Cache):
    """What decoding needs to go on: `get_seq_length()` counts columns of tokens, as `generate` expects.

    Args:
        config: a `BlockTransformerConfig`.
        capacity: tokens a row to make room for at the first forward; the cache grows beyond.

    Example:
        ```python
        >>> cache = BlockTransformerCache(model.config)
        >>> model(prompt_ids, past_key_values=cache)
        >>> model(next_ids, past_key_values=cache)
        ```
    """

    # The ranks that share the keys and values, where several do.
    group: Any = None
    # Whether the prompt that this was made for is one document a row, without pads; None: unknown.
    whole_prompt: bool | None = None
    # Tokens of each row in a chunk of the prompt, where memory has no room for longer ones.
    fitting_chunk: int | None = None
    # (B,) pads in the first block of each row, where the forward that begins is not given any.
    offset: torch.Tensor | None = None

    def __init__(self, config: PreTrainedConfig, capacity: int = 0) -> None:
        self.block_length = config.block_length
        self.keys_per_block = config.n_embedding_tokens
        self.capacity = -(-capacity // self.block_length) * self.keys_per_block
        super().__init__(layers=[BlockLayer(self.capacity) for _ in range(config.num_hidden_layers)])
        self.fill_id = config.fill_token_id
        self.by_column = config.block_alignment == "columns"
        self._clear()

    def _clear(self) -> None:
        self.num_columns = 0
        self.num_slots = torch.zeros(0, dtype=torch.long)  # (B,) slots filled, on the CPU
        self.num_blocks = torch.zeros(0, dtype=torch.long)  # (B,) blocks whose keys are held, on the CPU
        self.context_valid = torch.zeros(
            0, dtype=torch.bool
        )  # (B,) whether `context` is that of the last block
        self.context: torch.Tensor | None = None  # (B, n_e, D) of each row's last block
        self.slot_ids: torch.Tensor | None = None  # (B, W) the token of every slot
        self.slot_mask: torch.Tensor | None = None  # (B, W) bool: slots with attended tokens; None: all
        self.column_slots: torch.Tensor | None = None  # (B, T) bool: columns that took a slot; None: all
        self.block_mask: torch.Tensor | None = None  # (B, N) bool: blocks with an attended token; None: all
        self._write: BlockWrite | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first token."""
        return self.num_slots.shape[0] if self.slot_ids is not None else -1

    def start(self, input_ids: torch.Tensor, block_offset: torch.Tensor | None) -> None:
        """Begins a batch; `block_offset` (B,) pads stand before the first token in each row's first block."""
        batch, device = input_ids.shape[0], input_ids.device
        offset = torch.zeros(batch, dtype=torch.long) if block_offset is None else block_offset.cpu()
        self.num_slots, self.num_blocks = offset.clone(), torch.zeros_like(offset)
        self.context_valid = torch.zeros(batch, dtype=torch.bool)
        self.slot_ids = input_ids.new_full((batch, int(offset.max())), self.fill_id)
        if self.slot_ids.shape[1]:
            self.slot_mask = torch.zeros_like(self.slot_ids, dtype=torch.bool, device=device)

    @classmethod
    def check(cls, cache: Any, config: PreTrainedConfig, rows: int) -> None:
        """Refuses what is of another kind, or what another model or another batch filled.

        Args:
            cache: what a caller passed; None: nothing.
            config: a `BlockTransformerConfig`, of the model that reads on.
            rows: of the batch.

        Raises:
            TypeError: with the class of `cache`.
            ValueError: with what differs.
        """
        if cache is None:
            return
        if not isinstance(cache, cls):
            raise TypeError(
                f"`past_key_values` must be a {cls.__name__}, got {type(cache).__name__}; leave it out, or "
                f"make one with `{cls.__name__}(model.config)`."
            )
        if cache.batch_size not in (-1, rows):
            raise ValueError(
                f"`past_key_values` holds {cache.batch_size} rows, got `input_ids` of {rows}; make a new "
                "cache, or `batch_repeat_interleave` or `batch_select_indices` its rows."
            )
        held: dict[str, Any] = {
            "block_length": cache.block_length,
            "n_embedding_tokens": cache.keys_per_block,
            "block_alignment": "columns" if cache.by_column else "tokens",
            "num_hidden_layers": len(cache.layers),
        }
        keys = getattr(cache.layers[0], "_keys", None) if cache.layers else None
        if keys is not None:
            held |= {"num_key_value_heads": keys.shape[1], "head_dim": keys.shape[3]}
        needed = {name: getattr(config, name) for name in held}
        wrong = [
            f"`{name}` {held[name]} and not {needed[name]}" for name in held if held[name] != needed[name]
        ]
        if wrong:
            raise ValueError(
                f"`past_key_values` belongs to another model, of {', '.join(wrong)}; make one with "
                f"`{cls.__name__}(model.config)`."
            )

    def borrow(self, other: "BlockTransformerCache", rows: int) -> bool:
        """Has the first writes fill the buffers of a cache that is no longer read; False if they do not fit.

        Args:
            other: of the same model.
            rows: of the batch to come.
        """
        pairs = list(zip(self.layers, other.layers, strict=True))
        for own, its in pairs:
            if not its.is_initialized or its._keys.shape[0] != rows or its._keys.shape[2] < own.capacity:
                return False
        for own, its in pairs:
            own.borrowed = (its._keys, its._values)
        return True

    def pending(self) -> PendingTokens:
        """The tokens of the blocks that are not held: (B, p) each."""
        starts = self.num_blocks * self.block_length
        counts = self.num_slots - starts
        if bool((self.num_slots == self.slot_ids.shape[1]).all()) and bool((starts == starts[0]).all()):
            # Rows that stand at one slot: no index has to be sent to the device.
            own = slice(int(starts[0]), None)
            attended = None if self.slot_mask is None else self.slot_mask[:, own]
            return PendingTokens(self.slot_ids[:, own], None, attended)
        places, device = torch.arange(int(counts.max()))[None], self.slot_ids.device
        index = (starts[:, None] + places).to(device).clamp(max=max(self.slot_ids.shape[1] - 1, 0))
        slotted = None if bool((counts == counts[0]).all()) else (places < counts[:, None]).to(device)
        attended = slotted
        if self.slot_mask is not None:
            attended = self.slot_mask.gather(1, index)
            attended = attended if slotted is None else attended & slotted
        return PendingTokens(self.slot_ids.gather(1, index), slotted, attended)

    def append(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Takes new columns in: ids (B, T) and, where there are pads, their mask (B, T)."""
        batch, length = input_ids.shape
        slotted = None if self.by_column else attention_mask
        self.column_slots = self._joined(self.column_slots, slotted, self.num_columns, length, batch)
        if self.slot_mask is not None or (self.by_column and attention_mask is not None):
            held = (
                torch.ones_like(self.slot_ids, dtype=torch.bool) if self.slot_mask is None else self.slot_mask
            )
            new = attention_mask if self.by_column and attention_mask is not None else None
            new = torch.ones_like(input_ids, dtype=torch.bool) if new is None else new
            self.slot_mask = self._scattered(held, new, slotted, False)
        self.slot_ids = self._scattered(self.slot_ids, input_ids, slotted, self.fill_id)
        self.num_slots = self.num_slots + (length if slotted is None else slotted.sum(dim=1).cpu())
        self.num_columns += length

    def _joined(
        self, held: torch.Tensor | None, new: torch.Tensor | None, old: int, length: int, batch: int
    ) -> torch.Tensor | None:
        if held is None and new is None:
            return None
        device = self.slot_ids.device
        held = torch.ones((batch, old), dtype=torch.bool, device=device) if held is None else held
        new = torch.ones((batch, length), dtype=torch.bool, device=device) if new is None else new
        return torch.cat([held, new], dim=1)

    def _scattered(
        self, held: torch.Tensor, new: torch.Tensor, slotted: torch.Tensor | None, fill: int | bool
    ) -> torch.Tensor:
        """Puts the columns `new` behind the slots that each row has filled."""
        if slotted is None and bool((self.num_slots == held.shape[1]).all()):
            return torch.cat([held, new], dim=1)
        slotted = torch.ones_like(new, dtype=torch.bool) if slotted is None else slotted
        width = int(self.num_slots.max()) + new.shape[1]
        table = held.new_full((held.shape[0], width + 1), fill)
        kept = min(held.shape[1], width)
        table[:, :kept] = held[:, :kept]
        places = self.num_slots.to(held.device)[:, None] + slotted.cumsum(dim=1) - 1
        return table.scatter(1, torch.where(slotted, places, width), new)[:, :width]

    def run_length(self, counts: torch.Tensor, block_mask: torch.Tensor | None) -> int:
        """0: how many of the next blocks several ranks compute together.

        Args:
            counts: (B,) on the CPU, blocks that each row is about to get.
            block_mask: (B, N) bool, those with attended tokens; None: all.
        """
        return 0

    def begin_blocks(self, rows: torch.Tensor | None, count: int) -> BlockWrite:
        """Says that `rows` (None: all) get `count` blocks; the block decoder's `update` calls follow."""
        starts = self.num_blocks if rows is None else self.num_blocks[rows]
        self._write = BlockWrite(starts * self.keys_per_block, count * self.keys_per_block, rows)
        return self._write

    @property
    def complete_blocks(self) -> torch.Tensor:
        """(B,) on the CPU: blocks that are filled but whose keys are not held yet."""
        return self.num_slots // self.block_length - self.num_blocks

    def attended_blocks(self, new: torch.Tensor | None, count: int) -> torch.Tensor | None:
        """(B, n + count) bool: held and new blocks with attended tokens; None if all have them, or rows
        differ.
        """
        return self._joined(self.block_mask, new, int(self.num_blocks.max()), count, self.num_blocks.shape[0])

    def end_blocks(
        self, contexts: torch.Tensor, counts: torch.Tensor, block_mask: torch.Tensor | None
    ) -> None:
        """Takes in the new blocks that `begin_blocks` announced.

        Args:
            contexts: (B, count, n_e, D), the contexts of the new blocks.
            counts: (B,) on the CPU, how many of them each row has.
            block_mask: (B, count) bool, new blocks with attended tokens; None: all.
        """
        if block_mask is None and bool((counts == contexts.shape[1]).all()):
            # As many for every row: nothing has to be sent to the device.
            self.context = contexts[:, -1].clone()
            self.context_valid = torch.ones_like(counts, dtype=torch.bool)
        else:
            self._take_last(contexts, counts, block_mask)
        self.block_mask = self.attended_blocks(block_mask, contexts.shape[1])
        self.num_blocks = self.num_blocks + counts
        self._write = None

    def _take_last(
        self, contexts: torch.Tensor, counts: torch.Tensor, block_mask: torch.Tensor | None
    ) -> None:
        """Keeps the context of the last new block of each row that has one."""
        last = (counts - 1).clamp(min=0).to(contexts.device)
        rows, done = torch.arange(counts.shape[0], device=contexts.device), (counts > 0).to(contexts.device)
        newest = contexts[rows, last]
        self.context = (
            newest if self.context is None else torch.where(done[:, None, None], newest, self.context)
        )
        valid = (
            torch.ones_like(counts, dtype=torch.bool) if block_mask is None else block_mask[rows, last].cpu()
        )
        self.context_valid = torch.where(counts > 0, valid, self.context_valid)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the layers of the block decoder: stores (R, G, q, K) and returns all that the rows attend
        to.
        """
        return self.layers[layer_idx].update(
            key_states, value_states, write=self._write, batch_size=self.num_slots.shape[0]
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of tokens taken in, pads included."""
        return self.num_columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Key positions before the blocks that are being computed, in the row that has most."""
        return 0 if self._write is None else self._write.length - self._write.count

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key positions that the block decoder reads now, and the first of them."""
        return (query_length if self._write is None else self._write.length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last columns: `-n` removes n of them, `n` > 0 leaves n.

        A block that loses a token is open again. Its predecessor is taken apart too, because its context is
        no longer held, and is computed again with the next tokens.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else self.num_columns - tokens_to_remove
        removed = min(removed, self.num_columns)
        if removed <= 0:
            return
        slots = removed
        if self.column_slots is not None:
            slots = self.column_slots[:, -removed:].sum(dim=1).cpu()
            self.column_slots = self.column_slots[:, :-removed]
        self.num_columns -= removed
        self.num_slots = self.num_slots - slots
        width = int(self.num_slots.max())
        self.slot_ids = self.slot_ids[:, :width]
        self.slot_mask = None if self.slot_mask is None else self.slot_mask[:, :width]
        complete = self.num_slots // self.block_length
        opened = self.num_blocks > complete
        self.num_blocks = torch.where(opened, (complete - 1).clamp(min=0), self.num_blocks)
        self.context_valid = self.context_valid & ~opened
        self.block_mask = (
            None if self.block_mask is None else self.block_mask[:, : int(self.num_blocks.max())]
        )
        for layer in self.layers:
            layer.truncate(int(self.num_blocks.max()) * self.keys_per_block)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts rows in the order `beam_idx` (B,)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self.batch_select_indices(torch.arange(self.num_slots.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, in this order."""
        if self.slot_ids is None:
            return
        for name in ("num_slots", "num_blocks", "context_valid"):
            setattr(self, name, getattr(self, name)[indices.cpu()])
        for name in ("context", "slot_ids", "slot_mask", "column_slots", "block_mask"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[indices.to(tensor.device)])
        for layer in self.layers:
            layer.select(indices)

    def reset(self) -> None:
        """Forgets everything."""
        self.layers = [BlockLayer(self.capacity) for _ in self.layers]
        self._clear()


__all__ = ["BlockTransformerCache"]
