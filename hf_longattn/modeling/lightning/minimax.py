"""MiniMax of transformers, with the loops of its lightning layers replaced on one instance of a model.

transformers walks a prompt in blocks of 256 tokens and a continuation token by token, in Python, keeps state
and decays in the model's dtype, lets padding fade the state and packed documents leak, and its cache loses
the state in beam search and counts no tokens where the first layer is linear (seen in 5.17.0). Imported only
for a model of that type.
"""

import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.minimax.modeling_minimax import (
    MiniMaxCache,
    MiniMaxLightningAttention,
    MiniMaxRMSNorm,
)

from hf_longattn.attention.exact import Options
from hf_longattn.attention.lightning import (
    FEW_TOKENS,
    attend_to_state,
    check_packing,
    packing_of,
    rows_of_sequence,
)
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.recurrent import RecurrentStates, is_empty
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.cache.token_rows import TokenRows, scan_rows, version_of
from hf_longattn.fusion import is_fused, runs_on
from hf_longattn.instance import Setup
from hf_longattn.kernels.mask_runs import known_runs
from hf_longattn.kernels.row_norm import gated_row_norm
from hf_longattn.masking import is_tracing
from hf_longattn.parallel.group import SequenceGroup

_rows_of_positions = WeakIdKeyDictionary()


class _AnyLayers(MiniMaxCache):
    """A `MiniMaxCache` of the layers that it is given, with the methods of every other cache."""

    __len__ = Cache.__len__
    batch_repeat_interleave = Cache.batch_repeat_interleave
    batch_select_indices = Cache.batch_select_indices
    crop = Cache.crop
    is_croppable = Cache.is_croppable  # type: ignore[assignment]

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None

    def get_linear_cache(self, layer_idx: int) -> NoReturn:
        """Refused: only the forward of transformers, which would begin anew, asks for it.

        Args:
            layer_idx: unused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"`past_key_values` is a {type(self).__name__}, which a MiniMax model reads that "
            "`prepare_generation` has prepared, got one as transformers has it; prepare it, or pass a fresh "
            "`MiniMaxCache()`."
        )


class MiniMaxLongContextCache(LongContextCache, _AnyLayers):  # type: ignore[misc]
    """A `LongContextCache` that passes for a `MiniMaxCache`, which the model asks for.

    Args:
        config: of the MiniMax model.
        capacity: tokens to make room for in the softmax layers.
    """


class MiniMaxShardedCache(ShardedCache, _AnyLayers):  # type: ignore[misc]
    """A `ShardedCache` that passes for a `MiniMaxCache`.

    Args:
        config: of the MiniMax model.
        group: the `SequenceGroup` whose ranks share the sequence.
        capacity: tokens of the whole sequence to make room for in the softmax layers.
    """


def minimax_slopes(num_heads: int, layer_idx: int, num_layers: int) -> list[float]:
    """The decay slopes of MiniMax: 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5), h from 0.

    Args:
        num_heads: H.
        layer_idx: l, from 0.
        num_layers: L.
    """
    factor = 1 - layer_idx / (num_layers - 1 + 1e-5) + 1e-5
    return [2.0 ** (-8 * (head + 1) / num_heads) * factor for head in range(num_heads)]


def replace_lightning_layers(changes: Setup, model: PreTrainedModel) -> None:
    """Gives the lightning layers of one model our forward; parameters and state dict stay what they are.

    Args:
        changes: takes note, to undo it.
        model: a MiniMax model.
    """
    for module in model.modules():
        if isinstance(module, MiniMaxLightningAttention):
            device = module.out_proj.weight.device
            slopes = minimax_slopes(module.num_attention_heads, module.layer_idx, module.num_hidden_layers)
            # From the config, in fp32: the module's own buffer has the model's dtype.
            fast = functools.partial(_forward, module, torch.tensor(slopes, device=device))
            changes.set(module, "forward", fast)


def replace_cache(changes: Setup, model: PreTrainedModel, group: SequenceGroup | None = None) -> None:
    """Makes `generate`, and the model by itself, use a cache of ours where transformers would make its own.

    Args:
        changes: takes note, to undo it.
        model: a MiniMax model that generates.
        group: the processes that share a prompt, or None for this one alone.
    """
    prepare = functools.partial(_prepare_cache, model, group, model._prepare_cache_for_generation)
    changes.set(model, "_prepare_cache_for_generation", prepare)
    decoder = model.base_model
    changes.set(decoder, "forward", functools.partial(_decode, decoder, decoder.forward))


def _decode(
    decoder: Any,
    original: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`MiniMaxModel.forward` with our cache, and with the mask of tokens that come one by one."""
    config, tokens = decoder.config, input_ids if inputs_embeds is None else inputs_embeds
    wanted = config.use_cache if use_cache is None else use_cache
    if past_key_values is None and wanted and not (decoder.training and decoder.gradient_checkpointing):
        past_key_values = MiniMaxLongContextCache(config)
    _check_cache(past_key_values)
    single = tokens is not None and tokens.shape[1] == 1
    if single and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        attention_mask = _masks_of_one(decoder, tokens, attention_mask, past_key_values)
    return original(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )


