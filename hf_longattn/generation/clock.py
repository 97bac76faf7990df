"""How long a prompt and a token take, expected from a config and the numbers of a device.

    a token       (weights read + keys and values of the rank, in every layer that reads them
                  + states, read and written) / bandwidth
                  + launches a layer, fewer where it is a `FewRowLayer`
                  + a reduction a layer whose tokens are shared (`parallel/cost.py`)
                  + 2 all-reduces a layer where T > 1
    first token   matrix products / (P T) at their rate + attention / (P T) at its own + what travels;
                  of a lightning layer 4 K V products a token and head, and one state a rank and chunk;
                  of keys and values in 8 bits, the bytes that `attend_pieces` moves / bandwidth

The rates, shares of the dense peak, are those at which the measured prefills of an 8B shape agree with it.
"""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from hf_longattn.attention.quantized import PIECE_TOKENS
from hf_longattn.cache.head_sizes import head_sizes, layer_sizes
from hf_longattn.cache.quantized import CACHE_DTYPES
from hf_longattn.cache.recurrent import lightning_layers
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS, MOST_CHUNKS
from hf_longattn.generation.sizes import Ranks, Weights, has_few_row_layers, layer_kinds, state_bytes
from hf_longattn.parallel.cost import Links, message_bytes, reduction_seconds

# Launches and gaps of a captured step, seconds a layer; an H100 took 1.0 ms over the floor at 32 layers.
OVERHEAD_A_LAYER = 31e-6
# The same of a layer in two launches beside attention: an H100 took 0.14 ms over the floor for 12 such layers
# in every token of a Block Transformer, and 12 in every fourth.
FEW_ROW_OVERHEAD_A_LAYER = 9e-6
# Shares of the dense peak that the products and the attention of a prefill reach.
PRODUCT_SHARE, ATTENTION_SHARE = 0.60, 0.593


@dataclass(frozen=True)
class Hardware:
    """The numbers of one device that a plan needs; the defaults are an H100 SXM.

    Args:
        memory: bytes.
        bandwidth: bytes a second that a large copy moves.
        operations: dense bf16 floating-point operations a second, by the datasheet.
        links: what connects several devices.
    """

    memory: int = 80 * 1024**3 - 1024**3
    bandwidth: float = 3.0e12
    operations: float = 989e12
    links: Links = dataclasses.field(default_factory=Links)


