"""The blocks of one batch over the ranks of a group: each rank holds its share of their keys and values.

Which rank holds which block of a row is the same for all rows (`cache/placement.py`). The first blocks of a
prompt go through the block decoder together, each rank with its slices, and all ranks get all contexts. Later
blocks are computed by every rank alike: one reduction a layer joins what each finds in its own keys. Inside a
block there is nothing to share.
"""

# The tensors of a cache are None until the first tokens come.
# pyright: reportOptionalSubscript=false, reportArgumentType=false

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_longattn.cache.placement import Placement, Slices
from hf_longattn.cache.shares import Shard, ShardedStates

from .cache_block_transformer import BlockLayer, BlockTransformerCache, BlockWrite


class SharedBlockLayer(BlockLayer):
    """This rank's share of one layer of the block decoder, (B, G, capacity, K); `length` counts all keys.

    Args:
        group: the `SequenceGroup`.
        placement: who holds what, shared by the layers of a cache.
    """

    def __init__(self, group: Any, placement: Placement) -> None:
        super().__init__()
        self.group_of_ranks, self.placement = group, placement
        self.slices: Slices | None = None
        self._seen = 0  # keys of all ranks that the last `update` has returned this rank's share of

    @property
    def used(self) -> int:
        """Slots of the buffers that are in use."""
        return self.placement.count(self.length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps this rank's share of the states of `kwargs["write"]`, all of them or its slices of a run.

        Args:
            key_states: (R, G, q, K).
            value_states: (R, G, q, V).
            args: unused.
            kwargs: `write`, and the `batch_size`.

        Returns:
            this rank's share of what is read, the keys as `ShardedStates`.
        """
        write: BlockWrite = kwargs["write"]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if write.length > self.placement.length:
            new = write.length - self.placement.length
            self.placement.place(new) if self.slices is None else self.placement.place_slices(self.slices)
        self._seen = write.length
        self.reserve(kwargs["batch_size"], self.placement.count(max(self.length, write.length)))
        self.extend(write.length)
        pairs = ((self._keys, key_states), (self._values, value_states))
        keys, values = (self._write(held, states, write) for held, states in pairs)
        shard = Shard(self.group_of_ranks, self, self.slices)
        return ShardedStates(keys, shard, keys.dtype), values

    def _write(self, held: Tensor, states: Tensor, write: BlockWrite) -> Tensor:
        count = self.placement.count
        if self.slices is not None:
            held[:, :, count(self.slices.start) : count(write.length)] = states
        elif write.rows is None and write.uniform:
            start = write.length - write.count
            for part in self.placement.own_of(start, write.count):
                held[:, :, count(start + part.start) : count(start + part.stop)] = states[:, :, part]
        else:
            self._write_rows(held, states, write)
        read = held[:, :, : count(write.length)]
        return read if write.rows is None else read.index_select(0, write.rows.to(held.device))

    def _write_rows(self, held: Tensor, states: Tensor, write: BlockWrite) -> None:
        """The same where each row has a place of its own."""
        rows = range(held.shape[0]) if write.rows is None else write.rows.tolist()
        own = [
            (row, self.placement.count(start + part.start + step), place, part.start + step)
            for place, (row, start) in enumerate(zip(rows, write.starts.tolist(), strict=True))
            for part in self.placement.own_of(start, write.count)
            for step in range(part.stop - part.start)
        ]
        if own:
            row, slot, place, query = torch.tensor(own, device=held.device).unbind(1)
            held.transpose(1, 2)[row, slot] = states.transpose(1, 2)[place, query]

    def positions(self, device: torch.device) -> Tensor:
        """Places of the keys that `update` returned, ascending."""
        return self.placement.positions(self.placement.count(self._seen), device)

    def truncate(self, length: int) -> None:
        """Forgets the keys from place `length` on."""
        super().truncate(length)
        self.placement.truncate(length)


class SharedBlockCache(BlockTransformerCache):
    """A `BlockTransformerCache` of which every rank holds its share of the keys and values.

    Every rank must do the same to its part, in the same order: it is what `generate` does when every process
    calls it alike. Of attention implementations, `tree_attention` alone reads it; others are refused.

    Args:
        config: a `BlockTransformerConfig`.
        group: the `SequenceGroup` whose ranks share the blocks.
    """

    def __init__(self, config: PreTrainedConfig, group: Any) -> None:
        super().__init__(config)
        self.group = group
        self._share()

    def _share(self) -> None:
        self.placement = Placement(self.group.rank, self.group.world_size)
        self.layers: list[Any] = [SharedBlockLayer(self.group, self.placement) for _ in self.layers]

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._share()

    def run_length(self, counts: Tensor, block_mask: Tensor | None) -> int:
        """How many of the next blocks the ranks compute together, a multiple of 2P.

        Args:
            counts: (B,) on the CPU, blocks that each row is about to get.
            block_mask: (B, N) bool, those with attended tokens; None: all.
        """
        pieces, held = 2 * self.group.world_size, self.num_blocks[0]
        even = bool((self.num_blocks == held).all()) and self.placement.length == int(held)
        plain = block_mask is None and self.block_mask is None and self.keys_per_block == 1
        # What is gathered has no gradient.
        if not even or not plain or torch.is_grad_enabled():
            return 0
        return int(counts.min()) // pieces * pieces

    def compute_run(self, decoder: Any, embeds: Tensor) -> Tensor:
        """Contexts (B, N, 1, D) of the next blocks of all rows, of which each rank computes its slices.

        Args:
            decoder: the block decoder.
            embeds: (B, N, 1, D), N as `run_length` said.
        """
        count = embeds.shape[1]
        slices = Slices(int(self.num_blocks[0]), count, self.group.rank, self.group.world_size)
        places = torch.arange(slices.start, slices.start + count, device=embeds.device)[None]
        self.begin_blocks(None, count)
        for layer in self.layers:
            layer.slices = slices
        try:
            outputs = decoder(
                inputs_embeds=slices.take(embeds[:, :, 0], 1),
                position_ids=slices.take(places, 1),
                past_key_values=self,
                use_cache=False,
            )
        finally:
            for layer in self.layers:
                layer.slices = None
        gathered = self.group.gather(outputs.last_hidden_state[:, None].contiguous())
        contexts = slices.in_order(gathered)[:, 0, :, None]
        self.end_blocks(contexts, torch.full_like(self.num_blocks, count), None)
        return contexts


__all__ = ["SharedBlockCache", "SharedBlockLayer"]
