"""What a long prompt costs before it runs: bytes, whether they fit, and the time at least.

Weights are counted on the meta device; keys and values by layer kind; the workspace is that of one chunk in
the widest place of a layer, where the inputs, the gate and the product of a gated MLP are alive together:
(4 F + 3 D) elements a token. Measured peaks of an 8B shape at 8K and 32K lie within 1 % of the sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from hf_longattn.cache.preallocated import sliding_capacity
from hf_longattn.generation.prefill import GPU_CHUNK_TOKENS

# What remains for the context of CUDA, cuBLAS and the allocator's rounding.
_RESERVE = 1 << 30
# Launches and gaps of a captured step, seconds a layer; an H100 took 3.1 ms over the floor at 32 layers.
_OVERHEAD_A_LAYER = 97e-6
# Share of the dense peak that the matrix products and attention of a prefill reach together.
_PREFILL_SHARE = 0.55


@dataclass(frozen=True)
class Hardware:
    """The numbers of one device that a plan needs; the defaults are an H100 SXM.

    Args:
        memory: bytes.
        bandwidth: bytes a second that a large copy moves.
        operations: dense bf16 floating-point operations a second, by the datasheet.
    """

    memory: int = 80 * 1024**3 - 1024**3
    bandwidth: float = 3.0e12
    operations: float = 989e12


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of one generation.

    Args:
        context: prompt and new tokens together.
        weights: bytes.
        cache: bytes of keys and values.
        workspace: bytes of one chunk of the prompt.
        memory: bytes of the device.
        longest: tokens of prompt and answer that fit.
        floor_a_token: seconds, weights and cache read once.
        expected_a_token: seconds, with the launches of a captured step.
        expected_first_token: seconds until the first token.
    """

    context: int
    weights: int
    cache: int
    workspace: int
    memory: int
    longest: int
    floor_a_token: float
    expected_a_token: float
    expected_first_token: float

    @property
    def peak(self) -> int:
        """Bytes at the highest point."""
        return self.weights + self.cache + self.workspace

    @property
    def fits(self) -> bool:
        """Whether it fits the device, with a reserve of 1 GiB."""
        return self.peak + _RESERVE <= self.memory


def count_weights(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of all weights, bytes that a decoding step reads: all but an untied input embedding)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding: Any = model.get_input_embeddings()
    tied = model.get_output_embeddings() is None or model.get_output_embeddings().weight is embedding.weight
    return total, total if tied else total - embedding.weight.numel() * embedding.weight.element_size()


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one sequence's keys and values; windows keep their window.

    Args:
        config: the text config.
        tokens: length of the sequence.
        dtype: of keys and values.

    Raises:
        ValueError: a layer is of a kind that keeps no keys and values.
    """
    kinds, keywords = get_layer_types_and_kwargs(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * heads * width * dtype.itemsize
    total = 0
    for kind in kinds:
        if kind == "full_attention":
            total += tokens * a_token
        elif kind in ("sliding_attention", "chunked_attention"):
            total += sliding_capacity(keywords["sliding_window"], tokens) * a_token
        else:
            raise ValueError(
                f"`config`: layers of kind {kind!r} keep no keys and values, and are not planned for."
            )
    return total


def workspace_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes alive in the widest place of a layer, for `tokens` tokens of a chunk."""
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return tokens * (4 * inner * experts + 3 * hidden) * dtype.itemsize


def plan_generation(
    config: PreTrainedConfig,
    context: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int = GPU_CHUNK_TOKENS,
    hardware: Hardware | None = None,
) -> Plan:
    """The plan of one generation on one GPU with `prepare_generation`.

    Args:
        config: of the model.
        context: prompt and new tokens together.
        batch_size: sequences.
        dtype: of weights and cache.
        chunk: tokens of a chunk, all rows together.
        hardware: the device; an H100 if left out.

    Raises:
        ValueError: the architecture keeps something other than keys and values.
    """
    hardware = hardware or Hardware()
    text = config.get_text_config(decoder=True)
    weights, read = count_weights(config, dtype)
    workspace = workspace_bytes(text, min(chunk, context * batch_size), dtype)

    def cache(tokens: int) -> int:
        return batch_size * cache_bytes(text, tokens, dtype)

    room = hardware.memory - weights - workspace - _RESERVE
    floor = (read + cache(context)) / hardware.bandwidth
    attention = 2 * text.num_hidden_layers * text.hidden_size * context**2
    operations = batch_size * (2 * read / dtype.itemsize * context + attention)
    return Plan(
        context=context,
        weights=weights,
        cache=cache(context),
        workspace=workspace,
        memory=hardware.memory,
        longest=_longest(cache, room),
        floor_a_token=floor,
        expected_a_token=floor + _OVERHEAD_A_LAYER * text.num_hidden_layers,
        expected_first_token=operations / (_PREFILL_SHARE * hardware.operations),
    )


def _longest(cache: Any, room: int) -> int:
    """The largest number of tokens whose cache takes no more than `room` bytes, by bisection."""
    low, high = 0, 1 << 34
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cache(middle) <= room else (low, middle - 1)
    return low


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
