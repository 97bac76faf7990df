"""Lightning attention inside a layer that runs a block at a time: a state goes from block to block.

    forward, left to right:    the state behind block i enters block i + 1
    backward, right to left:   the states of the forward, or again from x;   one local backward of block i,
                               whose gradient for the state that entered it is that of the state behind
                               block i - 1

Where the sequence lies on several ranks, a first pass finds the state of each slice alone, and one all-gather
what enters it (see `parallel/lightning.py`). In the backward the gradients of what enters the slices go round
once, and a second pass adds what later slices have for a slice's keys and values.

The states of all blocks are held for the time of one layer's backward: H K V fp32 numbers a row and block. In
one process they are kept from the forward where they are little beside an input that waits on the device.
"""

from dataclasses import dataclass
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_longattn.attention.exact import Options
from hf_longattn.attention.lightning import rows_of_sequence
from hf_longattn.cache.recurrent import RecurrentStates
from hf_longattn.cache.token_rows import TokenRows, scan_rows, version_of
from hf_longattn.masking import LazyMask
from hf_longattn.parallel.lightning import Pieces, carry
from hf_longattn.parallel.sequence import SequenceShare, current_share
from hf_longattn.training.attention import KeysKnownError, TokenMixer


@dataclass
class BlockRows:
    """Which tokens exist and where documents begin, a block and a slice at a time.

    Args:
        blocks: of this process, in order.
        counts: of each block, (B,) existing tokens and (B,) whether a document begins.
        slices: the blocks of each of this rank's slices, by number; all of them in one process.
        pieces: the same of the slices, to be gathered; None in one process.
    """

    blocks: list[TokenRows]
    counts: list[tuple[Tensor, Tensor]]
    slices: list[list[int]]
    pieces: tuple[Tensor, Tensor] | None = None

    @classmethod
    def cut(
        cls, whole: TokenRows, places: list[slice], hidden: Tensor, share: SequenceShare | None
    ) -> "BlockRows":
        """The rows of a sequence by blocks.

        Args:
            whole: the rows of the whole sequence.
            places: of the blocks in the sequence.
            hidden: (B, t, D), of this process.
            share: what this rank computes of a sequence over several.
        """
        batch, device = hidden.shape[0], hidden.device
        blocks = [whole.part(place) for place in places]
        sizes = [place.stop - place.start for place in places]
        counts = [
            rows.counts(batch, size, device) for rows, size in zip(blocks, sizes, strict=True)
        ]  # fmt: skip
        if share is None:
            return cls(blocks, counts, [list(range(len(blocks)))])
        half = len(blocks) // 2
        own = [whole.part(part).counts(batch, share.slices.piece, device) for part in share.slices.own]
        lengths, resets = (torch.stack(parts) for parts in zip(*own, strict=True))
        slices = [list(range(half)), list(range(half, 2 * half))]
        return cls(blocks, counts, slices, (lengths, resets))


class BlockRowsCache:
    """Layers of one forward share its rows, and know what this rank computes of it."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def _of_forward(self, arguments: dict[str, Any]) -> dict[Any, Any]:
        """What is known of the forward that a layer's arguments belong to."""
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        key = mask if isinstance(mask, LazyMask) else positions
        if key is None:
            return {}
        # The caller may give the same tensor again, written over or beside others.
        parts = [mask, positions, arguments.get("seq_idx"), arguments.get("cu_seq_lens_q")]
        beside, versions = [part for part in parts if part is not key], list(map(version_of, parts))
        known = self._known.get(key)
        if known is None or known["versions"] != versions or any(map(is_not, known["beside"], beside)):
            known = self._known[key] = {"beside": beside, "versions": versions}
        return known

    def share_of(self, arguments: dict[str, Any]) -> SequenceShare | None:
        """What this rank computes of the sequence that a layer's arguments belong to.

        Args:
            arguments: of the layer.
        """
        # Checkpointing of the caller's calls the layer again in the backward, with nothing but its arguments.
        return self._of_forward(arguments).setdefault("share", current_share())

    def get(
        self, arguments: dict[str, Any], places: list[slice], hidden: Tensor, share: SequenceShare | None
    ) -> BlockRows:
        """The rows of a layer's blocks.

        Args:
            arguments: of the layer: mask, positions, cumulative lengths or document ids.
            places: of the blocks in the sequence.
            hidden: (B, t, D), of this process.
            share: what this rank computes of a sequence over several.

        Returns:
            the `BlockRows`.

        Raises:
            ValueError: the mask does not cover every token with every token.
        """
        known, key = self._of_forward(arguments), (places[0].stop, hidden.device)
        if key not in known:
            known[key] = BlockRows.cut(_whole_rows(arguments, hidden, share), places, hidden, share)
        return known[key]


def _whole_rows(arguments: dict[str, Any], hidden: Tensor, share: SequenceShare | None) -> TokenRows:
    mask, documents = arguments.get("attention_mask"), arguments.get("seq_idx")
    batch, length = hidden.shape[:2]
    positions, bounds = arguments.get("position_ids"), arguments.get("cu_seq_lens_q")
    exists = mask.padding if isinstance(mask, LazyMask) else mask
    if isinstance(mask, LazyMask) and documents is None and mask.pattern is not None:
        documents = mask.pattern.documents
    if share is not None:
        exists, length, positions = share.filled_padding(), share.slices.count, share.filled_positions()
        documents = share.documents if documents is None else documents
        documents = None if documents is None else share.fill(documents, 1, -1)
    elif isinstance(mask, LazyMask) and not mask.q_length == mask.kv_length == length:
        raise ValueError(
            f"`attention_mask` must cover {length} queries and as many keys, got {mask.q_length} and "
            f"{mask.kv_length}; a prepared model trains without a cache."
        )
    lengths = None if bounds is None else (bounds, bounds)
    options = Options(True, position_ids=positions, cu_seqlens=lengths, documents=documents)
    return rows_of_sequence(None if exists is None else exists.bool(), options, batch, length)


