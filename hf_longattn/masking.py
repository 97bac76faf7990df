"""The lazy mask: one description of what every query may see, with no (T, S) tensor.

transformers asks a registered mask function for a mask, and hands what it returns, untouched, to the
attention function of every layer. Ours returns a `LazyMask`: the arguments themselves. Causal order, windows,
chunks, padding and packed documents all leave each query one interval of keys, and become a `KeyRange` of
O(T) integers, worked out once a forward. Any other mask function is evaluated a few rows at a time.
"""

import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

from hf_longattn.kernels.dispatch import log_once
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.mask_runs import Runs, known_runs

MaskFunction = Callable[..., Any]

# With more queries than this, waiting for the device to say where the padding is pays for itself: without
# padding, or with some on the left alone, kernels for dense attention can be used.
_FEW_QUERIES = 16


@dataclass
class Pattern:
    """A mask function of a known kind, as data: every field narrows the interval of keys that a query sees.

    Args:
        causal: no key after the query.
        window: how many keys up to the query's own, itself included.
        radius: how many keys on either side of the query's own.
        chunk: (size, (B,) left padding): keys of the query's own chunk, counted from the first real token.
        documents: (B, N) integer ids: keys of the query's own document.
    """

    causal: bool = False
    window: int | None = None
    radius: int | None = None
    chunk: tuple[int, Tensor] | None = None
    documents: Tensor | None = None


def _closure(function: Callable) -> dict[str, Any]:
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _read_intersection(pattern: Pattern, closure: dict[str, Any]) -> bool:
    return all([_read(function, pattern) for function in closure["mask_functions"]])


def _read_window(pattern: Pattern, closure: dict[str, Any]) -> bool:
    pattern.window = min(closure["sliding_window"], pattern.window or closure["sliding_window"])
    return True


def _read_radius(pattern: Pattern, closure: dict[str, Any]) -> bool:
    pattern.radius = min(closure["sliding_window"], pattern.radius or closure["sliding_window"])
    return True


def _read_chunk(pattern: Pattern, closure: dict[str, Any]) -> bool:
    known = pattern.chunk is None
    pattern.chunk = (closure["chunk_size"], closure["left_padding"])
    return known


def _read_documents(pattern: Pattern, closure: dict[str, Any]) -> bool:
    known = pattern.documents is None
    pattern.documents = closure["packed_sequence_mask"]
    return known


# transformers makes its mask functions as closures. All of one kind share a code object, which tells the
# kind; a name would not, since a function of the caller's may have it too.
_READERS: dict[Any, Callable[[Pattern, dict[str, Any]], bool]] = {
    masking_utils.and_masks(masking_utils.causal_mask_function).__code__: _read_intersection,
    masking_utils.sliding_window_overlay(1).__code__: _read_window,
    masking_utils.sliding_window_bidirectional_overlay(1).__code__: _read_radius,
    masking_utils.chunked_overlay(1, torch.zeros(1)).__code__: _read_chunk,
    masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)).__code__: _read_documents,
}


def _read(function: MaskFunction, pattern: Pattern) -> bool:
    """Adds what `function` says to `pattern`; False where it is not a known kind."""
    if function is masking_utils.causal_mask_function:
        pattern.causal = True
        return True
    if function is masking_utils.bidirectional_mask_function:
        return True
    # torch.compile cannot look into a closure that is made inside the traced code: it is evaluated by tiles.
    if torch.compiler.is_compiling():
        return False
    reader = _READERS.get(getattr(function, "__code__", None))
    if reader is None:
        return False
    return reader(pattern, _closure(function))


def recognise(function: MaskFunction) -> Pattern | None:
    """The `Pattern` of a mask function, or None where it is not an interval of keys a query."""
    pattern = Pattern()
    return pattern if _read(function, pattern) else None


