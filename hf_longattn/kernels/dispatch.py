"""Which implementation of an operator runs: decided by device, said once, never silently slower.

Every operator takes `impl="auto" | "triton" | "reference"` (some also `"sdpa"`). An explicit choice is
honoured or refused; `"auto"` picks the fastest one that computes exactly what was asked.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hf_longattn")

_IMPLS = ("auto", "triton", "reference")
_TRITON_DTYPES = {torch.bfloat16, torch.float16, torch.float32}
_OLDEST_TRITON = (3, 4)
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


def _triton_version() -> str:
    """The installed version, or "" where it is unknown: builds for some devices have another name."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """(major, minor), or () where the version does not begin with them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def _is_too_old(version: str) -> bool:
    return () < _numbers(version) < _OLDEST_TRITON


# Asked once, here: Dynamo traces through `functools.cache` and warns about it.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_VERSION = _triton_version()
_TRITON_IS_TOO_OLD = _is_too_old(_TRITON_VERSION)


@functools.cache
def log_once(level: int, message: str) -> None:
    """Logs `message` at `level` the first time it is seen in this process."""
    logger.log(level, message)


def has_triton() -> bool:
    """Whether the `triton` package is installed (it is not imported by the question)."""
    return _HAS_TRITON


def triton_version() -> tuple[int, ...]:
    """(major, minor) of the installed Triton, or () where it is unknown."""
    return _numbers(_TRITON_VERSION)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`.

    Raises:
        ValueError: they would, but this version of Triton is too old for them.
    """
    on_device = device.type in ("cuda", "xpu") or (device.type == "cpu" and interpreting())
    if has_triton() and on_device and _TRITON_IS_TOO_OLD:
        raise ValueError(
            f"`triton` {_TRITON_VERSION} is too old for the kernels of hf_longattn, which need 3.4 or later: "
            "`pip install -U triton` with a torch that takes it; `hf-longattn doctor` shows all versions."
        )
    return has_triton() and on_device


def in_its_own_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an implementation without autocast, which would round its fp32 products to 16 bits.

    Args:
        function: its first argument is a tensor, or a tuple that begins with one.
    """

    @functools.wraps(function)
    def run(first: Any, *rest: Any, **options: Any) -> Any:
        kind = (first if isinstance(first, torch.Tensor) else first[0]).device.type
        if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
            return function(first, *rest, **options)
        with torch.autocast(kind, enabled=False):
            return function(first, *rest, **options)

    return run


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for a CPU, where the interpreter runs one program after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 4


def lacks_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU without conversions from and to fp8: those before compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def check_impl(name: str, impl: str, device: torch.device, allowed: tuple[str, ...] = _IMPLS) -> None:
    """Refuses an `impl` that is unknown, or that cannot run on `device`.

    Args:
        name: the operator, for the message.
        impl: what the caller asked for.
        device: where the tensors are.
        allowed: the values that this operator knows.

    Raises:
        ValueError: names `impl`, what was got and the way out.
    """
    if impl not in allowed:
        raise ValueError(f"`impl` of {name} must be one of {', '.join(map(repr, allowed))}, got {impl!r}.")
    if impl == "triton" and not triton_runs_on(device):
        where = "" if has_triton() else " without the package `triton`, which is not installed"
        way = "move the tensors to a GPU, or set TRITON_INTERPRET=1" if has_triton() else "install it"
        raise ValueError(
            f"`impl='triton'` of {name} cannot run on {device.type!r} tensors{where}; {way}, or use 'auto'."
        )


def takes_triton(name: str, impl: str, given: Sequence[Tensor], *obstacles: tuple[bool, str]) -> bool:
    """Whether a kernel without a backward runs: where it is asked for by name, or can on the GPU.

    Args:
        name: the operator, for the message.
        impl: what the caller asked for, one that `check_impl` lets pass.
        given: the tensors it reads, and any gradient would be of.
        obstacles: whether one is there, and what the kernel takes instead, beside the dtype and the gradient.

    Raises:
        ValueError: `impl` is "triton" and there is an obstacle.
    """
    if impl == "reference":
        return False
    reason = next((words for found, words in obstacles if found), None)
    if reason is None and not _TRITON_DTYPES.issuperset([tensor.dtype for tensor in given]):
        reason = "takes bf16, fp16 and fp32 alone"
    if reason is None and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        reason = "has no backward"
    if impl == "triton" and reason is not None:
        raise ValueError(f"`impl='triton'` of {name} {reason}; use 'auto'.")
    return impl == "triton" or (given[0].is_cuda and reason is None)


def warn_slow(name: str, reason: str) -> None:
    """Warns once that an operator takes a slower path than the device could offer, and why."""
    log_once(logging.WARNING, f"{name}: using a slower path, because {reason}.")
