"""What one prompt of a Block Transformer costs before it runs; the plan of other models is in `planning`.

Of B rows, with L tokens a block, n_e embedding tokens a block, P context vectors a block, on R ranks:

    weights       whole on every rank
    keys, values  of the block decoder alone: those of n_e tokens for each of ceil((N - 1) / L) + 2 blocks, as
                  many as `generate` makes room for; on R > 1 ranks of a share of them, whose buffers grow by
                  an eighth at a time
    open block    keys and values of the token decoder for one block, L + P - 1 tokens of each row, its
                  context and its prefix
    activations   of the block decoder for 8192 embedding tokens of all rows together, or one chunk of each
                  row where one prompt has more or ranks share it, or of an encoder that embeds them. Rows
                  with pads are read by chunks of each row
    rehearsal     of the token decoder behind the prompt for one block of each row, or a copy of the open
                  blocks while the steps are captured: what either takes beyond the activations

and the other terms of `planning`. The longest prompt, and how far its chunks are shortened, is the answer of
`BlockDemand`, which is what `generate` asks.

A token goes through the token decoder and the head; P vectors stand in the place of one at the begin of a
block, where the block decoder goes once over its weights and all blocks:

    a token       (token weights: L - 1 times for B rows, once for P B rows
                  + block weights and the blocks of the rank, for B rows) / L + launches + reductions
    first token   the block decoder over the blocks of the prompt, and one token

each product at the larger of its bytes / bandwidth and its operations / rate. What a prompt takes to begin is
left out: it is less where a prompt of its length was read before. So the time to the first token is a bound
from below; and so is that of a token where ranks share the blocks, for they run one forward a token, whose
launches no graph holds.
"""

import functools
import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from hf_longattn.cache.head_sizes import head_sizes
from hf_longattn.cache.shares import share_capacity
from hf_longattn.generation.clock import PRODUCT_SHARE, Clock, Hardware, launches_a_layer
from hf_longattn.generation.demand import Demand
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS, pick_chunk
from hf_longattn.generation.sizes import (
    Ranks,
    Weights,
    Workspace,
    activation_bytes,
    has_few_row_layers,
    library_bytes,
    logits_bytes,
    on_meta,
    partial_bytes,
    token_bytes,
)

_GPU = torch.device("cuda")
# Blocks by which a shared cache grows at a time.
_GROWTH = 64


@dataclass(frozen=True)
class BlockWeights:
    """The parameters of a Block Transformer.

    Args:
        total: bytes.
        blocks: those that one block goes through, but for the embedder's tables and encoder.
        encoder: those that every token goes through to be embedded.
        tokens: those that one token goes through, the head among them.
    """

    total: int
    blocks: int
    encoder: int
    tokens: int


def shape_of_blocks(
    config: PreTrainedConfig,
    batch_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    ranks: Ranks,
) -> "BlockShape":
    """What a plan needs to know of a Block Transformer.

    Args:
        config: a `BlockTransformerConfig`.
        batch_size: sequences.
        dtype: of weights and cache.
        cache_dtype: of keys and values in 8 bits, which it does not have.
        ranks: the GPUs.

    Raises:
        ValueError: a cache in 8 bits, or weights that are to be divided.
    """
    if cache_dtype is not None:
        raise ValueError(
            "`cache_dtype` must be None for a Block Transformer, whose blocks are kept in the dtype of the "
            f"model, got {cache_dtype}; leave `--cache-dtype` out."
        )
    if ranks.tensor > 1:
        raise ValueError(
            f"`--tp {ranks.tensor}`: there is no tensor parallel plan for the layers of a Block Transformer; "
            "leave it out, so that all GPUs share the blocks."
        )
    return BlockShape(config, config.block_decoder_config(), batch_size, dtype, ranks)


def count_block_weights(config: PreTrainedConfig, dtype: torch.dtype) -> BlockWeights:
    """What a Block Transformer holds, and what a block and a token go through, in bytes.

    Args:
        config: a `BlockTransformerConfig`.
        dtype: of the weights.
    """
    sizes = dict.fromkeys(("blocks", "encoder", "tokens", "tables"), 0)
    for name, parameter in on_meta(config, dtype).named_parameters():
        if "embeddings." in name or "embed_tokens." in name:
            # A head that is this table, too, is read whole.
            part = "tokens" if config.tie_word_embeddings and "embed_tokens." in name else "tables"
        elif ".encoder." in name:
            part = "encoder"
        else:
            part = "tokens" if "token_decoder.decoder." in name or "lm_head." in name else "blocks"
        sizes[part] += parameter.numel() * dtype.itemsize
    tables = sizes.pop("tables")
    return BlockWeights(tables + sum(sizes.values()), **sizes)


