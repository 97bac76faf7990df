"""`prepare_training`: any length under Trainer, on one instance of a model, undone by `restore`."""

import copy
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_longattn import instance
from hf_longattn.adapters import check_adapters
from hf_longattn.cache.head_sizes import feed_forward_width, head_sizes
from hf_longattn.cache.recurrent import keeps_latents, lightning_layers
from hf_longattn.kernels.dispatch import log_once
from hf_longattn.training import zero
from hf_longattn.training.attention import IMPLEMENTATION, register
from hf_longattn.training.blocks import times_at_once, token_numbers
from hf_longattn.training.forwards import blockwise_forward, is_norm, tokenwise_forward
from hf_longattn.training.groups import Groups
from hf_longattn.training.layer import Runtime
from hf_longattn.training.loss import loss_forward
from hf_longattn.training.offload import Offloader, working_bytes
from hf_longattn.training.sequence import partial_loss_forward
from hf_longattn.training.several import make_parallel, share_sequences

logger = logging.getLogger("hf_longattn")

_IMPLEMENTATIONS = ("tree_attention", "blockwise_attention", "lightning_attention")
# Modules that mix tokens without attention: a block of tokens alone would lack their state.
_MIXERS = re.compile(
    r"Mamba|DeltaNet|ShortConv|Rwkv|RWKV|Recurrent|LSTM|SSM|LinearAttention|Lightning|Conv1d$|Hyena"
)
# Models whose mixers of that name are lightning attention, which hands a state from block to block.
_LIGHTNING_MODELS = ("minimax", "lightning_attention")


@dataclass(frozen=True)
class TrainingSetup:
    """How a prepared model trains.

    Args:
        block_size: tokens of a row that go through a layer at a time; None picks by device and by the width
            of the layers. The result does not depend on it.
        offload: where the inputs of the layers wait for the backward: True in pinned host memory, False on
            the GPU, "auto" on the GPU as long as it leaves room for the layer that runs. No effect on a CPU.
        loss: "chunked" takes the loss a chunk of tokens at a time and returns no logits; "model" leaves it to
            the model.
        loss_chunk_size: tokens a chunk; None picks by device and vocabulary.
        label_smoothing: share of the target spread over all tokens, in [0, 1); with `loss="chunked"`. It
            stands in for Trainer's `label_smoothing_factor`, which needs whole logits.
        save_attention: keep the output of attention too (H * V values and H lse a token and layer), which
            spares its recomputation in the backward. It waits where the layer inputs wait.
        keep_every: keep the input of every n-th layer only, and run the n - 1 behind it forward once more in
            the backward; "auto" takes the fewest whose inputs find room on GPU and host, 1 where they all do.
            "auto" is 1 on a CPU, and where FSDP or ZeRO cuts the parameters.
    """

    block_size: int | None = None
    offload: Literal["auto"] | bool = "auto"
    loss: Literal["chunked", "model"] = "chunked"
    loss_chunk_size: int | None = None
    label_smoothing: float = 0.0
    save_attention: bool = True
    keep_every: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        for name in ("block_size", "loss_chunk_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive number of tokens or None, got {value!r}.")
        if self.offload not in ("auto", True, False):
            raise ValueError(f"`offload` must be 'auto', True or False, got {self.offload!r}.")
        if self.keep_every != "auto" and (type(self.keep_every) is not int or self.keep_every < 1):
            raise ValueError(f"`keep_every` must be 'auto' or a positive number, got {self.keep_every!r}.")
        if self.loss not in ("chunked", "model"):
            raise ValueError(f"`loss` must be 'chunked' or 'model', got {self.loss!r}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}.")
        if self.label_smoothing and self.loss == "model":
            raise ValueError("`label_smoothing` needs `loss='chunked'`, got `loss='model'`.")


