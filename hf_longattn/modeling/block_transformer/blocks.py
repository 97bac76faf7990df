"""The small parts of a Block Transformer: embedder, expansion, what the model returns, and the auxiliary
loss.
"""

# Fields of the configuration that default to None are filled in by it, which a type checker cannot see.
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_longattn.cache.preallocated import PreallocatedLayer

from .cache_block_transformer import BlockTransformerCache, BlockWrite
from .configuration_block_transformer import BlockTransformerConfig
from .held import EndsMask
from .layout import BlockLayout

CONTRASTIVE_TEMPERATURE = 0.07


@dataclass
class BlockTransformerModelOutput(BaseModelOutputWithPast):
    """What `BlockTransformerModel` returns; `hidden_states` are the token decoder's, `attentions` the block
    decoder's.

    Args:
        last_hidden_state: (B, T, D_tok), row i predicts token i + 1; zeros if no block stands before it.
        label_mask: (B, T + 1), 1 for tokens that some row predicts from a context, also the one to come; None
            where no row was asked for.
        block_embeds: (B, N, n_e, D), the embeddings e of the blocks of this call.
        context_embeds: (B, N, n_e, D), the contexts h.
        block_pair_mask: (B, N - 1), 1 where a block and the next are complete and of one document; None:
            all.
    """

    label_mask: torch.Tensor | None = None
    block_embeds: torch.Tensor | None = None
    context_embeds: torch.Tensor | None = None
    block_pair_mask: torch.Tensor | None = None