def document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last index of the run of equal ids around each position.

    Args:
        documents: (B, N) integer ids, equal ids contiguous.

    Returns:
        (lower, upper), each (B, N) int64.
    """
    index = torch.arange(documents.shape[-1], device=documents.device).expand_as(documents)
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    lower = torch.where(starts, index, 0).cummax(-1).values
    ends = F.pad(starts[:, 1:], (0, 1), value=True)
    last = torch.where(ends, index, documents.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return lower, last + 1


def packed_bounds(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int, batch: int = 1, num_keys: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of each query's own document, from cumulative lengths through all rows of a batch.

    Args:
        cu_seqlens_q: (documents + 1,) cumulative query lengths, starting at 0.
        cu_seqlens_k: (documents + 1,) cumulative key lengths, starting at 0.
        num_queries: T. Queries past the last document see nothing.
        batch: B rows, one behind the other.
        num_keys: S of each row, where there are several.

    Returns:
        (lower, upper, diagonal), each (B, T) int64: the document's keys in the query's own row, and one past
        the last key that bottom-right causal order inside the document allows.
    """
    index = torch.arange(batch * num_queries, device=cu_seqlens_q.device)
    document = torch.searchsorted(cu_seqlens_q[1:].contiguous(), index, right=True)
    # A query after the last document gets the empty interval at the end.
    ends_k = F.pad(cu_seqlens_k[1:], (0, 1), value=0) + F.pad(
        cu_seqlens_k.new_zeros(len(cu_seqlens_k) - 1), (0, 1)
    )
    starts_k = F.pad(cu_seqlens_k[:-1], (0, 1), value=0)
    ends_q = F.pad(cu_seqlens_q[1:], (0, 1), value=0)
    lower, upper = starts_k[document], ends_k[document]
    diagonal = upper - (ends_q[document] - index) + 1
    if batch == 1:
        return lower[None], upper[None], diagonal[None]
    row = torch.arange(batch, device=index.device)[:, None] * num_keys
    lower, upper, diagonal = (bound.view(batch, -1) - row for bound in (lower, upper, diagonal))
    return lower.clamp(0, num_keys), upper.clamp(0, num_keys), diagonal.clamp(0, num_keys)


def is_tracing(tensor: Tensor) -> bool:
    """Whether a graph is being made, by a compiler or by CUDA: what is in `tensor` cannot be looked at."""
    return torch.compiler.is_compiling() or masking_utils.is_tracing(tensor)


