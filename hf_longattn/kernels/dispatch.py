"""Which implementation of an operator runs: decided by device, said once, never silently slower.

Every operator takes `impl="auto" | "triton" | "reference"` (some also `"sdpa"`). An explicit choice is
honoured or refused; `"auto"` picks the fastest one that computes exactly what was asked.
"""

import functools
import importlib.util
import logging
import os

import torch

logger = logging.getLogger("hf_longattn")

# Asked once, here: Dynamo traces through `functools.cache` and warns about it.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def log_once(level: int, message: str) -> None:
    """Logs `message` at `level` the first time it is seen in this process."""
    logger.log(level, message)


def has_triton() -> bool:
    """Whether the `triton` package is installed (it is not imported by the question)."""
    return _HAS_TRITON


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of `device`."""
    return has_triton() and (device.type in ("cuda", "xpu") or (device.type == "cpu" and interpreting()))


def lacks_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU without conversions from and to fp8: those before compute capability 8.9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def check_impl(name: str, impl: str, device: torch.device, allowed: tuple[str, ...]) -> None:
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
        way = "install triton" if not has_triton() else "move the tensors to a GPU, or set TRITON_INTERPRET=1"
        raise ValueError(
            f"`impl='triton'` of {name} cannot run on {device.type!r} tensors; {way}, or use 'auto'."
        )


def warn_slow(name: str, reason: str) -> None:
    """Warns once that an operator takes a slower path than the device could offer, and why."""
    log_once(logging.WARNING, f"{name}: using a slower path, because {reason}.")
