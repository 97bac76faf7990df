"""What a long prompt costs before it runs: bytes on each GPU, whether they fit, and the times to expect.

Nothing is loaded: weights are counted on the meta device, from the config alone. A rank of P (sequence) x T
(tensor parallel) GPUs holds

    weights       those that transformers' tensor parallel plan cuts: 1 / T; all others whole
    keys, values  2 * G / T heads * head width of every token of its share, ceil(context / P) and what
                  `share_capacity` adds; windows keep two windows, the same on every rank; lightning layers
                  hold no token: a state of K * V fp32 for each of H / T heads, the same on every rank
    activations   of one chunk in the widest place of a layer: inputs, gate and up, activation and product of
                  a gated MLP are alive together, at most (4 F / T + 3 D) elements a token; or, on P > 1
                  ranks, six times the queries of the whole chunk, gathered, attended, merged and sent
    logits        of the last token of every row: the model's, and two copies in fp32
    partials      of a decoding step: one (V + 1) fp32 a query head and split of the keys
    graph         the pool of the captured step: activations and logits of one token a row
    tokens        ids and mask, twice in int64, and the mask of the graph

and 1 GiB is left for the CUDA context, cuBLAS and the rounding of the allocator. Times:

    a token       (weights read + keys and values of the rank) / bandwidth + launches a layer
                  + a reduction a layer whose tokens are shared (`parallel/cost.py`)
                  + 2 all-reduces a layer where T > 1
    first token   matrix products / (P T) at their rate + attention / (P T) at its own + what travels;
                  of a lightning layer 4 K V products a token and head, and one state a rank and chunk

The rates, shares of the dense peak, are those at which the measured prefills of an 8B shape agree with it.
"""

import copy
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from hf_longattn.cache.head_sizes import head_sizes, layer_sizes
from hf_longattn.cache.preallocated import rounded_capacity, sliding_capacity
from hf_longattn.cache.quantized import scale_bytes
from hf_longattn.cache.recurrent import IMPLEMENTATION, lightning_layers
from hf_longattn.cache.shares import share_capacity
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS, MOST_CHUNKS
from hf_longattn.parallel.cost import Links, message_bytes, reduction_seconds

