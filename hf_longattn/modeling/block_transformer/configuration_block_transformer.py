"""Configuration of the Block Transformer (Ho et al., arXiv 2406.02657): one flat list for its three parts."""

# Fields of the configuration that default to None are filled in by it, which a type checker cannot see.
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

# GPT-NeoX turns a quarter of each head; the others turn all of it (their configurations have no such field).
GPT_NEOX_ROTARY_FACTOR = 0.25


@strict
class BlockTransformerConfig(PreTrainedConfig):
    r"""Describes a `BlockTransformerModel`: an embedder, a block decoder and a token decoder.

    The fields without a prefix describe the block decoder, `token_*` the token decoder (`None`: as the block
    decoder) and `embedder_*` the embedder. The defaults are the released 420M model, `block_main_b4_300`.

    Args:
        vocab_size: number of token ids.
        block_length: tokens in a block, L.
        block_alignment: where blocks start. `"tokens"`: at the first attended token of a row and at each
            packed document, so that results do not depend on padding. `"columns"`: at multiples of L columns,
            the layout of the official code, where the ids of pads inside a partly padded block enter the
            embedder.
        decoder_type: `model_type` of the layers that both decoders are built from.
        hidden_size: width D of the block decoder.
        intermediate_size: width of its MLP (`None`: 4 D).
        num_hidden_layers: number of its layers.
        num_attention_heads: number of its query heads.
        num_key_value_heads: number of its key/value heads (`None`: as many as query heads).
        head_dim: width of a head (`None`: D / heads).
        token_hidden_size: width of the token decoder.
        token_intermediate_size: width of its MLP (`None`: 4 x `token_hidden_size`, or as the block decoder).
        token_num_hidden_layers: number of its layers.
        token_num_attention_heads: number of its query heads.
        token_num_key_value_heads: number of its key/value heads.
        token_head_dim: width of its heads.
        embedder_type: `"lookup"` (a table of its own), `"roberta"` (an encoder over the L tokens) or
            `"roberta_cls"` (the same with `n_cls_tokens` leading ids whose outputs are kept).
        projection_method: how token vectors become block vectors: `"concat"`, or `"projection_layer"` (a
            linear map of the concatenated vectors).
        n_embedding_tokens: vectors that stand for one block, n_e.
        n_cls_tokens: leading ids of `"roberta_cls"`.
        embedder_hidden_size: width of the embedder's token vectors (`None`: D n_e / L if `"concat"`, or D).
        embedder_num_hidden_layers: layers of a RoBERTa embedder.
        embedder_num_attention_heads: heads of a RoBERTa embedder.
        embedder_intermediate_size: MLP width of a RoBERTa embedder.
        embedder_max_position_embeddings: position table of a RoBERTa embedder.
        embedder_bos_token_id: the id that `"roberta_cls"` puts first.
        embedder_pad_token_id: the id to which RoBERTa gives no position of its own.
        decoding_strategy: how the context vectors reach the token decoder: `"prefix"` (P vectors in front),
            `"summation"` (one added to each input) or `"cross_attention"` (a T5 decoder attends to them).
        expansion_method: `"expansion_layer"` (a linear map to `expansion_ratio` vectors) or `None`
            (repeated).
        expansion_ratio: context vectors made of each embedding token (`None`: L; `"prefix"` needs n_e x ratio
            = P).
        decoder_start_token_id: first input of `"summation"` and `"cross_attention"` (`None`: `bos_token_id`).
        block_decoding_loss: auxiliary loss between a context vector and the next block's embedding, `"mse"`
            or `"contrastive"` (cosine similarities against all blocks of the batch, temperature 0.07).
        block_decoding_loss_weight: its weight in the loss.
        hidden_act: activation of the MLPs (`None`: `"gelu"`, or `"silu"` for the Llama family).
        token_hidden_act: activation of a `"cross_attention"` decoder, in T5's notation.
        max_position_embeddings: longest context in tokens.
        rope_parameters: rotary embedding, as in the configuration of `decoder_type`.
        layer_norm_eps: epsilon of the layer norms.
        rms_norm_eps: epsilon of the RMS norms (Llama family, T5).
        use_parallel_residual: GPT-NeoX: attention and MLP read the same input.
        attention_bias: whether attention projections have biases (`None`: true for GPT-NeoX only).
        mlp_bias: Llama: whether MLP projections have biases.
        attention_dropout: dropout of attention weights.
        hidden_dropout: dropout of hidden states.
        relative_attention_num_buckets: T5: buckets of relative positions.
        relative_attention_max_distance: T5: the distance of the last bucket.
        initializer_range: standard deviation of the initial weights.
        use_cache: whether forward passes return a cache.
        bos_token_id: id that begins a text.
        eos_token_id: id, or ids, that end one.
        pad_token_id: id that fills the columns of no token, and the block of a prompt shorter than L.
        tie_word_embeddings: whether the head is the token decoder's embedding table.

    Raises:
        ValueError: names the field that does not fit the others, what was got and what is needed.

    Example:
        ```python
        >>> config = BlockTransformerConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
        >>> config.token_decoder_config().hidden_size
        64
        ```
    """

    model_type = "block_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "block_embeds", "context_embeds", "block_pair_mask"]

    vocab_size: int = 50304
    block_length: int = 4
    block_alignment: Literal["tokens", "columns"] = "tokens"
    decoder_type: Literal["gpt_neox", "llama", "qwen2", "qwen3"] = "gpt_neox"
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    token_hidden_size: int | None = None
    token_intermediate_size: int | None = None
    token_num_hidden_layers: int | None = None
    token_num_attention_heads: int | None = None
    token_num_key_value_heads: int | None = None
    token_head_dim: int | None = None
    embedder_type: Literal["lookup", "roberta", "roberta_cls"] = "lookup"
    projection_method: Literal["concat", "projection_layer"] = "concat"
    n_embedding_tokens: int = 1
    n_cls_tokens: int = 3
    embedder_hidden_size: int | None = None
    embedder_num_hidden_layers: int = 3
    embedder_num_attention_heads: int = 8
    embedder_intermediate_size: int | None = None
    embedder_max_position_embeddings: int = 514
    embedder_bos_token_id: int = 0
    embedder_pad_token_id: int = 1
    decoding_strategy: Literal["prefix", "summation", "cross_attention"] = "prefix"
    expansion_method: Literal["expansion_layer"] | None = "expansion_layer"
    expansion_ratio: int | None = 2
    decoder_start_token_id: int | None = None
    block_decoding_loss: Literal["mse", "contrastive"] | None = None
    block_decoding_loss_weight: float = 1.0
    hidden_act: str | None = None
    token_hidden_act: str = "relu"
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-6
    use_parallel_residual: bool = True
    attention_bias: bool | None = None
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # What is filled in below divides by these.
        for name in (
            "block_length",
            "n_embedding_tokens",
            "num_attention_heads",
            "token_num_attention_heads",
        ):
            self._validate_positive(name)
        gpt_neox = self.decoder_type == "gpt_neox"
        self.hidden_act = self.hidden_act or ("gelu" if gpt_neox else "silu")
        self.attention_bias = gpt_neox if self.attention_bias is None else self.attention_bias
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self._fill_token_fields()
        tokens_each = self.block_length // self.n_embedding_tokens
        concat = self.projection_method == "concat"
        self.embedder_hidden_size = self.embedder_hidden_size or (
            self.hidden_size // tokens_each if concat and tokens_each else self.hidden_size
        )
        self.embedder_intermediate_size = self.embedder_intermediate_size or 4 * self.embedder_hidden_size
        self.expansion_ratio = self.expansion_ratio or self.block_length
        super().__post_init__(**kwargs)

    def _fill_token_fields(self) -> None:
        """Fields of the token decoder that were left out follow the block decoder."""
        same_width = self.token_hidden_size in (None, self.hidden_size)
        self.token_hidden_size = self.token_hidden_size or self.hidden_size
        self.token_intermediate_size = self.token_intermediate_size or (
            self.intermediate_size if same_width else 4 * self.token_hidden_size
        )
        self.token_num_hidden_layers = self.token_num_hidden_layers or self.num_hidden_layers
        self.token_num_key_value_heads = self.token_num_key_value_heads or (
            self.num_key_value_heads
            if self.token_num_attention_heads is None
            else self.token_num_attention_heads
        )
        self.token_num_attention_heads = self.token_num_attention_heads or self.num_attention_heads
        self.token_head_dim = self.token_head_dim or (
            self.head_dim if same_width else self.token_hidden_size // self.token_num_attention_heads
        )

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict:
        """Accepts GPT-NeoX's older names of the rotary fields, as its own configuration does."""
        if self.decoder_type == "gpt_neox":
            factor = kwargs.pop("rotary_pct", GPT_NEOX_ROTARY_FACTOR)
            kwargs.setdefault("rope_theta", kwargs.pop("rotary_emb_base", 10000))
            kwargs.setdefault("partial_rotary_factor", factor)
        return super().convert_rope_params_to_dict(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """Context vectors of one block that the token decoder gets, P = n_e x `expansion_ratio`."""
        return self.n_embedding_tokens * self.expansion_ratio

    def validate_architecture(self) -> None:
        """Checks the fields against each other; part of the checks at construction."""
        self._validate_heads()
        self._validate_embedder()
        self._validate_token_decoder()
        self._validate_ids()

    def _validate_positive(self, name: str) -> None:
        if getattr(self, name) is not None and getattr(self, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def _validate_ids(self) -> None:
        """Ids that the model itself puts beside those of a caller have an embedding."""
        names = ["pad_token_id"]
        names += ["embedder_pad_token_id"] if self.embedder_type != "lookup" else []
        names += ["embedder_bos_token_id"] if self.embedder_type == "roberta_cls" else []
        if self.decoding_strategy != "prefix":
            names.append("bos_token_id" if self.decoder_start_token_id is None else "decoder_start_token_id")
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"`{name}` must be an id of the vocabulary, 0 to {self.vocab_size - 1}, got {value}; "
                    "`resize_token_embeddings` makes room for more ids."
                )

    def _validate_heads(self) -> None:
        for name in ("n_cls_tokens", "expansion_ratio", "num_key_value_heads", "token_num_key_value_heads"):
            self._validate_positive(name)
        for prefix in ("", "token_"):
            size, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            kv_heads, head_dim = (
                getattr(self, f"{prefix}num_key_value_heads"),
                getattr(self, f"{prefix}head_dim"),
            )
            if heads % kv_heads:
                raise ValueError(
                    f"`{prefix}num_key_value_heads` must divide `{prefix}num_attention_heads`, got "
                    f"{kv_heads} and {heads}."
                )
            if self.decoder_type == "gpt_neox" and (kv_heads != heads or head_dim * heads != size):
                raise ValueError(
                    f"GPT-NeoX layers need `{prefix}num_key_value_heads` == `{prefix}num_attention_heads` "
                    f"and heads that make up `{prefix}hidden_size`, got {kv_heads}, {heads} heads of "
                    f"{head_dim} and {size}; use `decoder_type='llama'` for others."
                )

    def _validate_embedder(self) -> None:
        pieces = self.n_cls_tokens if self.embedder_type == "roberta_cls" else self.block_length
        if pieces % self.n_embedding_tokens:
            name = "n_cls_tokens" if self.embedder_type == "roberta_cls" else "block_length"
            raise ValueError(
                f"`n_embedding_tokens` must divide `{name}`, got {self.n_embedding_tokens} and {pieces}."
            )
        leading = self.n_cls_tokens if self.embedder_type == "roberta_cls" else 0
        # Positions count from behind the id of pads.
        places = self.embedder_pad_token_id + 1 + leading + self.block_length
        if self.embedder_type != "lookup" and self.embedder_max_position_embeddings < places:
            raise ValueError(
                f"`embedder_max_position_embeddings` must be at least {places}, for `block_length` "
                f"{self.block_length}, got {self.embedder_max_position_embeddings}."
            )
        width = self.embedder_hidden_size * pieces // self.n_embedding_tokens
        if self.projection_method == "concat" and width != self.hidden_size:
            raise ValueError(
                f"`projection_method='concat'` needs `embedder_hidden_size` x "
                f"{pieces // self.n_embedding_tokens} == `hidden_size`, got {self.embedder_hidden_size} and "
                f"{self.hidden_size}; use 'projection_layer'."
            )

    def _validate_token_decoder(self) -> None:
        if self.decoding_strategy == "summation" and self.num_prefix_tokens != self.block_length:
            raise ValueError(
                f"`decoding_strategy='summation'` needs `n_embedding_tokens` x `expansion_ratio` == "
                f"`block_length`, got {self.num_prefix_tokens} and {self.block_length}; leave "
                "`expansion_ratio=None`."
            )
        if self.expansion_method is None and self.hidden_size != self.token_hidden_size:
            raise ValueError(
                f"`expansion_method=None` needs `token_hidden_size` == `hidden_size`, got "
                f"{self.token_hidden_size} and {self.hidden_size}; use 'expansion_layer'."
            )
        if self.decoding_strategy != "prefix" and self.start_token_id is None:
            raise ValueError(
                f"`decoder_start_token_id` is needed by `decoding_strategy={self.decoding_strategy!r}`."
            )

    @property
    def start_token_id(self) -> int | None:
        """The first input of the summation and cross-attention strategies."""
        return self.bos_token_id if self.decoder_start_token_id is None else self.decoder_start_token_id

    @property
    def fill_token_id(self) -> int:
        """The id that fills slots without a token: `pad_token_id`, or 0."""
        return 0 if self.pad_token_id is None else self.pad_token_id

    def block_decoder_config(self) -> PreTrainedConfig:
        """The configuration of the block decoder, in the words of `decoder_type`."""
        positions = -(-self.max_position_embeddings // self.block_length) * self.n_embedding_tokens
        return self._decoder_config("", positions)

    def token_decoder_config(self) -> PreTrainedConfig:
        """The configuration of the token decoder, in the words of `decoder_type`, or of T5 for
        cross-attention.
        """
        if self.decoding_strategy != "cross_attention":
            return self._decoder_config("token_", self.num_prefix_tokens + self.block_length)
        return AutoConfig.for_model(
            "t5",
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            d_model=self.token_hidden_size,
            d_kv=self.token_head_dim,
            d_ff=self.token_intermediate_size,
            num_layers=self.token_num_hidden_layers,
            num_heads=self.token_num_attention_heads,
            relative_attention_num_buckets=self.relative_attention_num_buckets,
            relative_attention_max_distance=self.relative_attention_max_distance,
            dropout_rate=self.hidden_dropout,
            layer_norm_epsilon=self.rms_norm_eps,
            feed_forward_proj=self.token_hidden_act,
            is_decoder=True,
            is_encoder_decoder=False,
            use_cache=False,
            attn_implementation=self.local_attn_implementation,
        )

    def embedder_config(self) -> PreTrainedConfig:
        """The configuration of a RoBERTa embedder."""
        return AutoConfig.for_model(
            "roberta",
            vocab_size=self.vocab_size,
            hidden_size=self.embedder_hidden_size,
            num_hidden_layers=self.embedder_num_hidden_layers,
            num_attention_heads=self.embedder_num_attention_heads,
            intermediate_size=self.embedder_intermediate_size,
            max_position_embeddings=self.embedder_max_position_embeddings,
            pad_token_id=self.embedder_pad_token_id,
            type_vocab_size=1,
            layer_norm_eps=self.layer_norm_eps,
            hidden_dropout_prob=self.hidden_dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            initializer_range=self.initializer_range,
            attn_implementation=self.local_attn_implementation,
        )

    @property
    def local_attn_implementation(self) -> str:
        """Attention inside one block is a handful of keys: plain SDPA, whatever the block decoder uses."""
        return "eager" if self._attn_implementation == "eager" else "sdpa"

    def _decoder_config(self, prefix: str, positions: int) -> PreTrainedConfig:
        """A decoder of `decoder_type` with the fields that start with `prefix`; its embedding table is not
        used.
        """
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        fields = {name: getattr(self, prefix + name) for name in names}
        if self.decoder_type == "gpt_neox":
            fields |= {
                "use_parallel_residual": self.use_parallel_residual,
                "hidden_dropout": self.hidden_dropout,
            }
            fields |= {"layer_norm_eps": self.layer_norm_eps, "attention_bias": self.attention_bias}
        else:
            fields |= {name: getattr(self, prefix + name) for name in ("num_key_value_heads", "head_dim")}
            fields |= {"rms_norm_eps": self.rms_norm_eps}
        if self.decoder_type in ("llama", "qwen3"):
            fields |= {"attention_bias": self.attention_bias}
        if self.decoder_type == "llama":
            fields |= {"mlp_bias": self.mlp_bias}
        return AutoConfig.for_model(
            self.decoder_type,
            vocab_size=1,
            hidden_act=self.hidden_act,
            max_position_embeddings=positions,
            rope_parameters=dict(self.rope_parameters),
            attention_dropout=self.attention_dropout,
            initializer_range=self.initializer_range,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation=self.local_attn_implementation if prefix else self._attn_implementation,
            **fields,
        )


__all__ = ["BlockTransformerConfig"]
