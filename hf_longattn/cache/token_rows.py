"""Rows of tokens that are not plain, and their scan by lightning attention.

Padded tokens add nothing to a state and time does not pass for them; packed documents do not see each other.
Both come down to the operator's `cu_seqlens`: what exists is moved to the front of its row, and the rows go
through the scan as documents of one long row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_longattn.kernels.lightning_attention import lightning_attention


@dataclass(frozen=True)
class Packing:
    """How the tokens of B rows stand in one row of documents.

    Args:
        bounds: (documents + 1,) cumulative lengths.
        first: (B,) the document that a row's state enters.
        last: (B,) the document that leaves a row's state behind.
        order: (B * T,) the token at each place; None where they stay.
    """

    bounds: Tensor
    first: Tensor
    last: Tensor
    order: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        """(B, heads, T, dim) -> (1, heads, B * T, dim)."""
        flat = tensor.transpose(1, 2).flatten(0, 1)
        flat = flat if self.order is None else flat[self.order]
        return flat.transpose(0, 1)[None]

    def unpack(self, tensor: Tensor, batch: int) -> Tensor:
        """(1, heads, B * T, dim) -> (B, T, heads, dim)."""
        flat = tensor[0].transpose(0, 1)
        if self.order is not None:
            flat = flat[torch.argsort(self.order)]
        return flat.unflatten(0, (batch, -1))


def bounds_of(starts: Tensor) -> Tensor:
    """(documents + 1,) cumulative lengths of documents by their first tokens, the last being B * T.

    While a graph is traced their number does not depend on the documents: (B * T + 1,), most of them empty.

    Args:
        starts: (B, T) bool, True at the first of all.
    """
    begins, total = starts.flatten(), starts.numel()
    if not torch.compiler.is_compiling():
        return F.pad(begins.nonzero()[:, 0], (0, 1), value=total)
    places = torch.where(begins, torch.arange(total, device=begins.device), total)
    return F.pad(places.sort().values, (0, 1), value=total)


def version_of(value: object) -> int | None:
    """How often a tensor was written to in place, so that what is known of it holds; None if nobody counts.

    Args:
        value: a tensor or anything else.
    """
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


class TokenRows:
    """Which of B x T tokens exist, and where documents begin. Worked out once, for all layers of a forward.

    Args:
        exists: (B, T) bool, or None where all do.
        starts: (B, T) bool, the first token of each document; None for one document a row.
        bounds: (documents + 1,) cumulative lengths over the B * T tokens, in place of `starts`.
        look: whether the device may be asked which tokens exist; otherwise the general way is taken.
    """

    def __init__(
        self,
        exists: Tensor | None = None,
        starts: Tensor | None = None,
        bounds: Tensor | None = None,
        look: bool = True,
    ) -> None:
        self.starts, self.bounds = starts, bounds
        self.left_only = self.contiguous = False
        if exists is not None and look:
            begins = exists & ~F.pad(exists[:, :-1], (1, 0))
            flags = torch.stack([exists.all(), exists[:, -1:].all(), begins.sum(-1).max() <= 1])
            full, self.left_only, self.contiguous = flags.tolist()
            exists = None if full else exists
        self.exists = exists
        self._packing: Packing | None = None

    @classmethod
    def from_bounds(cls, bounds: Tensor, batch: int, length: int) -> "TokenRows":
        """Rows of documents whose cumulative lengths over the B * T tokens are known.

        Args:
            bounds: (documents + 1,), from 0 to B * T. The first token of all begins none: what enters there
                is the state of its document.
            batch: B.
            length: T.
        """
        marks = torch.zeros(batch * length + 1, dtype=torch.bool, device=bounds.device)
        marks[bounds.long()] = True
        marks[0] = False
        return cls(starts=marks[:-1].view(batch, length))

    def part(self, tokens: slice) -> "TokenRows":
        """The rows of some of the tokens, as they follow the tokens before them."""
        assert self.bounds is None, "documents by their bounds cannot be cut"
        exists, starts = (None if flags is None else flags[:, tokens] for flags in (self.exists, self.starts))
        return TokenRows(exists, starts)

    def counts(self, batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How far these tokens carry a state that enters them.

        Args:
            batch: B.
            length: T.
            device: of the tokens.

        Returns:
            (B,) tokens that exist, fp32, and (B,) bool, whether a document begins, which forgets the state.
        """
        existing = torch.full((batch,), float(length), device=device)
        if self.exists is not None:
            existing = self.exists.sum(-1).float()
        if self.starts is None:
            return existing, torch.zeros(batch, dtype=torch.bool, device=device)
        return existing, self.starts.any(-1).expand(batch)

    def _keep_out(self, state: Tensor) -> Tensor:
        """The state that enters, zero for rows whose first existing token begins a document."""
        assert self.starts is not None, "documents by their bounds have no state that enters"
        begun = self.starts.cumsum(-1)
        first = begun[:, 0]
        if self.exists is not None:
            first = begun.gather(1, self.exists.to(torch.uint8).argmax(-1, keepdim=True))[:, 0]
        return state.masked_fill((first > 0)[:, None, None, None], 0)

    @property
    def is_plain(self) -> bool:
        """Whether every token exists and every row is one document."""
        return self.exists is None and not self.is_packed

    @property
    def is_packed(self) -> bool:
        """Whether rows hold documents."""
        return self.starts is not None or self.bounds is not None

    def edges_only(self, stateful: bool) -> bool:
        """Whether it is enough that padded tokens have no value: they stand where decay matters to nobody.

        Args:
            stateful: whether a state leaves the rows, so that padding on the right would count.
        """
        return not self.is_packed and self.contiguous and (self.left_only or not stateful)

    def _existing(self) -> tuple[Tensor, Tensor]:
        """(B * T,) what exists first in each row, and (B,) how much that is."""
        assert self.exists is not None
        batch, length = self.exists.shape
        row = torch.arange(batch, device=self.exists.device)[:, None] * length
        order = torch.argsort((~self.exists).to(torch.uint8), dim=-1, stable=True) + row
        return order.flatten(), self.exists.sum(-1)

    def packing(self, batch: int, length: int, device: torch.device) -> Packing:
        """The rows as documents of one row; worked out at the first call.

        Args:
            batch: B.
            length: T.
            device: of the tokens.
        """
        if self._packing is None:
            row = torch.arange(batch, device=device)
            pack = self._pack_documents if self.is_packed else self._pack_existing
            self._packing = pack(row, length)
        return self._packing

    def _pack_existing(self, row: Tensor, length: int) -> Packing:
        order, count = self._existing()
        begin = row * length
        # Each row's padding is a document of its own, whose state nobody reads.
        bounds = F.pad(torch.stack([begin, begin + count], 1).flatten(), (0, 1), value=length * len(row))
        return Packing(bounds, 2 * row, 2 * row, order)

    def _pack_documents(self, row: Tensor, length: int) -> Packing:
        begin, total = row * length, length * len(row)
        order, end = None, begin + length
        if self.bounds is not None:
            bounds = F.pad(self.bounds.to(begin), (0, 1), value=total)
        else:
            assert self.starts is not None
            starts = self.starts
            if self.exists is not None:
                order, count = self._existing()
                end = begin + count
                # Documents are numbered from 1; padding, now behind them, is number 0.
                number = ((starts.cumsum(-1) + 1) * self.exists).flatten()[order].view_as(starts)
                starts = number != F.pad(number[:, :-1], (1, 0), value=-1)
            starts = starts.index_fill(1, begin.new_zeros(1), True)
            bounds = bounds_of(starts)
        last = torch.searchsorted(bounds, end - 1, right=True) - 1
        return Packing(bounds, torch.searchsorted(bounds, begin, right=True) - 1, last.clamp(min=0), order)


