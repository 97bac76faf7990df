"""`attn_implementation="lightning_attention"`: linear attention with decay in the place of softmax.

    o_t = scale * sum over j <= t of exp(-slope_h (t - j)) (q_t . k_j) v_j,   then RMS norm over all heads

Queries and keys come as the model makes them, with its rotary embedding and its scaling; there is no feature
map. The slopes are TransNormerLLM's, by head and layer (arXiv 2401.04658). This is another model than the
softmax one with the same weights: it has to be trained.
"""

import logging
import math
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_longattn.attention.exact import Options, read_options
from hf_longattn.attention.packing import check_documents, check_lengths, read_lengths
from hf_longattn.attention.tree import tree_attention_forward
from hf_longattn.cache.recurrent import IMPLEMENTATION, RecurrentLayer, RecurrentStates, lightning_layers
from hf_longattn.cache.sharded import ShardedRecurrentLayer
from hf_longattn.cache.token_rows import TokenRows, bounds_of, scan_rows
from hf_longattn.kernels.dispatch import log_once, warn_slow
from hf_longattn.masking import LazyMask, is_tracing
from hf_longattn.parallel.lightning import scan_slices

NORM_EPS = 1e-6
# For at most this many new tokens, the host does not wait for a GPU to say which of them are padding.
FEW_TOKENS = 16

_rows_of_mask: "weakref.WeakKeyDictionary[LazyMask, dict[bool, TokenRows]]" = weakref.WeakKeyDictionary()
_slopes_on_device: dict[tuple[Any, ...], Tensor] = {}


def refuse_pages(*unused: Any, **ignored: Any) -> NoReturn:
    """In the place of `init_continuous_batching`, which every call of `generate_batch` begins with.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "`generate_batch` (`cache_implementation='paged'`) gives attention pages of keys, and lightning "
        "layers keep a state; call `generate` with a batch of left-padded prompts."
    )


def tnl_slopes(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    """The decay slopes of TransNormerLLM: ALiBi's, smaller in later layers.

    slope_h = 2^(-8 (h + 1) / H) (1 - l / (L - 1) + 1e-5), h from 0 (arXiv 2401.04658). Where H is not a power
    of 2, heads beyond the largest power of 2 below take every other slope of twice that number, as in ALiBi.

    Args:
        num_heads: H.
        layer_idx: l, from 0.
        num_layers: L; with one layer the factor is that of the first of many.

    Returns:
        H positive numbers.
    """
    power = 1 << (num_heads.bit_length() - 1)
    base = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    base += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]
    factor = 1 - layer_idx / max(num_layers - 1, 1) + 1e-5
    return [slope * factor for slope in base]


def slopes_of(config: Any, layer_idx: int, num_heads: int) -> list[float]:
    """The slopes of one layer: `config.lightning_slopes`, or TransNormerLLM's.

    Args:
        config: of the model. `lightning_slopes` is a list of H numbers, or of one such list a layer.
        layer_idx: which layer.
        num_heads: H.

    Raises:
        ValueError: `config.lightning_slopes` has another shape, or numbers that are not slopes.
    """
    given = getattr(config, "lightning_slopes", None)
    number = config.num_hidden_layers
    if given is None:
        return tnl_slopes(num_heads, layer_idx, number)
    given = given if isinstance(given, (list, tuple)) else [given]
    by_layer = len(given) == number and all(isinstance(row, (list, tuple)) for row in given)
    slopes = list(given[layer_idx] if by_layer else given)
    fits = len(slopes) == num_heads and all(isinstance(slope, (int, float)) for slope in slopes)
    if not fits or not all(0 <= slope < math.inf for slope in slopes):
        raise ValueError(
            f"`config.lightning_slopes` must be {num_heads} numbers >= 0, or {number} lists of that many, "
            f"got {slopes!r} for layer {layer_idx}; slopes are minus the logarithm of the decays."
        )
    return slopes


def _slopes_tensor(config: Any, layer_idx: int, query: Tensor) -> Tensor:
    """(H,) on the query's device, made once: no copy to the device in later steps."""
    values = tuple(slopes_of(config, layer_idx, query.shape[1]))
    dtype = torch.promote_types(query.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=query.device)
    key = (values, dtype, query.device)
    if key not in _slopes_on_device:
        _slopes_on_device[key] = torch.tensor(values, dtype=dtype, device=query.device)
    return _slopes_on_device[key]


