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
from typing import Any, Literal, cast

import torch
from torch import OutOfMemoryError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.offloaded import full_layers, offload
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.cache.snapshot import Snapshot
from hf_longattn.devices import free_memory, host_memory
from hf_longattn.generation.block_planning import BlockDemand, BlockShape
from hf_longattn.generation.demand import RESERVE, Demand
from hf_longattn.generation.offloading import held_buffers, is_empty, place_layers
from hf_longattn.generation.prefill import asked_chunk, pick_chunk
from hf_longattn.generation.sizes import Ranks, layer_bytes, number_of_layers, state_bytes
from hf_longattn.instance import Setup
from hf_longattn.kernels.dispatch import warn_slow

_GIB = 1024**3
_PLANNED = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Call:
    """One call of `generate`, as far as its memory is concerned.

    Args:
        model: that generates.
        demand: what it asks for.
    """

    model: PreTrainedModel
    demand: Demand

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer, the last of which is never cached."""
        return self.demand.total + 1

    def fits(self, room: int) -> bool:
        """Whether the call fits.

        Args:
            room: bytes.
        """
        return self.demand.need(self.demand.total) <= room

    def fewest_offloaded(self, room: int) -> int | None:
        """The fewest layers in host memory with which the call fits; None where none do, or the host is full.

        Args:
            room: bytes.
        """
        demand = self.demand
        fewest = demand.fewest_offloaded(room)
        if not fewest:
            return fewest
        size = fewest * demand.rows * layer_bytes(demand.config, demand.total, demand.dtype)
        return fewest if size <= host_memory(self.model.device) else None

    def refusal(self, room: int) -> str:
        """Why it does not fit, and what would."""
        demand, fitting = self.demand, self.demand.fitting(room)
        name = "max_new_tokens" if demand.prompt < fitting else "input_ids"
        rows = f" in each of {demand.rows} rows" if demand.rows > 1 else ""
        ways = ["ask for fewer tokens"]
        if demand.rows > 1:
            ways.append("pass fewer rows or beams at a time")
        if demand.has_smaller_cache:
            ways.append("keep the cache in 8 bits with `cache_dtype='int8'`")
        if demand.ranks.total == 1 and not demand.past and (fewest := self.fewest_offloaded(room)):
            ways.append(f"keep {fewest} layers in host memory with `offload_layers='auto'`, which is slower")
        ways.append("share the prompt among more GPUs with `accelerator=`")
        return (
            f"`{name}`: a prompt of {demand.prompt:,} tokens and {self.tokens - demand.prompt:,} new{rows} "
            f"need {demand.need(demand.total) / _GIB:.2f} GiB for keys, values and a chunk of the prompt, "
            f"and {room / _GIB:.2f} GiB are there on {self.model.device}; {fitting:,} tokens of prompt and "
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
        if before is not None and not call.fits(before):
            raise ValueError(call.refusal(before))
        _reserve(cache, call.demand.total)

    def _offload_to_fit(self, cache: Any, call: Call, room: int) -> Call:
        """The call with as many layers in host memory as it takes to fit, where that can be had."""
        if not isinstance(cache, LongContextCache):
            return call
        if cache.offload_layers or not is_empty(cache) or not full_layers(cache.layers):
            return call
        count = call.fewest_offloaded(room)
        if not count:
            return call
        demand = call.demand
        offload(cache.layers, count, demand.config)
        warn_slow(
            "offload_layers",
            f"keys and values of {count} of {number_of_layers(demand.config)} layers wait in host memory, so "
            f"that {call.tokens:,} tokens fit on {self.model.device}",
        )
        return replace(call, demand=replace(demand, offload=count))

    def _free(self, cache: Any) -> int | None:
        """The least that any rank has free, so that all of them refuse alike."""
        free = free_memory(self.model.device)
        if free is None or getattr(cache, "group", None) is None:
            return free
        return int(cache.group.control.gather(torch.tensor([free], device=self.model.device)).min())

    def _read(
        self, generation_config: Any, model_kwargs: Any, mode: Any, batch_size: int, max_cache_length: int
    ) -> Call | None:
        """What the call asks for; None where its memory is not ours to count."""
        cache: Any = model_kwargs.get("past_key_values")
        placement = getattr(self.model, "hf_device_map", None) or {}
        config = self.model.config.get_text_config(decoder=True)
        if cache is None or len(set(placement.values())) > 1:
            return None
        # A cache of another kind is refused by the forward.
        has_blocks = hasattr(self.model, "decode_blocks") and hasattr(cache, "keys_per_block")
        if not has_blocks and not _is_counted(cache, config):
            return None
        group = getattr(cache, "group", None)
        ranks = Ranks(1 if group is None else group.world_size, getattr(self.model, "tp_size", None) or 1)
        mask = model_kwargs.get("attention_mask")
        new = generation_config.max_new_tokens or 1
        known = isinstance(mask, torch.Tensor) and mask.ndim == 2
        prompt = mask.shape[1] if known else max_cache_length + 1 - new
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        asked = asked_chunk(self.chunk, generation_config)
        cache.fitting_chunk = None
        fields = {
            "config": config,
            "rows": rows,
            "prompt": prompt,
            # The ids may be those of the new tokens alone, with a mask of all.
            "total": max(max_cache_length, prompt + new - 1),
            "past": int(cache.get_seq_length()),
            "activations": self.model.dtype,
            "ranks": ranks,
        }
        count = self._of_blocks if has_blocks else self._of_tokens
        return Call(self.model, count(cache, asked, fields))

    def _of_tokens(self, cache: Any, asked: int | None, fields: dict[str, Any]) -> Demand:
        """The demand on a cache of tokens."""
        rows, ranks = fields["rows"], fields["ranks"].sequence
        return Demand(
            **fields,
            spare=_spare(cache),
            dtype=getattr(cache, "cache_dtype", None) or self.model.dtype,
            chunk=(asked or pick_chunk(rows, self.model.device, ranks)) * rows,
            offload=cache.offload_layers,
        )

    def _of_blocks(self, cache: Any, asked: int | None, fields: dict[str, Any]) -> Demand:
        """The demand on a cache of blocks, which may fill the buffers of a program that was kept."""
        model, rows = self.model, fields["rows"]
        block = cast(Any, model.base_model).block_decoder.config
        shape = BlockShape(fields["config"], block, rows, model.dtype, fields["ranks"], model.device)
        chunk = asked * rows if asked else shape.most
        demand = BlockDemand(**fields, dtype=model.dtype, chunk=chunk, shape=shape)
        kept = vars(model).get("_kept_program")
        held = [cache] if kept is None or kept.program is None else [cache, kept.program.decoding.cache]
        layers = [layer for each in held for layer in each.layers if layer.is_initialized]
        # What makes way for this call, or is filled by it, is not what the past takes.
        room = sum(layer._keys.nbytes + layer._values.nbytes for layer in layers)
        return replace(demand, spare=room - demand.kept(demand.past))

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
            # What stops one rank stops all, and their shares must fit together afterwards. Nobody knows which
            # guesses are tokens of the answer.
            if snapshot is not None and (isinstance(cache, ShardedCache) or snapshot.cache.holds_guesses):
                snapshot.restore()
            elif snapshot is not None:
                # Some layers may have read a chunk that the others have not.
                snapshot.settle()
            raise

    def _explain(self, error: OutOfMemoryError, left: str) -> str:
        reason = str(error).strip().splitlines()[:1]
        words = f"memory ran out on {self.model.device} ({reason[0] if reason else 'no reason given'})"
        now = free_memory(self.model.device)
        if self.call is None or self.before is None or now is None:
            return f"{words}; {left}."
        # What was free was not enough: less of it is promised now.
        room = min(self.before, now) - min(RESERVE, min(self.before, now) // 8)
        demand = self.call.demand
        fitting = max(min(demand.fitting(room), demand.total), demand.past)
        return (
            f"{words}: {self.call.tokens:,} tokens of prompt and answer were asked for and about "
            f"{fitting:,} fit; {left}."
        )


def _is_counted(cache: Any, config: PreTrainedConfig) -> bool:
    """Whether it is a cache of ours, with layers that the counts know."""
    if not isinstance(cache, LongContextCache):
        return False
    kinds, states = get_layer_types_and_kwargs(config)[0], state_bytes(config)
    return all(kind in _PLANNED or index in states for index, kind in enumerate(kinds))


def _fit_chunk(cache: Any, call: Call, room: int) -> Call:
    """The call with chunks that fit, of which its cache is told."""
    shorter = call.demand.shortened(room)
    if shorter is call.demand:
        return call
    cache.fitting_chunk = shorter.chunk // shorter.rows
    return replace(call, demand=shorter)


def _left_behind(cache: Any, snapshot: Snapshot | None) -> str:
    """What the call has left of the model and of the cache that it was given."""
    if cache is None or snapshot is not None:
        return "the model and the cache are as they were before the call"
    return (
        f"the model is as it was before the call, and `past_key_values`, a {type(cache).__name__}, may hold "
        "a part of the call; pass a new one"
    )


def _reserve(cache: Any, tokens: int) -> None:
    """Makes room for a whole call in layers that have none: memory that moves is a graph captured anew."""
    if isinstance(cache, LongContextCache) and not isinstance(cache, ShardedCache):
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
