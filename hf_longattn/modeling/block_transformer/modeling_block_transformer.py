"""The Block Transformer (Ho et al., arXiv 2406.02657): a vector a block, a small decoder inside each block.

    e_i = embedder(x_iL .. x_iL+L-1)                        L tokens -> n_e vectors
    h_i = block_decoder(e_0 .. e_i)                         causal over blocks; only this sees the context
    x_jL+k ~ token_decoder(h_j-1, x_jL .. x_jL+k-1)         inside one block

Both decoders are models of transformers (GPT-NeoX, Llama, Qwen2, Qwen3, T5); this file is what joins them.
"""

# Fields of the configuration that default to None are filled in by it, which a type checker cannot see.
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .blocks import (
    BlockEmbedder,
    BlockTransformerModelOutput,
    TokenDecoder,
    block_attention_mask,
    loss_terms,
    without_table,
    zero_states,
)
from .cache_block_transformer import BlockTransformerCache, BlockWrite
from .configuration_block_transformer import BlockTransformerConfig
from .generating import BlockGenerationMixin
from .layout import (
    BlockLayout,
    TokenWindow,
    check_offset,
    column_mask,
    document_starts,
    lay_out,
    offset_pads,
)


class BlockTransformerPreTrainedModel(PreTrainedModel):
    """What `BlockTransformerModel` and `BlockTransformerForCausalLM` share."""

    config: BlockTransformerConfig
    config_class = BlockTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "GPTNeoXLayer",
        "LlamaDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "T5Block",
    ]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (BlockEmbedder, TokenDecoder)):
            linear = getattr(module, "projection" if isinstance(module, BlockEmbedder) else "expansion", None)
            if linear is not None:
                init.normal_(linear.weight, mean=0.0, std=linear.in_features**-0.5)

    def enable_input_require_grads(self) -> None:
        """Has what both tables return require gradients, as reentrant checkpoints need it."""
        super().enable_input_require_grads()
        # transformers looks for tables in models, and the embedder with one of its own is none.
        if self.config.embedder_type == "lookup":
            table = cast(Any, self.base_model).embedder.embeddings
            hook = table.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
            self._require_grads_hooks.append(hook)

    def set_attn_implementation(
        self, attn_implementation: str | dict, allow_all_kernels: bool = False
    ) -> None:
        """Sets the attention of the block decoder; inside one block it stays plain SDPA (or eager, if asked
        for).

        Args:
            attn_implementation: a registered name, or `{"": name}`.
            allow_all_kernels: whether kernels of unverified repositories may be loaded.
        """
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module.config is not self.config:
                # Left behind by transformers, it would make the next call skip this part.
                module.config.__dict__.pop("_attn_was_changed", None)
                if module is not getattr(self.base_model, "block_decoder", None):
                    module.config._attn_implementation_internal = self.config.local_attn_implementation


