"""Reading a prompt a chunk at a time: exact with padding, on a filled cache, and for any chunk size."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from hf_longattn.adapters import counts_tokens
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.fusion import fused_prompt
from hf_longattn.kernels.mask_runs import look_for_runs, remember_runs

if TYPE_CHECKING:
    from hf_longattn.generation.graph import GraphDecoder
    from hf_longattn.generation.setup import GenerationSetup

# Tokens (all rows of the batch together) a chunk. On a GPU a chunk this long keeps matrix products at full
# rate; on a CPU it keeps the progress bar moving.
GPU_CHUNK_TOKENS = 8192
_CPU_CHUNK_TOKENS = 512
# Processes that share a chunk make it longer, up to this many times: its queries meet on every one of them.
MOST_CHUNKS = 4
_TILE = 128
# Inputs that cannot be cut with the token ids: embeddings, and all that a picture or a sound comes with.
_WHOLE = ("inputs_embeds", "mm_token_type_ids", *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL)


def prefill(
    model: PreTrainedModel,
    setup: "GenerationSetup",
    original: Any,
    decoder: "GraphDecoder",
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool = True,
) -> Any:
    """Stands in for `GenerationMixin._prefill`: the same outputs, with memory for one chunk.

    Args:
        model: the model that generates.
        setup: the settings of `prepare_generation`.
        original: the model's own method, for what is not a prompt of token ids on a cache.
        decoder: told that a new call begins.
        input_ids: (B, T) the whole prompt, or only what a filled cache does not hold yet.
        generation_config: of this call.
        model_kwargs: cache, mask and positions, as `generate` made them.
        is_first_iteration: handed on to `prepare_inputs_for_generation`.

    Returns:
        the output of the last chunk: its last logits are those of the whole prompt.
    """
    cache = model_kwargs.get("past_key_values")
    decoder.forget(cache)
    asked = setup.prefill_chunk_size or generation_config.prefill_chunk_size
    generation_config = copy.copy(generation_config)
    # The method of transformers slices a chunked prompt from 0, whatever the cache holds.
    generation_config.prefill_chunk_size = None
    if isinstance(cache, ShardedCache) and (name := counts_tokens(model)) is not None:
        raise ValueError(
            f"`model`: the activated LoRA of `{name}` counts tokens from the end of its input, of which each "
            "process would see its share; generate in one process."
        )
    if cache is None or not _is_plain_prompt(model, cache, generation_config, model_kwargs):
        return original(input_ids, generation_config, model_kwargs, is_first_iteration)
    past = int(cache.get_seq_length())
    mask = model_kwargs.get("attention_mask")
    whole = mask is not None and mask.shape[1] == input_ids.shape[1]
    first = past if whole else 0
    total = input_ids.shape[1] - first
    ranks = cache.group.world_size if isinstance(cache, ShardedCache) else 1
    chunk = asked or pick_chunk(input_ids.shape[0], input_ids.device, ranks)
    if not asked and hasattr(model, "decode_blocks"):
        # The layers that read a prompt see one position a block of tokens.
        chunk *= model.config.block_length
    causal_model = cast(Any, model)
    with _progress_bar(setup.progress, total) as advance, fused_prompt(model):
        if total <= chunk:
            outputs = original(input_ids, generation_config, model_kwargs, is_first_iteration)
            advance(total)
            return outputs
        # A look at every chunk's mask would leave the GPU without work while the next chunk is prepared.
        runs = None if mask is None else look_for_runs(mask)
        if mask is not None:
            # The loop goes on with a tensor that nobody else holds: the caller may write to theirs later.
            model_kwargs["attention_mask"] = mask[:]
            remember_runs(model_kwargs["attention_mask"], runs)
        for start in range(0, total, chunk):
            length = min(chunk, total - start)
            inputs = _chunk_kwargs(model_kwargs, total - start - length)
            if mask is not None:
                inputs["attention_mask"] = inputs["attention_mask"].bool()
                remember_runs(inputs["attention_mask"], runs)
            inputs = causal_model.prepare_inputs_for_generation(
                input_ids[:, : first + start + length],
                next_sequence_length=length,
                is_first_iteration=is_first_iteration and start == 0,
                **inputs,
            )
            if ranks > 1 and start + length < total and "logits_to_keep" in inputs:
                # No logits are wanted here, so that every token can be shared.
                inputs["logits_to_keep"] = input_ids.new_empty(0)
            outputs = causal_model(**inputs, return_dict=True)
            advance(length)
    return outputs


def _is_plain_prompt(
    model: PreTrainedModel, cache: Any, generation_config: Any, model_kwargs: dict[str, Any]
) -> bool:
    mask = model_kwargs.get("attention_mask")
    # Prompt tuning of PEFT puts a method of its own here, which adds tokens to what it takes for the prompt.
    prepares = vars(model).get("prepare_inputs_for_generation")
    return (
        isinstance(cache, Cache)
        and (prepares is None or getattr(prepares, "__self__", None) is model)
        and not cache.is_compileable
        and not model.config.is_encoder_decoder
        and not any(model_kwargs.get(name) is not None for name in _WHOLE)
        and not generation_config.output_hidden_states
        and counts_tokens(model) is None
        and (mask is None or mask.ndim == 2)
        and not _looks_ahead(model, model_kwargs.get("token_type_ids"))
    )


def _looks_ahead(model: PreTrainedModel, kinds: Tensor | None) -> bool:
    """Whether tokens of the prompt see later ones: in BERT and its kin, and in a prefix that is marked so."""
    # Cross-attention is not causal either, beside layers that are.
    # Asked before every prompt: the first layer of most models ends it.
    causal = (part.is_causal for part in model.get_decoder().modules() if hasattr(part, "is_causal"))
    bidirectional = not next(causal, True) and not any(causal)
    return bidirectional or (kinds is not None and bool(kinds.any()))


def _chunk_kwargs(model_kwargs: dict[str, Any], left: int) -> dict[str, Any]:
    """The keywords with everything that runs along the prompt cut `left` tokens before its end.

    Positions may cover the filled cache or only what is new: both end with the prompt.
    """
    cut = dict(model_kwargs)
    for name in ("attention_mask", "position_ids", "token_type_ids"):
        if isinstance(value := cut.get(name), Tensor) and value.shape[-1] > left:
            cut[name] = value[..., : value.shape[-1] - left]
    return cut


def pick_chunk(rows: int, device: torch.device, ranks: int = 1) -> int:
    """Tokens of each row that go through the model at a time, where nobody asks for a number.

    Args:
        rows: of the batch.
        device: of the model.
        ranks: that share a chunk.
    """
    tokens = _CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS
    chunk = max(tokens // rows, 64) * min(ranks, MOST_CHUNKS)
    # Each rank takes two of 2P pieces, which are whole tiles of a kernel wherever a chunk is that long.
    return chunk // (2 * ranks * _TILE) * (2 * ranks * _TILE) or chunk


@contextlib.contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Any]:
    if not show:
        yield lambda count: None
        return
    columns = (
        TextColumn("reading the prompt"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("prefill", total=total, rate="")

        def advance(count: int) -> None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance
