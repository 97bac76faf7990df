"""What `generate` and `generate_batch` need to know of a Block Transformer."""

import contextlib
from typing import Any, cast

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode

from hf_longattn.kernels.mask_runs import look_for_whole_rows

from .cache_block_transformer import BlockTransformerCache
from .decoding import BlockDecoding, key_shape
from .layout import prompt_offset
from .rows import RowDecoding
from .shared import SharedBlockCache
from .steps import few_launches


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

    def decode_prompts(
        self, cache: BlockTransformerCache, input_ids: Tensor, steps: int, at_once: int
    ) -> BlockDecoding | None:
        """`decode_blocks` behind prompts that are read here, some rows at a time, each of them whole.

        Args:
            cache: empty, and read by nobody else.
            input_ids: (B, T), without pads.
            steps: tokens a row to make room for behind the prompt.
            at_once: rows that are read together.

        Returns:
            as `decode_blocks`; None where the forward has to read them.
        """
        return BlockDecoding.of_prompts(self, cache, input_ids, steps, at_once)

    def shared_cache(self, group: Any) -> SharedBlockCache:
        """An empty cache whose keys and values lie on the ranks of a group.

        Args:
            group: the `SequenceGroup`.
        """
        return SharedBlockCache(self.config, group)

    def decode_rows(self, rows: int, tokens: int) -> RowDecoding:
        """Steps of a block at a time for rows that begin and end one by one.

        Args:
            rows: R.
            tokens: of prompt and answer that a row has room for.
        """
        return RowDecoding(self, rows, tokens)

    def bytes_of_row(self, tokens: int) -> int:
        """Bytes of keys and values that `decode_rows` takes for each row.

        Args:
            tokens: of prompt and answer that a row has room for.
        """
        (heads, width), config = key_shape(self), self.config
        blocks = tokens // config.block_length + 1
        numbers = 2 * config.num_hidden_layers * blocks * config.n_embedding_tokens * heads * width
        return numbers * cast(Any, self).lm_head.weight.element_size()

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Many prompts on a fixed number of rows; `hf_longattn.prepare_generation` puts its own in place.

        Raises:
            ValueError: the model is not prepared.
        """
        raise ValueError(
            "`generate_batch` of a Block Transformer needs a model prepared for one process: its cache holds "
            "blocks of tokens, which the pages of transformers' continuous batching do not; call "
            "`hf_longattn.prepare_generation(model)` first."
        )

    def few_launches(self) -> contextlib.AbstractContextManager[None]:
        """Inside, prompts and steps take fewer launches; worth it for a prompt, and for steps to capture."""
        return few_launches(self)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        # `generate` takes the method of the class; a prepared instance has one of its own.
        prepared = vars(self).get("_sample")
        own = cast(Any, super())._sample
        return own(*args, **kwargs) if prepared is None else prepared(*args, **kwargs)

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
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "`assistant_early_exit` must be None for a Block Transformer, got "
                f"{generation_config.assistant_early_exit}; its decoders have layers of their own. Pass an "
                "`assistant_model`, or `prompt_lookup_num_tokens`."
            )
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
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
            if at_once and mask is not None:
                # One look for the pads of the first block and for how the prompt is read.
                cache.whole_prompt = look_for_whole_rows(mask, model_kwargs.get("position_ids"))
        elif cache is not None:
            cache._is_user_defined, cache.whole_prompt = True, None
        given = model_kwargs.get("block_offset") is not None
        if mask is None or given or (cache is not None and cache.get_seq_length() > 0):
            return
        by_column, whole = self.config.block_alignment == "columns", getattr(cache, "whole_prompt", None)
        offset = prompt_offset(mask, self.config.block_length, by_column, bool(whole))
        if cache is not None and generation_mode == GenerationMode.ASSISTED_GENERATION:
            # Arguments go to the assistant too, whose blocks, if it has any, are its own.
            cache.offset = offset
        else:
            model_kwargs["block_offset"] = offset

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


__all__ = ["BlockGenerationMixin"]
