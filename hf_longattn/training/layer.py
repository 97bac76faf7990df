"""A decoder layer a block of tokens at a time, forward and backward, through the layer's own code.

    forward, left to right:    y_i = layer(x_i), its attention reading K, V of blocks 0 .. i
    backward, right to left:   K, V again from x;   dx_i = one local backward of block i, with dK, dV of the
                               blocks 0 .. i added to fp32 sums on the way (see `training/attention.py`)

Where the sequence lies on several ranks, K and V of all come together before the first block, and dK, dV are
complete after the last one (see `training/shared_attention.py`).

Only x is kept (and, where asked for, the output of attention and its lse, which spares its recomputation).
`training/node.py` makes one autograd function of the two passes. Liu and Abbeel, "Blockwise Parallel
Transformer", arXiv 2305.19370, sections 3 and 4.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_longattn.adapters import LayerState
from hf_longattn.parallel.sequence import SequenceShare
from hf_longattn.training.arguments import cut
from hf_longattn.training.attention import KeysKnownError, TokenMixer
from hf_longattn.training.blocks import block_tokens, even_size
from hf_longattn.training.captured import CapturedTensors
from hf_longattn.training.groups import Groups
from hf_longattn.training.offload import Blocks, DeviceBlocks, Layout, Offloader
from hf_longattn.training.ownership import LayerInputs
from hf_longattn.training.randomness import BlockRandomness
from hf_longattn.training.states import BlockRowsCache
from hf_longattn.training.sums import GradientSum, local_gradients
from hf_longattn.training.unread import UnreadProducts
from hf_longattn.training.visibility import VisibilityCache, split_rows

# States are kept for the backward where this many times their bytes are those of the layer's input.
_STATE_SHARE = 16


@dataclass
class Runtime:
    """What the prepared layers of a model share.

    Args:
        block_size: tokens of a row in a block; None picks by device and `numbers`.
        save_attention: keep the output of attention for the backward.
        offloader: where inputs wait.
        groups: of layers of which the first keeps its input.
        numbers: that the activations of one token take in a layer.
    """

    block_size: int | None
    save_attention: bool
    offloader: Offloader
    groups: Groups
    numbers: int
    visibility: VisibilityCache = field(default_factory=VisibilityCache)
    block_rows: BlockRowsCache = field(default_factory=BlockRowsCache)
    inputs: LayerInputs = field(default_factory=LayerInputs)
    active: bool = False

    def is_active(self) -> bool:
        """Whether the set-up that made it still holds."""
        return self.active

    def rows(
        self, hidden: Tensor, share: SequenceShare | None = None, has_state: bool = False
    ) -> list[slice]:
        """The blocks of (B, T, D) hidden states, none of them across the two slices of a share.

        Args:
            hidden: of one call.
            share: what this rank computes of a sequence over several.
            has_state: whether the layer hands states from block to block, and keeps no keys.
        """
        piece = hidden.shape[1] if share is None else share.slices.piece
        size = self.block_size
        if size is None:
            dtype = hidden.dtype if has_state else None
            size = even_size(piece, block_tokens(hidden.device, hidden.shape[0], self.numbers, dtype))
        first = split_rows(piece, size)
        if share is None:
            return first
        return first + [slice(rows.start + piece, rows.stop + piece) for rows in first]


@dataclass
class BlockRun:
    """One call of a layer: everything but the hidden states and the parameters.

    Args:
        forward: the layer's own forward.
        arguments: its other arguments, by name.
        rows: the blocks.
        attention: keys and values or states of the layer; None for a module that mixes no tokens.
        random: the random numbers of its blocks.
        device: of the hidden states.
        state: hooks and settings of the layer's modules, which the backward needs too.
        share: what this rank computes of a sequence over several.
        may_overwrite: whether the output may be written over the hidden states once they are on the host.
        beside: what the layer returned beside hidden states, found in a call; None where it returns no tuple.
        unread: products of the layer that its run in the backward leaves out.
        captured: looks for tensors of others in the layer's graph.
    """

    forward: Callable[..., Any]
    arguments: dict[str, Any]
    rows: list[slice]
    attention: Callable[[], TokenMixer] | None
    random: BlockRandomness
    device: torch.device
    state: LayerState | None = None
    share: SequenceShare | None = None
    may_overwrite: bool = False
    beside: tuple[None, ...] | None = None
    unread: UnreadProducts | None = None
    captured: CapturedTensors | None = None

    def __post_init__(self) -> None:
        kind = self.device.type
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def _as_then(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast of the forward."""
        enabled, dtype = self.autocast
        kind = self.device.type
        if not enabled and not torch.is_autocast_enabled(kind):
            return contextlib.nullcontext()
        # Weights cast without gradient must not be found again by a pass with gradient.
        return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)

    def block(self, index: int, hidden: Tensor, attention: TokenMixer | None, **options: Any) -> Tensor:
        """The layer on one block.

        Args:
            index: of the block.
            hidden: (B, rows, D).
            attention: keys and values or states of the layer.
            options: of `TokenMixer.block`.

        Returns:
            (B, rows, D); nothing useful where attention stops the layer.
        """
        rows, length = self.rows[index], self.rows[-1].stop
        arguments = {name: cut(name, value, rows, length) for name, value in self.arguments.items()}
        if attention is not None:
            arguments |= attention.arguments

        def compute() -> Any:
            scope = contextlib.nullcontext() if attention is None else attention.block(index, rows, **options)
            with self._as_then(), scope:
                # Caught here, not by the scope: from Python 3.12 on, an exception that a generator's scope
                # takes holds the frames it came through, with their tensors, until the garbage collector
                # runs.
                try:
                    return self._only_tensor(self.forward(hidden, **arguments))
                except KeysKnownError:
                    return hidden

        place = rows if self.share is None else self.share.place(rows)
        return self.random.run(place.start, compute)

    def terms(self, index: int, hidden: Tensor, attention: TokenMixer | None, **options: Any) -> list[Tensor]:
        """Tensors like the output of `block`, for whose gradients its own stands; arguments as there."""
        compute = functools.partial(self.block, index, hidden, attention, **options)
        return [compute()] if self.unread is None else self.unread.terms(compute)

    def _only_tensor(self, output: Any) -> Tensor:
        if not isinstance(output, tuple):
            return output
        hidden, self.beside = output[0], output[1:]
        if any(part is not None for part in output[1:]):
            raise ValueError(
                f"`prepare_training` needs layers that return hidden states alone, got {len(output)} "
                "outputs; ask for no attention weights and no router logits."
            )
        return hidden

    def as_returned(self, output: Tensor) -> Any:
        """The output in the form in which the layer returns it.

        Args:
            output: hidden states of all blocks.
        """
        return output if self.beside is None else (output, *self.beside)


