"""What training on a long sequence costs before it runs: bytes on the GPU and on the host.

Nothing is loaded: parameters are counted on the meta device. Of N tokens, n = N / P lie on each of P GPUs
that share a sequence; D is the width of the model, i the bytes of one number:

    weights       whole on every GPU, i bytes a parameter
    gradients     i bytes a parameter that trains; AdamW keeps twice as much. With LoRA of rank R those are
                  R (inputs + outputs) numbers a linear layer inside the decoder layers, 4 bytes each, as PEFT
                  makes them, the weights of the adapters among them
    inputs        of every layer, D i bytes a token; with `save_attention` the output of attention too,
                  (H V i + 4 H). On the GPU as long as the offloader would leave them there, in pinned host
                  memory beyond: the rule of `Offloader` itself decides, tensor by tensor. Where `keep_every`
                  lets groups of layers keep one, those of the first layers and of one group at a time. States
                  that lightning layers keep, a sixteenth of their inputs at most, are left out

and what comes on top is the most of three moments, with cosines, sines, ids and labels in each:

    forward       the output of a layer (written over its input where that goes to the host, beside the
                  embeddings), keys and values, and one block of tokens: (2 D + 3 F) numbers a token
    loss          the final norm's output and its gradient, and its input where that stays; logits of one
                  chunk as the model gives them, their gradient, for which there is room elsewhere where it
                  is not written over them, and the gradient that the head gets of the chunk; fp32 sums of the
                  latter where the head trains. Or what Liger takes: logits of one chunk, hidden states of
                  eight and their gradients, and the head's gradient in fp32 twice, its own and ours
    backward      the forward of a layer once more, with a gradient beside it, where that group is not 1; or
                  one gradient, keys and values, and their gradients in fp32; the graph of one block in one
                  layer, (6.5 D + 3 F) numbers a token, and its gradients, (D + 2 F), or in the place of what
                  F takes, which is free by then, gradients of the keys and values of one call of the
                  attention kernel, for every query head, of at most 65,536 tokens; gradients of a layer's
                  parameters, in fp32 and of one block; the head's gradient, which waits for that of the
                  embeddings where they are one

A block is 16,384 tokens, or up to 65,536 of a narrow model whose activations then take no more bytes than
those of 16,384 tokens where D = 2048 and F = 8192; of a lightning layer in 16 bits, which holds no keys and
values, those of 32,768 such tokens. Of a model with both kinds the layer that takes more counts. The graph of
a block is that of layers whose norms and gates run as
single kernels: of D the outputs of both norms, queries, the output of attention, the sum with the residual,
the layer's output, and half as much of keys and values; of F gate, up and their product. In plain torch a
norm keeps three D more, and a gate one F. Of experts, which run as their model has them, F is the width of a
dense layer that takes as much: see `feed_forward_width`.

Where P > 1 keys and values are those of all ranks, twice while they are put in order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_longattn.cache.head_sizes import feed_forward_width
from hf_longattn.cache.recurrent import lightning_layers
from hf_longattn.training.attention import MOST_KEYS
from hf_longattn.training.blocks import block_tokens, token_numbers
from hf_longattn.training.groups import pick_every, waiting
from hf_longattn.training.liger import MOST_CHUNKS
from hf_longattn.training.loss import LossOptions
from hf_longattn.training.offload import has_room, place, working_bytes

# What remains for the context of CUDA, cuBLAS and the allocator's rounding.
_RESERVE = 1 << 30
_LONGEST = 1 << 34
_DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Parameters:
    """The parameters of one model, in bytes.

    Args:
        weights: all of them, adapters included.
        trained: those that train.
        layer: those of one layer that train.
        head: those of the output embedding that train.
        count: numbers that train.
        expert_biases: whether experts have biases.
    """

    weights: int
    trained: int
    layer: int
    head: int
    count: int
    expert_biases: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """Bytes of one training step on one GPU, and on the host beside it.

    Args:
        context: tokens of the sequence.
        ranks: GPUs that share it.
        weights: bytes.
        gradients: bytes.
        optimizer: bytes of AdamW's two averages.
        inputs: bytes of layer inputs, and of attention where it is saved, that stay on the GPU.
        host: bytes of them that go to pinned host memory.
        every: layers of a group of which the first keeps its input.
        forward: bytes on top while the last layer runs.
        loss: bytes on top while the loss is taken.
        backward: bytes on top while a layer runs backward.
        memory: bytes of the GPU.
        host_memory: bytes of the host for this GPU.
        longest: tokens that fit.
        advice: what to change, where it does not fit.
    """

    context: int
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    inputs: int
    host: int
    every: int
    forward: int
    loss: int
    backward: int
    memory: int
    host_memory: int
    longest: int = 0
    advice: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of the GPU at the highest point."""
        static = self.weights + self.gradients + self.optimizer
        return static + self.inputs + max(self.forward, self.loss, self.backward)

    @property
    def fits(self) -> bool:
        """Whether it fits GPU and host, with a reserve of 1 GiB on the GPU."""
        return self.peak + _RESERVE <= self.memory and self.host <= self.host_memory