class BlockStates(TokenMixer):
    """The states of one lightning layer, and the block that is running; a stand-in for the layer's cache.

    Args:
        rows: of the blocks.
        name: under which the layer takes a cache.
        share: what this rank computes of a sequence over several.
    """

    def __init__(self, rows: BlockRows, name: str, share: SequenceShare | None = None) -> None:
        super().__init__()
        self.block_rows, self.share = rows, share
        self.arguments = {name: self}
        # What enters each block and, in the backward, the gradient of what leaves it.
        self.states: dict[int, Tensor | None] = {}
        self.gradients: dict[int, Tensor] = {}
        # Of the slices: what leaves them alone, the gradients of what enters them, and their exchange.
        self.alone: list[Tensor | None] = [None] * len(rows.slices)
        self.grad_entering: list[Tensor | None] = [None] * len(rows.slices)
        self.pieces: Pieces | None = None
        self.slopes: Tensor | None = None
        self.left: Tensor | None = None
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether the sequence lies on several ranks."""
        return self.share is not None

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The block's (B, G, T, K) keys as `RecurrentStates`, and its values."""
        return RecurrentStates(key, self), value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the block's keys are all that the layer is to know of."""
        return 0

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scale: float, rows: TokenRows
    ) -> Tensor:
        """Lightning attention of the running block.

        Args:
            query: (B, H, T, K).
            key: (B, G, T, K).
            value: (B, G, T, V).
            slopes: (H,) fp32.
            scale: factor on the output.
            rows: unused: those of the block are known.

        Returns:
            (B, T, H, V).
        """
        self.calls += 1
        self.slopes = slopes
        if self.stops and not self.stores:
            self.found = query, key, value
            raise KeysKnownError
        self.entering = entering = self.states.get(self.index)
        if entering is not None:
            self.entering = entering = entering.detach().requires_grad_(torch.is_grad_enabled())
        own = self.block_rows.blocks[self.index]
        output, self.left = scan_rows(query, key, value, slopes, scale, own, entering, stateful=True)
        if self.stores:
            self._hand_on(self.left)
        if self.stops:
            raise KeysKnownError
        return output

    def _neighbour(self, step: int) -> tuple[list[int], int | None]:
        """The slice of the running block, and the block beside it there."""
        own = next(blocks for blocks in self.block_rows.slices if self.index in blocks)
        beside = self.index + step
        return own, beside if beside in own else None

    def _hand_on(self, state: Tensor | None) -> None:
        own, behind = self._neighbour(1)
        assert state is not None
        if behind is None:
            self.alone[self.block_rows.slices.index(own)] = state.detach()
        else:
            self.states[behind] = state.detach()

    def kept(self, most: int) -> Tensor | None:
        """What enters the blocks behind the first, (blocks - 1, B, H, K, V)."""
        states = [state for _, state in sorted(self.states.items()) if state is not None]
        if self.is_shared or not states or sum(state.nbytes for state in states) > most:
            return None
        return torch.stack(states)

    def put_back(self, kept: Tensor) -> None:
        """Takes what `kept` returned."""
        self.states = dict(enumerate(kept.unbind(), start=1))

    def gather(self) -> None:
        """From the states of the blocks, each slice begun at zero, to those of the whole sequence."""
        assert self.share is not None and self.slopes is not None and self.block_rows.pieces is not None
        self.pieces = Pieces(self.share.group, *self.block_rows.pieces)
        alone = torch.stack([state for state in self.alone if state is not None])
        entering, _ = self.pieces.enter(alone, self.slopes, None)
        for blocks, state in zip(self.block_rows.slices, entering.unbind(), strict=True):
            for index in blocks:
                local = self.states.get(index)
                self.states[index] = state if local is None else state + local
                state = carry(state, torch.zeros_like(state), *self.block_rows.counts[index], self.slopes)

    def ends(self) -> tuple[list[Tensor], list[Tensor]]:
        """The state behind the running block and its gradient, where a block behind has one for it."""
        grad = self.gradients.pop(self.index, None)
        return ([], []) if grad is None or self.left is None else ([self.left], [grad])

    def take(self, grad: Tensor | None) -> None:
        """Notes the gradient of the state that entered the running block."""
        own, before = self._neighbour(-1)
        if grad is not None and before is not None:
            self.gradients[before] = grad
        elif before is None:
            self.grad_entering[self.block_rows.slices.index(own)] = grad
        self.left = self.entering = None

    def add_up(self) -> None:
        """From the gradients of what enters the slices to those of what leaves each block alone."""
        assert self.pieces is not None and self.slopes is not None
        zeros = [state for state in self.alone if state is not None]
        grads = [
            torch.zeros_like(zero) if grad is None else grad
            for zero, grad in zip(zeros, self.grad_entering, strict=True)
        ]
        behind = self.pieces.leave(torch.stack(grads), torch.zeros_like(zeros[0]), self.slopes)
        for blocks, grad in zip(self.block_rows.slices, behind.unbind(), strict=True):
            for index in reversed(blocks):
                self.gradients[index] = grad
                grad = carry(grad, torch.zeros_like(grad), *self.block_rows.counts[index], self.slopes)

    def found_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The state of the block that stopped last, alone and with its graph, and its gradient."""
        assert self.found is not None and self.slopes is not None
        (query, key, value), self.found = self.found, None
        own = self.block_rows.blocks[self.index]
        with torch.enable_grad():
            _, left = scan_rows(query.detach(), key, value, self.slopes, 1.0, own, stateful=True)
        assert left is not None
        return [left], [self.gradients.pop(self.index)]