def _check_cache(cache: Any) -> None:
    """Refuses a cache of another kind, and a filled one that says that it is empty."""
    ours = "a `MiniMaxLongContextCache(model.config)` of hf_longattn.modeling.lightning.minimax"
    if isinstance(cache, LongContextCache) and not isinstance(cache, MiniMaxCache):
        raise ValueError(
            f"`past_key_values` must be {ours} for this model, which asks for a MiniMaxCache, got a "
            f"{type(cache).__name__}."
        )
    held = cache.linear_cache if _is_theirs(cache) else ()
    if any(isinstance(state, Tensor) for state in held) and cache.get_seq_length() == 0:
        raise ValueError(
            "`past_key_values`: a MiniMaxCache counts no tokens where the first layer is linear, so that "
            f"what follows would be read as a new text; pass {ours}, or leave it out at the first call."
        )


def _masks_of_one(decoder: Any, tokens: Any, mask: Tensor, cache: Any) -> dict[str, Any] | Tensor:
    """The masks of both kinds of layers for one token a row.

    transformers takes one token for a generated one, which exists (`create_recurrent_attention_mask`, seen in
    5.17.0). In a prompt that is read token by token it may be padding.
    """
    runs, length = known_runs(mask), mask.shape[1]
    if runs is not None and runs.fill(length - 1, length):
        return mask
    make = create_causal_mask if decoder.config.sliding_window is None else create_sliding_window_causal_mask
    # Of the embeddings, shape and dtype count alone.
    like = decoder.embed_tokens.weight.new_empty(*tokens.shape[:2], 0)
    offset = 0 if cache is None else cache.get_query_offset()
    # In a CUDA graph the mask has columns for tokens to come, and the device alone knows which is the last.
    column = mask.index_select(1, offset.view(1)) if isinstance(offset, Tensor) else mask[:, -1:]
    return {
        "full_attention": make(
            config=decoder.config, inputs_embeds=like, attention_mask=mask, past_key_values=cache
        ),
        "linear_attention": column,
    }