@dataclass(frozen=True)
class TrainingRequest:
    """What is to be trained, and where.

    Args:
        batch_size: sequences at a time.
        lora: rank of the adapters; 0 trains every parameter.
        ranks: GPUs that share a sequence.
        memory: bytes of the GPU.
        host_memory: bytes of the host that layer inputs may take, for this GPU.
        save_attention: as in `TrainingSetup`.
        offload: as in `TrainingSetup`.
        keep_every: as in `TrainingSetup`.
        dtype: of weights and activations.
        block_size: as in `TrainingSetup`; None as it is picked on a GPU.
        loss_chunk_size: as in `TrainingSetup`; None as it is picked on a GPU.
    """

    batch_size: int = 1
    lora: int = 0
    ranks: int = 1
    memory: int = 79 << 30
    host_memory: int = 100 << 30
    save_attention: bool = True
    offload: bool | str = "auto"
    keep_every: int | str = "auto"
    dtype: torch.dtype = torch.bfloat16
    block_size: int | None = None
    loss_chunk_size: int | None = None


def count_parameters(model: Any, dtype: torch.dtype, lora: int = 0) -> Parameters:
    """What a model holds and trains.

    Args:
        model: on the meta device.
        dtype: of the weights.
        lora: rank of the adapters on every linear layer inside the decoder layers; 0 trains everything.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    item = dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * item
    biases = any(name.endswith("experts.gate_up_proj_bias") for name, _ in model.named_parameters())
    if lora:
        sizes = [sum(lora * sum(m.weight.shape) for m in _linear(layer)) * 4 for layer in layers]
        trained = sum(sizes)
        return Parameters(weights + trained, trained, max(sizes, default=0), 0, trained // 4, biases)
    head = model.get_output_embeddings()
    sizes = [sum(p.numel() for p in layer.parameters()) * item for layer in layers]
    head_size = 0 if head is None else head.weight.numel() * item
    return Parameters(weights, weights, max(sizes, default=0), head_size, weights // item, biases)


def _linear(layer: nn.Module) -> list[Any]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def plan_training(
    config: PreTrainedConfig,
    model: Any,
    heads: tuple[int, int, int, int],
    context: int,
    request: TrainingRequest,
) -> TrainingPlan:
    """The plan of one step with `prepare_training`.

    Args:
        config: the text config.
        model: the model of it on the meta device.
        heads: (query heads, key heads, width of a key, width of a value).
        context: tokens of a sequence.
        request: everything else.
    """
    return plan_step(
        Step(config, heads, count_parameters(model, request.dtype, request.lora), request), context
    )


def plan_step(step: "Step", context: int) -> TrainingPlan:
    """The plan of one step, with the longest sequence that fits.

    Args:
        step: the sums of a model.
        context: tokens of a sequence.
    """
    longest = _bisect(lambda tokens: step.plan(tokens).fits)
    plan = step.plan(context)
    fields = {**vars(plan), "longest": longest, "advice": () if plan.fits else tuple(step.advice(plan))}
    return TrainingPlan(**fields)


def _bisect(fits: Callable[[int], bool]) -> int:
    low, high = 0, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Step:
    """One step of one model, at any length.

    Args:
        config: the text config.
        heads: (query heads, key heads, width of a key, width of a value).
        parameters: of the model.
        request: everything else.
    """

    config: PreTrainedConfig
    heads: tuple[int, int, int, int]
    parameters: Parameters
    request: TrainingRequest

    def plan(self, context: int) -> TrainingPlan:
        """The plan of so many tokens."""
        request, parameters = self.request, self.parameters
        tokens = -(-context // request.ranks) * request.batch_size
        static = parameters.weights + 3 * parameters.trained
        every, kept, host = self._kept(tokens, request.memory - _RESERVE - static)
        return TrainingPlan(
            context=context,
            ranks=request.ranks,
            weights=parameters.weights,
            gradients=parameters.trained,
            optimizer=2 * parameters.trained,
            inputs=kept,
            host=host,
            every=every,
            forward=self._forward(tokens, host > 0),
            loss=self._loss(tokens, host > 0),
            backward=max(self._backward(tokens), self._forward_again(tokens, host > 0) if every > 1 else 0),
            memory=request.memory,
            host_memory=request.host_memory,
        )

    def _kept(self, tokens: int, free: int) -> tuple[int, int, int]:
        """(layers of a group, bytes on the GPU, bytes on the host) of what waits for the backward."""
        heads, request, layers = self.heads, self.request, self.config.num_hidden_layers
        hidden = tokens * self._hidden
        attention = [tokens * heads[0] * heads[3] * request.dtype.itemsize, tokens * heads[0] * 4]
        # A layer's own input and output are there when it asks.
        memory = (free - 2 * hidden, request.host_memory)

        def sizes(every: int) -> list[int]:
            return waiting(layers, every, hidden, attention if request.save_attention else [])

        def reserve(size: int) -> int:
            return working_bytes(size, request.ranks)

        every = request.keep_every
        if not isinstance(every, int):
            every = pick_every(layers, sizes, lambda found: has_room(found, memory, request.offload, reserve))
        return every, *place(sizes(every), memory[0], request.offload, reserve)

    @property
    def _hidden(self) -> int:
        """Bytes of one token's hidden states."""
        return self.config.hidden_size * self.request.dtype.itemsize

    @property
    def _tables(self) -> int:
        """Bytes of one token's cosines and sines, and of ids, positions, labels and what is made of them."""
        return 2 * self.heads[2] * self.request.dtype.itemsize + 6 * 8

    @property
    def _kinds(self) -> list[bool]:
        """Whether layers hand states on: both answers where the model has layers of both kinds."""
        number = len(lightning_layers(self.config))
        return [
            has_state
            for has_state, among in ((True, number), (False, self.config.num_hidden_layers - number))
            if among
        ]

    def _keys(self, has_state: bool) -> int:
        """Numbers in the keys and values of one token of this rank's, with those that other ranks add."""
        if has_state:
            return 0
        _, groups, key_width, value_width = self.heads
        # Those of all ranks, and once more while they are put in order.
        copies = 2 * self.request.ranks if self.request.ranks > 1 else 1
        return copies * groups * (key_width + value_width)

    def _rows(self, tokens: int, has_state: bool) -> tuple[int, int]:
        """(tokens of a block, width of its feed-forward layer)."""
        config, request = self.config, self.request
        inner = feed_forward_width(config, self.parameters.expert_biases)
        numbers = token_numbers(config.hidden_size, inner)
        dtype = request.dtype if has_state else None
        rows = request.block_size or block_tokens(torch.device("cuda"), request.batch_size, numbers, dtype)
        return min(rows * request.batch_size, tokens), inner

    def _forward(self, tokens: int, offloads: bool) -> int:
        return max(self._forward_of(tokens, offloads, has_state) for has_state in self._kinds)

    def _forward_of(self, tokens: int, offloads: bool, has_state: bool) -> int:
        item = self.request.dtype.itemsize
        rows, inner = self._rows(tokens, has_state)
        whole = (2 if offloads else 1) * self._hidden + self._keys(has_state) * item + self._tables
        return tokens * whole + rows * (2 * self.config.hidden_size + 3 * inner) * item

    def _forward_again(self, tokens: int, offloads: bool) -> int:
        # The gradient stands where the embeddings did, or beside inputs that are counted already.
        return self._forward(tokens, offloads) + (0 if offloads else tokens * self._hidden)

    def _loss(self, tokens: int, offloads: bool) -> int:
        item, vocabulary = self.request.dtype.itemsize, self.config.vocab_size
        options = LossOptions(self.request.loss_chunk_size, 0.0)
        chunk = min(options.chunk(torch.empty(0, device=_DEVICE), vocabulary), tokens)
        head, logits = self.parameters.head, chunk * vocabulary
        whole = self._in_loss(offloads)
        sums = head * 4 // item
        plain = logits * 2 * item + head
        fused = max(logits * item, head) + sums + 2 * min(MOST_CHUNKS * chunk, tokens) * self._hidden
        return tokens * whole + max(plain, fused) + sums

    def _in_loss(self, offloads: bool) -> int:
        """Bytes of one token beside its logits: the final norm's output, its gradient, and its input."""
        return (2 if offloads else 3) * self._hidden + self._tables

    def _sums(self) -> int:
        """Gradients of one layer's parameters, in fp32 and of one block, and that of a head that waits."""
        # Adapters are fp32 already.
        each = 2 if self.request.lora else 4 // self.request.dtype.itemsize + 1
        tied = getattr(self.config, "tie_word_embeddings", False)
        return self.parameters.layer * each + (self.parameters.head if tied else 0)

    def _backward(self, tokens: int) -> int:
        return max(self._backward_of(tokens, has_state) for has_state in self._kinds)

    def _backward_of(self, tokens: int, has_state: bool) -> int:
        item = self.request.dtype.itemsize
        heads, _, key_width, value_width = self.heads
        rows, inner = self._rows(tokens, has_state)
        whole = self._hidden + self._keys(has_state) * (item + 4) + self._tables
        keys = min(tokens * self.request.ranks, MOST_KEYS) * heads * (key_width + value_width)
        keys = 0 if has_state else keys
        block = int(rows * 7.5 * self.config.hidden_size) + max(rows * 5 * inner, keys)
        return tokens * whole + block * item + self._sums()

    def advice(self, plan: TrainingPlan) -> list[str]:
        """What would make it fit, or bring it nearer."""
        request, found = self.request, []
        if plan.weights + plan.gradients + plan.optimizer + _RESERVE > plan.memory:
            # They are whole on every GPU that shares a sequence, whatever its length.
            if request.lora:
                return ["weights fill the GPU: load them in 4 bits (not counted here), or shard with FSDP"]
            return [
                "weights, gradients and AdamW fill the GPU: train adapters (`--lora 16`), or shard with FSDP"
            ]
        if plan.host > plan.host_memory and request.save_attention:
            found.append("the host is full: `prepare_training(save_attention=False)` halves what waits there")
        elif plan.host > plan.host_memory:
            found.append("the host is full: more host memory (`--host-memory`)")
        if isinstance(request.keep_every, int) and (plan.host > plan.host_memory or request.offload is False):
            found.append("keep fewer layer inputs: `prepare_training(keep_every='auto')`")
        if request.offload is False:
            found.append("let layer inputs go to the host: `prepare_training(offload='auto')`")
        if request.batch_size > 1:
            found.append("train on fewer sequences at a time, and accumulate gradients")
        found.append(f"share the sequence among more GPUs (`--gpus {2 * request.ranks}`)")
        return found
