"""What there is of a device and its host: memory that may be taken, generators, copies on their way."""

import contextlib
import os
from pathlib import Path

import torch

# Where Linux says what a container may take, in the second version of control groups and in the first.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a call may take on a device, None where they are not known.

    On a GPU, what the driver and the allocator have free; on a CPU, all that the machine has, or that the
    container may take of it.

    Args:
        device: of the model.
    """
    if device.type == "cuda":
        return free_on_gpu(device)
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_container_limits()])
    return None


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that the driver and the allocator have free.

    Args:
        device: the GPU.
    """
    free, _ = torch.cuda.mem_get_info(device)
    # Looked at once, and as they are: `torch.cuda.memory_reserved` spells a hundred numbers out for one.
    held = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (held[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes"))
    return free + reserved - allocated


def _container_limits() -> list[int]:
    """Bytes that the container of this process may take, where it has a limit."""
    found = []
    for path in _LIMITS:
        # Of another version of control groups, or hidden from this process.
        with contextlib.suppress(OSError):
            found.append(path.read_text().strip())
    return [int(word) for word in found if word.isdigit()]


def host_memory(device: torch.device) -> int:
    """Bytes of host memory that layers of a model on `device` may take: four fifths of what there is.

    The system and the data loader need the rest.

    Args:
        device: of the model; a CPU has no memory beside the host's.
    """
    return 0 if device.type == "cpu" else (free_memory(torch.device("cpu")) or 0) * 4 // 5


def default_generator(device: torch.device) -> torch.Generator:
    """What numbers on a device are drawn from where nobody names a generator.

    Args:
        device: a GPU, or any that draws from the generator of the CPU.
    """
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]


class HostCopy:
    """A copy of a tensor on its way to the host: nothing waits for it until it is read.

    Args:
        tensor: that may be written to again once this is made.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """The copy, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
