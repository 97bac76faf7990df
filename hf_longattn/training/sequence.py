"""One sequence on several ranks in training: each carries its share of the tokens through the decoder.

Every rank of the group is given the same batch and holds the whole model (or its FSDP shards). The forward of
the decoder, from token ids to final hidden states, is replaced by one that cuts its arguments; positions,
padding and packing are those of the whole sequence. Hidden states come together at the end, on every rank,
but for the chunked loss, which takes each rank's share and adds up.

Gradients: after a backward every rank has the gradient of the whole sequence, that of one process. Layers,
embeddings and head add up their parameters' fp32 sums over the group before autograd sees them. So a plain
loop needs nothing else, and what averages gradients over processes (DDP, FSDP) averages equal numbers inside
a group, and over the groups as it does over processes without one.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices

from hf_longattn.parallel.checks import check_same, digest
from hf_longattn.parallel.group import SequenceGroup
from hf_longattn.parallel.sequence import SequenceShare, current_share
from hf_longattn.training.arguments import UNUSED, named_arguments
from hf_longattn.training.visibility import PACKING

_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", *PACKING)
# What every rank of a group must have been given alike.
_FIELDS = (*_TOKENS, "past_key_values", "labels", "shift_labels", "num_items_in_batch")
_TASK = (
    "one sequence",
    "give every process of the group the same batch; under accelerate and Trainer, `ParallelismConfig` and "
    "its `cp_size` see to it",
)


@dataclass
class LossCall:
    """A forward whose loss is taken from shares; `share` is set by the decoder, None where it was not cut."""

    share: SequenceShare | None = None


class SequenceParallel:
    """What the forwards of one prepared model know about its group.

    Args:
        group: the ranks.
        decoder: the module that holds the layers and the final norm.
        copies: how often the caller counts a loss that it divides by its own number of items: Trainer adds
            up those of all processes, and under accelerate's "cp" each rank has to return its part.
        has_mesh: whether the caller gave a mesh, and sees to the batches.
    """

    def __init__(
        self, group: SequenceGroup, decoder: nn.Module, copies: int = 1, has_mesh: bool = True
    ) -> None:
        self.group, self.decoder, self.copies, self.has_mesh = group, decoder, copies, has_mesh
        self.call: LossCall | None = None

    def check(self, arguments: dict[str, Any]) -> None:
        """Compares what the ranks were given.

        Args:
            arguments: of the model's or the decoder's forward.

        Raises:
            ValueError: on every rank, naming a field that differs and the ranks.
        """
        parameter = next(self.decoder.parameters())
        fields = {name: _described(arguments.get(name)) for name in _FIELDS}
        drops = self.decoder.training and any(map(drops_anything, self.decoder.modules()))
        fields["random state"] = digest(torch.get_rng_state()) if drops else None
        check_same(self.group, fields, parameter.device, _TASK)

    def forward(self, is_active: Callable[[], bool]) -> Callable[..., Any]:
        """What stands in for the decoder's forward.

        Args:
            is_active: whether the set-up still holds.
        """
        original = self.decoder.forward
        signature = inspect.signature(original)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = named_arguments(signature, args, kwargs)
            if not is_active() or not self._is_cut(arguments):
                return original(*args, **kwargs)
            call = self.call
            if call is None:
                self.check(arguments)
            self._refuse(arguments)
            share = make_share(self.group, arguments)
            with share.running():
                output = original(**cut_arguments(share, arguments))
            if call is None:
                return _joined(output, share)
            call.share = share
            return output

        return forward

    def _is_cut(self, arguments: dict[str, Any]) -> bool:
        """Whether the ranks share this call: not one that reads or fills a cache, as `generate` does."""
        tokens = _first(arguments, "input_ids", "inputs_embeds")
        fills = bool(arguments.get("use_cache")) and not self.decoder.training
        cached = arguments.get("past_key_values") is not None
        return isinstance(tokens, Tensor) and tokens.numel() > 0 and not cached and not fills

    def _refuse(self, arguments: dict[str, Any]) -> None:
        config: Any = self.decoder.config
        for name in ("output_hidden_states", "output_attentions"):
            asked = arguments.get(name)
            if getattr(config, name, False) if asked is None else asked:
                raise ValueError(
                    f"`{name}=True`: no rank has those of a whole sequence over several processes; leave it "
                    "out, or prepare the model for one process."
                )
        mask = arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                "`attention_mask` must be (batch, tokens), or left out, for one sequence over several "
                f"processes, got {found}."
            )
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.ndim and name not in _TOKENS and name not in UNUSED:
                raise ValueError(
                    f"`{name}` of shape {tuple(value.shape)} reaches the decoder, and it is not known how it "
                    "runs along a sequence over several processes; leave it out, or prepare the model for "
                    "one process."
                )


@contextlib.contextmanager
def taking_loss(parallel: SequenceParallel | None, arguments: dict[str, Any]) -> Iterator[LossCall]:
    """Inside, the decoder leaves each rank its share of the hidden states.

    Args:
        parallel: the ranks, or None for one process.
        arguments: of the model's forward, labels among them; compared between the ranks.
    """
    call = LossCall()
    if parallel is None:
        yield call
        return
    parallel.check(arguments)
    parallel.call = call
    try:
        yield call
    finally:
        parallel.call = None


def _first(arguments: dict[str, Any], *names: str) -> Any:
    return next((value for name in names if (value := arguments.get(name)) is not None), None)


def _described(value: Any) -> Any:
    """What can be compared between ranks without moving much."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return [list(value.shape), str(value.dtype), value.detach().double().sum().item()]
    return type(value).__name__ if isinstance(value, nn.Module) or hasattr(value, "layers") else value


