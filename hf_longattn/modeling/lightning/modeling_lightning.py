"""Lightning attention as a model, TransNormerLLM (Qin et al., arXiv 2307.14995, 2401.04658).

    x <- x + out(u * norm(o)),    q, k, v, u = qkvu(norm(x)),    o_t = sum_j exp(-s (t - j)) (q_t . k_j) v_j
    x <- x + l3(l1(y) * l2(y)),   y = norm(x)

Norms have no weights. Lightning layers take silu(q), silu(k); the first gives them a learned relative
position encoding. Softmax layers of a hybrid take q, k with a rotary embedding.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    create_causal_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hf_longattn.attention.exact import Options
from hf_longattn.attention.lightning import (
    NORM_EPS,
    check_packing,
    lightning_attention_forward,
    normalised,
    packing_of,
    refuse_pages,
    rows_of_sequence,
)
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.recurrent import is_empty, lightning_layers
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.masking import LazyMask, lazy_mask

from .configuration_lightning import LightningConfig


class SimpleRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), without weights (arXiv 2307.14995)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalises the last dimension of (..., D)."""
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=NORM_EPS)


class LightningPositionEncoding(nn.Module):
    """Learned linearised relative position encoding: [x cos(theta t), x sin(theta t)].

    The product of a query at t and a key at j then weighs each channel by cos(theta (t - j)).

    Args:
        config: of the model.
    """

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(config.num_attention_heads, 1, config.head_dim))

    def initial_theta(self) -> Tensor:
        """10000^(-2 i / D) for channel i of all heads, (H, 1, K)."""
        channels = torch.arange(self.theta.numel(), dtype=torch.float32)
        return (10000.0 ** (-2 * channels / self.theta.numel())).view_as(self.theta)

    def forward(self, states: Tensor, position_ids: Tensor) -> Tensor:
        """Encodes (B, H, T, K) at (B or 1, T) positions: (B, H, T, 2 K)."""
        # In fp32: an angle at position 100,000 has no digits left in half precision.
        angle = self.theta.float() * position_ids[:, None, :, None].float()
        encoded = torch.cat([states * angle.cos(), states * angle.sin()], dim=-1)
        return encoded.to(states.dtype)


class LightningAttention(nn.Module):
    """The token mixer of one layer, lightning or softmax.

    Args:
        config: of the model.
        layer_idx: which layer.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: LightningConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_lightning = config.is_lightning(layer_idx)
        self.scaling = 1.0 if self.is_lightning else self.head_dim**-0.5
        self.act = ACT2FN[config.hidden_act]
        self.qkvu_proj = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if layer_idx in (config.lrpe_layers or ()):
            self.lrpe = LightningPositionEncoding(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes (B, T, D) over time.

        Args:
            hidden_states: (B, T, D).
            attention_mask: a `LazyMask` for a lightning layer, what the implementation takes for a softmax
                layer.
            position_ids: (B or 1, T).
            position_embeddings: cosines and sines for a softmax layer.
            past_key_values: the cache.
            **kwargs: what reaches the attention function.

        Returns:
            (B, T, D), and the attention weights of a softmax layer where its implementation returns them.
        """
        qk, vu = self.qkvu_proj(hidden_states).chunk(2, dim=-1)
        # One call of the activation for queries and keys.
        qk = self.act(qk) if self.is_lightning else qk
        (q, k), (v, gate) = qk.chunk(2, dim=-1), vu.chunk(2, dim=-1)
        q, k, v = (states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (q, k, v))
        if hasattr(self, "lrpe"):
            q, k = self.lrpe(q, position_ids), self.lrpe(k, position_ids)
        if not self.is_lightning:
            assert position_embeddings is not None
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = lightning_attention_forward
        if not self.is_lightning:
            implementation = self.config._attn_implementation or "eager"
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, position_ids=position_ids,
            **kwargs,
        )  # fmt: skip
        if not self.is_lightning:
            output = normalised(output)
        return self.out_proj(gate * output.flatten(2)), weights


