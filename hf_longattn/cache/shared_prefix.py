"""Cache layers of many continuations of one prefix, whose keys and values are in memory once.

`LongContextCache.fork(rows=...)` makes them. The prefix stays where the first cache has it; each row has a
suffix of its own. What a layer returns to the model is a `SharedStates`: prefix and suffix, not joined, which
our attention functions read apart and merge.
"""

import copy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from hf_longattn.cache.guarded_states import GuardedStates
from hf_longattn.cache.preallocated import PreallocatedLayer, PreallocatedSlidingLayer


class SharedStates(GuardedStates):
    """Keys or values of which a prefix is the same for every row: the shape of both, without storage.

    It has the shape, dtype and device of the tensor that joined them. Another attention implementation is
    refused, where it would copy the prefix for every row.

    Args:
        prefix: (1, G, P, K).
        suffix: (B, G, S, K).
    """

    prefix: Tensor
    suffix: Tensor

    def __new__(cls, prefix: Tensor, suffix: Tensor) -> "SharedStates":
        """A tensor of shape (B, G, P + S, K)."""
        rows, heads, length, width = suffix.shape
        shape = (rows, heads, prefix.shape[2] + length, width)
        states = cls.empty(shape, suffix.dtype, suffix.device)
        states.prefix, states.suffix = prefix, suffix
        return states

    def refuse(self, caller: str) -> NoReturn:
        """Names the implementations that read a prefix and suffixes.

        Args:
            caller: what was about to read them.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`attn_implementation` must be 'tree_attention' or 'blockwise_attention' for a cache forked with "
            f"`rows`, got {caller}; set one of them, or fork with `batch_size`."
        )


class SharedPrefixLayer(PreallocatedLayer):
    """One layer of `rows` sequences that begin alike: `keys` and `values` are those of their suffixes.

    A layer with a window shares the last window of the prefix, in memory of its own, and keeps every token of
    the suffixes.

    Args:
        layer: the filled layer of the one sequence that all rows begin with. It may be changed afterwards:
            it leaves the tokens that are read here where they are.
        rows: sequences.
    """

    def __init__(self, layer: PreallocatedLayer, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.is_sliding = layer.is_sliding
        self.prefix_length = int(layer.get_seq_length())
        if isinstance(layer, PreallocatedSlidingLayer):
            # A window moves to the front of its buffer now and then; it is short, and copied.
            self.prefix = tuple(states.clone() for states in layer.state().values())
        else:
            self.prefix = layer.share()

    @property
    def batch_size(self) -> int:
        """Rows of the cache."""
        return self.rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedPrefixLayer":
        """A copy with suffixes of its own, and the same prefix."""
        memo |= {id(states): states for states in (self.prefix, *self.prefix)}
        twin = copy.copy(self)
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def reserve(self, tokens: int) -> None:
        """Has the first update make room for `tokens`, those of the prefix counted."""
        super().reserve(tokens - self.prefix_length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends to the suffixes; returns them with the prefix, as `SharedStates`.

        Args:
            key_states: (B, G, T, K).
            value_states: (B, G, T, V).
            args: unused.
            kwargs: unused.

        Raises:
            ValueError: another batch than the cache was forked for.
        """
        if key_states.shape[0] != self.rows:
            raise ValueError(
                f"`past_key_values` was forked for {self.rows} sequences, got a batch of "
                f"{key_states.shape[0]}; fork with `rows={key_states.shape[0]}`: beams and returned "
                "sequences count as rows."
            )
        states = super().update(key_states, value_states)
        keys, values = (SharedStates(*pair) for pair in zip(self.prefix, states, strict=True))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """(keys that attention will see, position of the first) once `query_length` tokens are appended."""
        shared = self.prefix[0].shape[2]
        own = self.capacity if self.clock is not None else self.end + query_length
        return shared + own, self.prefix_length - shared

    def get_seq_length(self) -> Any:
        """Tokens seen so far, those of the prefix included."""
        return self.prefix_length + self.end if self.clock is None else super().get_seq_length()

    def check_drop(self, count: int) -> None:
        """Refuses to forget what other rows read too."""
        if count > self.end:
            raise ValueError(
                f"`crop` would remove {count - self.end} tokens of the shared prefix; crop the cache that it "
                "was forked from before forking."
            )
        super().check_drop(count)

    def reset(self) -> None:
        """Forgets the suffixes; keeps the prefix, and the memory."""
        super().reset()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times in place of it."""
        super().batch_repeat_interleave(repeats)
        self.rows *= repeats

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows `indices`."""
        super().batch_select_indices(indices)
        self.rows = len(torch.arange(self.rows, device=indices.device)[indices])

    def state(self) -> NoReturn:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "`save`: a cache that was forked with `rows` cannot be saved in this version; save the one that "
            "it was forked from."
        )

    def load_state(self, state: dict[str, Tensor], length: int) -> NoReturn:
        """Refused, as `state` is.

        Args:
            state: unused.
            length: unused.

        Raises:
            ValueError: always.
        """
        self.state()


def share_layers(layers: list[Any], rows: int) -> list[SharedPrefixLayer]:
    """The layers of a cache whose `rows` sequences share what `layers` hold.

    Args:
        layers: of a filled cache of one sequence.
        rows: sequences.

    Raises:
        ValueError: not one sequence, nothing to share, or a layer of another kind.
    """
    if rows < 1:
        raise ValueError(f"`rows` must be positive, got {rows}.")
    for index, layer in enumerate(layers):
        # A subclass holds something else than one whole sequence of keys.
        if type(layer) not in (PreallocatedLayer, PreallocatedSlidingLayer):
            raise ValueError(
                f"`rows`: layer {index} is a {type(layer).__name__}, whose keys and values cannot be "
                "shared; use `fork(batch_size)`."
            )
        if layer.batch_size != 1 or not layer.get_seq_length():
            raise ValueError(
                f"`rows`: a prefix of one sequence is shared, but layer {index} holds "
                f"{max(layer.batch_size, 0)} sequences of {layer.get_seq_length()} tokens; read the prefix "
                "with a batch of one, or use `fork(batch_size)`."
            )
    return [SharedPrefixLayer(cast(PreallocatedLayer, layer), rows) for layer in layers]
