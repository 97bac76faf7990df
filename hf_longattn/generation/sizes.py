"""What one prompt holds on a rank, in bytes: weights, keys and values, states, one chunk's activations.

Everything is counted from the config alone. Both the plan of a generation and the check of every call of
`generate` add these numbers up.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from hf_longattn.cache.head_sizes import feed_forward_width, head_sizes, layer_sizes
from hf_longattn.cache.offloaded import BUFFERS
from hf_longattn.cache.preallocated import rounded_capacity, sliding_capacity
from hf_longattn.cache.quantized import scale_bytes
from hf_longattn.cache.recurrent import IMPLEMENTATION, recurrent_layers
from hf_longattn.cache.shares import share_capacity
from hf_longattn.kernels.few_row_linear.api import MAX_ROWS
from hf_longattn.kernels.normed_linears import api as normed_linears

# Tokens beyond which nobody looks for the longest that fits.
LONGEST = 1 << 34
# Programs of the split-KV kernel that run at once on a large GPU.
_SPLIT_SLOTS = 528
# Tokens that a captured step's mask has room for beyond the context.
_MASK_ROOM = 4096
# What cuBLAS keeps for a stream on a Hopper; the streams of a caller and of a capture, and those on which the
# shapes of a model's linear layers are timed.
_A_STREAM, _STREAMS, _TIMED = 32 << 20, 3, 7


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
    """Bytes beside weights, keys and values, of the terms that `planning` describes.

    Args:
        activations: of one chunk of the prompt.
        logits: of the last token of every row.
        partials: of a decoding step's attention.
        graph: the pool of a captured step.
        tokens: ids and masks.
        libraries: what the library of matrix products keeps.
        rehearsal: copies of states while a step is captured, beyond the activations that are gone by then; of
            a Block Transformer, of the open blocks, or what the token decoder takes behind the prompt.
        open_block: of a Block Transformer, keys, values and context of the open block.
    """

    activations: int
    logits: int
    partials: int
    graph: int
    tokens: int
    libraries: int
    rehearsal: int = 0
    open_block: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(vars(self).values())

    @property
    def fixed(self) -> int:
        """Those that neither the length nor the chunk changes."""
        return self.total - self.activations - self.tokens


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
    # Layers that read keys and values of others come last, and have no kind.
    return _bytes_of(config, get_layer_types_and_kwargs(config), tokens, dtype, ranks or Ranks())


def read_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, ranks: Ranks | None = None) -> int:
    """Bytes of one sequence's keys and values that a rank reads for a token, once in every layer.

    As many as `cache_bytes`, and those of the layers that hold none and read those of an earlier one.

    Args:
        config: the text config.
        tokens: length of the whole sequence.
        dtype: of keys and values; one of 8 bits counts their scales too.
        ranks: among which it is divided; one rank if left out.

    Raises:
        ValueError: a layer keeps no keys and values of single tokens.
    """
    return _bytes_of(config, layer_kinds(config), tokens, dtype, ranks or Ranks())


def layer_kinds(config: PreTrainedConfig) -> tuple[list[str], dict[str, Any]]:
    """The kind of every layer and the keywords of the kinds; transformers leaves out layers that share keys.

    Args:
        config: the text config.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        config = copy.copy(config)
        config.num_kv_shared_layers = 0
    return get_layer_types_and_kwargs(config)


def _bytes_of(
    config: PreTrainedConfig,
    layers: tuple[list[str], dict[str, Any]],
    tokens: int,
    dtype: torch.dtype,
    ranks: Ranks,
) -> int:
    """The sum over layers of these kinds, the first of the model."""
    kinds, keywords = layers
    states = state_bytes(config)
    share = rounded_capacity(tokens) if ranks.sequence == 1 else share_capacity(tokens, ranks.sequence)
    total = 0
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


def state_bytes(config: PreTrainedConfig) -> dict[int, int]:
    """Bytes of the state of each layer that has one, fp32; a relative position encoding doubles its width.

    Args:
        config: the text config.
    """
    heads, _, key_width, value_width = head_sizes(config)
    double = getattr(config, "lrpe_layers", None) or ()
    return {i: heads * key_width * value_width * 4 << (i in double) for i in recurrent_layers(config)}


