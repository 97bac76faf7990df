"""Reading a prompt together: each rank carries its slices of the tokens through the model.

The forward of the model is replaced by one that cuts what can be cut. The last slice of a run is rank 0's,
who sends the logits of the last tokens to the others. A remainder that does not divide by 2P goes through
every rank alike, as decoded tokens do. Either way the logits are the same bits on every rank.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_longattn.cache.placement import Slices
from hf_longattn.cache.sharded import ShardedCache
from hf_longattn.kernels.dispatch import warn_slow

# Keywords of a prompt that can be cut: along the tokens, along the sequence seen so far, or not at all.
_KNOWN = frozenset(
    "input_ids position_ids attention_mask past_key_values use_cache return_dict logits_to_keep".split()
)
# Tokens of a forward that are not a prompt yet.
_GUESSES = 64


class ShardedForward:
    """Stands in for the forward of a model: the ranks share the tokens of a prompt on a `ShardedCache`.

    Args:
        run: the model's forward, for slices of a run.
        step: the forward for tokens that every rank computes; `run`, or one that replays graphs.
    """

    def __init__(self, run: Callable[..., Any], step: Callable[..., Any]) -> None:
        self.run, self.step = run, step

    def forward(self) -> Callable[..., Any]:
        """A function with the signature of the model's forward."""

        @functools.wraps(self.run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            count = 0 if args else shared_tokens(kwargs)
            if not count:
                _warn_of_whole_prompt(kwargs)
                return self.step(*args, **kwargs)
            output = self._run_shared(kwargs, count)
            if count == kwargs["input_ids"].shape[1]:
                return output
            positions = kwargs.get("position_ids")
            kwargs["input_ids"] = kwargs["input_ids"][:, count:]
            kwargs["position_ids"] = None if positions is None else positions[..., count:]
            return self.step(**kwargs)

        return forward

    def _run_shared(self, kwargs: dict[str, Any], count: int) -> Any:
        """Computes the first `count` tokens together."""
        cache: ShardedCache = kwargs["past_key_values"]
        past = cache.get_seq_length()
        slices = Slices(past, count, cache.group.rank, cache.group.world_size)
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        mask = kwargs.get("attention_mask")
        wanted = (_kept(kwargs) or 0) if count == ids.shape[1] else 0
        shared = {
            **kwargs,
            "input_ids": slices.take(ids, 1),
            "position_ids": slices.take(positions, positions.ndim - 1),
            "attention_mask": None if mask is None else mask[:, : past + count],
            # 0 would mean all of them.
            "logits_to_keep": max(wanted, 1),
        }
        with cache.computing(slices, mask):
            output = self.run(**shared)
        if wanted:
            # The last tokens of this rank's slices are those of the run on rank 0 alone.
            output.logits = cache.group.broadcast(output.logits.contiguous())
        return output


def _warn_of_whole_prompt(kwargs: dict[str, Any]) -> None:
    """Says what keeps the tokens of a prompt together, once for each name."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ShardedCache) or cache.group.world_size == 1:
        return
    ids = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if ids is None else ids
    # Guesses of assisted decoding are few, and their logits are all wanted.
    if tokens is not None and tokens.shape[1] > _GUESSES and (name := _not_cut(kwargs)) is not None:
        warn_slow("generate", f"`{name}` is not cut among processes: each computes every token of the prompt")


def _not_cut(kwargs: dict[str, Any]) -> str | None:
    """The first keyword of a forward that is not known to be cut."""
    return next((name for name, value in kwargs.items() if value is not None and name not in _KNOWN), None)


def _kept(kwargs: dict[str, Any]) -> int | None:
    """How many of the last logits a forward is asked for, None for all or a selection of them."""
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, Tensor) and keep.numel() == 0:
        # An empty selection: none is wanted.
        return 0
    return keep if isinstance(keep, int) and keep > 0 else None


def shared_tokens(kwargs: dict[str, Any]) -> int:
    """How many of the first tokens of a forward the ranks compute together.

    Args:
        kwargs: keywords of the forward.

    Returns:
        a multiple of 2P, 0 where every rank computes all.
    """
    ids, cache, mask = (kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
    keep = _kept(kwargs)
    if keep is None or ids is None or not isinstance(cache, ShardedCache) or cache.group.world_size == 1:
        return 0
    if _not_cut(kwargs) or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
        return 0
    length, pieces = ids.shape[1], 2 * cache.group.world_size
    # Logits that are sent have no gradient, and their output has names.
    sendable = not torch.is_grad_enabled() and kwargs.get("return_dict") is not False
    if length % pieces == 0 and (keep == 0 or (sendable and keep <= length // pieces)):
        return length
    count = max(length - keep, 0) // pieces * pieces
    # A token alone counts as decoded, and so as no padding (`create_recurrent_attention_mask` of transformers
    # 5.17); a prompt goes on behind this one, which may be padding.
    alone = keep == 0 and mask is not None and length - count == 1
    return max(count - pieces, 0) if alone else count