# What remains for the context of CUDA, cuBLAS and the allocator's rounding.
RESERVE = 1 << 30
# Launches and gaps of a captured step, seconds a layer; an H100 took 1.0 ms over the floor at 32 layers.
_OVERHEAD_A_LAYER = 31e-6
# Shares of the dense peak that the products and the attention of a prefill reach, and the start in seconds.
_PRODUCT_SHARE, _ATTENTION_SHARE, _START = 0.60, 0.593, 0.06
# Programs of the split-KV kernel that run at once on a large GPU.
_SPLIT_SLOTS = 528
# Tokens that a captured step's mask has room for beyond the context.
_MASK_ROOM = 4096
_LONGEST = 1 << 34


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
class Ranks:
    """How many GPUs share one prompt.

    Args:
        sequence: P, ranks among which the tokens are divided.
        tensor: T, ranks among which weights and heads are divided.
    """

    sequence: int = 1
    tensor: int = 1

    @property
    def total(self) -> int:
        """GPUs."""
        return self.sequence * self.tensor


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, on one rank.

    Args:
        total: bytes held.
        read: bytes that a decoding step of one row reads: no untied input embedding, chosen experts only.
        products: elements that a token is multiplied with.
    """

    total: int
    read: int
    products: int


@dataclass(frozen=True)
class Workspace:
    """Bytes beside weights, keys and values; the terms are those of the module's description."""

    activations: int
    logits: int
    partials: int
    graph: int
    tokens: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.activations + self.logits + self.partials + self.graph + self.tokens


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU, and seconds, of one generation.

    Args:
        context: prompt and new tokens together.
        new_tokens: how many of them are the answer.
        ranks: the GPUs.
        weights: bytes.
        cache: bytes of keys and values.
        workspace: bytes of everything else.
        memory: bytes of the device.
        longest: tokens of prompt and answer that fit.
        floor_a_token: seconds, weights and cache read once.
        expected_a_token: seconds, with the launches of a captured step, and what the ranks exchange.
        expected_first_token: seconds until the first token.
    """

    context: int
    new_tokens: int
    ranks: Ranks
    weights: int
    cache: int
    workspace: Workspace
    memory: int
    longest: int
    floor_a_token: float
    expected_a_token: float
    expected_first_token: float

    @property
    def peak(self) -> int:
        """Bytes at the highest point."""
        return self.weights + self.cache + self.workspace.total

    @property
    def fits(self) -> bool:
        """Whether it fits the device, with a reserve of 1 GiB."""
        return self.peak + RESERVE <= self.memory


def on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model of a config without memory for its weights.

    Args:
        config: of a causal language model.
        dtype: of the weights.
    """
    with torch.device("meta"):
        # Of a copy: the attention that is chosen for it is noted in the config.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def count_weights(config: PreTrainedConfig, dtype: torch.dtype, tensor_parallel: int = 1) -> Weights:
    """What a rank holds and reads of a model's parameters.

    Args:
        config: of the model.
        dtype: of the weights.
        tensor_parallel: T; what transformers' plan cuts is divided by it.

    Raises:
        ValueError: the model has no tensor parallel plan.
    """
    model = on_meta(config, dtype)
    plan = {name: style for name, style in (model.tp_plan or {}).items() if "wise" in style}
    if tensor_parallel > 1 and not any(".layers." in name for name in plan):
        raise ValueError(
            f"`--tp {tensor_parallel}`: transformers has no tensor parallel plan for the layers of "
            f"{type(model).__name__}; leave it out, so that all GPUs share the sequence."
        )
    cut = re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") for name in plan) or "$^")
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    active = _active_share(config.get_text_config(decoder=True))
    total = read = 0.0
    for name, parameter in model.named_parameters():
        size = parameter.numel() / (tensor_parallel if cut.match(name) else 1)
        total += size
        if tied or parameter is not embedding.weight:
            read += size * (active if ".experts." in name else 1.0)
    return Weights(round(total) * dtype.itemsize, round(read) * dtype.itemsize, round(read))