class LazyMask:
    """What transformers' `create_*_mask` would have spelled out as a (B, 1, T, S) tensor.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S, the keys that the attention function will get.
        q_offset: position of the first query; a device tensor for static caches.
        kv_offset: position of the first key; a device tensor inside a CUDA graph.
        mask_function: transformers' `(batch, head, query, key) -> bool`, on positions.
        padding: (B, S) bool, True where a key exists, or None.
        device: where the tensors of the mask live.
        pattern: what `mask_function` says, where it is of a known kind.
        runs: where the tokens of `padding` lie, where it is known that each row has one run of them.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor,
        kv_offset: int | Tensor,
        mask_function: MaskFunction,
        padding: Tensor | None,
        device: torch.device,
        pattern: Pattern | None = None,
        runs: Runs | None = None,
    ) -> None:
        self.batch_size, self.q_length, self.kv_length = batch_size, q_length, kv_length
        self.q_offset, self.kv_offset = q_offset, kv_offset
        self.mask_function, self.pattern = mask_function, pattern
        self.padding, self.device, self.runs = padding, device, runs
        self._ranges: dict[torch.device, KeyRange] = {}
        self._packed: dict[str, Tensor | None] = {}
        # What attention works out of this mask, once a forward for all layers.
        self.derived: dict[str, Any] = {}

    @property
    def shape(self) -> torch.Size:
        """(B, 1, T, S), as the tensor it stands for."""
        return torch.Size((self.batch_size, 1, self.q_length, self.kv_length))

    def dim(self) -> int:
        """4, as the tensor it stands for."""
        return 4

    def key_range(self, device: torch.device | None = None) -> KeyRange | None:
        """The mask as one interval of keys a query.

        Args:
            device: where the kernel will read it; the mask's own device if left out.

        Returns:
            the `KeyRange`, worked out at the first call, or None where the mask is not of that kind.
        """
        if self.pattern is None:
            return None
        device = device or self.device
        if device not in self._ranges:
            if self.device not in self._ranges:
                self._ranges[self.device] = self._build_range(self.pattern)
            self._ranges[device] = self._ranges[self.device].to(device)
        return self._ranges[device]

    def apart(self, limits: KeyRange, position_ids: Tensor) -> KeyRange:
        """Keeps packed documents apart where positions start again at 0 inside a row.

        transformers looks for packing only where there is neither a mask nor a cache. Looks once a forward.

        Args:
            limits: the causal range of this mask.
            position_ids: (B or 1, T) integer.

        Returns:
            `limits`, narrowed to each query's own document where there are several.
        """
        if position_ids.ndim != 2 or self.pattern is None or self.pattern.documents is not None:
            return limits
        if "lower" not in self._packed:
            # Padding has position 0 too, and is not the start of a document.
            starts = position_ids == 0
            if self.padding is not None:
                starts = starts & self.padding.to(starts.device)
            self._packed["lower"] = self._document_starts(position_ids, starts)
        lower = self._packed["lower"]
        return limits if lower is None else limits.narrowed(lower=lower.to(position_ids.device))

    def _document_starts(self, position_ids: Tensor, starts: Tensor) -> Tensor | None:
        """The first key of each query's document, (B or 1, T), or None where each row is one document."""
        if torch.compiler.is_compiling() and self.padding is not None and position_ids.shape[1] > 1:
            # Nothing can be looked at. Without padding, transformers has told documents apart by now.
            bounds = document_bounds(starts.cumsum(-1))[0]
            return torch.where(self._restarts(position_ids, starts), bounds, 0)
        single = is_tracing(position_ids) or not bool(self._restarts(position_ids, starts))
        return None if single else document_bounds(starts.cumsum(-1))[0]

    def _restarts(self, position_ids: Tensor, starts: Tensor) -> Tensor:
        """Whether positions count up by 1 and start again: others (groups, gaps) say nothing of documents."""
        counted = (position_ids[:, 1:] == position_ids[:, :-1] + 1) | starts[:, 1:]
        if self.padding is not None:
            real = self.padding.to(starts.device)
            counted = counted | ~(real[:, 1:] & real[:, :-1])
        return starts[:, 1:].any() & counted.all()

    def tile(self, rows: slice) -> Tensor:
        """The mask of some queries, spelled out.

        Args:
            rows: the queries, with start and stop.

        Returns:
            bool, (B, 1, rows, S).
        """
        batch = torch.arange(self.batch_size, device=self.device)[:, None, None, None]
        head = torch.zeros(1, dtype=torch.long, device=self.device)[:, None, None, None]
        query = torch.arange(rows.start, rows.stop, device=self.device)[:, None] + self.q_offset
        key = torch.arange(self.kv_length, device=self.device) + self.kv_offset
        visible = self.mask_function(batch, head, query[None, None], key[None, None, None])
        visible = visible.expand(self.batch_size, 1, rows.stop - rows.start, self.kv_length)
        return visible if self.padding is None else visible & self.padding[:, None, None]

    def _build_range(self, pattern: Pattern) -> KeyRange:
        known = isinstance(self.q_offset, int) and isinstance(self.kv_offset, int)
        aligned = known and bool(self.q_offset + self.q_length == self.kv_offset + self.kv_length)
        query = torch.arange(self.q_length, device=self.device)[None] + (self.q_offset - self.kv_offset)
        limits = KeyRange(causal=pattern.causal and aligned)
        if pattern.causal and not aligned:
            limits = limits.narrowed(upper=query + 1)
        reach = self.q_offset + self.q_length - self.kv_offset if known else None
        if pattern.window is not None and (reach is None or reach > pattern.window):
            limits = limits.narrowed(lower=query - pattern.window + 1)
        if pattern.radius is not None:
            limits = limits.narrowed(lower=query - pattern.radius, upper=query + pattern.radius + 1)
        if pattern.chunk is not None:
            size, left_padding = pattern.chunk
            left = left_padding.to(self.device)[:, None] - self.kv_offset
            start = (query - left) // size * size + left
            limits = limits.narrowed(lower=start, upper=start + size)
        if pattern.documents is not None:
            limits = limits.narrowed(*self._document_limits(pattern.documents.to(self.device)))
        return limits if self.padding is None else self._pad(limits, self.padding)

    def _document_limits(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = document_bounds(documents)
        rows = torch.arange(self.q_length, device=self.device) + self.q_offset
        return lower[:, rows] - self.kv_offset, upper[:, rows] - self.kv_offset

    def _pad(self, limits: KeyRange, padding: Tensor) -> KeyRange:
        # For a few queries the kernel reads the mask itself, a byte a key, and nothing waits for the device.
        # With many, the host looks at it once: an interval, or no limit at all, is faster to attend under.
        if is_tracing(padding) or (self.q_length <= _FEW_QUERIES and padding.device.type != "cpu"):
            return limits.masked(padding)
        if self.runs is None:
            starts = padding & ~F.pad(padding[:, :-1], (1, 0))
            missing, most_runs = torch.stack([(~padding).sum(), starts.sum(-1).max()]).tolist()
            if missing == 0:
                return limits
            if most_runs > 1:
                return limits.masked(padding)
        length = padding.sum(-1, keepdim=True)
        first = padding.to(torch.int8).argmax(-1, keepdim=True)
        full = torch.ones(1, self.q_length, dtype=torch.long, device=self.device)
        return limits.narrowed(lower=first * full, upper=(first + length) * full)

    def to(self, *args: Any, **kwargs: Any) -> "LazyMask":
        """The mask itself: its tensors follow the query that reads it."""
        return self

    def _refuse_use(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "this model computes with its attention mask outside transformers' attention interface, which "
            "`attn_implementation='tree_attention'` and `'blockwise_attention'` cannot serve; load it with "
            "`attn_implementation='sdpa'` or 'eager'."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __getitem__ = __invert__ = _refuse_use
    __and__ = __or__ = __lt__ = __gt__ = __neg__ = __bool__ = __len__ = __iter__ = _refuse_use

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse_use(args)


@functools.cache
def _module_bypasses_interface(module_name: str) -> bool:
    module = sys.modules.get(module_name)
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return False
    own_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    return own_attention is not None and "ALL_ATTENTION_FUNCTIONS" not in source


def check_config(config: Any) -> None:
    """Refuses a model whose attention does not go through transformers' attention interface.

    Args:
        config: the model's config; its modeling module is found beside it.

    Raises:
        ValueError: names the model type and the implementations that it can take.
    """
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    if _module_bypasses_interface(module):
        raise ValueError(
            f"`attn_implementation`: models of type {config.model_type!r} compute attention in their own "
            "code and never call transformers' attention interface, so it cannot be replaced; use "
            "`attn_implementation='eager'`."
        )


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **unused: Any,
) -> LazyMask:
    """The mask function that transformers calls for our attention implementations.

    Args:
        batch_size: B.
        q_length: T.
        kv_length: S.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: `(batch, head, query, key) -> bool` on positions.
        attention_mask: (B, N) bool, True where a token exists, or a `LazyMask`, returned as it is.
        device: where to build tensors.
        config: the model's config, to refuse models that would ignore the mask.
        unused: arguments of other implementations (`dtype`, `allow_is_causal_skip`, `use_vmap`,
            `local_size`).

    Returns:
        the description; nothing of size T x S is built.

    Raises:
        ValueError: the mask is not (B, N) or ends too soon, or the model bypasses the attention interface.
    """
    if isinstance(attention_mask, LazyMask):
        return attention_mask
    if config is not None and not torch.compiler.is_compiling():
        check_config(config)
    device = torch.device(device)
    q_offset, kv_offset = _snapshot(q_offset), _snapshot(kv_offset)
    # `known_runs` keeps what it knows in a weak dictionary, which torch.compile cannot trace.
    unknown = attention_mask is None or torch.compiler.is_compiling()
    runs = None if unknown else known_runs(attention_mask)
    if runs is not None and isinstance(kv_offset, int) and runs.fill(kv_offset, kv_offset + kv_length):
        attention_mask = None
    padding = _local_padding(attention_mask, batch_size, kv_length, kv_offset)
    _check_reach(attention_mask, q_offset + q_length, kv_offset + kv_length)
    pattern = recognise(mask_function)
    if pattern is None and not torch.compiler.is_compiling():
        name = getattr(mask_function, "__qualname__", repr(mask_function))
        log_once(
            logging.INFO, f"mask function {name} is not an interval of keys a query: evaluated tile by tile"
        )
    return LazyMask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, padding, device, pattern, runs
    )


