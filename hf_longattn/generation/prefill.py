"""Reading a prompt a chunk at a time: exact with padding, on a filled cache, and for any chunk size."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
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

from hf_longattn.adapters import reads_together
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.fusion import fused_prompt
from hf_longattn.instance import looks_ahead
from hf_longattn.kernels.mask_runs import Runs, look_for_runs, remember_runs

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
# Seconds after which a bar is drawn in the middle of the first chunk.
_BAR_AFTER_S = 0.2
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
    cache: Any = model_kwargs.get("past_key_values")
    decoder.forget(cache)
    asked = asked_chunk(setup.prefill_chunk_size, generation_config)
    generation_config = copy.copy(generation_config)
    # The method of transformers slices a chunked prompt from 0, whatever the cache holds.
    generation_config.prefill_chunk_size = None
    _refuse_adapters(model, cache)
    if not is_plain_prompt(model, cache, generation_config, model_kwargs):
        return original(input_ids, generation_config, model_kwargs, is_first_iteration)
    mask = model_kwargs.get("attention_mask")
    whole = mask is not None and mask.shape[1] == input_ids.shape[1]
    total = input_ids.shape[1] - (int(cache.get_seq_length()) if whole else 0)
    chunk = _chunk_of(model, asked, input_ids, cache)
    with _progress_bar(setup.progress, total) as advance, fused_prompt(model):
        if total <= chunk:
            _look_at_mask(model_kwargs)
            outputs = original(input_ids, generation_config, model_kwargs, is_first_iteration)
            advance(total)
            return outputs
        return _read_chunks(model, input_ids, model_kwargs, (total, 0), chunk, advance, is_first_iteration)


def read_before(
    model: PreTrainedModel,
    setup: "GenerationSetup",
    decoder: "GraphDecoder",
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> None:
    """Reads all of a plain prompt but its last token into the cache, a chunk at a time.

    Args:
        model: the model that generates.
        setup: the settings of `prepare_generation`.
        decoder: told that a new call begins.
        input_ids: (B, T) the whole prompt.
        generation_config: of this call.
        model_kwargs: cache, mask and positions, as `generate` made them.
    """
    cache: Any = model_kwargs["past_key_values"]
    decoder.forget(cache)
    _refuse_adapters(model, cache)
    total = input_ids.shape[1] - int(cache.get_seq_length())
    asked = asked_chunk(setup.prefill_chunk_size, generation_config)
    chunk = _chunk_of(model, asked, input_ids, cache)
    if total > 1:
        with _progress_bar(setup.progress, total - 1) as advance, fused_prompt(model):
            _read_chunks(model, input_ids, model_kwargs, (total, 1), chunk, advance, True)


def _look_at_mask(model_kwargs: dict[str, Any]) -> Runs | None:
    """Where the tokens of the prompt's mask lie: steps behind a prompt without padding take no mask."""
    if (mask := model_kwargs.get("attention_mask")) is None:
        return None
    # The loop goes on with a tensor that nobody else holds: the caller may write to theirs later.
    model_kwargs["attention_mask"], runs = mask[:], look_for_runs(mask)
    remember_runs(model_kwargs["attention_mask"], runs)
    return runs


def _refuse_adapters(model: PreTrainedModel, cache: Any) -> None:
    if isinstance(cache, ShardedCache) and (name := reads_together(model)) is not None:
        raise ValueError(
            f"`model`: the adapter of `{name}` needs all tokens of a prompt at once (activated LoRA, X-LoRA, "
            "Lily), of which each process would see its share; generate in one process."
        )


def _ranks(cache: Any) -> int:
    return cache.group.world_size if isinstance(cache, ShardedCache) else 1


def asked_chunk(prepared: int | None, generation_config: Any) -> int | None:
    """Tokens of a chunk that somebody has asked for, None where nobody has.

    Args:
        prepared: by `prepare_generation`.
        generation_config: of the call.
    """
    return prepared or generation_config.prefill_chunk_size


