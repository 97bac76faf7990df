"""The cache layer of lightning attention: a state of constant size in the place of keys and values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_longattn.cache.guarded_states import GuardedStates
from hf_longattn.cache.preallocated import Clock, grown_capacity, lasting_buffers, tokens_to_drop
from hf_longattn.cache.token_rows import TokenRows, scan_rows
from hf_longattn.kernels.dispatch import warn_slow
from hf_longattn.kernels.lightning_attention import lightning_attention_step

IMPLEMENTATION = "lightning_attention"
# Recorded tokens beyond which a new recording begins with the next update.
MAX_RECORDED = 256


def lightning_layers(config: PreTrainedConfig) -> frozenset[int]:
    """The layers of a model that are lightning attention.

    Args:
        config: of a model with `attn_implementation="lightning_attention"`, or a `LightningConfig`; its
            `lightning_layers` lists the indices, all layers where it is None or missing. Of MiniMax, the
            `linear_attention` layers.

    Returns:
        indices; none where the model is of another kind.

    Raises:
        ValueError: an index is not a layer of the model.
    """
    if config.model_type == "minimax":
        return frozenset(i for i, kind in enumerate(config.layer_types) if kind == "linear_attention")
    if IMPLEMENTATION not in (config._attn_implementation, config.model_type):
        return frozenset()
    number = config.num_hidden_layers
    chosen = getattr(config, "lightning_layers", None)
    chosen = range(number) if chosen is None else chosen
    wrong = [chosen]
    if isinstance(chosen, (list, tuple, set, frozenset, range)):
        wrong = [index for index in chosen if not isinstance(index, int) or not 0 <= index < number]
    if wrong:
        raise ValueError(f"`config.lightning_layers` must list layers from 0 to {number - 1}, got {wrong}.")
    return frozenset(chosen)


def keeps_latents(config: PreTrainedConfig) -> bool:
    """Whether a model of latent attention (DeepSeek) keeps compressed keys and expands them behind its cache.

    Args:
        config: of the model.
    """
    return bool(getattr(config, "kv_lora_rank", None))


def recurrent_layers(config: PreTrainedConfig) -> frozenset[int]:
    """The lightning layers whose cache is a state: all, unless the model needs their keys.

    Then lightning attention reads all that was kept at every step.

    Args:
        config: as for `lightning_layers`.
    """
    found = lightning_layers(config)
    if found and (reason := _needs_keys(config)):
        warn_slow(IMPLEMENTATION, f"models of type {config.model_type!r} {reason} at every step")
        return frozenset()
    return found


def _needs_keys(config: PreTrainedConfig) -> str | None:
    """Why the keys of lightning layers are kept and no state, or None."""
    if keeps_latents(config):
        return "keep compressed keys, not a state, and expand all of them"
    if getattr(config, "num_kv_shared_layers", 0):
        # A state has the decay of one layer in it; the layer that shares the keys has another one.
        return "have layers that read keys of others, which are kept in the place of a state, and read all"
    return None


def check_whole_keys(config: PreTrainedConfig, name: str, got: str) -> None:
    """Refuses a cache of which lightning layers that read keys could not have all, in the model's dtype.

    Args:
        config: as for `lightning_layers`.
        name: of the argument that asks for the cache.
        got: what it asks for.

    Raises:
        ValueError: there are such layers.
    """
    if kept := sorted(lightning_layers(config) - recurrent_layers(config)):
        raise ValueError(
            f"`{name}`: layers {kept} of this {config.model_type!r} model are {IMPLEMENTATION!r} that reads "
            f"the keys of all tokens as the model made them, got {got}; generate in one process, on a cache "
            "in the dtype of the model."
        )


def is_empty(cache: Cache, layer_idx: int = 0) -> bool:
    """Whether a cache has seen no token, without waiting for the device.

    Args:
        cache: of any kind.
        layer_idx: whose tokens are counted.

    Returns:
        False where the length is on the device, as in a captured step: only a filled cache has such steps.
    """
    length = cache.get_seq_length(layer_idx)
    return not isinstance(length, Tensor) and length == 0


@dataclass
class Recording:
    """What `crop` needs to go back: a state, and the tokens since."""

    state: Tensor | None
    tokens: list[tuple[Tensor, Tensor, Tensor | None]]

    def __len__(self) -> int:
        return sum(key.shape[2] for key, _, _ in self.tokens)


class RecurrentStates(GuardedStates):
    """New keys that a state lies in front of: their shape, without storage.

    Args:
        held: (B, G, T, K), the new keys.
        layer: the cache layer that has the state.
    """

    held: Tensor
    recurrent_layer: Any

    def __new__(cls, held: Tensor, layer: Any) -> "RecurrentStates":
        """A tensor in the shape of `held`."""
        states = cls.empty(held.shape, held.dtype, held.device)
        states.held, states.recurrent_layer = held, layer
        return states

    def refuse(self, caller: str) -> NoReturn:
        """Names the implementation that reads a state.

        Args:
            caller: what was about to take the new keys for all there are.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`past_key_values` keeps a state in the place of the keys of this layer, which "
            f"{IMPLEMENTATION!r} alone reads, got {caller}. Set that implementation again, or pass a fresh "
            "cache, made from this model's config; this one may hold a part of the call."
        )