class LightningGLU(nn.Module):
    """The channel mixer: l3(l1(x) * l2(x)), with no activation.

    Args:
        config: of the model.
    """

    def __init__(self, config: LightningConfig) -> None:
        super().__init__()
        self.l1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.l3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Mixes the channels of (B, T, D)."""
        return self.l3(self.l1(hidden_states) * self.l2(hidden_states))


class LightningDecoderLayer(GradientCheckpointingLayer):
    """Token mixer and channel mixer, each behind a norm and beside a residual.

    Args:
        config: of the model.
        layer_idx: which layer.
    """

    def __init__(self, config: LightningConfig, layer_idx: int) -> None:
        super().__init__()
        self.token_norm = SimpleRMSNorm()
        self.token_mixer = LightningAttention(config, layer_idx)
        self.channel_norm = SimpleRMSNorm()
        self.channel_mixer = LightningGLU(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """One layer on (B, T, D).

        Args:
            hidden_states: (B, T, D).
            **kwargs: of `LightningAttention.forward`.
        """
        hidden_states = hidden_states + self.token_mixer(self.token_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.channel_mixer(self.channel_norm(hidden_states))


class LightningPreTrainedModel(PreTrainedModel):
    """What `LightningModel` and `LightningForCausalLM` share."""

    config: LightningConfig
    config_class = LightningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LightningDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Of the softmax layers of a hybrid; lightning layers have an implementation of their own.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LightningDecoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LightningPositionEncoding):
            init.copy_(module.theta, module.initial_theta())

    @staticmethod
    def create_masks_for_generate(attention_mask: Any = None, **kwargs: Any) -> Any:
        """Leaves the (B, N) mask as it is: lightning layers need to know which tokens exist."""
        return attention_mask


class LightningModel(LightningPreTrainedModel):
    """The decoder, from `input_ids` (B, T) to hidden states (B, T, D).

    Args:
        config: the configuration.

    Example:
        ```python
        >>> model = LightningModel(LightningConfig(hidden_size=64, num_attention_heads=2))
        >>> model(torch.arange(10)[None]).last_hidden_state.shape
        torch.Size([1, 10, 64])
        ```

    Source: Qin et al., TransNormerLLM, arXiv 2307.14995; the attention is that of arXiv 2401.04658.
    """

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            LightningDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.final_norm = SimpleRMSNorm()
        if config.is_hybrid:
            self.rotary_emb = LlamaRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), or the columns of the cache too; 0 at pads, which may stand anywhere.
            position_ids: (B, T); documents packed in a row start at 0. Counted over existing tokens where
                left out.
            past_key_values: a `LongContextCache`, or any other cache, from all of whose keys the result is
                then computed.
            inputs_embeds: (B, T, D), in the place of `input_ids`.
            use_cache: whether to return a cache.
            **kwargs: `cu_seq_lens_q` and the like for packed documents, `output_hidden_states`.

        Returns:
            Hidden states (B, T, D), the cache, and the layers' states where asked for.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, or a mask of another rank.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("`input_ids` or `inputs_embeds`: exactly one of them must be given.")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` must be (B, N), which says what tokens exist, got shape "
                f"{tuple(attention_mask.shape)}."
            )
        if self.config.scale_embedding:
            embeds = embeds * self.config.hidden_size**0.5
        if use_cache and past_key_values is None:
            past_key_values = LongContextCache(self.config)
        packing = packing_of(self, position_ids, kwargs)
        if position_ids is None:
            position_ids = self._positions(embeds, attention_mask, past_key_values)
        masks = self._masks(embeds, attention_mask, position_ids, past_key_values, packing)
        rotary = self.rotary_emb(embeds, position_ids) if self.config.is_hybrid else None
        hidden_states = embeds
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[self.config.is_lightning(index)],
                position_ids=position_ids,
                position_embeddings=rotary,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(hidden_states),  # type: ignore[arg-type]
            past_key_values=past_key_values,
        )

    def _positions(self, embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Any:
        """(B or 1, T), counted over the tokens that exist, so that padding changes nothing."""
        length = embeds.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            return (torch.arange(length, device=embeds.device) + past)[None]
        counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return counted[:, -length:]

    def _masks(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Any,
        cache: Cache | None,
        packing: Options,
    ) -> dict[bool, Any]:
        """The masks of lightning layers (True) and of softmax layers (False)."""
        masks: dict[bool, Any] = {True: self._lightning_mask(embeds, attention_mask, cache, packing)}
        if self.config.is_hybrid:
            # transformers looks for packed documents only where it is given no cache. So an empty one is left
            # out, unless the ranks that share it share these tokens too.
            fresh = cache is None or (not cache.is_compileable and is_empty(cache))
            fresh = fresh and not (isinstance(cache, ShardedCache) and cache.is_computing)
            make = functools.partial(
                create_causal_mask,
                config=self.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=None if fresh else cache,
                position_ids=position_ids,
            )
            masks[False] = make()
            if fresh and not isinstance(masks[False], LazyMask):
                # Implementations of transformers read documents neither beside a mask nor by other words.
                documents = self._documents(embeds, attention_mask, masks[True], packing)
                if documents is not None:
                    masks[False] = make(and_mask_function=packed_sequence_mask_function(documents))
        return masks

    def _documents(
        self, embeds: Tensor, attention_mask: Tensor | None, mask: LazyMask, packing: Options
    ) -> Tensor | None:
        """(B, T), the number of each token's document, or None where transformers finds them itself."""
        batch, length = embeds.shape[:2]
        check_packing(packing, batch, length, mask)
        if packing.cu_seqlens is None and packing.documents is None and attention_mask is None:
            return None
        exists = None if attention_mask is None else attention_mask[:, :length].bool().to(embeds.device)
        starts = rows_of_sequence(exists, packing, batch, length).starts
        return None if starts is None else starts.cumsum(-1)

    def _lightning_mask(
        self, embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None, packing: Options
    ) -> LazyMask:
        batch, length = embeds.shape[:2]
        first = min(lightning_layers(self.config), default=0)
        offset, sizes = 0, (length, 0)
        if cache is not None:
            offset, sizes = cache.get_query_offset(first), cache.get_mask_sizes(length, first)
        if attention_mask is not None:
            attention_mask = attention_mask.to(embeds.device)
        function: Any = causal_mask_function
        if torch.compiler.is_compiling() and attention_mask is None and packing.position_ids is not None:
            # As transformers says to other models, while a graph is traced, that there may be documents.
            numbers = (packing.position_ids == 0).cumsum(-1)
            function = and_masks(function, packed_sequence_mask_function(numbers))
        return lazy_mask(
            batch, length, sizes[0], offset, sizes[1], function, attention_mask, embeds.device
        )  # fmt: skip


