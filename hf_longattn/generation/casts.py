"""Weights in the dtype of autocast, cast once for captured steps that read them at every replay.

Autocast casts a weight at its first use, and lets go of the cast when it ends, which may be after every step;
weights that want no gradient it casts at every use. A graph can hold neither: it would read memory that is
gone, or move 4 bytes a weight in fp32, and 2 twice, where a step of a model in 16 bits moves 2. So the casts
that a captured step asks for are made before it, and live as long as it does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longattn.cache.preallocated import lasting_buffers
from hf_longattn.kernels.dispatch import warn_slow

_CAST = torch.ops.aten._to_copy.default
_PRODUCTS = {2: torch.mm, 3: torch.bmm}


@dataclass(frozen=True)
class _Cast:
    """One weight, its cast, and how often the weight had been written to when it was cast."""

    weight: nn.Parameter
    cast: Tensor
    version: int


class WeightCasts(TorchDispatchMode):
    """The casts of one model to one dtype.

    Args:
        dtype: of autocast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.kept: dict[int, _Cast] = {}
        self.wanted: dict[int, nn.Parameter] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Parts of a model that are compiled run compiled, with casts of their own."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A cast that is kept, in the place of one more; notes weights of which there is none yet."""
        options = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func is _CAST and type(args[0]) is nn.Parameter and options == {"dtype": self.dtype}:
            weight = args[0]
            if id(weight) in self.kept:
                return self.kept[id(weight)].cast
            if not weight.is_inference():
                # Only of others is it known whether they have changed.
                self.wanted[id(weight)] = weight
        return func(*args, **(kwargs or {}))

    def rehearsing(self, work: Callable[[], Any]) -> Callable[[], None]:
        """What runs `work` and makes the casts that it asks for.

        Args:
            work: a step.
        """

        def run() -> None:
            self.reading(work)()
            wanted, self.wanted = self.wanted, {}
            made = {}
            try:
                for key, weight in wanted.items():
                    made[key] = _Cast(weight, _cast_of(weight, self.dtype), weight._version)
            except torch.OutOfMemoryError:
                made.clear()
                warn_slow(
                    "decoding", f"there is no room for the weights in {self.dtype}: each step casts them"
                )
            self.kept |= made

        return run

    def reading(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """What runs `work` on the casts that are kept.

        Args:
            work: a step.
        """

        @functools.wraps(work)
        def run() -> Any:
            with _casts_at_every_use(), self:
                return work()

        return run

    def hold(self) -> bool:
        """Whether no weight has been written to; what is written to `weight.data` is not seen."""
        return all([kept.weight._version == kept.version for kept in self.kept.values()])

    def are_equal(self) -> bool:
        """Whether every weight is what was cast, number by number."""
        return all(torch.equal(kept.cast, kept.weight.detach().to(self.dtype)) for kept in self.kept.values())


@contextlib.contextmanager
def _casts_at_every_use() -> Iterator[None]:
    """Inside, autocast asks for the cast of a weight wherever it is used, and keeps none."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


class _Operand(TorchDispatchMode):
    """Keeps the second operand of the products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.found = args[1]
        return func(*args, **(kwargs or {}))


def _cast_of(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The cast of a weight: that which autocast keeps, where it is the same, for two take twice as much."""
    with lasting_buffers():
        cast = weight.detach().to(dtype)
    product = _PRODUCTS.get(weight.ndim)
    if product is None or not (weight.requires_grad and torch.is_autocast_cache_enabled()):
        return cast
    # A product of no rows shows what autocast multiplies with.
    with torch.no_grad(), _Operand() as operand:
        product(weight.new_empty(*weight.shape[:-2], 0, weight.shape[-2]), weight)
    known = operand.found
    # It may be that of a weight as it was before.
    same = known is not None and known.dtype == dtype and torch.equal(known, cast)
    return known if known is not None and same else cast
