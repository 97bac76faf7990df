"""`prepare_generation`: long prompts in `generate()`, on one instance of a model, undone by `restore`."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from hf_longattn import instance
from hf_longattn.attention.lightning import refuse_pages
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.long_context import CACHES
from hf_longattn.cache.quantized import check_cache_dtype, read_cache_dtype
from hf_longattn.cache.recurrent import lightning_layers
from hf_longattn.cache.sharded import CacheKind, ShardedCache
from hf_longattn.generation.ahead import run_ahead
from hf_longattn.generation.blocks import sample
from hf_longattn.generation.generate_batch import BatchGeneration
from hf_longattn.generation.graph import GraphDecoder, follow_masks
from hf_longattn.generation.inputs import watch_inputs
from hf_longattn.generation.kept import KeptProgram
from hf_longattn.generation.offloading import check_setup, read_offload
from hf_longattn.generation.prefill import prefill
from hf_longattn.generation.room import Room
from hf_longattn.generation.settings import check_config_once, make_tokens_on_host
from hf_longattn.generation.several import compare_answers, share_generation
from hf_longattn.generation.speculation import read_before_guessing
from hf_longattn.kernels.dispatch import triton_runs_on
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.prefill import ShardedForward

_IMPLEMENTATIONS = ("tree_attention", "blockwise_attention", "lightning_attention")
# Those that know of caches cut along the sequence.
_SHARED = ("tree_attention", "lightning_attention")


@dataclass(frozen=True)
class GenerationSetup:
    """How a prepared model generates.

    Args:
        prefill_chunk_size: prompt tokens that go through the model at a time; None picks by device. The
            result does not depend on it, memory and the grain of the progress bar do.
        cache_dtype: "int8" or "fp8" (or torch.int8, torch.float8_e4m3fn) keeps keys and values in 8 bits,
            with a scale for each token and head; None keeps the model's dtype. fp8 needs a GPU of compute
            capability 8.9 or more, or a CPU.
        cuda_graph: "auto" captures the decoding step in a CUDA graph where it can be, and says once why where
            not; True refuses what "auto" would run eagerly; False never captures.
        offload_layers: how many layers of full attention keep keys and values in host memory, from where each
            is fetched while the layers before it compute; "auto" takes the fewest with which a call fits the
            GPU, and none where it fits as it is. A step is not captured then.
        progress: show a progress bar while the prompt is read; over several processes, rank 0 shows it.
        timeout: seconds that a process waits for the others, where several share one prompt.
    """

    prefill_chunk_size: int | None = None
    cache_dtype: Literal["int8", "fp8"] | torch.dtype | None = None
    cuda_graph: Literal["auto"] | bool = "auto"
    offload_layers: Literal["auto"] | int = 0
    progress: bool = False
    timeout: float = 120.0

    def __post_init__(self) -> None:
        size = self.prefill_chunk_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"`prefill_chunk_size` must be a positive number of tokens or None, got {size!r}."
            )
        if not isinstance(self.progress, bool):
            raise ValueError(f"`progress` must be True or False, got {self.progress!r}.")
        if not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, got {self.timeout!r}.")
        read_cache_dtype(self.cache_dtype)
        read_offload(self.offload_layers)
        if self.cuda_graph not in ("auto", True, False):
            raise ValueError(f"`cuda_graph` must be 'auto', True or False, got {self.cuda_graph!r}.")


def prepare_generation(
    model: nn.Module,
    accelerator: Any = None,
    device_mesh: Any = None,
    config: GenerationSetup | None = None,
    **fields: Any,
) -> nn.Module:
    """Makes `generate()` of one model take long prompts: preallocated cache, chunked prefill, progress.

    Greedy, sampled, beam and assisted decoding give what they gave before; streamers, processors and stopping
    criteria are transformers' own. Parameters, state dict and saved config are untouched. Called again, it
    replaces the earlier set-up.

    Args:
        model: a decoder of transformers, perhaps wrapped by PEFT, accelerate or DDP.
        accelerator: an `accelerate.Accelerator`; all its processes share one prompt, each with the whole
            model: every process makes the same call of `generate` and gets the same tokens.
        device_mesh: a `torch.distributed.DeviceMesh` in the place of it, whose dimension "cp" (or "cp_inter"
            and "cp_intra") shares the prompt; dimension "tp" is left to transformers' tensor parallelism.
        config: the settings.
        fields: fields of `GenerationSetup`, given straight.

    Returns:
        the same model.

    Raises:
        ValueError: a setting or an architecture that cannot be honoured; the model is as it was.
        TypeError: `model` has no transformers model inside, or a field is unknown.
    """
    setup = instance.read_setup(GenerationSetup, config, fields)
    inner = instance.unwrap(model)
    _check(inner, setup)
    group = _make_group(accelerator, device_mesh, setup)
    check_setup(setup, inner.config, 1 if group is None else group.control.world_size)
    if group is not None:
        setup = _check_shared(inner, setup, group)
    changes = instance.begin(inner, "generation")
    if inner.config._attn_implementation not in (_IMPLEMENTATIONS if group is None else _SHARED):
        changes.use_attention("tree_attention")
    if inner.config.model_type == "minimax":
        _replace_minimax(changes, inner, group)
    _replace_methods(changes, inner, setup, group)
    instance.setups(inner)["generation"] = changes
    return model


def _check(model: PreTrainedModel, setup: GenerationSetup) -> None:
    """Refuses what the model or its device cannot do."""
    # Names a version of Triton that is too old.
    triton_runs_on(model.device)
    if setup.cuda_graph is True and model.device.type != "cuda":
        raise ValueError(f"`cuda_graph=True` needs a model on a GPU, got one on {str(model.device)!r}.")
    check_cache_dtype(read_cache_dtype(setup.cache_dtype), model.device)
    if not model.can_generate():
        raise ValueError(
            f"`model` must have a language-modelling head to generate, got {type(model).__name__}."
        )


def _check_shared(model: PreTrainedModel, setup: GenerationSetup, group: SequenceGroup) -> GenerationSetup:
    """The set-up of this process, refused where several cannot share a prompt."""
    # Names a layer that cannot be cut, before anything is changed.
    ShardedCache(model.config, group)
    return dataclasses.replace(setup, progress=setup.progress and group.control.rank == 0)


def _replace_methods(
    changes: instance.Setup, model: PreTrainedModel, setup: GenerationSetup, group: SequenceGroup | None
) -> None:
    """Puts cache, prompt, steps and loop of this library in the place of the model's."""
    original_cache, original_prefill = model._prepare_cache_for_generation, model._prefill
    decoder = GraphDecoder(model, model.forward, required=setup.cuda_graph is True)
    if group is not None:
        # Inside of what takes a cache back to what it held.
        compare_answers(model, group.control, changes)
    room = Room(model, setup.prefill_chunk_size, setup.offload_layers)
    room.watch(changes)
    if group is not None:
        step = decoder.forward() if setup.cuda_graph else model.forward
        changes.set_forward(model, ShardedForward(model.forward, step).forward())
    elif setup.cuda_graph:
        changes.set_forward(model, decoder.forward())
    if setup.cuda_graph:
        follow_masks(model, changes)
    caches = _cache_kind(model, group)
    changes.set(model, CACHES, caches)
    prepare_cache = functools.partial(_prepare_cache, model, setup, caches, original_cache)
    counted = functools.partial(room.prepare_cache, prepare_cache)
    changes.set(model, "_prepare_cache_for_generation", counted)
    changes.set(model, "_prefill", functools.partial(prefill, model, setup, original_prefill, decoder))
    check_config_once(model, changes)
    make_tokens_on_host(model, changes)
    read_before_guessing(model, setup, decoder, changes)
    if group is None and hasattr(model, "decode_blocks"):
        decoder.stand_in = vars(model).get("forward")
        changes.set(model, "_kept_program", KeptProgram())
        changes.set(model, "_sample", functools.partial(sample, model, setup, decoder))
        changes.set(model, "generate_batch", BatchGeneration(model, setup, decoder).generate_batch)
    else:
        run_ahead(model, changes, None if group is None else group.control)
    if lightning_layers(model.config):
        changes.set(model, "init_continuous_batching", refuse_pages)
    watch_inputs(model, changes)
    if group is not None:
        # Outside of whatever may refuse a call: what one rank is refused, the others are told.
        share_generation(model, group, changes, _shared_settings(setup))