def lightning_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Lightning attention in the signature that transformers calls.

    Layers that `config.lightning_layers` leaves out are softmax attention, exact. With the recurrent state of
    a `LongContextCache` the keys are the new tokens only; any other cache hands over all of them, and the
    result is computed from all.

    Args:
        module: the attention module that calls, with `config` and `layer_idx`.
        query: (B, H, T, K), after rotary embedding.
        key: (B, G, S, K), after the cache's update, heads not repeated.
        value: (B, G, S, V).
        attention_mask: what `lazy_mask` returned, or None.
        dropout: must be 0: there are no attention weights to drop.
        scaling: factor on query . key, K**-0.5 if None.
        keywords: see `hf_longattn.attention.exact.read_options`.

    Returns:
        (output, None), output (B, T, H, V), normalised over H x V.

    Raises:
        TypeError: a keyword that would change the result and is not known.
        ValueError: what linear attention with decay cannot honour, by name.
    """
    config, layer_idx = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None or layer_idx is None:
        raise ValueError(
            f"`attn_implementation={IMPLEMENTATION!r}` needs the `config` and the `layer_idx` of its module "
            f"to know the slopes, and {type(module).__name__} has none; use another implementation."
        )
    if layer_idx not in lightning_layers(config):
        return tree_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **keywords)
    options = read_options(module, scaling, dropout, keywords)
    _refuse(module, attention_mask, options)
    if not torch.compiler.is_compiling():
        _warn_untrained(config)
    layer = None
    if isinstance(key, RecurrentStates):
        key, layer = key.held, key.recurrent_layer
    slopes = _slopes_tensor(config, layer_idx, query)
    scale = query.shape[3] ** -0.5 if options.scale is None else options.scale
    # Under autocast the rotary embedding leaves queries and keys in fp32.
    query, keys = query.to(value.dtype), key.to(value.dtype)
    mask = attention_mask if isinstance(attention_mask, LazyMask) else None

    def rows() -> TokenRows:
        _check_lengths(mask, query, key, layer)
        return _rows(mask, query, key, layer, options)

    if layer is None:
        output = _attend_to_all(query, keys, value, slopes, scale, rows(), mask)
    else:
        output = attend_to_state(layer, query, keys, value, slopes, scale, rows)
    return normalised(output), None


def attend_to_state(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    rows: Callable[[], TokenRows],
) -> Tensor:
    """Lightning attention of new tokens to the state that a cache layer holds, which they enter.

    Args:
        layer: that `update` of the cache tagged the keys with.
        query: (B, H, T, K).
        key: (B, G, T, K).
        value: (B, G, T, V).
        slopes: (H,) fp32.
        scale: factor on the output.
        rows: which of the tokens exist, where the layer does not know it by itself.

    Returns:
        (B, T, H, V).
    """
    if isinstance(layer, ShardedRecurrentLayer) and (run := layer.run) is not None:
        state, group = layer.recurrent_state, layer.group_of_ranks
        output, state = scan_slices(
            group, query, key, value, slopes, scale, run.rows, state, stateful=True
        )  # fmt: skip
        assert state is not None
        layer.take_run(key, value, slopes, state)
        return output
    known = rows() if isinstance(layer, RecurrentLayer) else TokenRows()
    return layer.attend(query, key, value, slopes, scale, known)


def normalised(output: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over all heads of a token: a norm without parameters takes the
    denominator's place.

    Args:
        output: (B, T, H, V).

    Returns:
        (B, T, H, V), contiguous. Source: arXiv 2307.14995.
    """
    flat = output.flatten(2)
    return F.rms_norm(flat, flat.shape[-1:], eps=NORM_EPS).view(output.shape)


def _refuse(module: Any, mask: LazyMask | Tensor | None, options: Options) -> None:
    """Raises for everything that changes softmax attention and has no meaning here."""
    pattern = mask.pattern if isinstance(mask, LazyMask) else None
    windowed = pattern is not None and (pattern.window or pattern.radius or pattern.chunk) is not None
    reasons = {
        "attention_mask": isinstance(mask, Tensor)
        and "a (B, H, T, S) mask chooses keys one by one; pass a (B, T) mask of existing tokens",
        "is_causal": (not options.causal or (pattern is not None and not pattern.causal))
        and "encoders and cross-attention are not causal",
        "encoder_hidden_states": getattr(module, "is_cross_attention", False)
        and "cross-attention has no order between queries and keys",
        "sliding_window": (options.window is not None or windowed)
        and "decay takes the place of windows and chunks; list the other layers in `config.lightning_layers`",
        "mask_function": isinstance(mask, LazyMask)
        and pattern is None
        and not _may_be_packing(module, mask, options)
        and "only causal order, padding and packed documents have a meaning",
        "softcap": options.softcap is not None and "there are no softmax scores to cap",
        "s_aux": options.sinks is not None and "there is no softmax denominator for sinks to enter",
        "position_bias": options.bias is not None and "decay takes the place of a position bias",
        "dropout": options.dropout and "there are no attention weights to drop; set `attention_dropout=0`",
    }
    for name, reason in reasons.items():
        if reason:
            raise ValueError(
                f"`{name}` of {type(module).__name__} cannot be honoured by "
                f"`attn_implementation={IMPLEMENTATION!r}`: {reason}. 'tree_attention' and "
                "'blockwise_attention' take everything that softmax attention does."
            )


