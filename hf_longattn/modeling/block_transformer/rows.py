"""Decoding rows of which each begins and ends by itself, a block of every row at a time: `generate_batch`.

All rows stand at the start of a block, so that weights are read once for all of them. What differs from row
to row (how many blocks it holds) lies on the device: the same program, or CUDA graph, serves whatever prompts
are in the rows.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .cache_block_transformer import BlockTransformerCache
from .decoding import BlockGroup, make_room
from .held import FirstBlocks, FirstMask, RowBlocks


class RowDecoding:
    """Decodes rows of which each begins and ends by itself, all of them at borders of blocks.

        admit: prompts -> whole blocks -> keys, values and context of some rows
        block: context -> prefix -> L tokens, each from those before it -> embedding -> context of the next

    What is left of a prompt behind its whole blocks is for the caller to say again, token by token.

    Args:
        model: a `BlockTransformerForCausalLM`.
        rows: R.
        tokens: of prompt and answer that a row has room for, pads included.
    """

    def __init__(self, model: Any, rows: int, tokens: int) -> None:
        self.model, self.block_length = model, model.config.block_length
        self.config, self.device = model.config, model.lm_head.weight.device
        cache, every = BlockTransformerCache(model.config), slice(0, rows)
        cache.start(torch.zeros(rows, 0, dtype=torch.long, device=self.device), None)
        make_room(model, cache, tokens + self.block_length)
        # No row predicts anything that is read before a prompt is there.
        cache.context_valid.fill_(True)
        self.group = BlockGroup(model.model, cache, every, RowBlocks(cache, every), begun=False)

    def cut(self, length: int) -> tuple[int, int, int]:
        """(pads in front, whole blocks, tokens behind them) of a prompt of `length` tokens on its own."""
        by_column = self.config.block_alignment == "columns"
        pads = -length % self.block_length if by_column else max(self.block_length - length, 0)
        blocks, rest = divmod(pads + length, self.block_length)
        return pads, blocks, rest

    def admit(
        self,
        rows: Tensor,
        token_ids: Tensor,
        pads: Tensor | None,
        blocks: Tensor,
        chunk: int,
        together: slice | None = None,
    ) -> None:
        """Has rows begin with the whole blocks of prompts.

        Args:
            rows: (R,) which.
            token_ids: (R, N, L), filled behind the last block of each.
            pads: (R,) pads in front of the first token, or None where there are none.
            blocks: (R,) whole blocks of each, 1 .. N.
            chunk: blocks of a row that go through the block decoder at a time.
            together: the rows as a slice, where they lie next to each other: their keys and values are then
                written and read in place.
        """
        mask = None
        if pads is not None:
            mask = torch.ones_like(token_ids, dtype=torch.bool)
            mask[:, 0] = torch.arange(self.block_length, device=self.device) >= pads[:, None]
        embeds = self.model.model.embedder(token_ids, mask)  # (R, N, n_e, D)
        contexts = [
            self._read(together or rows, embeds[:, start : start + chunk], start)
            for start in range(0, embeds.shape[1], chunk)
        ]
        last = torch.cat(contexts, dim=1)[torch.arange(len(rows), device=self.device), blocks - 1]
        self.group.context.index_copy_(0, rows, last)
        self.place(rows, blocks)

    def _read(self, rows: Tensor | slice, embeds: Tensor, start: int) -> Tensor:
        """Contexts of the embeddings (R, N, n_e, D) of blocks from `start` on."""
        each, inputs = embeds.shape[2], embeds.flatten(1, 2)
        first, (count, keys, _) = start * each, inputs.shape
        cache = FirstBlocks(self.group.held, rows, keys, first)
        outputs = self.model.model.block_decoder(
            inputs_embeds=inputs,
            attention_mask=FirstMask(count, keys, inputs.device, first, each),
            position_ids=cache.places,
            past_key_values=cache,
            use_cache=False,
        )
        return outputs.last_hidden_state.view_as(embeds)

    def place(self, rows: Tensor, blocks: Tensor) -> None:
        """Says that `rows` (R,) hold `blocks` (R,) blocks, 0 where nobody uses a row."""
        cast(RowBlocks, self.group.held).place(rows, blocks)

    def block(self, choose: Callable[[int, Tensor], Tensor]) -> None:
        """Decodes one block of every row.

        Args:
            choose: from a slot and logits (R, V) of its token, the token of each row, (R,).
        """
        group = self.group
        # A block that was begun and failed, say for memory in a capture, is not gone on with.
        group.slot = 0
        group.open_block()
        new = group.block_ids[:, :0]
        for slot in range(self.block_length):
            new = group.take(choose(slot, self.model.lm_head(group.step(new))))


__all__ = ["RowDecoding"]
