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
from transformers import GenerationMixin, masking_utils
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.masking import LazyMask, Pattern

from .cache_block_transformer import BlockTransformerCache
from .layout import prompt_offset
from .steps import few_launches


class HeldBlocks(Cache):
    """The buffers of a `BlockTransformerCache` for some rows, written at places that lie on the device.

    Args:
        cache: with room for all blocks to come.
        rows: the rows of the batch.
    """

    def __init__(self, cache: BlockTransformerCache, rows: slice) -> None:
        super().__init__(layers=cache.layers)
        self.buffers = [(layer._keys[rows], layer._values[rows]) for layer in cache.layers]
        batch, _, self.room, _ = self.buffers[0][0].shape
        device = self.buffers[0][0].device
        self.each = cache.keys_per_block
        self.rows = torch.arange(batch, device=device)[:, None]
        # Rows that stand at one block write in one launch.
        self.even = bool((cache.num_blocks[rows] == cache.num_blocks[rows.start]).all())
        # (R, 1) and (R, n_e), where the block that is computed next goes.
        places = cache.num_blocks[rows, None] * self.each
        # A number needs no copy, which would wait for all that was launched before.
        self.start = (
            torch.full_like(places, int(places[0]), device=device) if self.even else places.to(device)
        )
        self.places = self.start + torch.arange(self.each, device=device)
        self.key_mask = None  # (R, room) bool, False at blocks of pads alone; None: there are none
        if cache.block_mask is not None and not bool(cache.block_mask[rows].all()):
            held = cache.block_mask[rows].repeat_interleave(self.each, dim=1)
            self.key_mask = torch.ones(batch, self.room, dtype=torch.bool, device=device)
            self.key_mask[:, : held.shape[1]] = held

    def mask(self) -> "HeldMask":
        """What the queries of one new block see: all of it and all before it."""
        return HeldMask(self.start + self.each, self.each, self.room, self.key_mask)

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
        self.start.add_(self.each)
        self.places.add_(self.each)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are given, and the mask says what is visible."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """All of the buffers, from their begin."""
        return self.room, 0


class FirstBlocks(Cache):
    """The buffers of `HeldBlocks`, of which a prompt fills the begin.

    Args:
        held: what the steps go on with.
    """

    def __init__(self, held: HeldBlocks) -> None:
        super().__init__(layers=held.layers)
        self.buffers = held.buffers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes (R, G, N, K) in front; returns what is written."""
        keys, values = (buffer[:, :, : key_states.shape[2]] for buffer in self.buffers[layer_idx])
        keys.copy_(key_states)
        values.copy_(value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: nothing stands before a prompt."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The blocks of the prompt, from the first."""
        return query_length, 0


class FirstMask(LazyMask):
    """Causal order among the N blocks of R prompts, whose positions nobody has to search for documents."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        causal = masking_utils.causal_mask_function
        super().__init__(rows, blocks, blocks, 0, 0, causal, None, device, Pattern())

    def _build_range(self, pattern: Pattern) -> KeyRange:
        return KeyRange(causal=True)


class HeldMask(LazyMask):
    """The first `lengths` (R, 1) keys of each row, but for those that `key_mask` (R, S) leaves out."""

    def __init__(self, lengths: Tensor, q_length: int, kv_length: int, key_mask: Tensor | None) -> None:
        def visible(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return key < lengths[batch, 0]

        sizes = (lengths.shape[0], q_length, kv_length, 0, 0)
        super().__init__(*sizes, visible, key_mask, lengths.device, Pattern())
        self.lengths = lengths

    def _build_range(self, pattern: Pattern) -> KeyRange:
        limits = KeyRange().narrowed(upper=self.lengths.expand(-1, self.q_length))
        return limits if self.padding is None else limits.masked(self.padding)


class BlockGroup:
    """Rows of a batch that stand at the same slot of their open blocks.

    Args:
        model: a `BlockTransformerModel`.
        cache: what the prompt left, with room for all blocks to come.
        rows: the rows.
    """

    def __init__(self, model: Any, cache: BlockTransformerCache, rows: slice) -> None:
        self.model, self.rows = model, rows
        self.length = cache.block_length
        self.slot = int(cache.num_slots[rows.start]) % self.length
        self.held = HeldBlocks(cache, rows)
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
        # (R, D_tok), which predicts the token behind the prompt.
        self.first = self._step(tokens)

    def feed(self, token_ids: Tensor) -> Tensor:
        """Takes in the next token of each row, (R,); state (R, D_tok) that predicts the one after it."""
        self.block_ids[:, self.slot] = token_ids
        self.slot = (self.slot + 1) % self.length
        new = token_ids[:, None]
        if self.slot == 0:
            self._close_block()
            new = new[:, :0]
        return self._step(new)

    def _step(self, token_ids: Tensor) -> Tensor:
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
        self._open_block(outputs.last_hidden_state)
        held.advance()
        for tensor in (self.attended, self.valid):
            if tensor is not None:
                tensor.fill_(True)

    def _open_block(self, context: Tensor) -> None:
        """Begins the block behind (R, n_e, D), the context of the last one."""
        self.context.copy_(context)
        self.prefix.copy_(self.model.token_decoder.expand(context))
        self.tokens.reset()

    def can_read(self, length: int) -> bool:
        """Whether `read` takes prompts of `length` tokens."""
        plain = self.attended is None and self.valid is None and self.held.key_mask is None
        return plain and self.held.even and self.held.each == 1 and length >= self.length

    def read(self, input_ids: Tensor) -> Tensor:
        """Begins anew with prompts (R, T) without pads; state (R, D_tok) that predicts the token behind."""
        blocks, self.slot = divmod(input_ids.shape[1], self.length)
        whole, rest = input_ids.tensor_split([blocks * self.length], dim=1)
        embeds = self.model.embedder(whole.reshape(-1, blocks, self.length), None).flatten(1, 2)
        outputs = self.model.block_decoder(
            inputs_embeds=embeds,
            attention_mask=FirstMask(embeds.shape[0], blocks, embeds.device),
            position_ids=torch.arange(blocks, device=embeds.device)[None],
            past_key_values=FirstBlocks(self.held),
            use_cache=False,
        )
        self._open_block(outputs.last_hidden_state[:, -1:])
        self.held.start.fill_(blocks)
        self.held.places.fill_(blocks)
        self.block_ids[:, : self.slot] = rest
        return self._step(rest)

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
        own = [self.block_ids, self.context, self.prefix, self.attended, self.valid]
        own += [self.held.start, self.held.places]
        own += [buffer for layer in self._layers() for buffer in (layer._keys, layer._values)]
        return [tensor for tensor in own if tensor is not None]


class BlockDecoding:
    """Decodes a batch from what the prompt left in the cache, whose rows it may sort until `close`.

    Args:
        model: a `BlockTransformerForCausalLM`.
        cache: holds the prompt.
        steps: tokens a row to make room for.
    """

    def __init__(self, model: Any, cache: BlockTransformerCache, steps: int) -> None:
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
            self._make_room(steps)
            self.groups = [BlockGroup(model.model, cache, each) for each in rows]
            # Nothing has failed: the rows stay sorted.
            undo.pop_all()

    def _make_room(self, steps: int) -> None:
        cache = self.cache
        blocks = int((cache.num_slots.max() + steps) // self.block_length)
        if cache.context is None:
            # No row has a block yet: there is nothing to start from, and rows predict nothing until then.
            config, weight = self.model.config, self.model.lm_head.weight
            shape = (cache.batch_size, config.n_embedding_tokens, config.hidden_size)
            cache.context = weight.new_zeros(shape)
            block = self.model.model.block_decoder.config
            for layer in cache.layers:
                heads = getattr(block, "num_key_value_heads", block.num_attention_heads)
                width = getattr(block, "head_dim", None) or block.hidden_size // block.num_attention_heads
                states = weight.new_zeros((cache.batch_size, heads, 0, width))
                layer.lazy_initialization(states, states)
        for layer in cache.layers:
            layer.reserve(cache.batch_size, blocks * cache.keys_per_block)

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


class BlockGenerationMixin(GenerationMixin):
    """What `generate` needs to know of a Block Transformer."""

    config: Any

    def decode_blocks(self, cache: BlockTransformerCache, steps: int) -> BlockDecoding:
        """Steps of one token a row that pass the model's forward by.

        Args:
            cache: holds the prompt.
            steps: tokens a row to make room for.
        """
        return BlockDecoding(self, cache, steps)

    def few_launches(self) -> contextlib.AbstractContextManager[None]:
        """Inside, prompts and steps take fewer launches; worth it for a prompt, and for steps to capture."""
        return few_launches(self)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        # `generate` takes the method of the class; a prepared instance has one of its own.
        prepared = vars(self).get("_sample")
        return super()._sample(*args, **kwargs) if prepared is None else prepared(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Makes the cache, and says how many pads fill the first block of each prompt."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "`cache_implementation` must be None or 'dynamic' for a Block Transformer, got "
                f"{generation_config.cache_implementation!r}; it has a BlockTransformerCache of its own."
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None and generation_config.use_cache:
            # Beams copy the whole of a cache at every step: theirs stays as small as can be.
            at_once = "_sample" in vars(self) and generation_config.num_beams == 1
            kept = vars(self).get("_kept_program")
            if not at_once and kept is not None:
                kept.clear()
            capacity = max_cache_length + 2 * self.config.block_length if at_once else 0
            cache = model_kwargs["past_key_values"] = BlockTransformerCache(self.config, capacity)
            if generation_config.is_assistant:
                cache.activate_past_recording()
        elif cache is not None:
            cache._is_user_defined = True
        mask = model_kwargs.get("attention_mask")
        given = model_kwargs.get("block_offset") is not None
        if mask is None or given or (cache is not None and cache.get_seq_length() > 0):
            return
        by_column = self.config.block_alignment == "columns"
        model_kwargs["block_offset"] = prompt_offset(mask, self.config.block_length, by_column)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


__all__ = ["BlockDecoding", "BlockGenerationMixin"]
