"""Decoding a Block Transformer token by token, on buffers that stay where they are.

    token x of a row -> its open block -> full?  embedder -> block decoder -> context -> prefix, slot 0
                                          else   one row of the token decoder

Every length that changes from block to block lies on the device, and what the host knows (the slot of the
open block) comes back after L tokens. So any L steps in a row are one program: a CUDA graph may hold them.

Rows of a batch may stand at different slots. Rows at the same slot form a group, a slice of the batch after
sorting; in L steps each group closes one block, at its own step.
"""

# Fields of the configuration that default to None are filled in by it, which a type checker cannot see.
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportAttributeAccessIssue=false

import contextlib
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from .cache_block_transformer import BlockTransformerCache
from .held import FirstBlocks, FirstMask, HeldBlocks


class BlockGroup:
    """Rows of a batch that stand at the same slot of their open blocks.

    Args:
        model: a `BlockTransformerModel`.
        cache: what the prompt left, with room for all blocks to come.
        rows: the rows.
        held: their keys and values, where they begin and end one by one; None: they stay as they are.
        begun: whether the cache holds what the first token is predicted from.
    """

    def __init__(
        self,
        model: Any,
        cache: BlockTransformerCache,
        rows: slice,
        held: HeldBlocks | None = None,
        begun: bool = True,
    ) -> None:
        self.model, self.rows = model, rows
        self.length = cache.block_length
        self.slot = int(cache.num_slots[rows.start]) % self.length
        self.held = HeldBlocks(cache, rows) if held is None else held
        pending = cache.pending()
        tokens = pending.token_ids[rows, : self.slot]
        self.block_ids = cache.slot_ids.new_zeros((tokens.shape[0], self.length))
        self.block_ids[:, : self.slot] = tokens
        self.attended = None  # (R, L) bool, False at pads of the open block; None: there are none
        if pending.attended is not None and not bool(pending.attended[rows, : self.slot].all()):
            self.attended = torch.ones_like(self.block_ids, dtype=torch.bool)
            self.attended[:, : self.slot] = pending.attended[rows, : self.slot]
        self.valid = None  # (R, 1) bool, rows with a block to start from; None: all
        if not bool(cache.context_valid[rows].all()):
            self.valid = cache.context_valid[rows, None].to(tokens.device)
        self.context = cache.context[rows].clone()
        self.prefix = model.token_decoder.expand(self.context).clone()
        self.tokens = model.token_decoder.make_cache()
        if begun:
            # (R, D_tok), which predicts the token behind the prompt.
            self.first = self.step(tokens)

    def feed(self, token_ids: Tensor) -> Tensor:
        """Takes in the next token of each row, (R,); state (R, D_tok) that predicts the one after it."""
        new = self.take(token_ids)
        if self.slot == 0:
            self.open_block()
        return self.step(new)

    def take(self, token_ids: Tensor) -> Tensor:
        """Takes in the next token of each row, (R,); ids for `step`, (R, 1), (R, 0) at a new block."""
        self.block_ids[:, self.slot] = token_ids
        self.slot = (self.slot + 1) % self.length
        if self.slot:
            return token_ids[:, None]
        self._close_block()
        return token_ids[:, None][:, :0]

    def step(self, token_ids: Tensor) -> Tensor:
        """State that predicts the token behind these; zeros for rows that no block stands before."""
        state = self.model.token_decoder.step(self.prefix, token_ids, self.tokens, self._mask(self.slot))
        return state if self.valid is None else torch.where(self.valid, state, 0)

    def _close_block(self) -> None:
        held, mask = self.held, None if self.attended is None else self.attended[:, None]
        embeds = self.model.embedder(self.block_ids[:, None], mask)[:, 0]
        outputs = self.model.block_decoder(
            inputs_embeds=embeds,
            attention_mask=held.mask(),
            position_ids=held.places,
            past_key_values=held,
            use_cache=False,
        )
        self.context.copy_(outputs.last_hidden_state)
        held.advance()
        for tensor in (self.attended, self.valid):
            if tensor is not None:
                tensor.fill_(True)

    def open_block(self) -> None:
        """Begins the block behind `context`, (R, n_e, D), that of the last one."""
        self.prefix.copy_(self.model.token_decoder.expand(self.context))
        self.tokens.reset()

    def can_read(self, length: int) -> bool:
        """Whether `read` takes prompts of `length` tokens."""
        plain = self.attended is None and self.valid is None and self.held.key_mask is None
        return plain and self.held.even and self.held.each == 1 and length >= self.length

    def read(self, input_ids: Tensor, at_once: int | None = None) -> Tensor:
        """Begins anew with prompts (R, T) without pads; state (R, D_tok) that predicts the token behind.

        `at_once` rows go through the block decoder together, None: all.
        """
        blocks, self.slot = divmod(input_ids.shape[1], self.length)
        whole, rest = input_ids.tensor_split([blocks * self.length], dim=1)
        count = len(whole)
        for first in range(0, count, at_once or count):
            self._read_rows(slice(first, first + (at_once or count)), whole, blocks)
        self.open_block()
        self.held.places.fill_(blocks)
        self.block_ids[:, : self.slot] = rest
        return self.step(rest)

    def _read_rows(self, rows: slice, token_ids: Tensor, blocks: int) -> None:
        embeds = self.model.embedder(token_ids[rows].reshape(-1, blocks, self.length), None).flatten(1, 2)
        first = FirstBlocks(self.held, rows, blocks)
        outputs = self.model.block_decoder(
            inputs_embeds=embeds,
            attention_mask=FirstMask(embeds.shape[0], blocks, embeds.device),
            position_ids=first.places,
            past_key_values=first,
            use_cache=False,
        )
        self.context[rows] = outputs.last_hidden_state[:, -1:]

    def _mask(self, slot: int) -> Tensor | None:
        return None if self.attended is None else self.attended[:, :slot]

    def _layers(self) -> list[Any]:
        caches = [self.tokens]
        if isinstance(self.tokens, EncoderDecoderCache):
            caches = [self.tokens.self_attention_cache, self.tokens.cross_attention_cache]
        return [layer for cache in caches for layer in cache.layers]

    @property
    def place(self) -> Any:
        """What the host knows of the open block: the same after every L tokens."""
        updated = dict(getattr(self.tokens, "is_updated", {}))
        return self.slot, [layer.end for layer in self._layers()], updated

    @place.setter
    def place(self, place: Any) -> None:
        """Goes back to a place taken before."""
        self.slot, ends, updated = place
        for layer, end in zip(self._layers(), ends, strict=True):
            layer.end = end
        if updated:
            cast(Any, self.tokens).is_updated = dict(updated)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the steps of two groups have in common where one program serves both."""
        optional = (self.attended, self.valid, self.held.key_mask)
        held = (self.held.room, self.held.even)
        return self.rows.start, self.rows.stop, *held, *(tensor is None for tensor in optional)

    def constants(self) -> list[Tensor]:
        """Every tensor that `feed` reads and never changes, but for weights."""
        return [] if self.held.key_mask is None else [self.held.key_mask]

    def state(self) -> list[Tensor]:
        """Every tensor that `feed` changes, but for the keys and values of blocks, which it only adds to."""
        own = [self.block_ids, self.context, self.prefix, self.attended, self.valid, self.held.places]
        own += [buffer for layer in self._layers() for buffer in (layer._keys, layer._values)]
        return [tensor for tensor in own if tensor is not None]


def make_room(model: Any, cache: BlockTransformerCache, steps: int, written: int = 0) -> None:
    """Makes room for the blocks that `steps` more tokens a row fill, where there are none yet as well.

    Args:
        model: a `BlockTransformerForCausalLM`.
        cache: that has begun.
        steps: tokens.
        written: blocks of every row that are about to be written.
    """
    blocks = int((cache.num_slots.max() + steps) // cache.block_length)
    if cache.context is None:
        # No row has a block yet: there is nothing to start from, and rows predict nothing until then.
        config, weight = model.config, model.lm_head.weight
        cache.context = weight.new_zeros((cache.batch_size, config.n_embedding_tokens, config.hidden_size))
        heads, width = key_shape(model)
        for layer in cache.layers:
            states = weight.new_zeros((cache.batch_size, heads, 0, width))
            layer.lazy_initialization(states, states)
    for layer in cache.layers:
        layer.reserve(cache.batch_size, blocks * cache.keys_per_block, written * cache.keys_per_block)


def key_shape(model: Any) -> tuple[int, int]:
    """(G, K): key heads of a layer of the block decoder, and their width.

    Args:
        model: a `BlockTransformerForCausalLM`.
    """
    block = model.model.block_decoder.config
    heads = getattr(block, "num_key_value_heads", block.num_attention_heads)
    return heads, getattr(block, "head_dim", None) or block.hidden_size // block.num_attention_heads


class BlockDecoding:
    """Decodes a batch from what the prompt left in the cache, whose rows it may sort until `close`.

    Args:
        model: a `BlockTransformerForCausalLM`.
        cache: holds the prompt.
        steps: tokens a row to make room for.
        begun: whether it does; else the prompt comes with `BlockGroup.read`.
    """

    def __init__(self, model: Any, cache: BlockTransformerCache, steps: int, begun: bool = True) -> None:
        self.model, self.cache = model, cache
        self.block_length = cache.block_length
        slots = cache.num_slots % self.block_length
        self.order = slots.argsort(stable=True)
        slots = slots[self.order]
        self.device = cache.slot_ids.device
        self.sorted = bool((self.order == torch.arange(slots.shape[0])).all())
        # Rows that stay as they are need no index, whose copy would wait for all that was launched before.
        self._to = None if self.sorted else self.order.to(self.device)
        self._back = None if self.sorted else self._to.argsort()
        bounds = [0, *((slots[1:] != slots[:-1]).nonzero()[:, 0] + 1).tolist(), slots.shape[0]]
        rows = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if not self.sorted:
                cache.batch_select_indices(self.order)
            make_room(model, cache, steps)
            self.groups = [BlockGroup(model.model, cache, each, begun=begun) for each in rows]
            # Nothing has failed: the rows stay sorted.
            undo.pop_all()

    def step(self, token_ids: Tensor) -> Tensor:
        """Takes in the next token of each row, (B,); logits (B, V) of the one after it."""
        token_ids = token_ids if self.sorted else token_ids[self._to]
        return self._predict([group.feed(token_ids[group.rows]) for group in self.groups])

    def first(self) -> Tensor:
        """Logits (B, V) of the token behind the prompt."""
        return self._predict([group.first for group in self.groups])

    def can_read(self, length: int, place: list[Any]) -> bool:
        """Whether `read` takes prompts (B, length), and stands at `place` then."""
        (slot, *_), *others = place
        return (
            self.sorted
            and not others
            and slot == length % self.block_length
            and (self.groups[0].can_read(length))
        )

    @classmethod
    def of_prompts(
        cls, model: Any, cache: BlockTransformerCache, input_ids: Tensor, steps: int, at_once: int
    ) -> "BlockDecoding | None":
        """Reads prompts (B, T) without pads, some rows at a time, into an empty cache that nobody else reads.

        Args:
            model: a `BlockTransformerForCausalLM`.
            cache: empty; holds keys and values behind, and knows of no tokens.
            input_ids: (B, T).
            steps: tokens a row to make room for behind the prompt.
            at_once: rows that are read together.

        Returns:
            what decodes behind the prompts; None where `BlockGroup.can_read` says no.
        """
        length = input_ids.shape[1]
        blocks = length // cache.block_length
        if blocks == 0 or cache.keys_per_block > 1:
            return None
        cache.start(input_ids[:, :0], None)
        make_room(model, cache, length + steps, blocks)
        cache.context_valid.fill_(True)
        decoding = cls(model, cache, length + steps, begun=False)
        decoding.groups[0].first = decoding.groups[0].read(input_ids, at_once)
        return decoding

    def read(self, input_ids: Tensor) -> Tensor:
        """Begins anew with prompts (B, T), without pads; logits (B, V) of the token behind them."""
        return self._predict([self.groups[0].read(input_ids)])

    def _predict(self, states: list[Tensor]) -> Tensor:
        state = states[0] if len(states) == 1 else torch.cat(states)
        return self.model.lm_head(state if self.sorted else state[self._back])

    def state(self) -> list[Tensor]:
        """Every tensor that `step` changes, but for the keys and values of blocks, which it only adds to."""
        return [tensor for group in self.groups for tensor in group.state()]

    @property
    def place(self) -> list[Any]:
        """What the host knows of the open blocks; set again where steps were begun and not run."""
        return [group.place for group in self.groups]

    @place.setter
    def place(self, places: list[Any]) -> None:
        """Goes back to places taken before, one a group."""
        for group, place in zip(self.groups, places, strict=True):
            group.place = place

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two batches have in common where one program serves both, with the same buffers."""
        first = self.groups[0].slot
        apart = [(group.slot - first) % self.block_length for group in self.groups]
        return self.sorted, tuple(apart), *(group.kind for group in self.groups)

    def constants(self) -> list[Tensor]:
        """Every tensor that `step` reads and never changes, but for weights."""
        order = [] if self._to is None else [self._to, self._back]
        return order + [tensor for group in self.groups for tensor in group.constants()]

    def buffers(self) -> list[Tensor]:
        """The keys and values of blocks."""
        return [each for group in self.groups for pair in group.held.buffers for each in pair]

    def steps_from(self, other: "BlockDecoding") -> int | None:
        """Steps after which `other` stands at the slots where this stands, or None: it never does."""
        if other.kind != self.kind:
            return None
        return (self.groups[0].slot - other.groups[0].slot) % self.block_length

    def finish(self, token_ids: Tensor, over: int) -> None:
        """Makes the cache what a forward over the same tokens leaves, but for the order of its rows.

        Args:
            token_ids: (B, F), all tokens that `step` took in.
            over: how many of them, from the end, the cache is to forget.
        """
        cache = self.cache
        if token_ids.shape[1]:
            cache.append(token_ids if self.sorted else token_ids[self._to], None)
        counts = cache.complete_blocks
        if bool((counts > 0).any()):
            contexts = torch.cat([group.context for group in self.groups])
            cache.end_blocks(contexts[:, None].expand(-1, int(counts.max()), -1, -1), counts, None)
        for layer in cache.layers:
            layer.extend(int(cache.num_blocks.max()) * cache.keys_per_block)
        if over:
            cache.crop(-over)

    def close(self) -> None:
        """Puts the rows of the cache in the order in which they came."""
        if not self.sorted:
            self.cache.batch_select_indices(self._back.cpu())
            self.sorted = True


__all__ = ["BlockDecoding", "BlockGroup", "key_shape", "make_room"]