def _shared_settings(setup: GenerationSetup) -> dict[str, Any]:
    """What decides which messages the ranks send each other, and when."""
    return {
        "prefill_chunk_size": setup.prefill_chunk_size,
        "cache_dtype": str(read_cache_dtype(setup.cache_dtype)),
        "cuda_graph": setup.cuda_graph,
    }


def _replace_minimax(changes: instance.Setup, model: PreTrainedModel, group: SequenceGroup | None) -> None:
    # Imported here: it imports the model of transformers.
    from hf_longattn.modeling.lightning import minimax

    minimax.replace_lightning_layers(changes, model)
    minimax.replace_cache(changes, model, group)


def _cache_kind(model: PreTrainedModel, group: SequenceGroup | None) -> CacheKind:
    """What `LongContextCache.load` makes where it is given this model."""
    if model.config.model_type != "minimax":
        return CacheKind(model, group, LongContextCache, ShardedCache)
    from hf_longattn.modeling.lightning.minimax import MiniMaxLongContextCache, MiniMaxShardedCache

    return CacheKind(model, group, MiniMaxLongContextCache, MiniMaxShardedCache)


def _make_group(accelerator: Any, device_mesh: Any, setup: GenerationSetup) -> SequenceGroup | None:
    """The processes that share a prompt, or None for this one alone."""
    group = SequenceGroup.find(accelerator, device_mesh, setup.timeout)
    return group if group is not None and group.control.world_size > 1 else None