@dataclass
class Saved:
    """What the backward reads: the input, perhaps attention's output (B, T, H, V) and lse (B, T, H).

    Of a layer with states perhaps those, in one piece.
    """

    hidden: Blocks
    output: Blocks | None = None
    lse: Blocks | None = None
    states: DeviceBlocks | None = None

    def all(self) -> list[Blocks]:
        """Those that are there."""
        found = (self.hidden, self.output, self.lse, self.states)
        return [blocks for blocks in found if blocks is not None]

    def on_device(self) -> list[DeviceBlocks]:
        """Those that stay where they are."""
        return [blocks for blocks in self.all() if isinstance(blocks, DeviceBlocks)]

    def results(self, order: list[int]) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Output (B, H, rows, V) and lse (B, H, rows) of the blocks, or None for each."""
        if self.output is None or self.lse is None:
            yield from [None] * len(order)
            return
        for output, lse in zip(self.output.read(order), self.lse.read(order), strict=True):
            yield output.transpose(1, 2), lse.transpose(1, 2).contiguous()


def layout_of(tensor: Tensor, rows: list[slice]) -> Layout:
    """The layout of a (B, T, ...) tensor, of which a block may be given, in blocks of T."""
    return Layout((tensor.shape[0], rows[-1].stop, *tensor.shape[2:]), tensor.dtype, tensor.device, rows)


def run_forward(
    run: BlockRun, hidden: Tensor, runtime: Runtime | None, known: Saved | None = None
) -> tuple[Tensor, Saved | None]:
    """All blocks from left to right, without gradient.

    Args:
        run: the call.
        hidden: (B, T, D).
        runtime: keeps what the backward needs; None keeps nothing.
        known: what the same call kept before, which may spare it attention.

    Returns:
        (B, T, D), and what was kept.
    """
    attention = run.attention() if run.attention is not None else None
    is_known = known is not None and known.output is not None
    options = {}
    if attention is not None and (is_known or attention.is_shared):
        options["stores"] = False
    if attention is not None and attention.is_shared and not is_known:
        _fill(run, attention, enumerate(hidden[:, rows] for rows in run.rows))
        attention.gather()
    saved = None if runtime is None else Saved(runtime.offloader.keep(layout_of(hidden, run.rows), hidden))
    # Where the input does not wait on the device, the output of a block takes the place of its input.
    is_single = len(run.rows) == 1
    in_place = (
        run.may_overwrite and not is_single and (saved is None or not isinstance(saved.hidden, DeviceBlocks))
    )
    whole = hidden if in_place else None
    order = list(range(len(run.rows)))
    results = known.results(order) if known is not None else iter([None] * len(order))
    for index, rows in enumerate(run.rows):
        options["results"] = next(results)
        block = hidden[:, rows]
        if saved is not None:
            # Before the block runs: its copy to the host is over when the block is.
            saved.hidden.write(index, block)
        output = run.block(index, block, attention, **options)
        if is_single and _is_own(output, hidden):
            whole = output
        elif whole is None or (index == 0 and (output.dtype, output.shape) != (block.dtype, block.shape)):
            whole = output.new_empty(output.shape[0], hidden.shape[1], *output.shape[2:])
        if saved is not None and (whole is hidden or index == len(run.rows) - 1):
            saved.hidden.settle()
        if whole is not output:
            whole[:, rows] = output
        if runtime is not None and saved is not None:
            if attention is not None and attention.results is not None and runtime.save_attention:
                _save_results(saved, index, attention, runtime, run.rows)
    assert whole is not None
    run.random.watches = False
    if saved is not None and attention is not None and isinstance(saved.hidden, DeviceBlocks):
        # Where the input went to the host, memory is short.
        if (states := attention.kept(hidden.nbytes // _STATE_SHARE)) is not None:
            saved.states = DeviceBlocks(states, [], filled=True)
    return whole, saved


def _is_own(output: Tensor, hidden: Tensor) -> bool:
    """Whether a tensor fills memory of its own, apart from that of the hidden states."""
    storages = [tensor.untyped_storage() for tensor in (output, hidden)]
    return _fills_its_memory(output) and storages[0].data_ptr() != storages[1].data_ptr()


def _fills_its_memory(tensor: Tensor) -> bool:
    # Of a layer that somebody compiled, `nbytes` cannot be traced.
    size = tensor.numel() * tensor.element_size()
    return tensor.untyped_storage().nbytes() == size and tensor.is_contiguous()


def _save_results(
    saved: Saved, index: int, attention: TokenMixer, runtime: Runtime, rows: list[slice]
) -> None:
    assert attention.results is not None
    output, lse = (result.transpose(1, 2) for result in attention.results)
    if saved.output is None or saved.lse is None:
        # Of one block, what the kernel made is kept as it is.
        whole = len(rows) == 1 and _fills_its_memory(output)
        made = (output, lse) if whole else (None, None)
        saved.output = runtime.offloader.keep(layout_of(output, rows), made[0], lent=False)
        saved.lse = runtime.offloader.keep(layout_of(lse, rows), made[1], lent=False)
    saved.output.write(index, output)
    saved.lse.write(index, lse)


def _fill(run: BlockRun, attention: TokenMixer, blocks: Iterable[tuple[int, Tensor]]) -> None:
    """Keys and values of some blocks, and nothing else of the layer."""
    with torch.no_grad():
        for index, block in blocks:
            run.block(index, block, attention, stops=True)


def _refill(run: BlockRun, saved: Saved, attention: TokenMixer) -> None:
    """Keys and values, or states, again; the last block brings its own in the pass from right to left."""
    if saved.states is not None:
        assert saved.states.tensor is not None
        attention.put_back(saved.states.tensor)
        return
    order = list(range(len(run.rows) if attention.is_shared else len(run.rows) - 1))
    if order:
        _fill(run, attention, zip(order, saved.hidden.read(order), strict=True))
    if attention.is_shared:
        attention.gather()


class _GradientSums:
    """The gradients of one call: a row block of the input's at a time, and sums of the parameters'.

    Args:
        run: the call.
        parameters: those that want a gradient.
        needs_input: whether the input wants its own.
        room: a tensor that the input's gradient may overwrite, block by block, or None.
    """

    def __init__(
        self, run: BlockRun, parameters: list[Tensor], needs_input: bool, room: Tensor | None
    ) -> None:
        self.run, self.parameters, self.needs_input = run, parameters, needs_input
        self.room, self.written = room, set[int]()
        self.hidden: Tensor | None = None
        # Whether the graph of a block was looked at.
        self.checked = False
        self.sums = [GradientSum() for _ in parameters]

    def add(
        self,
        index: int,
        block: Tensor,
        outputs: list[Tensor],
        grads: list[Tensor],
        entering: Tensor | None = None,
    ) -> Tensor | None:
        """One local backward of a block (B, rows, D), from what it gave to that of `entering`."""
        pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
        wanted = [block, *self.parameters] if self.needs_input else list(self.parameters)
        if not pairs or not wanted:
            return None
        outputs, grads = map(list, zip(*pairs, strict=True))
        wanted += [] if entering is None else [entering]
        if not self.checked and self.run.captured is not None and self.run.state is not None:
            self.run.captured.check(
                outputs, [block, *wanted], (*map(id, self.parameters), self.run.state.hooks)
            )
        self.checked = True
        parts = local_gradients(outputs, wanted, grads)
        found = None if entering is None else parts.pop()
        hidden = parts.pop(0) if self.needs_input else None
        for total, part in zip(self.sums, parts, strict=True):
            total.add(part)
        # Last: the gradient of a parameter that is added to the output may be a view of what is overwritten.
        if hidden is not None:
            self._add_hidden(index, hidden)
        return found

    def _add_hidden(self, index: int, part: Tensor) -> None:
        if len(self.run.rows) == 1 and self.hidden is None:
            self.hidden, self.written = part, {index}
            return
        if self.hidden is None:
            self.hidden = self._place(part)
        if part.untyped_storage().data_ptr() == self.hidden.untyped_storage().data_ptr():
            # Written in place, in another view of the room: torch copies between no two of one memory.
            part = part.clone()
        if index in self.written:
            # Not `+=`, which copies the sum to where it is.
            self.hidden[:, self.run.rows[index]].add_(part)
        else:
            self.hidden[:, self.run.rows[index]] = part
        self.written.add(index)

    def _place(self, part: Tensor) -> Tensor:
        shape = (part.shape[0], self.run.rows[-1].stop, *part.shape[2:])
        fits = self.room is not None and self.room.shape == shape and self.room.dtype == part.dtype
        return self.room if fits and self.room is not None else part.new_empty(shape)

    def results(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of the input, and of each parameter in its own dtype, summed over the ranks."""
        if self.run.share is None:
            pairs = zip(self.sums, self.parameters, strict=True)
            return self.hidden, [total.rounded(parameter.dtype) for total, parameter in pairs]
        totals = self.run.share.add_up_gradients([total.wide() for total in self.sums], self.parameters)
        pairs = zip(totals, self.parameters, strict=True)
        return self.hidden, [None if total is None else total.to(p.dtype) for total, p in pairs]