@dataclass(frozen=True)
class Clock:
    """Expected times of one model on some ranks.

    Args:
        config: the text config.
        weights: what a rank holds and reads.
        ranks: the GPUs.
        hardware: the device.
        dtype: of the activations.
        cache_dtype: of keys and values, where it is another.
    """

    config: PreTrainedConfig
    weights: Weights
    ranks: Ranks
    hardware: Hardware
    dtype: torch.dtype
    cache_dtype: torch.dtype | None = None

    def overhead(self, batch_size: int) -> float:
        """Seconds of a step beyond its reads: launches, and what the ranks exchange.

        Args:
            batch_size: sequences.
        """
        heads, _, _, width = head_sizes(self.config)
        layers, links = self.config.num_hidden_layers, self.hardware.links
        message = message_bytes(batch_size, heads // self.ranks.tensor, width, self.dtype.itemsize)
        # Windows and states are the same on every rank.
        full = self._kinds().count("full_attention")
        reductions = full * reduction_seconds(message, self.ranks.sequence, links)
        hidden = batch_size * self.config.hidden_size * self.dtype.itemsize
        # An all-reduce is twice the way of a gather.
        a_layer = launches_a_layer(self.config, batch_size, self.dtype) + 2 * reduction_seconds(
            2 * hidden // self.ranks.tensor, self.ranks.tensor, links
        )
        return layers * a_layer + reductions

    def _kinds(self) -> list[str]:
        """The kind of each layer; "lightning" is not among those of transformers."""
        recurrent, kinds = lightning_layers(self.config), layer_kinds(self.config)[0]
        return ["lightning" if index in recurrent else kind for index, kind in enumerate(kinds)]

    def prefill(self, tokens: int, chunk: int = GPU_CHUNK_TOKENS, rows: int = 1) -> float:
        """Seconds of the prompt of one row.

        Args:
            tokens: of the prompt.
            chunk: tokens of a chunk, all rows and ranks together.
            rows: that are read together.
        """
        peak = self.hardware.operations * self.ranks.total
        # `products` is the share of a rank.
        products = 2.0 * self.weights.products * self.ranks.tensor * tokens / (PRODUCT_SHARE * peak)
        attention = self._attention(tokens) / (ATTENTION_SHARE * peak)
        converted = self._converted_bytes(tokens, max(chunk // rows, 1), rows) / self.hardware.bandwidth
        return products + attention + converted + self._travel(tokens)

    def _converted_bytes(self, tokens: int, chunk: int, rows: int) -> float:
        """What keys and values in 8 bits move beyond attention, of one row: see `attend_pieces`.

        Every chunk brings all keys before it and its own to 16 bits, in two passes, and joins the results of
        the pieces in fp32.
        """
        if self.cache_dtype not in CACHE_DTYPES.values():
            return 0.0
        window = layer_kinds(self.config)[1].get("sliding_window") or tokens
        item, total = self.dtype.itemsize, 0.0
        for kind, size in zip(self._kinds(), layer_sizes(self.config), strict=False):
            if kind == "lightning":
                continue
            is_full = kind == "full_attention"
            ranks, seen = (self.ranks.sequence, tokens) if is_full else (1, window)
            before = [min(start, seen) // ranks for start in range(0, tokens, chunk)]
            joined = [keys // max(PIECE_TOKENS // rows, 1) for keys in before]
            heads, groups, key_width, value_width = size
            # The bytes become 16 bits, and these are multiplied by their scales.
            states = _looks(ranks) * (sum(before) + tokens / ranks) * groups * (key_width + value_width)
            total += states * (1 + 3 * item)
            # A piece is copied to fp32, joined with those before it, and copied to their place; around them
            # the place of both is filled, the first piece copied there, and the last result back.
            numbers = chunk * heads * value_width
            total += numbers * (sum(joined) * (item + 24) + sum(map(bool, joined)) * (2 * item + 16))
        return total / self.ranks.tensor

    def _attention(self, tokens: int) -> float:
        """Floating-point operations of the visible pairs, and of the states of lightning layers."""
        window = layer_kinds(self.config)[1].get("sliding_window") or tokens
        heads, _, key_width, value_width = head_sizes(self.config)
        total = 0.0
        for kind in self._kinds():
            seen = tokens if kind == "full_attention" else min(window, tokens)
            scores = (key_width + value_width) * seen * (tokens - seen / 2)
            total += 2 * key_width * value_width * tokens if kind == "lightning" else scores
        return 2.0 * heads * total

    def _travel(self, tokens: int) -> float:
        """Seconds of sending queries and partial results round, and of tensor parallel sums."""
        heads, _, key_width, value_width = head_sizes(self.config)
        item, links = self.dtype.itemsize, self.hardware.links
        sequence, tensor = self.ranks.sequence, self.ranks.tensor
        states = state_bytes(self.config)
        chunks = -(-tokens // (GPU_CHUNK_TOKENS * min(sequence, MOST_CHUNKS)))
        gathered = chunks * (sequence - 1) * sum(states.values()) / tensor
        queries = tokens * heads // tensor * (key_width + value_width) * item * (sequence - 1) / sequence
        rate = links.rate if sequence <= links.node_size else links.node_rate
        summed = 4 * tokens / sequence * self.config.hidden_size * item * (tensor - 1) / tensor
        layers = self.config.num_hidden_layers
        return ((layers - len(states)) * queries + gathered) / rate + layers * summed / links.rate


def launches_a_layer(config: PreTrainedConfig, rows: int, dtype: torch.dtype) -> float:
    """Seconds that the launches of a layer add to a captured step.

    Args:
        config: of the decoder.
        rows: of the step.
        dtype: of the activations.
    """
    return FEW_ROW_OVERHEAD_A_LAYER if has_few_row_layers(config, rows, dtype) else OVERHEAD_A_LAYER


def _looks(ranks: int) -> int:
    """How often a rank goes through its keys for a chunk: twice for itself, and for ranks on either side."""
    return 1 if ranks == 1 else 2 * min(ranks, 3)


def this_hardware(device: torch.device) -> Hardware:
    """The numbers of a CUDA device: its memory, and the rate of a large copy measured now."""
    properties = torch.cuda.get_device_properties(device)
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    stop.record()
    stop.synchronize()
    rate = 10 * 2 * source.numel() * 4 / (start.elapsed_time(stop) * 1e-3)
    return Hardware(memory=properties.total_memory, bandwidth=rate)