class LightningForCausalLM(LightningPreTrainedModel, GenerationMixin):
    """A `LightningModel` with a language modelling head: `logits[:, i]` (B, T, V) predicts token i + 1.

    Args:
        config: the configuration.

    Example:
        ```python
        >>> model = LightningForCausalLM(LightningConfig(hidden_size=64, num_attention_heads=2))
        >>> model.generate(torch.arange(10)[None], max_new_tokens=5).shape
        torch.Size([1, 15])
        ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    init_continuous_batching = staticmethod(refuse_pages)

    def __init__(self, config: LightningConfig) -> None:
        super().__init__(config)
        self.model = LightningModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `LightningModel.forward`, with logits and, given labels, the loss.

        Args:
            input_ids: (B, T).
            attention_mask: (B, N), 0 at pads.
            position_ids: (B, T).
            past_key_values: the cache, changed in place.
            inputs_embeds: (B, T, D), in the place of `input_ids`.
            labels: (B, T), -100 where nothing is to be scored.
            use_cache: whether to return a cache.
            logits_to_keep: how many of the last rows to compute (0: all), or the indices of the rows.
            **kwargs: `num_items_in_batch`, by which the summed loss is divided, `shift_labels`, and what
                `LightningModel.forward` takes.

        Returns:
            loss, logits (B, T or `logits_to_keep`, V), the cache, and the layers' states where asked for.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Makes a cache with recurrent states, unless another kind is asked for by name."""
        given = model_kwargs.get("past_key_values") is not None
        dynamic = generation_config.cache_implementation in (None, "dynamic")
        if given or not dynamic or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        cache = model_kwargs["past_key_values"] = LongContextCache(self.config, capacity=max_cache_length)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None


__all__ = ["LightningForCausalLM", "LightningModel", "LightningPreTrainedModel"]