def _snapshot(offset: int | Tensor) -> Any:
    """The offset as it is now: caches advance theirs in place, before the mask is read."""
    if not isinstance(offset, Tensor):
        return offset
    return offset.clone() if is_tracing(offset) or offset.device.type != "cpu" else int(offset)


def _check_reach(attention_mask: Tensor | None, queries: int | Tensor, keys: int | Tensor) -> None:
    """Refuses a mask that ends before the last token; free slots of a static cache may lie behind it."""
    if attention_mask is None or not (isinstance(queries, int) and isinstance(keys, int)):
        return
    if attention_mask.shape[1] < (needed := min(queries, keys)):
        raise ValueError(
            f"`attention_mask` covers {attention_mask.shape[1]} tokens of {needed}; give an entry for each."
        )


def _local_padding(
    attention_mask: Tensor | None, batch_size: int, kv_length: int, kv_offset: int
) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`attention_mask` must be (batch, tokens) with batch {batch_size}, "
            f"got {tuple(attention_mask.shape)}."
        )
    padding = attention_mask.to(torch.bool)
    if isinstance(kv_offset, Tensor):
        # Slots of a cache in a CUDA graph: those past the mask are past the last query too.
        slots = torch.arange(kv_length, device=padding.device) + kv_offset
        return padding[:, slots.clamp(max=padding.shape[1] - 1)].expand(batch_size, kv_length)
    if (missing := kv_length + kv_offset - padding.shape[1]) > 0:
        padding = F.pad(padding, (0, missing))
    return padding[:, kv_offset : kv_offset + kv_length].expand(batch_size, kv_length)
