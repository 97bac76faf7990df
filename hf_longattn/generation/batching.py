"""`generate_batch` of a prepared Block Transformer: many prompts on a fixed number of rows.

    queue of prompts -> free rows: whole blocks read, in batches of similar lengths
                     -> all rows, a block at a time, until each has ended -> its row is free

Every row stands at the start of a block, whatever the length of its prompt: the tokens behind the prompt's
whole blocks are fed in again, one by one, while the other rows choose theirs. So one program of L steps, a
CUDA graph on a GPU, serves all that is ever in the rows. While it runs, the host reads the tokens of the
block before.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from hf_longattn.devices import HostCopy
from hf_longattn.fusion import fused
from hf_longattn.generation.capture import capture
from hf_longattn.generation.choice import TokenChoice
from hf_longattn.generation.linear import Products

# Prompts wait until one row in so many is free: few rows at a time are read at less than the full rate.
_FREE_SHARE = 8


class RowProgram:
    """The tokens of R rows, and the L steps that add to all of them.

    Args:
        decoding: what `decode_rows` returned.
        choice: chooses tokens; it knows of no end.
        width: tokens of prompt and answer that a row has room for.
    """

    def __init__(self, decoding: Any, choice: TokenChoice, width: int) -> None:
        self.decoding, self.choice, self.span = decoding, choice, decoding.block_length
        self.device = decoding.device
        rows = choice.finished.shape[0]
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=self.device)
        self.column = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        # Tokens of a prompt behind its whole blocks, -1 where a row chooses.
        self.known = torch.full((rows, self.span), -1, device=self.device)
        self.said = torch.zeros_like(self.known)
        self.kept: dict[str, Any] = {}
        self.graph: Any = None

    def run(self) -> None:
        """Writes the tokens of the next block of every row to `said`."""
        self._steps() if self.graph is None else self.graph.replay()

    def _steps(self) -> None:
        self.decoding.block(self._choose)
        self.known.fill_(-1)

    def _choose(self, slot: int, logits: Tensor) -> Tensor:
        as_they_are = self.choice.takes_largest() and logits.dtype != torch.float64
        # A copy, as processors may write to what they are given.
        logits = logits if as_they_are else logits.to(torch.float32, copy=True)
        tokens, _ = self.choice(self.ids, logits)
        known = self.known[:, slot]
        tokens = torch.where(known < 0, tokens, known)
        self.said[:, slot] = tokens
        self.ids.scatter_(1, self.column, tokens[:, None])
        self.column.add_(1).clamp_(max=self.ids.shape[1] - 1)
        return tokens

    def record(self, model: PreTrainedModel, products: Products) -> None:
        """Captures the steps in a graph, which `run` replays from here on; no row may be in use yet.

        Args:
            model: whose layers may run as faster ones.
            products: knows which linear layers.

        Raises:
            RuntimeError: a step cannot be captured.
        """

        def rehearse() -> None:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                self._steps()

        with fused(model, self.ids.shape[0], products), cast(Any, model).few_launches():
            self.graph, _ = capture(rehearse, self._steps)

    def admit(self, rows: list[int], prompts: list[list[int]], chunk: int) -> None:
        """Has rows begin with prompts: reads their whole blocks, and notes the tokens behind.

        Args:
            rows: which.
            prompts: token ids of each.
            chunk: blocks of a row that are read at a time.
        """
        cuts = [self.decoding.cut(len(prompt)) for prompt in prompts]
        most = max(blocks for _, blocks, _ in cuts)
        whole = torch.full((len(rows), most * self.span), self.decoding.config.fill_token_id)
        # What is not written yet repeats a token of the row, which a penalty on tokens seen does not notice.
        ids = torch.tensor([[prompt[0]] for prompt in prompts]).repeat(1, self.ids.shape[1])
        known = torch.full((len(rows), self.span), -1)
        for row, (prompt, (pads, blocks, rest)) in enumerate(zip(prompts, cuts, strict=True)):
            tokens = torch.tensor(prompt)
            ids[row, : len(prompt)] = tokens
            whole[row, pads : blocks * self.span] = tokens[: len(prompt) - rest]
            known[row, :rest] = tokens[len(prompt) - rest :]
        numbers = torch.tensor([(row, *cut) for row, cut in zip(rows, cuts, strict=True)])
        index, pads, blocks, rest = self._sent(numbers).unbind(1)
        lengths = self._sent(torch.tensor([[len(prompt)] for prompt in prompts]))
        self.ids.index_copy_(0, index, self._sent(ids))
        self.known.index_copy_(0, index, self._sent(known))
        self.column.index_copy_(0, index, lengths - rest[:, None])
        padded = any(cut[0] for cut in cuts)
        whole = self._sent(whole).view(len(rows), most, self.span)
        together = slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else None
        self.decoding.admit(index, whole, pads if padded else None, blocks, chunk, together)

    def park(self, rows: list[int]) -> None:
        """Says that nobody uses these rows any more: they go on with as few blocks as can be."""
        index = self._sent(torch.tensor(rows))
        self.decoding.place(index, torch.zeros_like(index))

    def _sent(self, numbers: Tensor) -> Tensor:
        """A copy on the device, for which nobody waits."""
        if self.device.type != "cuda":
            return numbers.to(self.device)
        return numbers.pin_memory().to(self.device, non_blocking=True)


@dataclass
class _Block:
    """The tokens of one block of every row, and whose they are."""

    tokens: HostCopy
    seats: list[RequestState | None]
    skipped: list[int]


class Rows:
    """Has the rows of a program answer a queue of requests.

    Args:
        program: with nothing in its rows.
        requests: in the order in which they are to begin.
        positions: blocks that are read at a time, all prompts together.
        chunk: blocks of one prompt that are read at a time.
        read: a context in which prompts are read.
        ended: called for every request that has ended.
        behind: blocks whose tokens the host has not read yet while the device computes the next one.
    """

    def __init__(
        self,
        program: RowProgram,
        requests: Iterable[RequestState],
        positions: int,
        chunk: int,
        read: Callable[[], contextlib.AbstractContextManager[Any]],
        ended: Callable[[], None],
        behind: int,
    ) -> None:
        self.program, self.queue = program, deque(requests)
        self.positions, self.chunk, self.behind = positions, chunk, behind
        self.read, self.ended = read, ended
        rows = program.ids.shape[0]
        self.seats: list[RequestState | None] = [None] * rows
        self.left, self.skipped = [0] * rows, [0] * rows
        self.parked: set[int] = set(range(rows))
        self.blocks: deque[_Block] = deque()

    def run(self) -> None:
        """Goes on until every request has ended."""
        while True:
            self._refill()
            if all(seat is None for seat in self.seats):
                break
            self._launch()
            while len(self.blocks) > self.behind:
                self._look(self.blocks.popleft())
        while self.blocks:
            self._look(self.blocks.popleft())

    def _refill(self) -> None:
        free = [row for row, seat in enumerate(self.seats) if seat is None]
        count = min(len(free), len(self.queue))
        if count and self._is_worth_it(len(free), count):
            with self.read():
                for group in self._groups(count):
                    self._begin(free[: len(group)], group)
                    free = free[len(group) :]
        idle = [] if self.queue else [row for row in free if row not in self.parked]
        if idle and len(free) < len(self.seats):
            self.program.park(idle)
            self.parked.update(idle)

    def _is_worth_it(self, free: int, count: int) -> bool:
        """Whether to read prompts now, or to wait for more rows to end."""
        if count == len(self.queue) or free * _FREE_SHARE >= len(self.seats):
            return True
        waiting = sum(self._blocks(self.queue[place]) for place in range(count))
        return waiting >= self.positions

    def _blocks(self, request: RequestState) -> int:
        return self.program.decoding.cut(len(request.initial_tokens))[1]

    def _groups(self, count: int) -> Iterator[list[RequestState]]:
        """The next `count` requests, in batches that are read at once."""
        new = [self.queue.popleft() for _ in range(count)]
        while new:
            most, size = 0, 0
            for size in range(1, len(new) + 1):
                most = max(most, self._blocks(new[size - 1]))
                if (size + 1) * most > self.positions:
                    break
            yield new[:size]
            new = new[size:]

    def _begin(self, rows: list[int], requests: list[RequestState]) -> None:
        self.program.admit(rows, [request.initial_tokens for request in requests], self.chunk)
        for row, request in zip(rows, requests, strict=True):
            request.status = RequestStatus.DECODING
            self.seats[row], self.left[row] = request, cast(int, request.max_new_tokens)
            self.skipped[row] = self.program.decoding.cut(len(request.initial_tokens))[2]
        self.parked.difference_update(rows)

    def _launch(self) -> None:
        """Has the device compute a block; rows that it fills up are free for those that come behind it."""
        self.program.run()
        self.blocks.append(_Block(HostCopy(self.program.said), self.seats.copy(), self.skipped))
        self.left = [
            left - self.program.span + known for left, known in zip(self.left, self.skipped, strict=True)
        ]
        self.seats = [seat if left > 0 else None for seat, left in zip(self.seats, self.left, strict=True)]
        self.skipped = [0] * len(self.seats)

    def _look(self, block: _Block) -> None:
        """Notes the tokens of a block, and which requests end by one of them."""
        for row, tokens in enumerate(block.tokens.read().tolist()):
            request = block.seats[row]
            if request is None or request.status >= RequestStatus.FINISHED:
                continue
            known = block.skipped[row]
            if any(request.update_and_check_completion(token, None) for token in tokens[known:]):
                self.ended()
                if self.seats[row] is request:
                    self.seats[row] = None
