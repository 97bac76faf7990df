"""What training a Block Transformer costs before it runs; the plan of other models is in `planning`.

Of N tokens in blocks of L, with n_e embedding tokens a block, the layers of the block decoder see n_e N / L
positions. Those of the token decoder see q N: a row of L + P - 1 positions a block where P context vectors
stand in front of its tokens ("prefix"), or of L ("summation"); such a row is shorter than a block of
`prepare_training`, and all rows go through a layer at once. Of numbers a position:

    inputs        of every layer, and its attention where that is saved, as in `planning`; then the context
                  vectors and the input of the block decoder's last norm, on the GPU
    forward       of a layer of the token decoder, (2 D + 3 F) and its keys and values, as in `planning`
    loss          the final norm's output of every token, its gradient, and the norm's input where that stays
    backward      of a layer of the token decoder, the more of two moments: of its feed-forward layer, the
                  gradient of the output, norms, queries, keys, values and sums, (5 D + keys and values), with
                  3 F (or 5 F where there is a gate); or of its attention, 8 D (7 D beside a parallel branch),
                  keys and values with their gradients in fp32, and those of one call for every query head.
                  Attention that is not saved comes on top. Or of a layer of the block decoder, when the token
                  decoder is done

and all else as in `planning`. A group of layers with one kept input lies in one of the decoders.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_longattn.cache.head_sizes import Sizes, head_sizes
from hf_longattn.training.blocks import numbers_at_once, times_at_once
from hf_longattn.training.groups import pick_every, waiting
from hf_longattn.training.offload import has_room, place, working_bytes
from hf_longattn.training.planning import Step, TrainingPlan, TrainingRequest, count_parameters, plan_step


@dataclass(frozen=True)
class _Stack:
    """The layers of one of the two decoders.

    Args:
        config: of the decoder.
        share: positions of its layers for each token.
    """

    config: PreTrainedConfig
    share: float

    @property
    def heads(self) -> Sizes:
        """Query heads, key heads, width of a key and of a value."""
        return head_sizes(self.config)

    @property
    def keys(self) -> int:
        """Numbers in the keys and values of one position."""
        _, groups, key_width, value_width = self.heads
        return groups * (key_width + value_width)

    def hidden(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of so many tokens."""
        return int(tokens * self.share * self.config.hidden_size) * dtype.itemsize

    def attention(self, tokens: int, dtype: torch.dtype) -> list[int]:
        """Bytes of attention's output and lse."""
        heads, _, _, width = self.heads
        positions = int(tokens * self.share)
        return [positions * heads * width * dtype.itemsize, positions * heads * 4]


def plan_block_training(
    config: PreTrainedConfig, model: Any, context: int, request: TrainingRequest
) -> TrainingPlan:
    """The plan of one step of a Block Transformer with `prepare_training`.

    Args:
        config: a `BlockTransformerConfig`.
        model: the model of it on the meta device.
        context: tokens of a sequence.
        request: everything else.

    Raises:
        ValueError: an encoder embeds the tokens, or GPUs are to share a sequence.
    """
    if config.embedder_type != "lookup":
        raise ValueError(
            f"`embedder_type` must be 'lookup' for a plan of training, got {config.embedder_type!r}: the "
            "encoder is trained as it is, and keeps all of its activations; train a step and read the peak."
        )
    if request.ranks > 1:
        raise ValueError(
            f"`--gpus {request.ranks}`: several GPUs do not share a sequence of a Block Transformer in "
            "training; leave it out, and train on other sequences on each."
        )
    rows = config.block_length + (config.num_prefix_tokens - 1 if config.decoding_strategy == "prefix" else 0)
    decoders = (
        _Stack(config.block_decoder_config(), config.n_embedding_tokens / config.block_length),
        _Stack(config.token_decoder_config(), rows / config.block_length),
    )
    parameters = count_parameters(model, request.dtype, request.lora)
    return plan_step(BlockStep(config, head_sizes(config), parameters, request, decoders), context)


