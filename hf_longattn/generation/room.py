"""Whether a call of `generate` fits the memory that is free, and what is left when it runs out after all.

Before any work, the keys and values that a call will add and the activations of one chunk are held against
the free memory of the device; on a CPU against all memory that the machine has, for what the system can free
is not known. The counts are those of `hf-longattn plan`. Layers that wait in host memory are put there, too,
before any work. Where memory runs out in the middle of a call, the cache that the caller passed is taken back
to what it held, and the error says how many tokens fit.
"""

import functools
import traceback
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import OutOfMemoryError
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.offloaded import full_layers, offload
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.cache.snapshot import Snapshot
from hf_longattn.devices import free_memory, host_memory
from hf_longattn.generation.demand import RESERVE, Demand
from hf_longattn.generation.offloading import held_buffers, is_empty, place_layers
from hf_longattn.generation.prefill import asked_chunk, pick_chunk
from hf_longattn.generation.sizes import Ranks, layer_bytes, number_of_layers, state_bytes
from hf_longattn.instance import Setup
from hf_longattn.kernels.dispatch import warn_slow

_GIB = 1024**3
_PLANNED = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True)
class Call(Demand):
    """One call of `generate`, as far as its memory is concerned.

    Args:
        model: that generates.
    """

    model: PreTrainedModel

    def fewest_offloaded(self, room: int) -> int | None:
        """The fewest layers in host memory with which the call fits; None where none do, or the host is full.

        Args:
            room: bytes.
        """
        fewest = super().fewest_offloaded(room)
        size = (fewest or 0) * self.rows * layer_bytes(self.config, self.total, self.dtype)
        return fewest if size <= host_memory(self.model.device) else None

    def refusal(self, room: int) -> str:
        """Why it does not fit, and what would."""
        fitting = self.fitting(room)
        name = "max_new_tokens" if self.prompt < fitting else "input_ids"
        rows = f" in each of {self.rows} rows" if self.rows > 1 else ""
        ways = ["ask for fewer tokens"]
        if self.rows > 1:
            ways.append("pass fewer rows or beams at a time")
        if self.dtype.itemsize > 1:
            ways.append("keep the cache in 8 bits with `cache_dtype='int8'`")
        if self.ranks.total == 1 and not self.past and (fewest := self.fewest_offloaded(room)):
            ways.append(f"keep {fewest} layers in host memory with `offload_layers='auto'`, which is slower")
        ways.append("share the prompt among more GPUs with `accelerator=`")
        return (
            f"`{name}`: a prompt of {self.prompt:,} tokens and {self.total + 1 - self.prompt:,} new{rows} "
            f"need {self.need(self.total) / _GIB:.2f} GiB for keys, values and a chunk of the prompt, and "
            f"{room / _GIB:.2f} GiB are there on {self.model.device}; {fitting:,} tokens of prompt and "
            f"answer fit. To make it fit, {'; '.join(ways)}."
        )