def scan_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scale: float,
    rows: TokenRows,
    state: Tensor | None = None,
    *,
    stateful: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal lightning attention over rows with padding and documents.

    o_t = scale * sum over existing tokens j <= t of its document, of exp(-slope * n) (q_t . k_j) v_j, where n
    counts the existing tokens from j to t (arXiv 2401.04658, equation 6).

    Args:
        query: (B, H, T, K).
        key: (B, G, T, K), where G divides H.
        value: (B, G, T, V).
        slopes: (H,) fp32.
        scale: factor on the output.
        rows: which tokens exist and belong together.
        state: (B, H, K, V) fp32 that enters, or None. A row whose first token begins a document drops it.
        stateful: whether the state behind the last token is wanted.

    Returns:
        The output (B, T, H, V) in the query's dtype, and the state or None. Outputs of padded tokens mean
        nothing.
    """
    if rows.exists is not None:
        value = value.masked_fill(~rows.exists[:, None, :, None], 0)
    if rows.is_plain or (state is None and rows.edges_only(stateful)):
        result = lightning_attention(
            query, key, value, slopes, scale=scale, initial_state=state, output_final_state=stateful
        )
        output, state = result if stateful else (result, None)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2), state
    batch, _, length, _ = query.shape
    if state is not None and rows.is_packed:
        state = rows._keep_out(state)
    packing = rows.packing(batch, length, query.device)
    entering = state
    if state is not None:
        state = state.new_zeros(len(packing.bounds) - 1, *state.shape[1:]).index_copy(0, packing.first, state)
    q, k, v = (packing.pack(tensor) for tensor in (query, key, value))
    output, state = lightning_attention(
        q,
        k,
        v,
        slopes,
        scale=scale,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=packing.bounds,
    )
    output = packing.unpack(output, batch)
    return output, _leaving(state[packing.last], entering, rows) if stateful else None


def _leaving(state: Tensor, entering: Tensor | None, rows: TokenRows) -> Tensor:
    """The states behind the rows; time has not passed for a row without a token."""
    if not rows.is_packed or rows.exists is None:
        return state
    before = torch.zeros_like(state) if entering is None else entering
    return torch.where(rows.exists.any(-1)[:, None, None, None], state, before)