@dataclass(frozen=True)
class BlockStep(Step):
    """One step of a Block Transformer, at any length.

    Args:
        decoders: the layers of the block decoder and those of the token decoder.
    """

    decoders: tuple[_Stack, _Stack]

    @property
    def _hidden(self) -> int:
        return self.config.token_hidden_size * self.request.dtype.itemsize

    def _kept(self, tokens: int, free: int) -> tuple[int, int, int]:
        # The last norm of the block decoder and the expansion of contexts keep what they read.
        kept, host, most = 2 * self.decoders[0].hidden(tokens, self.request.dtype), 0, 1
        for decoder in self.decoders:
            every, here, there = self._kept_of(decoder, tokens, free - kept)
            kept, host, most = kept + here, host + there, max(most, every)
        return most, kept, host

    def _kept_of(self, decoder: _Stack, tokens: int, free: int) -> tuple[int, int, int]:
        """(layers of a group, bytes on the GPU, bytes on the host) of one decoder."""
        request, hidden = self.request, decoder.hidden(tokens, self.request.dtype)
        attention = decoder.attention(tokens, request.dtype) if request.save_attention else []
        # A layer's own input and output are there when it asks. The first of a decoder takes all layers for
        # its like, and the host for empty.
        memory = (free - 2 * hidden, request.host_memory)
        number = sum(each.config.num_hidden_layers for each in self.decoders)

        def reserve(size: int) -> int:
            return working_bytes(size, 1, times_at_once(self.config))

        every = request.keep_every
        if not isinstance(every, int):
            every = pick_every(
                number,
                lambda count: waiting(number, count, hidden, attention),
                lambda found: has_room(found, memory, request.offload, reserve),
            )
        sizes = waiting(decoder.config.num_hidden_layers, every, hidden, attention)
        return every, *place(sizes, memory[0], request.offload, reserve)

    def _forward(self, tokens: int, offloads: bool) -> int:
        _, decoder = self.decoders
        item, positions = self.request.dtype.itemsize, int(tokens * decoder.share)
        width, inner = decoder.config.hidden_size, decoder.config.intermediate_size
        states = (2 if offloads else 1) * width + decoder.keys + 2 * width + 3 * inner
        return tokens * self._tables + positions * states * item

    def _forward_again(self, tokens: int, offloads: bool) -> int:
        hidden = self.decoders[1].hidden(tokens, self.request.dtype)
        return self._forward(tokens, offloads) + (0 if offloads else hidden)

    def _in_loss(self, offloads: bool) -> int:
        before = 0 if offloads else self.decoders[1].share
        return int((2 + before) * self._hidden) + self._tables

    def _backward(self, tokens: int) -> int:
        blocks, inside = self.decoders
        # For its decoder blocks are tokens.
        alone = Step(blocks.config, blocks.heads, self.parameters, self.request)
        later = alone._backward(int(tokens * blocks.share)) - self._gone(tokens)
        return max(self._backward_inside(inside, tokens) + tokens * self._tables + self._sums(), later)

    def _gone(self, tokens: int) -> int:
        """Bytes that are kept no more when the backward of the block decoder's layers begins."""
        (blocks, inside), dtype = self.decoders, self.request.dtype
        gone = 2 * blocks.hidden(tokens, dtype)
        if self.request.offload is not False or self.request.keep_every != 1:
            # What the token decoder kept may have waited on the host.
            return gone
        attention = inside.attention(tokens, dtype) if self.request.save_attention else []
        return gone + inside.config.num_hidden_layers * (inside.hidden(tokens, dtype) + sum(attention))

    def _backward_inside(self, decoder: _Stack, tokens: int) -> int:
        """Bytes of a layer of the token decoder, of which all positions run backward at once."""
        request, config = self.request, decoder.config
        item, positions = request.dtype.itemsize, int(tokens * decoder.share)
        heads, _, key_width, value_width = decoder.heads
        # Of parallel branches, one is done before the other begins.
        parallel = self.config.decoder_type == "gpt_neox" and self.config.use_parallel_residual
        attending = (7 if parallel else 8) * config.hidden_size + heads * (key_width + value_width)
        most = max(numbers_at_once(self.config) * item, attending * item + decoder.keys * (item + 4))
        again = 0 if request.save_attention else sum(decoder.attention(tokens, request.dtype))
        return positions * most + again

    def advice(self, plan: TrainingPlan) -> list[str]:
        """What would make it fit, or bring it nearer; GPUs do not share its sequences."""
        return [words for words in super().advice(plan) if "--gpus" not in words]