def prepare_training(
    model: nn.Module,
    accelerator: Any = None,
    device_mesh: Any = None,
    config: TrainingSetup | None = None,
    **fields: Any,
) -> nn.Module:
    """Makes one model train on sequences of any length: blockwise-parallel layers, chunked loss, offload.

    Loss and gradients are those of the model as it was; with dropout, other random numbers of the same
    distribution are drawn. Works under Trainer, DDP, FSDP, DeepSpeed and PEFT. Evaluation without a cache
    takes the same path. With labels the model returns the loss and no logits. Parameters, state dict and
    saved config are untouched. Called again, it replaces the earlier set-up.

    With an accelerator of several processes or a mesh, these share each sequence: every one of a group is
    given the same batch and computes T / P of its tokens. The loss is that of the whole batch on each rank,
    and each ends a backward with the gradient of the whole batch, so that a plain loop, DDP and FSDP go on
    as with one process. For the time of a layer every rank holds the keys and values of the whole sequence,
    and their fp32 gradients in the backward. Without labels the final hidden states come together on every
    rank.

    Args:
        model: a decoder of transformers, perhaps wrapped by PEFT, accelerate or DDP.
        accelerator: an `accelerate.Accelerator`, whose processes share a sequence: those of "cp" where its
            `ParallelismConfig` has a `cp_size`, else all; leave it out for data parallelism alone.
        device_mesh: a `torch.distributed.DeviceMesh` in the place of it, whose dimension "cp" (or "cp_inter"
            and "cp_intra") shares a sequence; other dimensions train on other batches.
        config: the settings.
        fields: fields of `TrainingSetup`, given straight.

    Returns:
        the same model.

    Raises:
        ValueError: a setting or an architecture that cannot be honoured; the model is as it was.
        TypeError: `model` has no transformers model inside, or a field is unknown.

    Source: Liu and Abbeel, "Blockwise Parallel Transformer", arXiv 2305.19370.
    """
    setup = instance.read_setup(TrainingSetup, config, fields)
    inner = instance.unwrap(model)
    decoder = _decoder(inner)
    layers = _causal_layers(decoder)
    _check_model(inner, layers)
    check_adapters(model, chunked_loss=setup.loss == "chunked")
    trunk = _trunk_of_loss(inner, decoder, setup)
    parallel = make_parallel(accelerator, device_mesh, decoder, layers)
    changes = instance.begin(inner, "training")
    _tell_of_checkpointing(layers)
    if inner.config._attn_implementation not in _IMPLEMENTATIONS:
        changes.use_attention("blockwise_attention")
    ranks = 1 if parallel is None else parallel.group.world_size
    offloader = Offloader(setup.offload, _reserve(inner, ranks))
    groups = Groups(setup.keep_every, len(layers), _saved_sizes(inner, setup), offloader)
    config_of_text = inner.config.get_text_config()
    numbers = token_numbers(config_of_text.hidden_size, feed_forward_width(config_of_text))
    runtime = Runtime(setup.block_size, setup.save_attention, offloader, groups, numbers)
    changes.set(runtime, "active", True)
    if inner.config.model_type == "minimax":
        _replace_minimax(changes, inner)
    _patch_layers(changes, decoder, layers, runtime, lightning_layers(inner.config.get_text_config()))
    if parallel is not None:
        share_sequences(changes, parallel, accelerator, runtime)
    for module in inner.modules():
        if isinstance(module, PreTrainedModel):
            changes.set(module, "gradient_checkpointing_enable", _no_checkpointing)
            changes.set(module, "_replicate_for_data_parallel", _no_replicas)
    if trunk is not None:
        _mark_heads(changes, inner, trunk)
        numbers = (setup.loss_chunk_size, setup.label_smoothing)
        # Ranks compute the loss of their own tokens only where the head reads the decoder's output directly;
        # whatever else a model does with hidden states, it does with those of all tokens.
        sharing = parallel if inner._modules[trunk] is decoder else None
        changes.set_forward(inner, loss_forward(inner, trunk, runtime.is_active, *numbers, sharing))
    if parallel is not None and parallel.copies > 1:
        changes.set_forward(inner, partial_loss_forward(inner.forward, parallel.copies, runtime.is_active))
    # A compiler that traces the whole model goes round it; parts of layers can be compiled by themselves.
    traced = inner if "forward" in vars(inner) else decoder
    changes.set_forward(traced, torch.compiler.disable(traced.forward))
    instance.setups(inner)["training"] = changes
    return model


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that holds the layers and the final norm."""
    found = model.get_decoder() if model.can_generate() else model.base_model
    if found is not model or model.get_output_embeddings() is None:
        return found
    # `get_decoder` returns the model itself where it looks for a child under a name that this model does not
    # use. What holds the layers is meant.
    holders = [
        c for c in model.children() if any(isinstance(m, GradientCheckpointingLayer) for m in c.modules())
    ]
    return holders[0] if len(holders) == 1 else model


def _causal_layers(decoder: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that run by blocks: not those of an encoder beside them, whose tokens see later ones."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if not instance.looks_ahead(layer)] or layers


def _check_model(model: PreTrainedModel, layers: list[GradientCheckpointingLayer]) -> None:
    """Refuses by name what a layer that runs by blocks cannot honour."""
    config = model.config.get_text_config()
    reasons = [
        (not layers, "its layers are not transformers' `GradientCheckpointingLayer`"),
        (bool(model.config.is_encoder_decoder), "it is an encoder-decoder"),
        (getattr(config, "output_router_logits", False), "`output_router_logits=True` asks for the router's "
         "auxiliary loss, which needs every token at once; set it to False"),
        (getattr(config, "num_kv_shared_layers", 0), "its layers share keys and values"),
        (config.model_type == "phimoe", "its router draws random numbers token by token"),
        (getattr(config, "decoding_strategy", "") == "cross_attention", "its token decoder attends to "
         "vectors beside its tokens (`decoding_strategy='cross_attention'`)"),
        (getattr(config, "n_embedding_tokens", 1) > 1, "the vectors of one block see each other "
         f"(`n_embedding_tokens={getattr(config, 'n_embedding_tokens', 1)}`)"),
        (lightning_layers(config) and keeps_latents(config), "its lightning layers expand compressed keys "
         "behind the place where a state would go from block to block"),
    ]  # fmt: skip
    mixers = {
        type(m).__name__ for layer in layers for m in layer.modules() if _MIXERS.search(type(m).__name__)
    }
    mixers = set() if config.model_type in _LIGHTNING_MODELS else mixers
    reasons.append((bool(mixers), f"its layers mix tokens in {', '.join(sorted(mixers))}, not in attention"))
    for fails, words in reasons:
        if fails:
            raise ValueError(f"`model`: {type(model).__name__} cannot be prepared for training: {words}.")


def _trunk_of_loss(model: PreTrainedModel, decoder: nn.Module, setup: TrainingSetup) -> str | None:
    """The child of a causal language model that ends in the final hidden states; None to leave the loss."""
    children = model.named_children()
    trunk = next((name for name, child in children if any(m is decoder for m in child.modules())), None)
    if setup.loss != "chunked" or model.get_output_embeddings() is None:
        return None
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"`loss='chunked'` knows the loss of causal language models, and {type(model).__name__} has "
            "another; use `loss='model'`."
        )
    return trunk


def _patch_layers(
    changes: instance.Setup,
    decoder: nn.Module,
    layers: list[GradientCheckpointingLayer],
    runtime: Runtime,
    lightning: frozenset[int],
) -> None:
    register()
    configs: dict[int, Any] = {}
    for layer in layers:
        has_state = any(vars(module).get("layer_idx") in lightning for module in layer.modules())
        for module in layer.modules():
            if not has_state and (config := vars(module).get("config")) is not None:
                own = configs.setdefault(id(config), copy.deepcopy(config))
                own._attn_implementation = IMPLEMENTATION
                changes.set(module, "config", own)
        changes.set(layer, "gradient_checkpointing", False)
        changes.set(layer, zero.LEAF, True)
        changes.set(layer, "forward", blockwise_forward(layer, runtime, has_state))
    for norm in decoder.children():
        if is_norm(norm):
            changes.set(norm, "forward", tokenwise_forward(norm, runtime))


def _mark_heads(changes: instance.Setup, model: PreTrainedModel, trunk: str) -> None:
    """Has DeepSpeed's ZeRO stage 3 gather a head as a whole, once for all chunks of the loss."""
    for name, head in model.named_children():
        if name != trunk and zero.can_be_leaf(head, model.get_submodule(trunk)):
            changes.set(head, zero.LEAF, True)


