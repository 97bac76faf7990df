"""`LongContextCache`: the cache that a prepared model generates with, and that a user may keep."""

import copy
import json
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, get_layer_types_and_kwargs

from hf_longattn.cache.files import Alone, Notes, SavedCache, is_cut, lengths_of, load_cache, save_layers
from hf_longattn.cache.head_sizes import field_of
from hf_longattn.cache.offloaded import offload, offloaded_layers
from hf_longattn.cache.placement import Placement
from hf_longattn.cache.preallocated import rounded_capacity, tokens_to_drop
from hf_longattn.cache.quantized import cache_dtype_name, make_layer, read_cache_dtype
from hf_longattn.cache.recurrent import RecurrentLayer, check_whole_keys, lightning_layers, recurrent_layers
from hf_longattn.cache.shared_prefix import share_layers

# Where a prepared model has the kind of its caches.
CACHES = "_hf_longattn_caches"


class LongContextCache(Cache):
    """A KV cache with preallocated, growing layers: full attention, and windows that keep only what they can
    see. Layers of lightning attention have a state of constant size in the place of keys and values.

    Layers of other kinds (state-space, convolution) are transformers' own.

    Args:
        config: the model's config, or its text config; tells the kind of every layer.
        capacity: tokens to make room for at the first forward, e.g. prompt and answer together; grows beyond.
        cache_dtype: "int8" or "fp8" (or the torch dtype) keeps keys and values in 8 bits, with a scale for
            each token and head, which only the attention of this library reads (not "sdpa" or "eager");
            None keeps the dtype of the model. Other states are what they are.
        offload_layers: how many layers of full attention keep keys and values in host memory, evenly spread;
            two buffers on the device serve all of them.

    Raises:
        ValueError: a `cache_dtype` that is none of these, or one where lightning layers read keys, or
            `offload_layers` that the model does not have.
    """

    # For caches of models that make their layers themselves.
    cache_dtype: torch.dtype | None = None
    # Tokens of a chunk of each row, where the call under way has no room for those that the device likes.
    fitting_chunk: int | None = None
    # Whether a call is under way whose last tokens may turn out not to be those of the answer.
    holds_guesses = False

    def __init__(
        self,
        config: PreTrainedConfig,
        capacity: int = 0,
        cache_dtype: str | torch.dtype | None = None,
        offload_layers: int = 0,
    ) -> None:
        config = config.get_text_config(decoder=True)
        self.signature = _signature(config)
        self.cache_dtype = read_cache_dtype(cache_dtype)
        if self.cache_dtype is not None:
            check_whole_keys(config, "cache_dtype", f"{cache_dtype_name(self.cache_dtype)!r}")
        layers = _make_layers(config, capacity, self.cache_dtype)
        offload(layers, offload_layers, config)
        super().__init__(layers=layers)

    @property
    def offload_layers(self) -> int:
        """How many layers keep keys and values in host memory."""
        return len(offloaded_layers(self.layers))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends keys and values of one layer, as a model's layers do.

        Args:
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).
            layer_idx: of the layer.
            args: as transformers' caches take them.
            kwargs: as transformers' caches take them.

        Returns:
            keys and values to look at.

        Raises:
            ValueError: the cache was made for a model with fewer layers.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"`past_key_values` was made for a model with {len(self.layers)} layers, got keys of layer "
                f"{layer_idx}; pass a cache made from this model's config."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def fork(self, batch_size: int = 1, rows: int | None = None) -> "LongContextCache":
        """A cache to continue the same prefix in several ways; this one stays as it is.

        Args:
            batch_size: how many continuations: a copy, in which every row is repeated that many times.
            rows: how many continuations of the one sequence of this cache, in the place of `batch_size`: its
                keys and values stay in memory once, and a decoding step reads them once for all rows. The
                result takes a batch of `rows` suffixes, with `tree_attention` or `blockwise_attention`.

        Raises:
            ValueError: a number below 1, or `rows` of a cache that is empty, holds several sequences, or has
                layers without keys.
        """
        if rows is not None:
            if batch_size != 1:
                raise ValueError(f"`rows` takes the place of `batch_size`, got {rows=} and {batch_size=}.")
            twin = copy.copy(self)
            twin.layers = cast(Any, share_layers(self.layers, rows))
            return twin
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
        twin = copy.deepcopy(self)
        if batch_size != 1:
            twin.batch_repeat_interleave(batch_size)
        return twin

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens: in every layer or, where one of them cannot, in none.

        Args:
            tokens_to_remove: a negative number of tokens to drop, or a positive length to keep.

        Raises:
            RuntimeError: a layer has not recorded them.
        """
        drop = tokens_to_drop(self, tokens_to_remove)
        layers: list[Any] = self.layers
        for layer in layers:
            # Layers of transformers refuse nothing.
            if hasattr(layer, "check_drop"):
                layer.check_drop(drop)
        super().crop(-drop)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache to a safetensors file, without the spare room.

        Where several processes share the cache, every one must call it, and writes its own share: rank 0 to
        `path`, the others to files beside it that are named after it. What was there before is replaced once
        all are written.

        Args:
            path: the file, in a folder that every process sees.

        Raises:
            ValueError: a layer of this model is of a kind that cannot be saved, or the processes were not
                asked for the same; on every process.
            OSError: a file cannot be written; on every process.
        """
        lengths = lengths_of(self.layers)
        dtype = cache_dtype_name(self.cache_dtype)
        notes = Notes(self.signature, lengths, dtype, self._placed(max(lengths, default=0)).stretches, "")
        save_layers(path, self.layers, notes, self._ranks)

    @property
    def _ranks(self) -> Any:
        return Alone()

    def _placed(self, length: int) -> Placement:
        """Who holds which token of a cache that one process has for itself."""
        placement = Placement(0, 1)
        if length:
            placement.place(length)
        return placement

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: PreTrainedConfig | nn.Module,
        device: torch.device | str | None = None,
        capacity: int = 0,
        cache_dtype: str | torch.dtype | None = None,
        offload_layers: int = 0,
    ) -> "LongContextCache":
        """Reads a cache that `save` wrote, by as many processes or by others.

        Args:
            path: the file; of a cache that several processes have saved, the one without a number.
            config: config of the model that will use it, which must be the one that made it; or that model.
                Where `prepare_generation` has prepared it for several processes, they share the cache: every
                one must call it, and reads its own share.
            device: where the keys and values go; None for that of the model, and the CPU for a config.
            capacity: tokens to make room for.
            cache_dtype: that of the saved cache, as in the constructor.
            offload_layers: as in the constructor; the saved cache may have had another number.

        Raises:
            ValueError: the file is not such a cache, not all of one, or was made by another model, in another
                `cache_dtype` or by another version of this library; files beside it are missing, or of
                another save. On every process.
            OSError: there is no such file; on every process.
            TypeError: `config` is neither a config nor a model of transformers.
        """
        known: Any = config if isinstance(config, PreTrainedConfig) else getattr(config, "config", None)
        if not isinstance(known, PreTrainedConfig):
            raise TypeError(
                f"`config` must be a model of transformers or its config, got {type(config).__name__}; give "
                "the model inside of a wrapper."
            )
        place: Any = getattr(config, "device", "cpu") if device is None else device
        caches = getattr(config, CACHES, None)
        options = (capacity, cache_dtype, offload_layers)
        if caches is None:
            return load_cache(path, lambda: cls(known, *options), place, Alone())
        ranks = Alone() if caches.group is None else caches.group
        return load_cache(path, lambda: caches.make(*options), place, ranks)

    def read(self, saved: SavedCache) -> None:
        """Takes over what open files hold, if it is a cache of this kind.

        Args:
            saved: the files.

        Raises:
            ValueError: names what differs.
        """
        notes = saved.notes
        self._check_signature(notes.model)
        self.check_dtype(notes.cache_dtype, saved.owner)
        if len(notes.lengths) != len(self.layers):
            raise ValueError(
                f"{saved.owner} does not hold all layers: {len(notes.lengths)} of the {len(self.layers)} of "
                "this model; save it again."
            )
        places = saved.places(self._place(notes).runs)
        layers: list[Any] = self.layers
        for index, (layer, length) in enumerate(zip(layers, notes.lengths, strict=True)):
            layer.load_state(saved.state(index, places if is_cut(layer) else None), length)

    def _place(self, notes: Notes) -> Placement:
        """Decides which of the saved tokens this cache will hold."""
        return self._placed(notes.length)

    def check_model(self, config: PreTrainedConfig) -> None:
        """Refuses a model other than the one this cache was made for.

        Args:
            config: the model's config.

        Raises:
            ValueError: names the field that differs.
        """
        for name, other in _signature(config.get_text_config(decoder=True)).items():
            if self.signature[name] != other:
                raise ValueError(
                    f"`past_key_values` was made for a model with {name}={self.signature[name]!r}, but this "
                    f"one has {other!r}; pass a cache made from this model's config."
                )

    def check_dtype(self, cache_dtype: str | torch.dtype | None, owner: str) -> None:
        """Refuses a dtype of cached keys and values other than this cache's.

        Args:
            cache_dtype: the other.
            owner: whose it is, for the message.

        Raises:
            ValueError: names both.
        """
        mine, other = cache_dtype_name(self.cache_dtype), cache_dtype_name(read_cache_dtype(cache_dtype))
        if mine != other:
            raise ValueError(
                f"`cache_dtype` of the cache is {mine!r}, but that of {owner} is {other!r}; "
                f"use `cache_dtype={other!r}` for the cache."
            )

    def _check_signature(self, saved: dict[str, Any]) -> None:
        for name, mine in self.signature.items():
            if saved.get(name) != mine:
                raise ValueError(
                    f"`config` has {name}={mine!r}, but the saved cache was made with {saved.get(name)!r}; "
                    "use the model that made it."
                )