def as_loaded(config: PreTrainedConfig) -> PreTrainedConfig:
    """A saved config with the attention whose layers it lists: its name, unlike the list, is not saved.

    Args:
        config: the text config.
    """
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
    own = -(-tokens // ranks.sequence)
    layer = own * (4 * feed_forward_width(config) // ranks.tensor + 3 * hidden)
    heads, _, key_width, _ = head_sizes(config)
    queries = 0 if ranks.sequence == 1 else 6 * tokens * heads * key_width // ranks.tensor
    return max(layer, queries + 3 * own * hidden) * dtype.itemsize


def workspace_bytes(
    config: PreTrainedConfig, context: int, batch_size: int, chunk: int, dtype: torch.dtype, ranks: Ranks
) -> Workspace:
    """Everything beside weights, keys and values; see the description of `planning`.

    Args:
        config: the text config.
        context: prompt and new tokens together.
        batch_size: sequences.
        chunk: tokens of a chunk, all rows and all ranks together.
        dtype: of the activations.
        ranks: the GPUs.
    """
    step = activation_bytes(config, batch_size, dtype, Ranks(tensor=ranks.tensor))
    activations = activation_bytes(config, min(chunk, context * batch_size), dtype, ranks)
    states = batch_size * sum(state_bytes(config).values()) // ranks.tensor
    return Workspace(
        activations=activations,
        logits=logits_bytes(config, batch_size, dtype),
        partials=partial_bytes(config, batch_size),
        graph=step + batch_size * config.vocab_size * dtype.itemsize,
        tokens=token_bytes(context, batch_size),
        libraries=library_bytes(batch_size, has_few_row_layers(config, batch_size, dtype)),
        rehearsal=max(states - activations, 0),
    )


def logits_bytes(config: PreTrainedConfig, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes of the last token's logits: the model's, and two copies in fp32.

    Args:
        config: of the vocabulary.
        batch_size: sequences.
        dtype: of the model.
    """
    return batch_size * config.vocab_size * (dtype.itemsize + 8)


def partial_bytes(config: PreTrainedConfig, batch_size: int) -> int:
    """Bytes of the partial results of a step's attention.

    Args:
        config: of the layers that attend.
        batch_size: sequences.
    """
    heads, groups, _, value_width = head_sizes(config)
    programs = max(_SPLIT_SLOTS, batch_size * groups) * -(-heads // groups)
    return programs * (value_width + 1) * 4


def token_bytes(context: int, batch_size: int) -> int:
    """Bytes of ids and masks.

    Args:
        context: prompt and new tokens together.
        batch_size: sequences.
    """
    return batch_size * (context * 33 + _MASK_ROOM)


def library_bytes(batch_size: int, more: int = 0) -> int:
    """Bytes that cuBLAS keeps for the streams of a prepared model.

    Args:
        batch_size: sequences; linear layers of few rows are timed.
        more: streams that this model takes beyond those of every model.
    """
    return _A_STREAM * (_STREAMS + (_TIMED if batch_size <= MAX_ROWS else 0) + more)


def has_few_row_layers(config: PreTrainedConfig, rows: int, dtype: torch.dtype) -> bool:
    """Whether a captured step runs layers in two launches beside attention, which are timed as a whole.

    Args:
        config: of the decoder.
        rows: of the step.
        dtype: of weights and activations.
    """
    plain = getattr(config, "model_type", None) == "gpt_neox" and config.hidden_act == "gelu"
    if not plain or not (config.use_parallel_residual and config.attention_bias):
        return False
    return (
        rows <= normed_linears.MAX_ROWS
        and config.hidden_size <= normed_linears.MAX_WIDTH
        and dtype.itemsize == 2
    )


def number_of_layers(config: PreTrainedConfig) -> int:
    """How many layers keep all keys and values, and so can wait in host memory.

    Args:
        config: the text config.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        return 0
    kinds, _ = get_layer_types_and_kwargs(config)
    recurrent = recurrent_layers(config)
    return sum(kind == "full_attention" and index not in recurrent for index, kind in enumerate(kinds))


def layer_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one sequence's keys and values in one layer that waits in host memory; scales stay.

    Args:
        config: the text config.
        tokens: of the sequence.
        dtype: of keys and values.
    """
    kinds, _ = get_layer_types_and_kwargs(config)
    sizes = zip(kinds, layer_sizes(config), strict=False)
    # The narrowest, where they differ: what the device is spared is not overrated.
    rows = (groups * (keys + values) for kind, (_, groups, keys, values) in sizes if kind == "full_attention")
    return rounded_capacity(tokens) * min(rows, default=0) * dtype.itemsize


def saved_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype, count: int) -> int:
    """Bytes of one sequence that the device does not hold where `count` layers wait in host memory.

    Args:
        config: the text config.
        tokens: of the sequence.
        dtype: of keys and values.
        count: layers.
    """
    return max(count - BUFFERS, 0) * layer_bytes(config, tokens, dtype)


def fewest_layers(need: Callable[[int], int], room: int, number: int) -> int | None:
    """The fewest layers in host memory with which something fits; None where none do.

    Args:
        need: bytes on the device with so many layers in host memory.
        room: bytes of the device.
        number: layers that could wait there.
    """
    return next((count for count in (0, *range(BUFFERS + 1, number + 1)) if need(count) <= room), None)


def longest(need: Callable[[int], int], room: int) -> int:
    """The largest number of tokens that needs no more than `room` bytes, by bisection; 0 if none does.

    Args:
        need: bytes of so many tokens, never falling.
        room: bytes.
    """
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= room else (low, middle - 1)
    return low