def _active_share(config: PreTrainedConfig) -> float:
    """Share of the experts that one token goes through."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(chosen / experts, 1.0) if experts and chosen else 1.0


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, ranks: Ranks | None = None) -> int:
    """Bytes of one sequence's keys and values on a rank; windows keep their window.

    Args:
        config: the text config.
        tokens: length of the whole sequence.
        dtype: of keys and values; one of 8 bits counts their scales too.
        ranks: among which it is divided; one rank if left out.

    Raises:
        ValueError: a layer keeps no keys and values of single tokens.
    """
    ranks = ranks or Ranks()
    if config.model_type == "block_transformer":
        raise ValueError(
            "`config`: a Block Transformer keeps keys and values of blocks, and is not planned for."
        )
    kinds, keywords = get_layer_types_and_kwargs(config)
    states = _state_bytes(config)
    share = rounded_capacity(tokens) if ranks.sequence == 1 else share_capacity(tokens, ranks.sequence)
    total = 0
    # Layers that read keys and values of others come last, and have no kind.
    for index, (kind, size) in enumerate(zip(kinds, layer_sizes(config), strict=False)):
        _, groups, key_width, value_width = size
        a_token = groups // ranks.tensor * ((key_width + value_width) * dtype.itemsize + scale_bytes(dtype))
        if index in states:
            total += states[index] // ranks.tensor
        elif kind == "full_attention":
            total += share * a_token
        elif kind in ("sliding_attention", "chunked_attention"):
            total += sliding_capacity(keywords["sliding_window"], tokens) * a_token
        else:
            raise ValueError(
                f"`config`: layers of kind {kind!r} keep no keys and values, and are not planned for."
            )
    return total


def _state_bytes(config: PreTrainedConfig) -> dict[int, int]:
    """Bytes of each lightning layer's state, fp32; a relative position encoding doubles the keys' width."""
    heads, _, key_width, value_width = head_sizes(config)
    double = getattr(config, "lrpe_layers", None) or ()
    return {i: heads * key_width * value_width * 4 << (i in double) for i in lightning_layers(config)}


def _as_loaded(config: PreTrainedConfig) -> PreTrainedConfig:
    """A saved config with the attention whose layers it lists: its name, unlike the list, is not saved."""
    if config._attn_implementation is None and getattr(config, "lightning_layers", None) is not None:
        config = copy.copy(config)
        config._attn_implementation = IMPLEMENTATION
    return config


def activation_bytes(
    config: PreTrainedConfig, tokens: int, dtype: torch.dtype, ranks: Ranks | None = None
) -> int:
    """Bytes alive in the widest place of a layer, for one chunk.

    Args:
        config: the text config.
        tokens: of the chunk, all rows and all ranks together.
        dtype: of the activations.
        ranks: among which the chunk is divided.
    """
    ranks = ranks or Ranks()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 1
    own = -(-tokens // ranks.sequence)
    layer = own * (4 * inner * experts // ranks.tensor + 3 * hidden)
    heads, _, key_width, _ = head_sizes(config)
    queries = 0 if ranks.sequence == 1 else 6 * tokens * heads * key_width // ranks.tensor
    return max(layer, queries + 3 * own * hidden) * dtype.itemsize


def workspace_bytes(
    config: PreTrainedConfig, context: int, batch_size: int, chunk: int, dtype: torch.dtype, ranks: Ranks
) -> Workspace:
    """Everything beside weights, keys and values; see the module's description.

    Args:
        config: the text config.
        context: prompt and new tokens together.
        batch_size: sequences.
        chunk: tokens of a chunk, all rows and all ranks together.
        dtype: of the activations.
        ranks: the GPUs.
    """
    heads, groups, _, value_width = head_sizes(config)
    logits = batch_size * config.vocab_size * (dtype.itemsize + 8)
    programs = max(_SPLIT_SLOTS, batch_size * groups) * -(-heads // groups)
    step = activation_bytes(config, batch_size, dtype, Ranks(tensor=ranks.tensor))
    return Workspace(
        activations=activation_bytes(config, min(chunk, context * batch_size), dtype, ranks),
        logits=logits,
        partials=programs * (value_width + 1) * 4,
        graph=step + batch_size * config.vocab_size * dtype.itemsize,
        tokens=batch_size * (context * 33 + _MASK_ROOM),
    )


def plan_generation(
    config: PreTrainedConfig,
    context: int,
    *,
    new_tokens: int = 0,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    ranks: Ranks | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """The plan of one generation with `prepare_generation`.

    Args:
        config: of the model.
        context: prompt and new tokens together.
        new_tokens: how many of them are the answer; they are not part of the time to the first token.
        batch_size: sequences.
        dtype: of weights and cache.
        cache_dtype: of the cache, where it is in 8 bits.
        chunk: tokens of a chunk, all rows and ranks together; None as `prepare_generation` picks it on a GPU.
        ranks: the GPUs; one if left out.
        hardware: the device; an H100 if left out.

    Raises:
        ValueError: the architecture keeps something other than keys and values, or cannot be divided so.
    """
    hardware, ranks = hardware or Hardware(), ranks or Ranks()
    text = _as_loaded(config.get_text_config(decoder=True))
    _check_ranks(text, ranks)
    weights = count_weights(config, dtype, ranks.tensor)
    chunk = chunk or GPU_CHUNK_TOKENS * min(ranks.sequence, MOST_CHUNKS)

    def cache(tokens: int) -> int:
        return batch_size * cache_bytes(text, tokens, cache_dtype or dtype, ranks)

    def peak(tokens: int) -> int:
        workspace = workspace_bytes(text, tokens, batch_size, chunk, dtype, ranks)
        return weights.total + cache(tokens) + workspace.total

    floor = (weights.read + cache(context)) / hardware.bandwidth
    clock = _Clock(text, weights, ranks, hardware, dtype)
    return Plan(
        context=context,
        new_tokens=new_tokens,
        ranks=ranks,
        weights=weights.total,
        cache=cache(context),
        workspace=workspace_bytes(text, context, batch_size, chunk, dtype, ranks),
        memory=hardware.memory,
        longest=longest(peak, hardware.memory - RESERVE),
        floor_a_token=floor,
        expected_a_token=floor + clock.overhead(batch_size),
        expected_first_token=batch_size * clock.prefill(max(context - new_tokens, 1)),
    )


def _check_ranks(config: PreTrainedConfig, ranks: Ranks) -> None:
    groups = sorted({size[1] for size in layer_sizes(config)})
    if ranks.tensor < 1 or any(number % ranks.tensor for number in groups):
        raise ValueError(
            f"`--tp` must divide the {' and '.join(map(str, groups))} key heads of the model, got "
            f"{ranks.tensor}; share the sequence among more GPUs instead."
        )


def longest(need: Callable[[int], int], room: int) -> int:
    """The largest number of tokens that needs no more than `room` bytes, by bisection; 0 if none does.

    Args:
        need: bytes of so many tokens, never falling.
        room: bytes.
    """
    low, high = 0, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= room else (low, middle - 1)
    return low


@dataclass(frozen=True)
class _Clock:
    """Expected times of one model on some ranks."""

    config: PreTrainedConfig
    weights: Weights
    ranks: Ranks
    hardware: Hardware
    dtype: torch.dtype

    def overhead(self, batch_size: int) -> float:
        """Seconds of a step beyond its reads: launches, and what the ranks exchange."""
        heads, _, _, width = head_sizes(self.config)
        layers, links = self.config.num_hidden_layers, self.hardware.links
        message = message_bytes(batch_size, heads // self.ranks.tensor, width, self.dtype.itemsize)
        # Windows and states are the same on every rank.
        full = self._kinds().count("full_attention")
        reductions = full * reduction_seconds(message, self.ranks.sequence, links)
        hidden = batch_size * self.config.hidden_size * self.dtype.itemsize
        # An all-reduce is twice the way of a gather.
        a_layer = _OVERHEAD_A_LAYER + 2 * reduction_seconds(
            2 * hidden // self.ranks.tensor, self.ranks.tensor, links
        )
        return layers * a_layer + reductions

    def _kinds(self) -> list[str]:
        """The kind of each layer; "lightning" is not among those of transformers."""
        recurrent, kinds = lightning_layers(self.config), get_layer_types_and_kwargs(self.config)[0]
        return ["lightning" if index in recurrent else kind for index, kind in enumerate(kinds)]

    def prefill(self, tokens: int) -> float:
        """Seconds of the prompt of one row."""
        peak = self.hardware.operations * self.ranks.total
        # `products` is the share of a rank.
        products = 2.0 * self.weights.products * self.ranks.tensor * tokens / (_PRODUCT_SHARE * peak)
        attention = self._attention(tokens) / (_ATTENTION_SHARE * peak)
        return _START + products + attention + self._travel(tokens)

    def _attention(self, tokens: int) -> float:
        """Floating-point operations of the visible pairs, and of the states of lightning layers."""
        window = get_layer_types_and_kwargs(self.config)[1].get("sliding_window") or tokens
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
        states = _state_bytes(self.config)
        chunks = -(-tokens // (GPU_CHUNK_TOKENS * min(sequence, MOST_CHUNKS)))
        gathered = chunks * (sequence - 1) * sum(states.values()) / tensor
        queries = tokens * heads // tensor * (key_width + value_width) * item * (sequence - 1) / sequence
        rate = links.rate if sequence <= links.node_size else links.node_rate
        summed = 4 * tokens / sequence * self.config.hidden_size * item * (tensor - 1) / tensor
        layers = self.config.num_hidden_layers
        return ((layers - len(states)) * queries + gathered) / rate + layers * summed / links.rate


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
