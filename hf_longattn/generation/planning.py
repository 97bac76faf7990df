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
    libraries     32 MiB of cuBLAS for each stream that products ran on: the caller's, those of a capture, and
                  those on which the linear layers of a step of few rows are timed
    rehearsal     a copy of the states while a step is captured, in the place of a chunk's activations

and 1 GiB is left for the CUDA context and the rounding of the allocator. The longest prompt, and how far its
chunks are shortened, is the answer of `demand`, which is what `generate` asks. Of times see `clock`; a Block
Transformer, whose layers see blocks, has its own sums in `block_planning`.
"""

import dataclasses
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from hf_longattn.cache.head_sizes import layer_sizes
from hf_longattn.generation.block_planning import BlockDemand, BlockShape, shape_of_blocks
from hf_longattn.generation.clock import Clock, Hardware
from hf_longattn.generation.demand import RESERVE, Demand
from hf_longattn.generation.prefill import pick_chunk
from hf_longattn.generation.sizes import (
    LONGEST,
    Ranks,
    Weights,
    Workspace,
    as_loaded,
    cache_bytes,
    count_weights,
    read_bytes,
    state_bytes,
    workspace_bytes,
)

_GPU = torch.device("cuda")


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU, and seconds, of one generation.

    Args:
        context: prompt and new tokens together.
        new_tokens: how many of them are the answer.
        ranks: the GPUs.
        weights: bytes.
        cache: bytes of keys and values of all tokens but the last, and of states.
        states: how many of them are those of lightning layers, which do not grow.
        workspace: bytes of everything else.
        chunk: tokens of a chunk of the prompt, all rows and ranks together.
        shortened: whether chunks are that short because memory is.
        memory: bytes of the device.
        room: how many of them are left for keys, values and a chunk of the prompt.
        longest: tokens of prompt and answer that fit.
        floor_a_token: seconds, weights read once, keys and values by every layer that attends to them, states
            written too.
        expected_a_token: seconds, with the launches of a captured step, and what the ranks exchange.
        expected_first_token: seconds until the first token.
        block_length: tokens of a block of a Block Transformer, whose first token takes at least as long as
            expected, and on several ranks every token; else 1.
    """

    context: int
    new_tokens: int
    ranks: Ranks
    weights: int
    cache: int
    states: int
    workspace: Workspace
    chunk: int
    shortened: bool
    memory: int
    room: int
    longest: int
    floor_a_token: float
    expected_a_token: float
    expected_first_token: float
    block_length: int = 1

    @property
    def peak(self) -> int:
        """Bytes at the highest point."""
        return self.weights + self.cache + self.workspace.total

    @property
    def fits(self) -> bool:
        """Whether it fits the device, with a reserve of 1 GiB."""
        return self.context <= self.longest

    @property
    def grows(self) -> bool:
        """Whether a longer context takes more memory."""
        return self.longest < LONGEST


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
        chunk: tokens of a chunk, all rows and ranks together; None as `generate` picks it on a GPU.
        ranks: the GPUs; one if left out.
        hardware: the device; an H100 if left out.

    Raises:
        ValueError: the architecture keeps something other than keys and values, or cannot be divided so.
    """
    hardware, ranks = hardware or Hardware(), ranks or Ranks()
    text = as_loaded(config.get_text_config(decoder=True))
    if text.model_type == "block_transformer":
        shape = shape_of_blocks(text, batch_size, dtype, cache_dtype, ranks)
        return _plan_blocks(shape, context, new_tokens, hardware)
    _check_ranks(text, ranks)
    weights = count_weights(config, dtype, ranks.tensor)
    picked = pick_chunk(batch_size, _GPU, ranks.sequence) * batch_size
    demand = Demand(
        config=text,
        rows=batch_size,
        prompt=max(context - new_tokens, 1),
        total=max(context - 1, 1),
        dtype=cache_dtype or dtype,
        activations=dtype,
        chunk=chunk or picked,
        ranks=ranks,
    )
    return _plan_tokens(demand, weights, context, new_tokens, hardware, asked=bool(chunk))


def _plan_tokens(
    demand: Demand, weights: Weights, context: int, new_tokens: int, hardware: Hardware, asked: bool
) -> Plan:
    """The plan of a model whose layers see tokens; chunks that are `asked` for are not shortened."""
    config, rows, dtype, ranks = demand.config, demand.rows, demand.activations, demand.ranks
    fixed = workspace_bytes(config, context, rows, demand.chunk, dtype, ranks).fixed
    room = hardware.memory - RESERVE - weights.total - fixed
    fitted = demand if asked else demand.shortened(room)
    states = rows * sum(state_bytes(config).values()) // ranks.tensor
    # What a token of the answer reads, in the middle of it, and the states that it writes.
    read = rows * read_bytes(config, context - new_tokens // 2, demand.dtype, ranks)
    floor = (weights.read + read + states) / hardware.bandwidth
    clock = Clock(config, weights, ranks, hardware, dtype, demand.dtype)
    return Plan(
        context=context,
        new_tokens=new_tokens,
        ranks=ranks,
        weights=weights.total,
        cache=rows * cache_bytes(config, demand.total, demand.dtype, ranks),
        states=states,
        workspace=workspace_bytes(config, context, rows, fitted.chunk, dtype, ranks),
        chunk=fitted.chunk,
        shortened=fitted.chunk < demand.chunk,
        memory=hardware.memory,
        room=room,
        longest=_longest(demand, room, asked),
        floor_a_token=floor,
        expected_a_token=floor + clock.overhead(rows),
        expected_first_token=rows * clock.prefill(demand.prompt, fitted.chunk, rows),
    )


def _longest(demand: Demand, room: int, asked: bool) -> int:
    """Tokens up to which `generate` takes a prompt, where so much memory is free."""
    demand = dataclasses.replace(demand, prompt=LONGEST, total=LONGEST)
    # A chunk that somebody asks for is not shortened.
    demand = demand if asked else demand.shortened(room)
    return min(demand.fitting(room), LONGEST) if demand.need(1) <= room else 0


def _plan_blocks(shape: BlockShape, context: int, new_tokens: int, hardware: Hardware) -> Plan:
    """The plan of a Block Transformer."""
    prompt, middle = max(context - new_tokens, 1), context - new_tokens // 2
    demand = BlockDemand(
        config=shape.config,
        rows=shape.batch_size,
        prompt=prompt,
        total=max(context - 1, 1),
        dtype=shape.dtype,
        activations=shape.dtype,
        chunk=shape.most,
        ranks=shape.ranks,
        shape=shape,
    )
    fixed = shape.workspace(LONGEST, shape.most).fixed
    room = hardware.memory - RESERVE - shape.weights.total - fixed
    chunk, picked = demand.shortened(room).chunk, shape.chunk(context)
    return Plan(
        context=context,
        new_tokens=new_tokens,
        ranks=shape.ranks,
        weights=shape.weights.total,
        cache=shape.cache(context),
        states=0,
        workspace=shape.workspace(context, chunk),
        chunk=min(chunk, picked),
        shortened=chunk < picked,
        memory=hardware.memory,
        room=room,
        longest=_longest(demand, room, asked=False),
        floor_a_token=shape.floor_a_token(middle, hardware),
        expected_a_token=shape.expected_a_token(middle, hardware),
        expected_first_token=shape.expected_first_token(prompt, hardware),
        block_length=shape.config.block_length,
    )


def _check_ranks(config: PreTrainedConfig, ranks: Ranks) -> None:
    groups = sorted({size[1] for size in layer_sizes(config)})
    if ranks.tensor < 1 or any(number % ranks.tensor for number in groups):
        raise ValueError(
            f"`--tp` must divide the {' and '.join(map(str, groups))} key heads of the model, got "
            f"{ranks.tensor}; share the sequence among more GPUs instead."
        )