def _chunk_of(model: PreTrainedModel, asked: int | None, input_ids: Tensor, cache: Any) -> int:
    """Tokens of a chunk: what was asked for, what fits, or what the device likes."""
    if asked or (asked := getattr(cache, "fitting_chunk", None)):
        return asked
    chunk = pick_chunk(input_ids.shape[0], input_ids.device, _ranks(cache))
    # The layers of a Block Transformer that read a prompt see one position a block of tokens.
    return chunk * model.config.block_length if hasattr(model, "decode_blocks") else chunk


def _read_chunks(
    model: PreTrainedModel,
    input_ids: Tensor,
    model_kwargs: dict[str, Any],
    counts: tuple[int, int],
    chunk: int,
    advance: Callable[[int], None],
    is_first_iteration: bool,
) -> Any:
    """The output of the last chunk of a prompt.

    `counts` are the tokens at the end of `input_ids` that the cache does not hold, and how many of them, the
    last, are left out.
    """
    causal_model, mask = cast(Any, model), model_kwargs.get("attention_mask")
    (total, left_out), is_shared = counts, _ranks(model_kwargs["past_key_values"]) > 1
    outputs = None
    # A look at every chunk's mask would leave the GPU without work while the next chunk is prepared.
    runs = _look_at_mask(model_kwargs)
    for start in range(0, total - left_out, chunk):
        length = min(chunk, total - left_out - start)
        left = total - start - length
        inputs = _chunk_kwargs(model_kwargs, left)
        if mask is not None:
            inputs["attention_mask"] = inputs["attention_mask"].bool()
            remember_runs(inputs["attention_mask"], runs)
        inputs = causal_model.prepare_inputs_for_generation(
            input_ids[:, : input_ids.shape[1] - left],
            next_sequence_length=length,
            is_first_iteration=is_first_iteration and start == 0,
            **inputs,
        )
        if is_shared and left and "logits_to_keep" in inputs:
            # No logits are wanted here, so that every token can be shared.
            inputs["logits_to_keep"] = input_ids.new_empty(0)
        outputs = causal_model(**inputs, return_dict=True)
        advance(length)
    return outputs


def is_plain_prompt(
    model: PreTrainedModel, cache: Any, generation_config: Any, model_kwargs: dict[str, Any]
) -> bool:
    """Whether a prompt can be cut: token ids on a cache, of a model in which no token sees a later one.

    Args:
        model: the model that generates.
        cache: of the call, or None.
        generation_config: of the call.
        model_kwargs: mask and all else, as `generate` made them.
    """
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
        and reads_together(model) is None
        and (mask is None or mask.ndim == 2)
        and not looks_ahead(model.get_decoder())
        and not _has_marked_prefix(model_kwargs.get("token_type_ids"))
    )


def _has_marked_prefix(kinds: Tensor | None) -> bool:
    """Whether tokens of a prefix see later ones of it, since they are marked so."""
    return kinds is not None and bool(kinds.any())


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
    """A function that counts the tokens of a chunk on a bar.

    The bar takes the host longer than a short prompt takes the device: it is drawn once there are chunks
    behind the first, or the first takes its time.
    """
    if not show:
        yield lambda count: None
        return
    progress = _make_bar()
    task = progress.add_task("prefill", total=total, rate="")
    late = threading.Timer(_BAR_AFTER_S, progress.start)
    late.daemon = True
    late.start()

    def advance(count: int) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        progress.advance(task, count)
        speed = progress.tasks[0].speed
        progress.update(task, rate=f"{speed:,.0f} tokens/s" if speed else "")
        if not progress.finished:
            progress.start()

    try:
        yield advance
    finally:
        late.cancel()
        # It may be drawing.
        late.join()
        if progress.live.is_started:
            progress.stop()


def _make_bar() -> Progress:
    return Progress(
        TextColumn("reading the prompt"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