class BlockEmbedder(nn.Module):
    """Turns the L tokens of each block into n_e vectors of the block decoder's width."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.kept = config.block_length
        if config.embedder_type == "lookup":
            self.embeddings = nn.Embedding(config.vocab_size, config.embedder_hidden_size)
        else:
            self.encoder = AutoModel.from_config(config.embedder_config(), add_pooling_layer=False)
        if config.embedder_type == "roberta_cls":
            self.kept = config.n_cls_tokens
        if config.projection_method == "projection_layer":
            width = config.embedder_hidden_size * self.kept // config.n_embedding_tokens
            self.projection = nn.Linear(width, config.hidden_size)

    def forward(self, token_ids: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Embeds (B, N, L) ids, of which `token_mask` (B, N, L) are attended, as (B, N, n_e, D)."""
        config = self.config
        if config.embedder_type == "lookup":
            states = self.embeddings(token_ids)
        else:
            states = self._encode(
                token_ids.flatten(0, 1), None if token_mask is None else token_mask.flatten(0, 1)
            )
        states = states.reshape(*token_ids.shape[:2], config.n_embedding_tokens, -1)
        return self.projection(states) if config.projection_method == "projection_layer" else states

    def _encode(self, token_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is not None:
            # A block of pads alone is never read, but an encoder that may attend to nothing returns NaN.
            mask = mask | ~mask.any(dim=-1, keepdim=True)
        leading = self.config.n_cls_tokens if self.config.embedder_type == "roberta_cls" else 0
        token_ids = F.pad(token_ids, (leading, 0), value=self.config.embedder_bos_token_id)
        mask = None if mask is None else F.pad(mask, (leading, 0), value=True).long()
        return self.encoder(token_ids, attention_mask=mask).last_hidden_state[:, : self.kept]


class TokenDecoder(nn.Module):
    """Decodes the tokens of one block from its context vectors and the tokens before them."""

    def __init__(self, config: BlockTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.expansion = None
        if config.expansion_method == "expansion_layer":
            self.expansion = nn.Linear(config.hidden_size, config.expansion_ratio * config.token_hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.token_hidden_size)
        self.decoder = without_table(config.token_decoder_config())

    def expand(self, contexts: torch.Tensor) -> torch.Tensor:
        """Makes P vectors, (X, P, D_tok), of the n_e context vectors (X, n_e, D) of each block."""
        if self.expansion is None:
            return contexts.repeat_interleave(self.config.expansion_ratio, dim=1)
        return self.expansion(contexts).reshape(contexts.shape[0], -1, self.config.token_hidden_size)

    def forward(
        self,
        contexts: torch.Tensor,
        token_ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        output_hidden_states: Any = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Runs the layers on blocks.

        Args:
            contexts: (X, n_e, D), the context of each block.
            token_ids: (X, l - 1), its first tokens.
            mask: (X, l - 1) bool, which of them are attended; None: all.
            output_hidden_states: whether to return the states of every layer, or a list of layers.

        Returns:
            States (X, l, D_tok) whose row j predicts token j, and those of the layers asked for.
        """
        prefix = self.expand(contexts)
        inputs = self._inputs(prefix, token_ids, 0)
        options: dict[str, Any] = {"use_cache": False, "output_hidden_states": output_hidden_states}
        outputs = self._run(inputs, prefix, mask, inputs.shape[1], options)
        rows = slice(inputs.shape[1] - token_ids.shape[1] - 1, None)
        others = [None if state is None else state[:, rows] for state in outputs.hidden_states or ()]
        return self._scaled(outputs.last_hidden_state[:, rows]), others

    def make_cache(self) -> Cache:
        """Room for the keys and values of one block; `reset()` makes it ready for the next."""
        config = self.config
        layers = range(config.token_num_hidden_layers)
        rows = config.block_length
        if config.decoding_strategy == "prefix":
            rows += config.num_prefix_tokens - 1
        own = Cache(layers=[PreallocatedLayer(rows) for _ in layers])
        if config.decoding_strategy != "cross_attention":
            return own
        crossed = Cache(layers=[PreallocatedLayer(config.num_prefix_tokens) for _ in layers])
        return EncoderDecoderCache(own, crossed)

    def step(
        self, prefix: torch.Tensor, token_ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Goes on inside a block, behind what is in the cache.

        Args:
            prefix: (X, P, D_tok), what `expand` made of the contexts.
            token_ids: (X, l), the next tokens of the block; before its first token perhaps none.
            cache: what `make_cache` made, with all that this block had before; empty at its begin.
            mask: (X, tokens of the block so far) bool, those that are attended; None: all.

        Returns:
            State (X, D_tok) that predicts the token after the last one.
        """
        held = int(cache.get_seq_length())
        before = self.config.num_prefix_tokens - 1 if self.config.decoding_strategy == "prefix" else 0
        inputs = self._inputs(prefix, token_ids, max(held - before, 0))
        outputs = self._run(inputs, prefix, mask, held + inputs.shape[1], {"past_key_values": cache})
        return self._scaled(outputs.last_hidden_state[:, -1])

    def _inputs(self, prefix: torch.Tensor, token_ids: torch.Tensor, row: int) -> torch.Tensor:
        """What the layers read from row `row` of a block on; rows count from that which predicts slot 0."""
        strategy = self.config.decoding_strategy
        if row == 0 and strategy == "prefix":
            tokens = self.embed_tokens(token_ids)
            # To join no tokens would copy the prefix; under autocast it also makes it of their dtype.
            bare = tokens.numel() == 0 and tokens.dtype == prefix.dtype and not tokens.requires_grad
            return prefix if bare else torch.cat([prefix, tokens], dim=1)
        if row == 0:
            token_ids = F.pad(token_ids, (1, 0), value=self.config.start_token_id)
        inputs = self.embed_tokens(token_ids)
        return inputs + prefix[:, row : row + inputs.shape[1]] if strategy == "summation" else inputs

    def _run(
        self, inputs: torch.Tensor, prefix: torch.Tensor, mask: torch.Tensor | None, keys: int, options: dict
    ) -> Any:
        if self.config.decoding_strategy == "cross_attention":
            options["encoder_hidden_states"] = prefix
        if mask is not None:
            # Pads inside a block are not attended to; what stands before the tokens is.
            options["attention_mask"] = F.pad(mask, (keys - mask.shape[1], 0), value=True)
        return self.decoder(inputs_embeds=inputs, **options)

    def _scaled(self, states: torch.Tensor) -> torch.Tensor:
        if self.config.decoding_strategy != "cross_attention":
            return states
        # A T5 head is tied to the table, which is scaled.
        return states * self.config.token_hidden_size**-0.5


def zero_states(zeros: torch.Tensor, layers: int, wanted: Any) -> tuple[torch.Tensor | None, ...] | None:
    """What the layers asked for return for rows that no block stands before.

    Args:
        zeros: (B, T, D_tok).
        layers: of the token decoder.
        wanted: `output_hidden_states`: true for all layers, or a list of them.
    """
    if not wanted:
        return None
    if not isinstance(wanted, (list, tuple, set)):
        return (zeros,) * (layers + 1)
    # As transformers does it: of layers that are chosen, what goes in.
    return tuple(zeros if layer in wanted else None for layer in range(layers))


def without_table(config: Any) -> PreTrainedModel:
    """Builds the decoder of `config` without its embedding table, which nothing reads."""
    if config.model_type == "t5":
        from transformers.models.t5.modeling_t5 import T5Stack

        decoder = T5Stack._from_config(config)
    else:
        decoder = AutoModel.from_config(config)
    decoder.set_input_embeddings(None)
    return decoder


def block_attention_mask(
    config: PreTrainedConfig,
    each: int,
    inputs: torch.Tensor,
    position_ids: torch.Tensor,
    layout: BlockLayout,
    cache: BlockTransformerCache | None,
    write: BlockWrite | None,
) -> Any:
    """What the block decoder must know beyond causality: None, a 2-D mask, or a mask made of a function.

    Args:
        config: of the block decoder.
        each: embedding tokens of a block, n_e.
        inputs: (R, N x n_e, D), the embeddings of new blocks.
        position_ids: (R or 1, N x n_e).
        layout: of the new blocks.
        cache: what holds the blocks before.
        write: which rows of the cache get the new blocks, and where.
    """
    valid = layout.block_mask
    if write is not None:
        valid = cache.attended_blocks(valid, inputs.shape[1] // each)
    valid = None if valid is None else valid.repeat_interleave(each, dim=1)
    if cache is not None and cache.group is not None:
        ends = (position_ids // each + 1) * each
        return EndsMask(ends.expand(inputs.shape[0], -1), write.length, valid)
    ragged = write is not None and not write.uniform
    if not ragged and each == 1:
        return valid
    if ragged and inputs.shape[1] == 1:
        # One new key a row: it may read its own and those before it.
        return torch.arange(write.length, device=inputs.device) <= position_ids
    offset = 0 if write is None else write.length - write.count
    own = torch.arange(inputs.shape[1], device=inputs.device)[None] if write is None else position_ids
    last_key = ((own // each + 1) * each - 1).expand(inputs.shape[0], -1)

    def reachable(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key <= last_key[batch, query - offset]

    return create_causal_mask(
        config=config,
        inputs_embeds=inputs,
        attention_mask=valid,
        past_key_values=cache,
        position_ids=position_ids,
        or_mask_function=reachable,
        and_mask_function=reachable,
    )


def block_decoding_loss(
    contexts: torch.Tensor, embeds: torch.Tensor, pair_mask: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """How far the context of a block is from the embedding of the next, which gets no gradient.

    "mse": mean of (h_i - e_i+1)^2. "contrastive": cross-entropy of cos(h_i, e_j) / 0.07 with j = i + 1 right,
    over all next blocks of the batch.

    Args:
        contexts: (B, N, n_e, D), h.
        embeds: (B, N, n_e, D), e.
        pair_mask: (B, N - 1), 1 for the pairs that count; None: all.
        kind: `"mse"` or `"contrastive"`.
    """
    predicted, wanted = contexts[:, :-1].float(), embeds[:, 1:].detach().float()
    if pair_mask is not None:
        pair_mask = pair_mask[:, : predicted.shape[1]].bool()
        predicted, wanted = predicted[pair_mask], wanted[pair_mask]
    predicted, wanted = predicted.flatten(0, -2), wanted.flatten(0, -2)
    if predicted.shape[0] == 0:
        return predicted.sum()
    if kind == "mse":
        return F.mse_loss(predicted, wanted)
    similarities = F.normalize(predicted, dim=-1) @ F.normalize(wanted, dim=-1).T / CONTRASTIVE_TEMPERATURE
    return F.cross_entropy(similarities, torch.arange(similarities.shape[0], device=similarities.device))


def loss_terms(
    config: BlockTransformerConfig,
    outputs: BlockTransformerModelOutput,
    shifted: torch.Tensor,
    num_items: torch.Tensor | int | None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """What the loss of a batch is made of.

        loss = share (mean cross-entropy of the scored tokens + weight x auxiliary loss)

    Whoever counts the labels of a step (Trainer) counts those of first blocks, which nothing predicts, so
    that their number is only good for telling which share of the step this batch is. Where the labels of
    first blocks are ignored anyway, the shares are those of the scored tokens, and the losses of a step add
    up to the mean over all of these; else only batches in which the same part is scored do.

    Args:
        config: of the model.
        outputs: of the model, for the whole batch.
        shifted: (B, T), the label of the token that follows each.
        num_items: labels of the step that this batch is a part of; None: the batch is all of it.
        ignore_index: the label of tokens that are not to be scored.

    Returns:
        the labels (B, T) that are scored, what their summed cross-entropy is divided by, and what is added to
        that.
    """
    mask = outputs.label_mask
    assert mask is not None
    scored = shifted.masked_fill(mask[:, 1:] == 0, ignore_index).contiguous()
    # A batch of documents shorter than a block scores nothing: a loss of 0, not 0 / 0.
    count, share = (scored != ignore_index).sum().clamp(min=1), torch.ones((), device=scored.device)
    if num_items is not None:
        share = (shifted != ignore_index).sum() / torch.as_tensor(num_items, device=scored.device)
    kind, contexts = config.block_decoding_loss, outputs.context_embeds
    if kind is None or contexts is None:
        return scored, count / share, 0.0
    added = block_decoding_loss(contexts, outputs.block_embeds, outputs.block_pair_mask, kind)
    return scored, count / share, share * config.block_decoding_loss_weight * added