def _prepare_cache(
    model: PreTrainedModel,
    setup: GenerationSetup,
    caches: CacheKind,
    original: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Gives `generate` our cache where it would have made a dynamic one, and leaves others alone."""
    before = model_kwargs.get("past_key_values")
    if isinstance(before, LongContextCache):
        before.check_model(model.config)
        _check_continuation(int(before.get_seq_length()), model_kwargs.get("attention_mask"))
    original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    made = model_kwargs.get("past_key_values")
    if caches.group is not None and before is None and made is not None and hasattr(model, "shared_cache"):
        _check_dtype_of(made, setup, False)
        model_kwargs["past_key_values"] = cast(Any, model).shared_cache(caches.group)
        return
    wanted = generation_config.cache_implementation in (None, "dynamic")
    # A model with a cache of its own kind keeps it; one of ours can be had in 8 bits, or shared.
    plain = setup.cache_dtype is None and caches.group is None
    ours = (DynamicCache,) if plain else (DynamicCache, LongContextCache)
    if before is not None or not wanted or type(made) not in ours:
        _check_dtype_of(made, setup, before is not None)
        return
    model_kwargs["past_key_values"] = caches.make(max_cache_length, setup.cache_dtype)
    if generation_config.is_assistant:
        model_kwargs["past_key_values"].activate_past_recording()


def _check_continuation(held: int, mask: Any) -> None:
    """Refuses what transformers would get wrong, silently, on a cache that holds tokens."""
    # It tells by the mask whether the ids are those of the whole sequence.
    if mask is not None and mask.ndim == 2 and mask.shape[1] <= held:
        raise ValueError(
            f"`attention_mask` covers {mask.shape[1]} tokens, but `past_key_values` holds {held}; pass the "
            "ids of the whole sequence, or those of the new tokens with a mask of both: ones for what is "
            "held, then the mask of the new tokens."
        )


def _check_dtype_of(cache: Any, setup: GenerationSetup, given: bool) -> None:
    """Refuses a cache, `given` by the caller or made by the model, that should be in 8 bits and is not."""
    if setup.cache_dtype is None or cache is None:
        return
    if given and isinstance(cache, LongContextCache):
        cache.check_dtype(setup.cache_dtype, "`prepare_generation`")
        return
    raise ValueError(
        f"`cache_dtype`={setup.cache_dtype!r} cannot be honoured: this call keeps keys and values in a "
        f"{type(cache).__name__}; leave `cache_dtype` out for it."
    )
