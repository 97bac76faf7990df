"""The cache layer of lightning attention, a state of constant size, and the scan of rows that are not plain.

Padded tokens add nothing to a state and time does not pass for them; packed documents do not see each other.
Both come down to the operator's `cu_seqlens`: what exists is moved to the front of its row, and the rows go
through the scan as documents of one long row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from hf_longattn.cache.preallocated import Clock, grown_capacity
from hf_longattn.kernels.lightning_attention import lightning_attention, lightning_attention_step

IMPLEMENTATION = "lightning_attention"
# Recorded tokens beyond which a new recording begins with the next update.
_MAX_RECORDED = 256


def lightning_layers(config: PreTrainedConfig) -> frozenset[int]:
    """The layers of a model that are lightning attention.

    Args:
        config: of a model with `attn_implementation="lightning_attention"`, or a `LightningConfig`; its
            `lightning_layers` lists the indices, all layers where it is None or missing.

    Returns:
        indices; none where the model is of another kind.

    Raises:
        ValueError: an index is not a layer of the model.
    """
    if IMPLEMENTATION not in (config._attn_implementation, config.model_type):
        return frozenset()
    number = config.num_hidden_layers
    chosen = getattr(config, "lightning_layers", None)
    chosen = range(number) if chosen is None else chosen
    if wrong := [index for index in chosen if not isinstance(index, int) or not 0 <= index < number]:
        raise ValueError(f"`config.lightning_layers` must list layers from 0 to {number - 1}, got {wrong}.")
    return frozenset(chosen)


@dataclass(frozen=True)
class Packing:
    """How the tokens of B rows stand in one row of documents.

    Args:
        bounds: (documents + 1,) cumulative lengths.
        first: (B,) the document that a row's state enters.
        last: (B,) the document that leaves a row's state behind.
        order: (B * T,) the token at each place; None where they stay.
    """

    bounds: Tensor
    first: Tensor
    last: Tensor
    order: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, heads, T, dim) -> (1, heads, B * T, dim)."""
        flat = tensor.transpose(1, 2).flatten(0, 1)
        flat = flat if self.order is None else flat[self.order]
        return flat.transpose(0, 1)[None]

    def unpack(self, tensor: Tensor, batch: int) -> Tensor:
        """(1, heads, B * T, dim) -> (B, T, heads, dim)."""
        flat = tensor[0].transpose(0, 1)
        if self.order is not None:
            flat = flat[torch.argsort(self.order)]
        return flat.unflatten(0, (batch, -1))


class TokenRows:
    """Which of B x T tokens exist, and where documents begin. Worked out once, for all layers of a forward.

    Args:
        exists: (B, T) bool, or None where all do.
        starts: (B, T) bool, the first token of each document; None for one document a row.
        bounds: (documents + 1,) cumulative lengths over the B * T tokens, in place of `starts`.
        look: whether the device may be asked which tokens exist; otherwise the general way is taken.
    """

    def __init__(
        self,
        exists: Tensor | None = None,
        starts: Tensor | None = None,
        bounds: Tensor | None = None,
        look: bool = True,
    ) -> None:
        self.starts, self.bounds = starts, bounds
        self.left_only = self.contiguous = False
        if exists is not None and look:
            begins = exists & ~F.pad(exists[:, :-1], (1, 0))
            flags = torch.stack([exists.all(), exists[:, -1:].all(), begins.sum(-1).max() <= 1])
            full, self.left_only, self.contiguous = flags.tolist()
            exists = None if full else exists
        self.exists = exists
        self._packing: Packing | None = None

    @property
    def is_plain(self) -> bool:
        """Whether every token exists and every row is one document."""
        return self.exists is None and not self.is_packed

    @property
    def is_packed(self) -> bool:
        """Whether rows hold documents."""
        return self.starts is not None or self.bounds is not None

    def edges_only(self, stateful: bool) -> bool:
        """Whether it is enough that padded tokens have no value: they stand where decay matters to nobody.

        Args:
            stateful: whether a state leaves the rows, so that padding on the right would count.
        """
        return not self.is_packed and self.contiguous and (self.left_only or not stateful)

    def _existing(self) -> tuple[Tensor, Tensor]:
        """(B * T,) what exists first in each row, and (B,) how much that is."""
        assert self.exists is not None
        batch, length = self.exists.shape
        row = torch.arange(batch, device=self.exists.device)[:, None] * length
        order = torch.argsort((~self.exists).to(torch.uint8), dim=-1, stable=True) + row
        return order.flatten(), self.exists.sum(-1)

    def packing(self, batch: int, length: int, device: torch.device) -> Packing:
        """The rows as documents of one row; worked out at the first call.

        Args:
            batch: B.
            length: T.
            device: of the tokens.
        """
        if self._packing is None:
            row = torch.arange(batch, device=device)
            pack = self._pack_documents if self.is_packed else self._pack_existing
            self._packing = pack(row, length)
        return self._packing

    def _pack_existing(self, row: Tensor, length: int) -> Packing:
        order, count = self._existing()
        begin = row * length
        # Each row's padding is a document of its own, whose state nobody reads.
        bounds = F.pad(torch.stack([begin, begin + count], 1).flatten(), (0, 1), value=length * len(row))
        return Packing(bounds, 2 * row, 2 * row, order)

    def _pack_documents(self, row: Tensor, length: int) -> Packing:
        begin, total = row * length, length * len(row)
        order, end = None, begin + length
        if self.bounds is not None:
            bounds = F.pad(self.bounds.to(begin), (0, 1), value=total)
        else:
            assert self.starts is not None
            starts = self.starts
            if self.exists is not None:
                order, count = self._existing()
                end = begin + count
                # Documents are numbered from 1; padding, now behind them, is number 0.
                number = (starts.cumsum(-1) * self.exists).flatten()[order].view_as(starts)
                starts = number != F.pad(number[:, :-1], (1, 0), value=-1)
            starts = starts.index_fill(1, begin.new_zeros(1), True)
            bounds = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=total)
        last = torch.searchsorted(bounds, end - 1, right=True) - 1
        return Packing(bounds, torch.searchsorted(bounds, begin, right=True) - 1, last.clamp(min=0), order)