def _may_be_packing(module: Any, mask: LazyMask, options: Options) -> bool:
    """Whether an unknown mask function can only be the overlay for packed documents.

    While a graph is traced, transformers adds that overlay wherever there is neither a mask nor a cache, and
    a mask function cannot be looked into.
    """
    if not torch.compiler.is_compiling() or mask.padding is not None or options.position_ids is None:
        return False
    kinds = getattr(module.config, "layer_types", None)
    chunked = getattr(module.config, "attention_chunk_size", None) is not None
    full = kinds is None or kinds[module.layer_idx] == "full_attention"
    return full and not chunked and options.window is None and mask.q_length == mask.kv_length


def _warn_untrained(config: Any) -> None:
    """Once a checkpoint: its weights were trained with softmax unless its config says otherwise."""
    path = getattr(config, "_name_or_path", "")
    trained = config.model_type == IMPLEMENTATION or any(
        getattr(config, name, None) is not None for name in ("lightning_layers", "lightning_slopes")
    )
    if path and not trained:
        log_once(
            logging.WARNING,
            f"{path}: lightning attention is another model than the softmax attention that this checkpoint "
            "was trained with, and says nothing useful until it is trained. A config that sets "
            "`lightning_layers` is taken for a trained one.",
        )


def _check_lengths(mask: LazyMask | None, query: Tensor, key: Tensor, layer: RecurrentLayer | None) -> None:
    if mask is None:
        return
    length = key.shape[2] if layer is None else layer.mask_length
    if mask.q_length != query.shape[2] or mask.kv_length != length:
        raise ValueError(
            f"`attention_mask` covers {mask.q_length} queries and {mask.kv_length} keys, but the layer has "
            f"{query.shape[2]} queries and {length} keys; was the mask made for another cache or prompt?"
        )


def _rows(
    mask: LazyMask | None, query: Tensor, key: Tensor, layer: RecurrentLayer | None, options: Options
) -> TokenRows:
    """Which keys exist and where documents begin; the same for all layers of a forward."""
    if mask is None or torch.compiler.is_compiling():
        return _make_rows(mask, query, key, layer, options)
    known = _rows_of_mask.setdefault(mask, {})
    stateful = layer is not None
    if stateful not in known:
        known[stateful] = _make_rows(mask, query, key, layer, options)
    return known[stateful]


def _make_rows(
    mask: LazyMask | None, query: Tensor, key: Tensor, layer: RecurrentLayer | None, options: Options
) -> TokenRows:
    length, device = key.shape[2], query.device
    total = length if layer is None else layer.mask_length
    exists = None if mask is None or mask.padding is None else _columns(mask, length, total).to(device)
    stepping = layer is not None and query.shape[2] <= FEW_TOKENS and device.type != "cpu"
    rows = TokenRows(exists, look=not (is_tracing(query) or stepping))
    if query.shape[2] == total > 1:
        check_packing(options, query.shape[0], query.shape[2], mask)
        if options.cu_seqlens is not None:
            rows.bounds = options.cu_seqlens[0]
        if rows.bounds is None and mask is not None and mask.pattern is None:
            rows.bounds = _traced_bounds(mask, options)
        elif rows.bounds is None:
            rows.starts = _document_starts(mask, rows.exists, options)
    return rows


def _columns(mask: LazyMask, length: int, total: int) -> Tensor:
    """(B, length), which of the keys exist: all of them, or those of the new tokens."""
    assert mask.padding is not None
    first = 0 if length == total else mask.q_offset - mask.kv_offset
    if isinstance(first, Tensor):
        # The position of a CUDA graph's tokens is known to the device alone.
        return mask.padding.index_select(1, torch.arange(length, device=first.device) + first)
    return mask.padding[:, first : first + length]