def run_backward(
    run: BlockRun,
    saved: Saved,
    grad: Tensor,
    parameters: list[Tensor],
    needs_input: bool,
    may_overwrite: bool = False,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """All blocks from right to left, each with one local backward.

    Args:
        run: the call.
        saved: from `run_forward`.
        grad: (B, T, D), the gradient of the output.
        parameters: those that want a gradient.
        needs_input: whether the hidden states want theirs.
        may_overwrite: whether `grad` is nobody else's: the gradient of the input is written over it, and
            functions of the layer may write over what they are given of it.

    Returns:
        the gradients of hidden states and parameters.
    """
    attention = run.attention() if run.attention is not None else None
    if attention is not None:
        _refill(run, saved, attention)
    last = len(run.rows) - 1
    order = list(range(last, -1, -1))
    sums = _GradientSums(run, parameters, needs_input, grad if may_overwrite else None)
    for index, block, results in zip(order, saved.hidden.read(order), saved.results(order), strict=True):
        block = block.detach().requires_grad_(needs_input)
        options = {}
        if attention is not None:
            options = {"results": results, "stores": index == last and not attention.is_shared}
        with torch.enable_grad():
            terms = run.terms(index, block, attention, **options)
        _block_backward(sums, index, block, terms, grad, attention)
    if attention is not None and attention.is_shared:
        _keys_backward(run, saved, attention, sums)
    return sums.results()


def _block_backward(
    sums: _GradientSums,
    index: int,
    block: Tensor,
    terms: list[Tensor],
    grad: Tensor,
    attention: TokenMixer | None,
) -> None:
    part = grad[:, sums.run.rows[index]]
    # Functions of others, as Liger's, write over the gradients they are given and do not say so.
    if sums.room is None:
        part = part.clone()
    # One for all: products that were left out read it first, for autograd runs the newest node first.
    own = [part] * len(terms)
    if attention is None:
        sums.add(index, block, terms, own)
        return
    outputs, grads = attention.ends()
    found = sums.add(index, block, [*terms, *outputs], [*own, *grads], attention.entering)
    attention.take(found)


def _keys_backward(run: BlockRun, saved: Saved, attention: TokenMixer, sums: _GradientSums) -> None:
    """The way of the gradients of keys and values, or states, to the input and the parameters.

    A second pass, for no block's own dK, dV are complete before every rank has finished its first. To compute
    norm and projections again costs a tenth of the layer's products and no memory; to keep the graphs of all
    blocks meanwhile would cost several hidden states a token.
    """
    attention.add_up()
    order = list(range(len(run.rows)))
    for index, block in zip(order, saved.hidden.read(order), strict=True):
        block = block.detach().requires_grad_(sums.needs_input)
        with torch.enable_grad():
            run.block(index, block, attention, stores=False, stops=True)
        sums.add(index, block, *attention.found_gradients())