@dataclass(frozen=True)
class BlockShape:
    """The sums of one Block Transformer, for any length.

    Args:
        config: a `BlockTransformerConfig`.
        block: that of its block decoder.
        batch_size: sequences.
        dtype: of weights and cache.
        ranks: the GPUs, which share the blocks.
        device: of the model.
    """

    config: PreTrainedConfig
    block: PreTrainedConfig
    batch_size: int
    dtype: torch.dtype
    ranks: Ranks
    device: torch.device = _GPU

    @functools.cached_property
    def weights(self) -> BlockWeights:
        """What is held and read."""
        return count_block_weights(self.config, self.dtype)

    def chunk(self, tokens: int) -> int:
        """Tokens that are read at a time, all rows and ranks together.

        Args:
            tokens: of a prompt.
        """
        blocks = -(-tokens // self.config.block_length)
        at_once = GPU_CHUNK_TOKENS if self._reads_whole and blocks <= GPU_CHUNK_TOKENS else self._a_chunk
        return min(at_once, self.batch_size * blocks) * self.config.block_length

    @property
    def most(self) -> int:
        """Tokens that are read at a time of the prompt of which that is the most."""
        at_once = max(GPU_CHUNK_TOKENS, self._a_chunk) if self._reads_whole else self._a_chunk
        return at_once * self.config.block_length

    @property
    def _reads_whole(self) -> bool:
        """Whether prompts are read some rows at a time, each of them whole."""
        one = self.ranks.sequence == 1 and self.config.n_embedding_tokens == 1
        return one and self.device.type == _GPU.type

    @property
    def _a_chunk(self) -> int:
        """Blocks of a chunk, all rows and ranks together."""
        return pick_chunk(self.batch_size, self.device) * self.batch_size

    def cache(self, tokens: int) -> int:
        """Bytes of the keys and values of blocks on a rank.

        Args:
            tokens: of prompt and answer.
        """
        slots = (-(-max(tokens - 1, 0) // self.config.block_length) + 2) * self.config.n_embedding_tokens
        if self.ranks.sequence > 1:
            share = share_capacity(slots, self.ranks.sequence)
            slots = -(-(share + share // 8) // _GROWTH) * _GROWTH
        return slots * self._a_slot

    def _read(self, tokens: int) -> int:
        """Bytes of keys and values that a block reads, of those on a rank."""
        slots = -(-tokens // self.config.block_length) * self.config.n_embedding_tokens
        return -(-slots // self.ranks.sequence) * self._a_slot

    @property
    def _a_slot(self) -> int:
        """Bytes of the keys and values of one embedding token, of all rows and layers."""
        _, groups, key_width, value_width = head_sizes(self.block)
        a_layer = groups * (key_width + value_width) * self.dtype.itemsize
        return self.batch_size * self.block.num_hidden_layers * a_layer

    def open_block(self) -> int:
        """Bytes of the open block of every row: keys and values of the token decoder, context and prefix."""
        config = self.config
        crossed = config.decoding_strategy == "cross_attention"
        groups = config.token_num_attention_heads if crossed else config.token_num_key_value_heads
        prefixes = config.num_prefix_tokens
        slots = config.block_length + {"prefix": prefixes - 1, "cross_attention": prefixes}.get(
            config.decoding_strategy, 0
        )
        kept = 2 * config.token_num_hidden_layers * slots * groups * config.token_head_dim
        vectors = config.n_embedding_tokens * config.hidden_size + prefixes * config.token_hidden_size
        return self.batch_size * (kept + vectors) * self.dtype.itemsize

    def reading(self, tokens: int) -> int:
        """Bytes alive in the widest place while one chunk of the prompt is read.

        Args:
            tokens: of the chunk, all rows and ranks together.
        """
        positions = tokens // self.config.block_length * self.config.n_embedding_tokens
        decoding = activation_bytes(self.block, positions, self.dtype, self.ranks)
        return max(decoding, self._embedding(positions))

    def workspace(self, tokens: int, chunk: int) -> Workspace:
        """Everything beside weights, and keys and values of blocks.

        Args:
            tokens: of prompt and answer.
            chunk: tokens of a chunk, all rows and ranks together.
        """
        config, rows = self.config, self.batch_size
        # What stands before the last token of a block, and the block's first step.
        longest, first = config.num_prefix_tokens + config.block_length - 1, config.num_prefix_tokens
        open_block = self.open_block()
        activations = self.reading(min(chunk, self.chunk(tokens)))
        return Workspace(
            activations=activations,
            logits=logits_bytes(config, rows, self.dtype),
            partials=partial_bytes(self.block, rows),
            graph=self._token_step(rows * first) + rows * config.vocab_size * self.dtype.itemsize,
            tokens=token_bytes(tokens, rows),
            # A prompt of a length that was read before is captured, too.
            libraries=library_bytes(rows, 1 + has_few_row_layers(self.block, rows, self.dtype)),
            rehearsal=max(self._token_step(rows * longest), open_block, activations) - activations,
            open_block=open_block,
        )

    def _token_step(self, positions: int) -> int:
        """Bytes of the token decoder's widest place."""
        width, inner = self.config.token_hidden_size, self.config.token_intermediate_size
        return positions * (4 * inner + 3 * width) * self.dtype.itemsize

    def _embedding(self, positions: int) -> int:
        """Bytes of an encoder's widest place, for the tokens of so many embedding tokens."""
        config = self.config
        if config.embedder_type == "lookup":
            return 0
        tokens = config.block_length + (config.n_cls_tokens if config.embedder_type == "roberta_cls" else 0)
        a_token = 4 * config.embedder_intermediate_size + 3 * config.embedder_hidden_size
        return positions // config.n_embedding_tokens * tokens * a_token * self.dtype.itemsize

    def _seconds(self, weights: int, rows: int, hardware: Hardware, kept: int = 0) -> float:
        """Of one product of so many bytes of weights with so many rows, beside what else is read."""
        operations = 2 * weights // self.dtype.itemsize * rows / (PRODUCT_SHARE * hardware.operations)
        return max(weights / hardware.bandwidth, operations) + kept / hardware.bandwidth

    def floor_a_token(self, tokens: int, hardware: Hardware) -> float:
        """Seconds of a token in which weights and blocks are read once, averaged over a block.

        Args:
            tokens: that stand before it.
            hardware: the device.
        """
        a_block = self.weights.blocks + self.weights.encoder + self._read(tokens)
        return (self.weights.tokens + a_block / self.config.block_length) / hardware.bandwidth

    def expected_a_token(self, tokens: int, hardware: Hardware) -> float:
        """Seconds of a token, averaged over a block, with the launches and what the ranks exchange.

        Args:
            tokens: that stand before it.
            hardware: the device.
        """
        config, rows, length = self.config, self.batch_size, self.config.block_length
        per_token = (length - 1) * self._seconds(self.weights.tokens, rows, hardware)
        per_token += self._seconds(self.weights.tokens, rows * config.num_prefix_tokens, hardware)
        per_block = self._seconds(
            self.weights.blocks, rows * config.n_embedding_tokens, hardware, self._read(tokens)
        )
        per_block += self._seconds(self.weights.encoder, rows * length, hardware)
        launches = config.token_num_hidden_layers * self._launches()
        waits = self._clock(hardware).overhead(rows * config.n_embedding_tokens)
        return launches + (per_token + per_block + waits) / length

    def _launches(self) -> float:
        """Seconds that the launches of a layer of the token decoder add to a token, averaged over a block."""
        decoder, length = self.config.token_decoder_config(), self.config.block_length
        first, others = (
            launches_a_layer(decoder, self.batch_size * vectors, self.dtype)
            for vectors in (self.config.num_prefix_tokens, 1)
        )
        return (first + (length - 1) * others) / length

    def expected_first_token(self, tokens: int, hardware: Hardware) -> float:
        """Seconds until the first token, at least.

        Args:
            tokens: of the prompt.
            hardware: the device.
        """
        config, rows = self.config, self.batch_size
        blocks = math.ceil(tokens / config.block_length) * config.n_embedding_tokens
        encoded = self._seconds(self.weights.encoder, rows * tokens, hardware)
        step = self._seconds(self.weights.tokens, rows * config.num_prefix_tokens, hardware)
        read = self.weights.blocks / hardware.bandwidth
        return max(rows * self._clock(hardware).prefill(blocks), read) + encoded + step

    def _clock(self, hardware: Hardware) -> Clock:
        """Of the block decoder, for which an embedding token is a token."""
        size = self.weights.blocks
        weights = Weights(size, size, size // self.dtype.itemsize)
        return Clock(self.block, weights, self.ranks, hardware, self.dtype)


@dataclass(frozen=True, kw_only=True)
class BlockDemand(Demand):
    """What one call of `generate` of a Block Transformer asks of the memory of a rank.

    Args:
        shape: the sums of the model, for these rows.
    """

    shape: BlockShape

    def kept(self, tokens: int) -> int:
        """Bytes on this rank of the keys and values of blocks.

        Args:
            tokens: of a row.
        """
        # The last token is never cached, and the shape counts it.
        return self.shape.cache(tokens + 1) if tokens else 0

    def work(self, tokens: int) -> int:
        """Bytes on this rank of the activations of one chunk.

        Args:
            tokens: that are to be read, all rows and ranks together.
        """
        return self.shape.reading(min(tokens, self.chunk, self.shape.chunk(-(-tokens // self.rows))))

    @property
    def smallest_chunk(self) -> int:
        """Tokens below which no chunk is shortened, all rows and ranks together."""
        return super().smallest_chunk * self.shape.config.block_length

    @property
    def has_smaller_cache(self) -> bool:
        """Blocks are kept in the dtype of the model."""
        return False

    def fewest_offloaded(self, room: int) -> int | None:
        """None: no layer waits in host memory.

        Args:
            room: bytes.
        """
        return None