def scan_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    rows: TokenRows,
    state: Tensor | None = None,
    *,
    stateful: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal lightning attention over rows with padding and documents.

    o_t = scale * sum over existing tokens j <= t of its document, of exp(-slope * n) (q_t . k_j) v_j, where n
    counts the existing tokens from j to t (arXiv 2401.04658, equation 6).

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K), where G divides H.
        value: (B, G, T, V).
        slopes: (H,) fp32.
        scale: factor on the output.
        rows: which tokens exist and belong together.
        state: (B, H, K, V) fp32 that enters, or None. Rows that hold documents must begin without one.
        stateful: whether the state behind the last token is wanted.

    Returns:
        The output (B, T, H, V) in the query's dtype, and the state or None. Outputs of padded tokens mean
        nothing.
    """
    if rows.exists is not None:
        value = value.masked_fill(~rows.exists[:, None, :, None], 0)
    if rows.is_plain or (state is None and rows.edges_only(stateful)):
        result = lightning_attention(
            query, key, value, slopes, scale=scale, initial_state=state, output_final_state=stateful
        )
        output, state = result if stateful else (result, None)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2), state
    batch, _, length, _ = query.shape
    packing = rows.packing(batch, length, query.device)
    if state is not None:
        assert not rows.is_packed
        state = state.new_zeros(len(packing.bounds) - 1, *state.shape[1:]).index_copy(0, packing.first, state)
    q, k, v = (packing.pack(tensor) for tensor in (query, key, value))
    output, state = lightning_attention(
        q,
        k,
        v,
        slopes,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=packing.bounds,
    )
    return packing.unpack(output, batch), state[packing.last] if stateful else None


@dataclass
class Recording:
    """What `crop` needs to go back: a state, and the tokens since."""

    state: Tensor | None
    tokens: list[tuple[Tensor, Tensor, Tensor | None]]

    def __len__(self) -> int:
        return sum(key.shape[2] for key, _, _ in self.tokens)


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
        self.recurrent_state: Tensor | None = None
        self.length = 0
        self.capacity = capacity
        self.clock: Clock | None = None
        self.record_past = False
        self._slopes: Tensor | None = None
        self._recording: Recording | None = None

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
        """Counts (B, G, T, K) new keys and returns them with a reference to this layer, and the values."""
        if not self.is_initialized:
            self.capacity = max(self.capacity, key_states.shape[2])
            self.lazy_initialization(key_states, value_states)
        if self.recurrent_state is not None and key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"`past_key_values` holds {self.batch_size} sequences, got a batch of {key_states.shape[0]}; "
                "pass a new cache, or `cache.fork(batch_size)`."
            )
        if self.clock is None:
            self.make_room(key_states.shape[2])
            self.length += key_states.shape[2]
        # An alias of its own: the model's tensor keeps no reference to the cache.
        key_states = key_states.view_as(key_states)
        key_states.recurrent_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

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
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if self.recurrent_state is not None and query.shape[2] == 1 and not gradient:
            return _step(query, key, value, slopes, scale, rows.exists, self.recurrent_state)
        before = self.recurrent_state
        output, state = scan_rows(query, key, value, slopes, scale, rows, before, stateful=True)
        assert state is not None
        # In place: a CUDA graph goes on writing where it was captured.
        self.recurrent_state = state if before is None or gradient else before.copy_(state)
        return output

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

    def make_room(self, count: int) -> None:
        """Grows the capacity as the key/value layers do."""
        if self.length + count > self.capacity:
            self.capacity = grown_capacity(self.capacity, self.length + count)

    def advanced(self, count: int) -> None:
        """Counts tokens that a CUDA graph has taken in."""
        self.length += count

    def _record(self, key: Tensor, value: Tensor, exists: Tensor | None) -> None:
        if self._recording is None or len(self._recording) > _MAX_RECORDED:
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
        tokens_to_remove = int(tokens_to_remove)
        drop = max(self.length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if drop >= self.length:
            self.reset()
            return
        if drop > 0:
            self._roll_back(drop)
        self._recording = None

    def _roll_back(self, drop: int) -> None:
        recorded = 0 if self._recording is None else len(self._recording)
        if self._recording is None or drop > recorded:
            raise RuntimeError(
                f"`crop` would remove {drop} tokens, but this lightning-attention layer has recorded the "
                f"last {recorded}; call `activate_past_recording` before the tokens are added, or keep a "
                "copy of the cache."
            )
        keys, values, masks = zip(*self._recording.tokens, strict=True)
        keys, values = torch.cat(keys, 2), torch.cat(values, 2)
        state, kept = self._recording.state, recorded - drop
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