def _make_layers(config: PreTrainedConfig, capacity: int, cache_dtype: torch.dtype | None) -> list[Any]:
    kinds, keywords = get_layer_types_and_kwargs(config)
    recurrent = recurrent_layers(config)
    layers = []
    for index, kind in enumerate(kinds):
        if index in recurrent:
            layers.append(RecurrentLayer(rounded_capacity(capacity)))
        elif kind == "full_attention":
            layers.append(make_layer(cache_dtype, None, rounded_capacity(capacity)))
        elif kind in ("sliding_attention", "chunked_attention"):
            layers.append(make_layer(cache_dtype, keywords["sliding_window"], capacity))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**keywords))
    return layers


def _signature(config: PreTrainedConfig) -> dict[str, Any]:
    fields = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    # By these, keys at the same place differ.
    fields += ("head_dim", "sliding_window", "layer_types", "rope_parameters")
    # Behind a layer of another kind, or other slopes, the same weights make other keys.
    lightning = sorted(lightning_layers(config))
    signature = {name: field_of(config, name) for name in fields} | {
        "vocab_size": getattr(config, "vocab_size", None),
        "lightning_layers": lightning or None,
        "lightning_slopes": getattr(config, "lightning_slopes", None),
    }
    # As it comes back from a file, and apart from the config, which may be changed.
    return json.loads(json.dumps(signature))