def _replace_minimax(changes: instance.Setup, model: PreTrainedModel) -> None:
    # Imported here: it imports the model of transformers.
    from hf_longattn.modeling.lightning import minimax

    minimax.replace_lightning_layers(changes, model)


def _no_checkpointing(*args: Any, every_n_layers: int = 1, offload: bool = False, **kwargs: Any) -> None:
    """Stands in for `gradient_checkpointing_enable`: prepared layers recompute their own activations."""
    logger.info("gradient checkpointing: left out, since prepared layers recompute their own activations")
    if every_n_layers != 1 or offload:
        log_once(
            logging.WARNING,
            "gradient checkpointing: `every_n_layers` and `offload` have no effect on a prepared model; "
            "which inputs wait, and where, is for `keep_every` and `offload` of `prepare_training` to say.",
        )


def _tell_of_checkpointing(layers: list[GradientCheckpointingLayer]) -> None:
    """Says that checkpointing which was enabled before is left out."""
    flags = {bool(layer.gradient_checkpointing) for layer in layers}
    if True in flags:
        # Where some layers are without it, `every_n_layers` was asked for.
        _no_checkpointing(every_n_layers=len(flags))


def _no_replicas() -> None:
    """Stands in for what `nn.DataParallel` asks of a module: a replica would compute with our weights."""
    raise ValueError(
        "`model`: a prepared model cannot be copied to several GPUs by nn.DataParallel, which Trainer does "
        "where one process sees several; start a process a GPU by torchrun or accelerate launch, or set "
        "CUDA_VISIBLE_DEVICES=0."
    )


def _saved_sizes(model: PreTrainedModel, setup: TrainingSetup) -> tuple[int, ...]:
    """Bytes of attention's output and lse for one token in one layer, where they are saved."""
    if not setup.save_attention:
        return ()
    heads, _, _, width = head_sizes(model.config.get_text_config())
    return heads * width * model.dtype.itemsize, heads * 4


def _reserve(model: PreTrainedModel, ranks: int) -> Callable[[int], int]:
    # This runs for every tensor that is kept, and walking `model.parameters()` takes as long as many kernel
    # launches. The `_parameters` dicts of the modules stay, whatever becomes of the parameters in them.
    tables = [part._parameters for part in instance.every_module(model) if part._parameters]
    times = times_at_once(model.config.get_text_config())

    def reserve(num_bytes: int) -> int:
        found = {id(p): p for own in tables for p in own.values() if p is not None and p.grad is None}
        missing = sum(p.numel() * p.element_size() for p in found.values() if p.requires_grad)
        return working_bytes(num_bytes, ranks, times) + missing

    return reserve