def _traced_bounds(mask: LazyMask, options: Options) -> Tensor:
    """Cumulative lengths of packed documents in a shape that does not depend on them: most are empty."""
    positions, documents = options.position_ids, options.documents
    assert positions is not None
    begins = positions[:, 1:] != positions[:, :-1] + 1
    if documents is not None:
        begins = documents[:, 1:] != documents[:, :-1]
    starts = F.pad(begins.expand(mask.batch_size, -1), (1, 0), value=True)
    return bounds_of(starts)[:-1]


def _document_starts(mask: LazyMask | None, exists: Tensor | None, options: Options) -> Tensor | None:
    """(B, T) bool, the first token of each document; None where there is one a row."""
    documents = options.documents
    if documents is None and mask is not None and mask.pattern is not None:
        documents = mask.pattern.documents
    if documents is not None:
        starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        return starts if mask is None else starts.expand(mask.batch_size, -1)
    positions = options.position_ids
    if mask is None or positions is None or positions.ndim != 2:
        return None
    if mask.padding is None and torch.compiler.is_compiling():
        # Documents come with a mask function there: see `_may_be_packing`.
        return None
    return starts_of_positions(positions, exists, mask.batch_size)


def starts_of_positions(positions: Tensor, exists: Tensor | None, batch: int) -> Tensor | None:
    """(B, T) bool, the existing tokens at position 0, where a row has several; None where none has.

    While a graph is traced nobody may look, and they are returned in any case.

    Args:
        positions: (B or 1, T).
        exists: (B, T) bool, or None where all tokens do.
        batch: B.
    """
    starts = (positions == 0).expand(batch, -1)
    starts = starts if exists is None else starts & exists
    if torch.compiler.is_compiling():
        return starts
    return starts if bool((starts.sum(-1) > 1).any()) else None


def packing_of(module: Any, position_ids: Tensor | None, keywords: dict[str, Any]) -> Options:
    """What a call of a model, or of one of its parts, says of packed documents.

    Args:
        module: that was called.
        position_ids: (B or 1, T).
        keywords: of the call; left as they are.

    Raises:
        TypeError: `cu_seq_lens_q` or `cu_seq_lens_k` are no tensors of integers.
        ValueError: the two do not fit each other.
    """
    lengths = read_lengths(module, dict(keywords))
    return Options(
        causal=True, position_ids=position_ids, cu_seqlens=lengths, documents=keywords.get("seq_idx")
    )


def check_packing(options: Options, batch: int, length: int, mask: LazyMask | None) -> None:
    """Refuses documents that are not those of B x T new tokens.

    Args:
        options: of the call.
        batch: B.
        length: T.
        mask: of the call, on which it is noted that lengths were looked at.

    Raises:
        ValueError: with the name of the argument.
    """
    if options.cu_seqlens is not None:
        check_lengths(options.cu_seqlens, batch * length, batch * length, mask, alike=True)
    if options.documents is not None:
        check_documents(options.documents, batch, length)


def rows_of_sequence(exists: Tensor | None, options: Options, batch: int, length: int) -> TokenRows:
    """The rows of whole sequences, to be cut.

    Args:
        exists: (B, T) bool, or None where all tokens do.
        options: cumulative lengths, documents or positions.
        batch: B.
        length: T.
    """
    starts = None
    if options.cu_seqlens is not None:
        starts = TokenRows.from_bounds(options.cu_seqlens[0], batch, length).starts
    elif options.documents is not None:
        starts = F.pad(options.documents[:, 1:] != options.documents[:, :-1], (1, 0), value=True)
        starts = starts.expand(batch, -1)
    elif options.position_ids is not None and options.position_ids.ndim == 2:
        starts = starts_of_positions(options.position_ids, exists, batch)
    return TokenRows(exists, starts, look=not torch.compiler.is_compiling())


def _attend_to_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    rows: TokenRows,
    mask: LazyMask | None,
) -> Tensor:
    """The outputs of the queries, from all keys that there are: (B, T, H, V)."""
    length, total = query.shape[2], key.shape[2]
    if length == total:
        return scan_rows(query, key, value, slopes, scale, rows)[0]
    if not torch.compiler.is_compiling():
        warn_slow(
            IMPLEMENTATION,
            "this cache keeps keys, not a state, so every step sums all of them; `prepare_generation` or a "
            "`LongContextCache` keeps a state of constant size",
        )
    first = total - length if mask is None else mask.q_offset - mask.kv_offset
    # The queries at their places among the keys; the others ask for nothing.
    places = torch.arange(length, device=query.device) + first
    among = query.new_zeros(*query.shape[:2], total, query.shape[3]).index_copy(2, places, query)
    return scan_rows(among, key, value, slopes, scale, rows)[0].index_select(1, places)