def drops_anything(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training, as dropout of its own or of attention.

    Args:
        module: any module.
    """
    if isinstance(module, nn.Dropout):
        return module.p > 0
    rates = (getattr(module, name, 0) for name in ("attention_dropout", "dropout", "attn_dropout"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def make_share(group: SequenceGroup, arguments: dict[str, Any]) -> SequenceShare:
    """This rank's share of a call of a decoder.

    Args:
        group: the ranks.
        arguments: of the whole sequence, by name.

    Raises:
        ValueError: positions or mask of another length than the tokens.
    """
    tokens = _first(arguments, "input_ids", "inputs_embeds")
    length, positions, mask = tokens.shape[1], arguments.get("position_ids"), arguments.get("attention_mask")
    if positions is None:
        positions = torch.arange(length, device=tokens.device)[None]
    for name, value in (("position_ids", positions), ("attention_mask", mask)):
        if value is not None and value.shape[-1] != length:
            raise ValueError(f"`{name}` must cover {length} tokens, got shape {tuple(value.shape)}.")
    documents = None
    # As transformers does it: where there is a mask, positions say nothing of documents.
    if mask is None and positions.ndim == 2:
        documents = find_packed_sequence_indices(positions.expand(tokens.shape[0], -1))
    padding = None if mask is None else mask.to(torch.bool)
    return SequenceShare(group, length, positions, padding, documents)


def cut_arguments(share: SequenceShare, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder for this rank's tokens.

    Args:
        share: this rank's.
        arguments: of the whole sequence, by name.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    assert tokens is not None
    mask = share.filled_padding()
    if mask is None:
        # Without a mask a model would look for packed documents in the cut positions.
        mask = torch.ones(tokens.shape[0], share.slices.count, dtype=torch.bool, device=tokens.device)
    own = {
        "input_ids": None if ids is None else share.take(ids, 1),
        "inputs_embeds": None if embeds is None else share.split(embeds),
        # Added tokens stand at 0: a table of positions may end with the sequence.
        "position_ids": share.take(share.positions, -1),
        "attention_mask": mask,
        "use_cache": False,
    }
    return {**arguments, **{name: value for name, value in own.items() if value is not None}}


def _joined(output: Any, share: SequenceShare) -> Any:
    if isinstance(output, tuple):
        return share.join(output[0]), *output[1:]
    output.last_hidden_state = share.join(output.last_hidden_state)
    return output


def partial_loss_forward(
    original: Callable[..., Any], copies: int, is_active: Callable[[], bool]
) -> Callable[..., Any]:
    """What stands in for the forward of a model whose loss is counted once for each of its ranks.

    Args:
        original: computes the loss of the whole sequence on every rank.
        copies: how often the loss is counted where `num_items_in_batch` divides it, see `SequenceParallel`.
        is_active: whether the set-up still holds.
    """

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_active() and kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * copies
        return original(*args, **kwargs)

    return forward


def whole_rotary_forward(module: nn.Module) -> Callable[..., Any]:
    """What stands in for the forward of a rotary embedding whose frequencies depend on the length.

    Args:
        module: the embedding, its forward still its own.
    """
    original = module.forward

    @functools.wraps(original)
    def forward(hidden: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        share = current_share()
        if share is None:
            return original(hidden, position_ids, *args, **kwargs)
        waves = original(hidden, share.positions, *args, **kwargs)
        return tuple(share.take(wave, 1) for wave in waves)

    return forward


def depends_on_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose frequencies depend on the longest position.

    Args:
        module: any module.
    """
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
