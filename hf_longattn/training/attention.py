"""Attention of one block of queries to everything on its left, inside a layer that runs a block at a time.

Forward, from left to right: the block's keys and values join those of the blocks before it, then its queries
attend to all of them. Backward, from right to left: the gradient of every key and value on the left is added
to an fp32 sum; what the sum holds for the block's own columns is complete by then, for all blocks on the
right have been there.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface

from hf_longattn.attention.exact import Options, of_one_dtype, read_options
from hf_longattn.attention.tree import tree_attention_forward
from hf_longattn.kernels.blockwise_attention import blockwise_attention, blockwise_attention_gradients
from hf_longattn.masking import LazyMask, lazy_mask
from hf_longattn.training.visibility import Visibility

# What the attention modules inside prepared layers look up; the model's config keeps the public name.
IMPLEMENTATION = "blockwise_layer_attention"
# Keys of one call in the backward: what it returns in the keys' dtype is added to the fp32 sums at once, and
# must stay small beside them.
MOST_KEYS = 1 << 16


class KeysKnownError(Exception):
    """Leaves a layer once the block's keys and values are stored: the rest of it is not needed."""


class TokenMixer:
    """What mixes the tokens of a layer that runs a block at a time, and the block that is running."""

    is_shared = False

    def __init__(self) -> None:
        # The running block among the tokens of this process, and its place in the sequence.
        self.index, self.rows, self.place = 0, slice(0, 0), slice(0, 0)
        self.stores, self.stops, self.calls = True, False, 0
        self.results: tuple[Tensor, Tensor] | None = None
        # Arguments that the layer is given with each block.
        self.arguments: dict[str, Any] = {}
        # A tensor that came from the block before, whose gradient goes back there.
        self.entering: Tensor | None = None

    @contextlib.contextmanager
    def block(
        self,
        index: int,
        rows: slice,
        stores: bool = True,
        stops: bool = False,
        results: tuple[Tensor, Tensor] | None = None,
    ) -> Iterator[None]:
        """Inside, attention serves one block.

        Args:
            index: of the block.
            rows: its tokens.
            stores: keep what later blocks need of it.
            stops: leave the layer once that is kept.
            results: output (B, H, rows, V) and lse (B, H, rows) of the forward, where they were saved.
        """
        self.index, self.rows, self.stores, self.stops = index, rows, stores, stops
        self.place, self.results, self.calls = self._place(rows), results, 0
        token = _running.set(self)
        try:
            yield
        finally:
            _running.reset(token)
        if self.calls != 1:
            raise ValueError(
                "`prepare_training` needs layers that call transformers' attention interface once, got one "
                f"that calls it {self.calls} times; train this model unprepared, with gradient checkpointing."
            )

    def ends(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the running block handed on to later ones, and its gradients, in the backward."""
        return [], []

    def take(self, grad: Tensor | None) -> None:
        """Takes the gradient of `entering`."""

    def kept(self, most: int) -> Tensor | None:
        """What blocks handed on to later ones, as one tensor, where the backward is to have it.

        Args:
            most: bytes of it.
        """
        return None

    def put_back(self, kept: Tensor) -> None:
        """Takes what `kept` returned."""
        raise NotImplementedError

    def gather(self) -> None:
        """Puts what the ranks have stored together."""
        raise NotImplementedError

    def add_up(self) -> None:
        """Puts the gradients of what the ranks have stored together."""
        raise NotImplementedError

    def found_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """What the block that stopped last stores, with its graph, and its gradients."""
        raise NotImplementedError

    def _place(self, rows: slice) -> slice:
        return rows


class PrefixAttention(TokenMixer):
    """The keys and values of one layer, and the block that is running.

    Args:
        visibility: what each block sees.
        length: T.
    """

    def __init__(self, visibility: Visibility, length: int) -> None:
        super().__init__()
        self.visibility, self.length = visibility, length
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.grad_keys: Tensor | None = None
        self.grad_values: Tensor | None = None
        # Keys and values of a block that stopped, with their graph.
        self.found: tuple[Tensor, Tensor] | None = None

    def store(self, key: Tensor, value: Tensor) -> None:
        """Keeps the keys (B, G, rows, K) and values (B, G, rows, V) of the running block."""
        if key.shape[2] == self.length:
            # They are the layer's own tensors, which it is done with. In a backward they stay, and must not
            # hold the memory of queries beside them.
            stays = torch.is_grad_enabled()
            self.keys, self.values = (_alone(x) if stays else x for x in (key, value))
            return
        if self.keys is None or self.values is None:
            self.keys = key.new_empty(*key.shape[:2], self.length, key.shape[3])
            self.values = value.new_empty(*value.shape[:2], self.length, value.shape[3])
        self.keys[:, :, self.rows] = key
        self.values[:, :, self.rows] = value

    def forget(self) -> None:
        """Drops the keys and values of a block that is the only one, which no later block reads."""
        if self.keys is not None and self.rows == slice(0, self.length) and not self.is_shared:
            self.keys = self.values = None

    def attend(self, query: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Output and lse of the running block."""
        if self.results is None:
            window = self.visibility.window(self.index, self.place)
            key, value = self._columns(window.keys)
            self.results = blockwise_attention(
                query, key, value, mask=window.limits, bias=window.bias, **options
            )
        return self.results

    def gradients(
        self, grad: Tensor, query: Tensor, results: tuple[Tensor, Tensor], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of query, of the block's own keys and values if they are complete, and of the sinks."""
        window = self.visibility.window(self.index, self.place)
        if self._is_alone(window.keys):
            inputs = (query, *self._columns(window.keys))
            found = blockwise_attention_gradients(
                grad, inputs, results, mask=window.limits, bias=window.bias, **options
            )
            return found.query, found.key, found.value, found.sinks
        sums, is_first = self._key_sums(window.keys)
        # Dropout counts columns from the first key of the call, so that call must be the forward's.
        parts = [window] if options["dropout"] else window.parts(MOST_KEYS)
        grad_query: Tensor | None = None
        grad_sinks: Tensor | None = None
        for part in parts:
            # lse holds the sink already; its gradient comes from one part, which knows every row.
            own = {**options, "sinks": options["sinks"] if part is parts[-1] else None}
            inputs = (query, *self._columns(part.keys))
            found = blockwise_attention_gradients(
                grad, inputs, results, mask=part.limits, bias=part.bias, **own
            )
            for total, new in zip(sums, (found.key, found.value), strict=True):
                if is_first:
                    total[:, :, part.keys] = new
                else:
                    # Not `+=`, which copies the sum to where it is.
                    total[:, :, part.keys].add_(new)
            del new
            grad_query, grad_sinks = _sum(grad_query, found.query, len(parts)), found.sinks
            # A part's gradients must not wait beside those of the next.
            del found
        assert grad_query is not None
        return grad_query.to(query.dtype), *self._own_gradients(), grad_sinks

    def _key_sums(self, keys: slice) -> tuple[tuple[Tensor, Tensor], bool]:
        """The fp32 sums of keys and values, and whether a block that sees `keys` writes all of them first."""
        if self.grad_keys is not None and self.grad_values is not None:
            return (self.grad_keys, self.grad_values), False
        assert self.keys is not None and self.values is not None
        dtype = torch.promote_types(self.keys.dtype, torch.float32)
        # Those of all ranks, where several share the sequence.
        sees_all = keys == slice(0, self.keys.shape[2])
        make = torch.empty_like if sees_all else torch.zeros_like
        self.grad_keys, self.grad_values = (make(x, dtype=dtype) for x in (self.keys, self.values))
        return (self.grad_keys, self.grad_values), sees_all

    def _is_alone(self, keys: slice) -> bool:
        """Whether the running block is the only one, and its gradients need no sums."""
        return self.rows == slice(0, self.length) == keys and not self.is_shared

    def _own_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        assert self.keys is not None and self.values is not None
        assert self.grad_keys is not None and self.grad_values is not None
        own_key = _as_projected(self.grad_keys[:, :, self.rows], self.keys.dtype)
        return own_key, _as_projected(self.grad_values[:, :, self.rows], self.values.dtype)

    def _columns(self, keys: slice) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, keys], self.values[:, :, keys]


def _alone(heads: Tensor) -> Tensor:
    """The tensor, or a copy where others share its memory."""
    return heads if heads.untyped_storage().nbytes() == heads.nbytes else heads.clone()


def _as_projected(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, G, rows, K) in another dtype, laid out as a projection leaves it, which takes its gradient so."""
    made = heads.new_empty(heads.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)
    return made.copy_(heads)


def _sum(total: Tensor | None, part: Tensor, count: int) -> Tensor:
    """The sum of `count` parts, in fp32 where there are several."""
    if total is not None:
        return total.add_(part)
    return part if count == 1 else part.to(torch.promote_types(part.dtype, torch.float32), copy=True)


_running: ContextVar[TokenMixer | None] = ContextVar("hf_longattn_running_block", default=None)


class _BlockAttention(torch.autograd.Function):
    """Attention of one block, whose gradients for the keys on its left go to the layer's sums."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        layer: PrefixAttention,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.layer, ctx.options = layer, {**options, "sinks": sinks}
        output, lse = layer.attend(query, ctx.options)
        ctx.save_for_backward(query, output, lse)
        # A saved output lies in a buffer of the whole layer: autograd must not take it for this node's own.
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, output, lse = ctx.saved_tensors
        return *ctx.layer.gradients(grad, query, (output, lse), ctx.options), None, None


def _kernel_options(options: Options) -> dict[str, Any]:
    if options.bias is not None:
        raise ValueError(
            "`position_bias` cannot be cut by blocks of queries; train this model unprepared, with gradient "
            "checkpointing."
        )
    seed = int(torch.randint(2**62, ()).item()) if options.dropout else 0
    return {
        "scale": options.scale,
        "softcap": options.softcap,
        "dropout": (options.dropout, seed) if options.dropout else None,
    }


def layer_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the signature that transformers calls; serves the running block, if there is one.

    Args:
        module: the attention module.
        query: (B, H, T, K).
        key: (B, G, S, K).
        value: (B, G, S, V).
        attention_mask: of the whole sequence.
        dropout: probability of dropping an attention weight.
        scaling: factor on query . key, K**-0.5 if None.
        keywords: the rest of the interface.

    Returns:
        (B, T, H, V), contiguous, and None.

    Raises:
        ValueError: an option that a block cannot honour, or keys that are not the block's own.
    """
    query, key, value = of_one_dtype(query, key, value)
    layer = _running.get()
    if not isinstance(layer, PrefixAttention):
        return tree_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **keywords)
    options = read_options(module, scaling, dropout, keywords)
    layer.calls += 1
    rows = layer.rows.stop - layer.rows.start
    if not query.shape[2] == key.shape[2] == rows:
        raise ValueError(
            f"`prepare_training` needs layers that attend to their own input, got {query.shape[2]} queries "
            f"and {key.shape[2]} keys for a block of {rows} tokens; train this model unprepared."
        )
    if layer.stores:
        layer.store(key.detach(), value.detach())
    if layer.stops:
        layer.found = key, value
        raise KeysKnownError
    output = _BlockAttention.apply(query, key, value, options.sinks, layer, _kernel_options(options))
    if not torch.is_grad_enabled():
        layer.forget()
    return output.transpose(1, 2).contiguous(), None


@functools.cache
def register() -> None:
    """Makes the internal name known to transformers, with its mask function."""
    AttentionInterface.register(IMPLEMENTATION, layer_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, lazy_mask)