class BlockTransformerModel(BlockTransformerPreTrainedModel):
    """Embedder, block decoder and token decoder, from `input_ids` (B, T) to hidden states (B, T, D_tok).

    Args:
        config: the configuration.

    Example:
        ```python
        >>> model = BlockTransformerModel(BlockTransformerConfig(hidden_size=64, num_attention_heads=2))
        >>> model(torch.arange(10)[None]).last_hidden_state.shape
        torch.Size([1, 10, 64])
        ```
    """

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.embedder = BlockEmbedder(config)
        self.block_decoder = without_table(config.block_decoder_config())
        self.token_decoder = TokenDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token decoder's table; the embedder has its own."""
        return self.token_decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the token decoder's table."""
        self.token_decoder.embed_tokens = value

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.resize_embedder(embeddings)
        return embeddings

    def resize_embedder(self, like: nn.Embedding) -> None:
        """Gives the embedder's table as many ids as `like` has."""
        lookup = self.config.embedder_type == "lookup"
        owner, name = (
            (self.embedder, "embeddings") if lookup else (self.embedder.encoder.embeddings, "word_embeddings")
        )
        old = getattr(owner, name)
        new = self._get_resized_embeddings(old, like.weight.shape[0])
        setattr(owner, name, new.requires_grad_(old.weight.requires_grad))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        block_offset: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> BlockTransformerModelOutput:
        """Predicts token i + 1 in row i, from all blocks before its own and the tokens of its own before it.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or the columns of the cache too; 0 at pads.
            position_ids: (B, T), read only to find packed documents: they start where positions do not rise.
            past_key_values: a `BlockTransformerCache`, changed in place.
            use_cache: whether to return a cache (default: as configured, never in training).
            logits_to_keep: how many of the last rows to compute; 0: all. A tensor computes all too, but for
                one without elements, which leaves the token decoder out.
            block_offset: (B,), how many pads stand in the first block before the first token, each < L.
            **kwargs: `cu_seq_lens_q` or `seq_idx` (packed documents, in the place of `position_ids`),
                `output_hidden_states`, `output_attentions`.

        Returns:
            Hidden states (B, T or `logits_to_keep`, D_tok) and what `BlockTransformerModelOutput` lists.

        Raises:
            ValueError: if `input_ids` is missing, packed rows come with a cache or are cut by column, or
                an argument is of other tokens, or of another model.
            TypeError: if `past_key_values` is a cache of another class.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"`input_ids` is needed, got {'None' if input_ids is None else '`inputs_embeds` too'}; a "
                "Block Transformer embeds them twice and takes no `inputs_embeds`."
            )
        mask = column_mask(input_ids, attention_mask)
        BlockTransformerCache.check(past_key_values, self.config, input_ids.shape[0])
        starts = self._packed_starts(input_ids, mask, position_ids, past_key_values, kwargs)
        cache = self._cache_to_use(past_key_values, use_cache, starts)
        layout = self._layout_of(input_ids, mask, starts, cache, block_offset)
        held = None if cache is None or cache.context is None else (cache.context, cache.context_valid)
        embeds, contexts, attentions = self._decode_blocks(layout, cache, self._wanted("attentions", kwargs))
        length, keep = self.config.block_length, input_ids.shape[1]
        if isinstance(logits_to_keep, int) and logits_to_keep > 0:
            keep = min(logits_to_keep, keep)
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.numel() == 0:
            keep = 0
        if keep == 1 and cache is not None:
            length = int((cache.num_slots % length).max()) + 1
        wanted = self._wanted("hidden_states", kwargs)
        hidden, others = self._decode_tokens(layout, keep, contexts, held, length, wanted)
        return BlockTransformerModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=others,
            attentions=attentions,
            label_mask=layout.label_mask(input_ids.shape[0], held) if keep else None,
            block_embeds=embeds,
            context_embeds=contexts,
            block_pair_mask=None if layout.pair_mask is None else layout.pair_mask.long(),
        )

    def _wanted(self, name: str, kwargs: dict) -> Any:
        value = kwargs.get(f"output_{name}")
        return getattr(self.config, f"output_{name}") if value is None else value

    def _packed_starts(
        self, input_ids: Any, mask: Any, position_ids: Any, cache: Cache | None, kwargs: dict
    ) -> torch.Tensor | None:
        """(B, T) bool, where packed documents after the first start; None if there is one a row."""
        if cache is not None and cache.get_seq_length() > 0 and input_ids.shape[1] == 1:
            return None
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        starts = document_starts(position_ids, mask, kwargs)
        if starts is not None and self.config.block_alignment == "columns":
            raise ValueError(
                "Packed documents need `block_alignment='tokens'`, got 'columns'; set it in the config."
            )
        return starts

    def _cache_to_use(
        self, cache: Cache | None, use_cache: bool | None, starts: torch.Tensor | None
    ) -> BlockTransformerCache | None:
        if starts is not None and cache is not None:
            raise ValueError(
                "`past_key_values` cannot hold packed documents; leave it out, or pass one document a row."
            )
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is not None or not use_cache or starts is not None:
            return cache
        return (
            None if self.training and self.is_gradient_checkpointing else BlockTransformerCache(self.config)
        )

    def _layout_of(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        starts: torch.Tensor | None,
        cache: BlockTransformerCache | None,
        block_offset: torch.Tensor | None,
    ) -> BlockLayout:
        """Lays the new tokens out behind those that no block has yet."""
        config, pending = self.config, None
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        begins = cache is None or cache.get_seq_length() == 0
        if begins and block_offset is not None and not torch.compiler.is_compiling():
            check_offset(block_offset, input_ids.shape[0], config.block_length)
        if cache is not None:
            if begins:
                cache.start(input_ids, cache.offset if block_offset is None else block_offset)
            pending = cache.pending()
            cache.append(input_ids, mask)
        elif block_offset is not None:
            pending = offset_pads(
                block_offset.to(input_ids.device), config.block_length, config.fill_token_id
            )
        return lay_out(
            input_ids,
            mask,
            starts,
            pending,
            block_length=config.block_length,
            fill_id=config.fill_token_id,
            by_column=config.block_alignment == "columns",
        )

    def _decode_blocks(
        self, layout: BlockLayout, cache: BlockTransformerCache | None, output_attentions: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """Embeds and decodes complete blocks: e and h (B, N, n_e, D), or None, and attentions."""
        counts = None if cache is None else cache.complete_blocks
        number = layout.num_blocks if counts is None else int(counts.max())
        if number == 0:
            return None, None, None
        mask = None if layout.token_mask is None else layout.token_mask[:, :number]
        embeds = self.embedder(layout.token_ids[:, :number], mask)
        if cache is None:
            contexts, attentions = self._run_block_decoder(embeds, layout, None, output_attentions)
            return embeds, contexts, attentions
        done = cache.run_length(counts, layout.block_mask)
        if not done:
            return embeds, *self._decode_new(embeds, counts, layout, cache, output_attentions)
        contexts, attentions = [cast(Any, cache).compute_run(self.block_decoder, embeds[:, :done])], None
        if number > done:
            rest, counts = embeds[:, done:], counts - done
            rest, attentions = self._decode_new(rest, counts, layout, cache, output_attentions)
            contexts.append(rest)
        return embeds, torch.cat(contexts, dim=1), attentions

    def _decode_new(
        self,
        embeds: torch.Tensor,
        counts: torch.Tensor,
        layout: BlockLayout,
        cache: BlockTransformerCache,
        output_attentions: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Contexts (B, N, n_e, D) of new blocks behind those of the cache, of which each row has `counts`."""
        rows = None if bool((counts > 0).all()) else counts.nonzero()[:, 0]
        write = cache.begin_blocks(rows, embeds.shape[1])
        index = None if rows is None else rows.to(embeds.device)
        own = embeds if index is None else embeds[index]
        contexts, attentions = self._run_block_decoder(own, layout, cache, output_attentions, write)
        if index is not None:
            contexts = contexts.new_zeros(embeds.shape).index_copy(0, index, contexts)
        mask = None if layout.block_mask is None else layout.block_mask[:, : embeds.shape[1]]
        cache.end_blocks(contexts, counts, mask)
        return contexts, attentions

    def _run_block_decoder(
        self,
        embeds: torch.Tensor,
        layout: BlockLayout,
        cache: BlockTransformerCache | None,
        output_attentions: Any,
        write: BlockWrite | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Runs the block decoder on (R, N, n_e, D); positions count from the first of a document."""
        inputs, each = embeds.flatten(1, 2), embeds.shape[2]
        places = torch.arange(inputs.shape[1], device=inputs.device)[None]
        if write is not None and write.uniform:
            position_ids = places + (write.length - write.count)
        elif write is not None:
            position_ids = write.starts.to(inputs.device)[:, None] + places
        elif layout.position_ids is not None:
            position_ids = (layout.position_ids[:, :, None] * each + places[:, :each]).flatten(1)
        else:
            position_ids = places
        mask = block_attention_mask(
            self.block_decoder.config, each, inputs, position_ids, layout, cache, write
        )
        outputs = self.block_decoder(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
            output_attentions=output_attentions,
        )
        return outputs.last_hidden_state.view_as(embeds), outputs.attentions

    def _decode_tokens(
        self,
        layout: BlockLayout,
        keep: int,
        contexts: torch.Tensor | None,
        held: tuple[torch.Tensor, torch.Tensor] | None,
        length: int,
        output_hidden_states: Any,
    ) -> tuple[torch.Tensor, tuple | None]:
        """States of the last `keep` columns of `layout`, (B, keep, D_tok), and those of layers asked for.

        `contexts` (B, N, n_e, D) stand before blocks 1 .. N, `held` (context, valid) before block 0; `length`
        rows of each block are needed.
        """
        shape = (layout.token_ids.shape[0], keep, self.config.token_hidden_size)
        if keep == 0 or (contexts is None and held is None):
            zeros = self.get_input_embeddings().weight.new_zeros(shape)
            return zeros, zero_states(zeros, self.config.token_num_hidden_layers, output_hidden_states)
        layout = layout.last_columns(keep)
        valid, first = layout.has_context, 1
        if held is not None:
            valid = valid | (layout.target_block == 0) & held[1].to(valid.device)[:, None]
            parts = [held[0][:, None]] if contexts is None else [held[0][:, None], contexts]
            contexts, first = torch.cat(parts, dim=1), 0
        window = TokenWindow.over(layout, first, first + contexts.shape[1] - 1, length)
        token_ids, mask = window.take(layout.token_ids, 0)[:, : length - 1], None
        if layout.block_mask is not None:
            mask = window.take(layout.token_mask, 0)[:, : length - 1]
        hidden, others = self.token_decoder(
            window.take(contexts, first), token_ids, mask, output_hidden_states
        )
        others = tuple(None if state is None else window.rows(state, valid) for state in others)
        return window.rows(hidden, valid), others or None


class BlockTransformerForCausalLM(BlockTransformerPreTrainedModel, BlockGenerationMixin):
    """A Block Transformer with a language modelling head: `logits[:, i]` (B, T, V) predicts token i + 1.

    Example:
        ```python
        >>> model = BlockTransformerForCausalLM(BlockTransformerConfig(hidden_size=64, num_attention_heads=2))
        >>> model.generate(torch.arange(10)[None], max_new_tokens=5).shape
        torch.Size([1, 15])
        ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.token_decoder.embed_tokens.weight"}

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__(config)
        self.model = BlockTransformerModel(config)
        self.lm_head = nn.Linear(config.token_hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _resize_token_embeddings(self, new_num_tokens: int, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.model.resize_embedder(embeddings)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        block_offset: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `BlockTransformerModel.forward`, with logits and, given labels, the loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 at pads.
            position_ids: (B, T), read only to find packed documents.
            past_key_values: a `BlockTransformerCache`, changed in place.
            labels: (B, T), -100 where nothing is to be scored. A document's first block is never scored.
            use_cache: whether to return a cache.
            logits_to_keep: how many of the last rows to compute (0: all), or the indices of the rows.
            block_offset: (B,), pads that stand in the first block before the first token.
            **kwargs: `num_items_in_batch`, the labels of a step of which this batch is a part (`loss_terms`),
                `shift_labels` and `ignore_index`.

        Returns:
            loss, logits (B, T or `logits_to_keep`, V), zeros where no block stands before, and the cache.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            block_offset=block_offset,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        # Of an int, the model has kept the last rows already, unless something stands in for it.
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, rows])
        loss = None if labels is None else self._loss(logits, labels, outputs, kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, outputs: BlockTransformerModelOutput, kwargs: dict
    ) -> torch.Tensor:
        shifted, ignored = kwargs.get("shift_labels"), kwargs.get("ignore_index", -100)
        if shifted is None:
            shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        scored, divisor, added = self.loss_terms(outputs, shifted, kwargs.get("num_items_in_batch"), ignored)
        loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=divisor,
            ignore_index=ignored,
            shift_labels=scored,
        )
        return loss + added

    def loss_terms(
        self,
        outputs: BlockTransformerModelOutput,
        shifted: torch.Tensor,
        num_items: torch.Tensor | int | None,
        ignore_index: int = -100,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """What the loss of a batch is made of, see `blocks.loss_terms`."""
        return loss_terms(self.config, outputs, shifted, num_items, ignore_index)


__all__ = [
    "BlockTransformerForCausalLM",
    "BlockTransformerModel",
    "BlockTransformerModelOutput",
    "BlockTransformerPreTrainedModel",
]