class Room:
    """Watches over the memory of the calls of one prepared model.

    Args:
        model: the transformers model.
        chunk: tokens of a chunk that the set-up asks for, or None.
        offload_layers: how many layers wait in host memory, or "auto".
    """

    def __init__(
        self, model: PreTrainedModel, chunk: int | None, offload_layers: int | Literal["auto"] = 0
    ) -> None:
        self.model, self.chunk, self.offload_layers = model, chunk, offload_layers
        self.call: Call | None = None
        self.before: int | None = None

    def watch(self, changes: Setup) -> None:
        """Puts itself around `generate`.

        Args:
            changes: where the change is noted.
        """
        original: Any = self.model.generate
        changes.set(self.model, "generate", functools.wraps(original)(functools.partial(self._run, original)))

    def prepare_cache(self, prepare: Any, *args: Any) -> None:
        """Makes the cache of a call, and refuses the call if it cannot fit.

        Args:
            prepare: `_prepare_cache_for_generation`, which makes the cache.
            args: its arguments.

        Raises:
            ValueError: with the number of tokens that fit.
        """
        prepare(*args)
        cache = args[1].get("past_key_values")
        if isinstance(self.offload_layers, int):
            place_layers(cache, self.offload_layers, self.model.config.get_text_config(decoder=True))
        # What is noted for the words of an error may be another thread's before this returns.
        call = self.call = self._read(*args)
        if call is None:
            return
        before = self.before = self._free(cache)
        if before is not None and not asked_chunk(self.chunk, args[0]):
            call = self.call = _fit_chunk(cache, call, before)
        if before is not None and self.offload_layers == "auto":
            call = self.call = self._offload_to_fit(cache, call, before)
        if before is not None and call.need(call.total) > before:
            raise ValueError(call.refusal(before))
        _reserve(cache, call.total)

    def _offload_to_fit(self, cache: Any, call: Call, room: int) -> Call:
        """The call with as many layers in host memory as it takes to fit, where that can be had."""
        if cache.offload_layers or not is_empty(cache) or not full_layers(cache.layers):
            return call
        count = call.fewest_offloaded(room)
        if not count:
            return call
        offload(cache.layers, count, call.config)
        warn_slow(
            "offload_layers",
            f"keys and values of {count} of {number_of_layers(call.config)} layers wait in host memory, so "
            f"that {call.total + 1:,} tokens fit on {self.model.device}",
        )
        return replace(call, offload=count)

    def _free(self, cache: Any) -> int | None:
        """The least that any rank has free, so that all of them refuse alike."""
        free = free_memory(self.model.device)
        if free is None or not isinstance(cache, ShardedCache):
            return free
        return int(cache.group.control.gather(torch.tensor([free], device=self.model.device)).min())

    def _read(
        self, generation_config: Any, model_kwargs: Any, mode: Any, batch_size: int, max_cache_length: int
    ) -> Call | None:
        """What the call asks for; None where its memory is not ours to count."""
        cache = model_kwargs.get("past_key_values")
        placement = getattr(self.model, "hf_device_map", None) or {}
        if not isinstance(cache, LongContextCache) or len(set(placement.values())) > 1:
            return None
        config = self.model.config.get_text_config(decoder=True)
        kinds, states = get_layer_types_and_kwargs(config)[0], state_bytes(config)
        if any(kind not in _PLANNED and index not in states for index, kind in enumerate(kinds)):
            return None
        ranks = cache.group.world_size if isinstance(cache, ShardedCache) else 1
        mask = model_kwargs.get("attention_mask")
        new = generation_config.max_new_tokens or 1
        known = isinstance(mask, torch.Tensor) and mask.ndim == 2
        prompt = mask.shape[1] if known else max_cache_length + 1 - new
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        chunk = asked_chunk(self.chunk, generation_config) or pick_chunk(rows, self.model.device, ranks)
        cache.fitting_chunk = None
        return Call(
            model=self.model,
            config=config,
            rows=rows,
            prompt=prompt,
            # The ids may be those of the new tokens alone, with a mask of all.
            total=max(max_cache_length, prompt + new - 1),
            past=int(cache.get_seq_length()),
            spare=_spare(cache),
            dtype=getattr(cache, "cache_dtype", None) or self.model.dtype,
            activations=self.model.dtype,
            chunk=chunk * rows,
            ranks=Ranks(ranks, getattr(self.model, "tp_size", None) or 1),
            offload=cache.offload_layers,
        )

    def _run(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        self.call = self.before = None
        snapshot = Snapshot(cache) if isinstance(cache, LongContextCache) else None
        try:
            return original(*args, **kwargs)
        except OutOfMemoryError as error:
            # What the frames of the call hold would stay as long as the error does.
            traceback.clear_frames(error.__traceback__)
            if snapshot is not None:
                snapshot.restore()
            raise OutOfMemoryError(self._explain(error, _left_behind(cache, snapshot))) from error
        except BaseException:
            # What stops one rank stops all, and their shares must fit together afterwards.
            if snapshot is not None and isinstance(cache, ShardedCache):
                snapshot.restore()
            raise

    def _explain(self, error: OutOfMemoryError, left: str) -> str:
        reason = str(error).strip().splitlines()[:1]
        words = f"memory ran out on {self.model.device} ({reason[0] if reason else 'no reason given'})"
        now = free_memory(self.model.device)
        if self.call is None or self.before is None or now is None:
            return f"{words}; {left}."
        # What was free was not enough: less of it is promised now.
        room = min(self.before, now) - min(RESERVE, min(self.before, now) // 8)
        fitting = max(min(self.call.fitting(room), self.call.total), self.call.past)
        return (
            f"{words}: {self.call.total + 1:,} tokens of prompt and answer were asked for and about "
            f"{fitting:,} fit; {left}."
        )


def _fit_chunk(cache: LongContextCache, call: Call, room: int) -> Call:
    """The call with chunks that fit, of which its cache is told."""
    shorter = call.shortened(room)
    if shorter is not call:
        cache.fitting_chunk = shorter.chunk // call.rows
    return shorter


def _left_behind(cache: Any, snapshot: Snapshot | None) -> str:
    """What the call has left of the model and of the cache that it was given."""
    if cache is None or snapshot is not None:
        return "the model and the cache are as they were before the call"
    return (
        f"the model is as it was before the call, and `past_key_values`, a {type(cache).__name__}, may hold "
        "a part of the call; pass a new one"
    )


def _reserve(cache: LongContextCache, tokens: int) -> None:
    """Makes room for a whole call in layers that have none: memory that moves is a graph captured anew."""
    if not isinstance(cache, ShardedCache):
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.reserve(tokens)


def _spare(cache: LongContextCache) -> int:
    """Bytes of the room that the layers have on the device beyond what they hold."""
    spare = 0
    for buffer, held in held_buffers(cache):
        left = max(buffer.shape[2] - held, 0)
        spare += buffer.numel() // max(buffer.shape[2], 1) * left * buffer.element_size()
    return spare