def _prepare_cache(
    model: PreTrainedModel,
    group: SequenceGroup | None,
    original: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    # `original` has said by now that a kind of cache that is asked for by name cannot be had.
    if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
        if group is None:
            cache = MiniMaxLongContextCache(model.config, max_cache_length)
        else:
            cache = MiniMaxShardedCache(model.config, group, max_cache_length)
        model_kwargs["past_key_values"] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()


def _forward(
    module: nn.Module,
    slopes: Tensor,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention.forward` in one scan.

    Args:
        module: the layer.
        slopes: (H,) fp32.
        hidden_states: (B, T, D).
        position_embeddings: not used by these layers.
        attention_mask: (B, T), 0 at pads, or None.
        past_key_values: our cache or transformers' own, or None.
        position_ids: (B or 1, T), to find packed documents.
        **keywords: `cu_seq_lens_q` and `seq_idx`, which tell them too, and what softmax layers take.

    Returns:
        ((B, T, D), None).
    """
    layer: Any = module
    states = layer.act_fn(layer.qkv_proj(hidden_states))
    states = states.unflatten(-1, (layer.num_attention_heads, 3 * layer.head_dim)).transpose(1, 2)
    query, key, value = states.split(layer.head_dim, dim=-1)
    slopes = slopes.to(hidden_states.device, torch.promote_types(hidden_states.dtype, slopes.dtype))
    shape = hidden_states.shape[:2]

    def rows() -> TokenRows:
        empty = past_key_values is None or _is_empty(past_key_values, layer.layer_idx)
        # No document may be looked for while a graph is traced.
        positions = None if torch.compiler.is_compiling() else position_ids
        return _rows(attention_mask, packing_of(module, positions, keywords), shape, empty)

    if past_key_values is None or _is_theirs(past_key_values):
        output = _scan_beside(past_key_values, layer.layer_idx, query, key, value, slopes, rows())
    else:
        known = rows() if isinstance(past_key_values, LongContextCache) else TokenRows()
        key, value = past_key_values.update(key, value, layer.layer_idx)
        assert isinstance(key, RecurrentStates)
        output = attend_to_state(key.recurrent_layer, query, key.held, value, slopes, 1.0, lambda: known)
    return layer.out_proj(_gated(layer.norm, output.flatten(2), layer.output_gate(hidden_states))), None


def _gated(norm: Any, states: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(gate) * norm(states), in one launch where no hook, gradient or replaced norm forbids it."""
    watched = norm._forward_hooks or norm._forward_pre_hooks or _is_replaced(norm)
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    same = states.dtype == gate.dtype == norm.weight.dtype
    if traced or watched or not same or not runs_on(states.device):
        return F.sigmoid(gate) * norm(states)
    return gated_row_norm(states, gate, norm.weight, eps=norm.variance_epsilon, sigmoid=True)


def _is_replaced(norm: Any) -> bool:
    """Whether the norm computes something else than its class, as far as we know."""
    return type(norm) is not MiniMaxRMSNorm or ("forward" in vars(norm) and not is_fused(norm))


def _scan_beside(
    cache: Any, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, rows: TokenRows
) -> Tensor:
    """The scan with the state in transformers' own cache, kept in fp32 there."""
    held = None if cache is None else cache.get_linear_cache(layer_idx)
    state = held.to(slopes.dtype) if isinstance(held, Tensor) else None
    output, state = scan_rows(query, key, value, slopes, 1.0, rows, state, stateful=cache is not None)
    if cache is not None:
        cache.set_linear_cache(layer_idx, state)
    return output


def _rows(mask: Tensor | None, options: Options, shape: torch.Size, empty: bool) -> TokenRows:
    """Which of (B, T) tokens exist and, where no state is held, where documents begin; looked at once a
    forward.
    """
    positions = options.position_ids
    if positions is None:
        return _make_rows(mask, options, shape, empty)
    lengths = None if options.cu_seqlens is None else options.cu_seqlens[0]
    given = (mask, lengths, options.documents, positions)
    versions = [version_of(tensor) for tensor in given]
    known = _rows_of_positions.get(positions)
    if (
        known is None
        or known[2] != versions
        or any(a is not b for a, b in zip(known[0], given, strict=False))
    ):
        # Not the positions themselves, or they would be held for ever.
        known = (given[:-1], _make_rows(mask, options, shape, empty), versions)
        _rows_of_positions[positions] = known
    return known[1]


def _make_rows(mask: Tensor | None, options: Options, shape: torch.Size, empty: bool) -> TokenRows:
    rows = _existing(mask, empty)
    if empty and shape[1] > 1:
        check_packing(options, shape[0], shape[1], None)
        rows.starts = rows_of_sequence(None if mask is None else mask.bool(), options, *shape).starts
    return rows


def _existing(mask: Tensor | None, empty: bool) -> TokenRows:
    if mask is None:
        return TokenRows()
    stepping = not empty and mask.shape[1] <= FEW_TOKENS and mask.device.type != "cpu"
    return TokenRows(mask.bool(), look=not (is_tracing(mask) or stepping))


def _is_theirs(cache: Any) -> bool:
    return isinstance(cache, MiniMaxCache) and not isinstance(cache, LongContextCache)


def _is_empty(cache: Any, layer_idx: int) -> bool:
    if _is_theirs(cache):
        return not isinstance(cache.get_linear_cache(layer_idx), Tensor)
    return is_empty(cache, layer_idx)
