"""`hf-longattn bench`: what the operators take on this machine, beside torch's own attention and the floor.

A short form of the scripts in benchmarks/: one pass over a few sizes, in less than a minute on a GPU. Softmax
attention is first held against fp64, and not timed where it is wrong.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_longattn.cli.measure import pick_device
from hf_longattn.cli.plan import print_json
from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.decode_attention import decode_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.lightning_attention import lightning_attention

_HEADS, _GROUPS, _WIDTH = 32, 8, 128
# Keys of a decoding step, tokens of a causal prefill, tokens of lightning attention.
_GPU_SIZES = ((16384, 131072), (4096, 16384), (16384, 65536))
_CPU_SIZES = ((2048, 8192), (256, 512), (512, 2048))
_REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        operation: what was run.
        tokens: keys or tokens.
        ours: seconds, the median.
        sdpa: seconds of torch's attention on the same inputs; None where it computes something else.
        floor: seconds that moving the bytes once takes, or the products at the rate of a matrix product,
            whichever is more.
        note: what the floor counts.
    """

    operation: str
    tokens: int
    ours: float
    sdpa: float | None
    floor: float
    note: str


def bench(device: str = "auto", sizes: tuple[tuple[int, ...], ...] | None = None) -> list[Row]:
    """Times the operators.

    Args:
        device: "auto", "cpu", "cuda", ...
        sizes: (keys of decoding, tokens of prefill, tokens of lightning attention); None picks by device.

    Raises:
        ValueError: a result is wrong, or the device cannot be used.
    """
    place = pick_device(device)
    decode, prefill, lightning = sizes or (_GPU_SIZES if place.type == "cuda" else _CPU_SIZES)
    machine = _Machine(place)
    with torch.inference_mode():
        rows = [machine.decode(keys) for keys in decode]
        rows += [machine.prefill(tokens) for tokens in prefill]
        return rows + [machine.lightning(tokens) for tokens in lightning]


class _Machine:
    """A device, with its rates measured now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        side = 8192 if device.type == "cuda" else 512
        left, right = (self.draw(side, side) for _ in range(2))
        self.operations = 2 * side**3 / self.seconds(lambda: left @ right)
        source = self.draw(1 << 28 if device.type == "cuda" else 1 << 24)
        target = torch.empty_like(source)
        self.bandwidth = (
            2 * source.numel() * source.element_size() / self.seconds(lambda: target.copy_(source))
        )

    def draw(self, *shape: int) -> Tensor:
        """Random numbers."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        """The median of some runs, after two that are not counted."""
        times = []
        for _ in range(_REPEATS + 2):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def states(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of one sequence."""
        shapes = ((_HEADS, queries), (_GROUPS, keys), (_GROUPS, keys))
        query, key, value = (self.draw(1, *shape, _WIDTH) for shape in shapes)
        return query, key, value

    def floor(self, size: float, operations: float) -> tuple[float, str]:
        """Seconds at least, and what they are of."""
        times = (size / self.bandwidth, operations / self.operations)
        words = f"{size / 1e6:,.0f} MB" if times[0] >= times[1] else f"{operations / 1e9:,.0f} GFLOP"
        return max(times), words

    def decode(self, keys: int) -> Row:
        """One new token on a cache."""
        states = self.states(1, keys)
        size = 2 * states[1].numel() * states[1].element_size()
        floor = self.floor(size, 4 * _HEADS * _WIDTH * keys)
        ours = lambda: decode_attention(*states)[0]  # noqa: E731
        return self.compare("decode", keys, ours, states, False, floor)

    def prefill(self, tokens: int) -> Row:
        """A causal prompt."""
        states = self.states(tokens, tokens)
        size = sum(state.numel() for state in states) * states[0].element_size()
        floor = self.floor(size, 2 * _HEADS * _WIDTH * tokens**2)
        ours = lambda: blockwise_attention(*states, mask=KeyRange(causal=True))[0]  # noqa: E731
        return self.compare("causal prefill", tokens, ours, states, True, floor)

    def compare(
        self,
        name: str,
        tokens: int,
        ours: Callable[[], Tensor],
        states: tuple[Tensor, Tensor, Tensor],
        causal: bool,
        floor: tuple[float, str],
    ) -> Row:
        """Checks and times ours beside torch's."""

        def sdpa() -> Tensor:
            query, key, value = states
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

        # The first heads are enough to tell a wrong kernel, and fit in fp64.
        per_group = _HEADS // _GROUPS
        wide = (states[0][:, :per_group].double(), states[1][:, :1].double(), states[2][:, :1].double())
        rows = slice(None) if not causal else slice(0, min(tokens, 1024))
        keys = slice(None) if not causal else rows
        parts = (wide[0][:, :, rows], wide[1][:, :, keys], wide[2][:, :, keys])
        exact = F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], is_causal=causal, enable_gqa=True
        )
        errors = [_error(run()[:, :per_group, rows], exact) for run in (ours, sdpa)]
        if not errors[0] <= 1.5 * (errors[1] + torch.finfo(self.dtype).eps):
            raise ValueError(
                f"`{name}` is wrong here: error {errors[0]:.1e}, sdpa {errors[1]:.1e}; run `doctor`."
            )
        return Row(name, tokens, self.seconds(ours), self.seconds(sdpa), *floor)

    def lightning(self, tokens: int) -> Row:
        """Linear attention with decay."""
        query, key, value = (self.draw(1, _HEADS, tokens, _WIDTH) for _ in range(3))
        slopes = torch.linspace(0.01, 0.5, _HEADS, device=self.device)
        seconds = self.seconds(lambda: lightning_attention(query, key, value, slopes))
        # State and value of every token, both ways.
        floor = self.floor(4 * query.numel() * query.element_size(), 4 * _HEADS * _WIDTH**2 * tokens)
        return Row("lightning", tokens, seconds, None, *floor)


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def show(rows: list[Row], as_json: bool) -> None:
    """Prints the measurements as a table, or as JSON."""
    if as_json:
        print_json({"rows": [dataclasses.asdict(row) for row in rows]})
        return
    table = Table("operation", "tokens", "ms", "sdpa, ms", "floor, ms", "floor of", "share")
    for row in rows:
        times = [
            f"{1e3 * value:.3f}" if value is not None else "" for value in (row.ours, row.sdpa, row.floor)
        ]
        table.add_row(
            row.operation, f"{row.tokens:,}", *times, row.note, f"{100 * row.floor / row.ours:.0f} %"
        )
    Console().print(table)