class RecurrentLayer(CacheLayerMixin):
    """The (B, H, K, V) fp32 state of one lightning-attention layer, and the number of tokens it has seen.

    It stands in a cache beside key/value layers. `update` only counts; the tokens enter the state in
    `attend`, which lightning attention calls on the layer that it finds at the keys.

    Args:
        capacity: that of the key/value layers beside it. A state has no length, but all layers share a mask,
            whose columns in a CUDA graph are as many as there is room for.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._state: Tensor | None = None
        self.length = 0
        self.capacity = capacity
        self.clock: Clock | None = None
        self.record_past = False
        self._slopes: Tensor | None = None
        self._recording: Recording | None = None

    @property
    def recurrent_state(self) -> Tensor | None:
        """(B, H, K, V), None before the first token."""
        return self._state

    @recurrent_state.setter
    def recurrent_state(self, state: Tensor | None) -> None:
        """Takes a state as an ordinary tensor, in `torch.inference_mode` too."""
        if state is not None and state.is_inference():
            with lasting_buffers():
                state = state.clone()
        self._state = state

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first token."""
        return -1 if self.recurrent_state is None else self.recurrent_state.shape[0]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first scan makes the state."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Counts (B, G, T, K) new keys; returns them as `RecurrentStates`, and the values."""
        if not self.is_initialized:
            self.capacity = max(self.capacity, key_states.shape[2])
            self.lazy_initialization(key_states, value_states)
        if self.recurrent_state is not None and key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"`past_key_values` holds {self.batch_size} sequences, got a batch of {key_states.shape[0]}; "
                "pass a new cache, or `cache.fork(batch_size)`."
            )
        if self.clock is None:
            self.make_room(self._count_new(key_states))
            self.length += self._count_new(key_states)
        return RecurrentStates(key_states, self), value_states

    def _count_new(self, key_states: Tensor) -> int:
        return key_states.shape[2]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scale: float, rows: TokenRows
    ) -> Tensor:
        """Takes the tokens that `update` counted into the state, and lets them look at it.

        Args:
            query: (B, H, T, K).
            key: (B, G, T, K).
            value: (B, G, T, V).
            slopes: (H,) fp32.
            scale: factor on the output.
            rows: which of the tokens exist; documents only before the first token.

        Returns:
            (B, T, H, V).
        """
        self._slopes = slopes
        if self.record_past:
            self._record(key, value, rows.exists)
        else:
            # What was recorded before is not the last any more.
            self._recording = None
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if self.recurrent_state is not None and query.shape[2] == 1 and not gradient:
            return _step(query, key, value, slopes, scale, rows.exists, self.recurrent_state)
        before = self.recurrent_state
        output, state = scan_rows(query, key, value, slopes, scale, rows, before, stateful=True)
        assert state is not None
        self._take(state, gradient)
        return output

    def _take(self, state: Tensor, gradient: bool) -> None:
        # In place: a CUDA graph goes on writing where it was captured.
        before = self.recurrent_state
        self.recurrent_state = state if before is None or gradient else before.copy_(state)

    @property
    def mask_length(self) -> int:
        """Columns of the mask behind `update`: all tokens, or all that there is room for in a CUDA graph."""
        return self.length if self.clock is None else self.capacity

    @property
    def group(self) -> tuple[Any, ...]:
        """Layers that are equal in this advance together."""
        return (self.is_sliding, self.capacity, self.device)

    def set_clock(self, clock: Clock) -> None:
        """Tells the device how many tokens this layer, and all of its group, has seen."""
        clock.set(self.length, 0)

    def reserve(self, tokens: int) -> None:
        """Sets the capacity as the key/value layers do."""
        if not self.is_initialized:
            self.capacity = max(self.capacity, tokens)

    def make_room(self, count: int) -> None:
        """Grows the capacity as the key/value layers do."""
        if self.length + count > self.capacity:
            self.capacity = grown_capacity(self.capacity, self.length + count)

    def advanced(self, count: int) -> None:
        """Counts tokens that a CUDA graph has taken in."""
        self.length += count

    def _record(self, key: Tensor, value: Tensor, exists: Tensor | None) -> None:
        if self._recording is None or len(self._recording) > MAX_RECORDED:
            state = self.recurrent_state
            self._recording = Recording(None if state is None else state.clone(), [])
        self._recording.tokens.append((key, value, exists))

    def activate_past_recording(self) -> None:
        """Keeps the tokens of the next updates until `crop`, which may then undo them.

        At least the last update can be undone, and as many before it as fit in 256 tokens.
        """
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(all tokens there will be, 0) once `query_length` are appended, as for a layer that keeps all."""
        if self.clock is not None:
            return self.capacity, self.clock.offset
        return self.length + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens seen so far, padding included."""
        return self.length if self.clock is None else self.clock.write + self.clock.offset

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: back to the recorded state, and forward again over what is kept.

        Args:
            tokens_to_remove: a negative number of tokens to drop. A positive number is the length to keep.

        Raises:
            RuntimeError: the tokens were not recorded.
        """
        drop = tokens_to_drop(self, tokens_to_remove)
        self.check_drop(drop)
        if drop == self.length:
            self.reset()
            return
        if drop > 0:
            self._roll_back(drop)
        self._recording = None

    @property
    def recorded(self) -> int:
        """How many of the last tokens can be undone, short of all."""
        return 0 if self._recording is None else len(self._recording)

    def check_drop(self, count: int) -> None:
        """Refuses to forget tokens that were not recorded."""
        if self.recorded < count < self.length:
            raise RuntimeError(
                f"`crop` would remove {count} tokens, but this lightning-attention layer has recorded the "
                f"last {self.recorded}; call `activate_past_recording` before the tokens are added, or keep "
                "a copy of the cache."
            )

    def _roll_back(self, drop: int) -> None:
        assert self._recording is not None
        keys, values, masks = zip(*self._recording.tokens, strict=True)
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)
        state, kept = self._recording.state, len(self._recording) - drop
        if kept:
            exists = None
            if any(mask is not None for mask in masks):
                shapes = [key.shape[::2] for key, _, _ in self._recording.tokens]
                masks = [
                    keys.new_ones(shape[0], part.shape[2], dtype=torch.bool) if mask is None else mask
                    for mask, shape, (part, _, _) in zip(masks, shapes, self._recording.tokens, strict=True)
                ]
                exists = torch.cat(masks, 1)[:, :kept]
            _, state = self._replay(keys[:, :, :kept], values[:, :, :kept], exists, state)
        self.recurrent_state = state
        self.length -= drop

    def _replay(
        self, key: Tensor, value: Tensor, exists: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert self._slopes is not None
        # Only the state counts; any query will do.
        query = key.new_zeros(key.shape[0], len(self._slopes), *key.shape[2:])
        return scan_rows(query, key, value, self._slopes, 1.0, TokenRows(exists), state, stateful=True)

    def reset(self) -> None:
        """Forgets everything."""
        self.recurrent_state = self._recording = None
        self.length = 0
        self.is_initialized = False

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.recurrent_state is not None:
            self.recurrent_state = change(self.recurrent_state)
        if self._recording is not None:
            state, tokens = self._recording.state, self._recording.tokens
            changed = [(change(k), change(v), None if m is None else change(m)) for k, v, m in tokens]
            self._recording = Recording(None if state is None else change(state), changed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts row `beam_idx[b]` in the place of row b."""
        state = self.recurrent_state
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))
        if state is not None and self.recurrent_state is not None:
            # In the memory that a CUDA graph knows.
            self.recurrent_state = state.copy_(self.recurrent_state)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times in place of it."""
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices`."""
        self._change_rows(lambda rows: rows[indices.to(rows.device)])

    def offload(self) -> None:
        """Moves the state to the CPU."""
        if self.recurrent_state is not None:
            self.recurrent_state = self.recurrent_state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Moves an offloaded state back to the device of the layer."""
        if self.recurrent_state is not None:
            self.recurrent_state = self.recurrent_state.to(self.device, non_blocking=True)

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs: safetensors-ready."""
        return {} if self.recurrent_state is None else {"recurrent_state": self.recurrent_state.contiguous()}

    def load_state(self, state: dict[str, Tensor], length: int) -> None:
        """Takes over what `state` gave; `length` is the number of tokens seen."""
        self.reset()
        self.recurrent_state, self.length = state.get("recurrent_state"), length
        self.capacity = max(self.capacity, length)
        if self.recurrent_state is not None:
            self.lazy_initialization(self.recurrent_state, self.recurrent_state)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    exists: Tensor | None,
    state: Tensor,
) -> Tensor:
    """One token a row, state in place. A row whose token does not exist keeps its state: its slopes are 0."""
    if exists is None:
        return lightning_attention_step(query, key, value, slopes, state, scale=scale).transpose(1, 2)
    batch, heads = query.shape[:2]
    value = value.masked_fill(~exists[:, None, :, None], 0)
    # Rows become heads, so that each has slopes of its own.
    query, key, value = (tensor.flatten(0, 1)[None] for tensor in (query, key, value))
    own = (exists * slopes).flatten()
    output = lightning_attention_step(query, key, value, own, state.flatten(0, 1)[None], scale=scale)
    return output[0].unflatten(0, (batch, heads)).transpose(1, 2)
