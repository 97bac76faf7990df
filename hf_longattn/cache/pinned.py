"""Page-locked host memory at its exact size: torch's own pinned allocator rounds to powers of two."""

import operator
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# What unlocks each tensor that is locked. Memory must not go back to the system as it is: CUDA would take
# whatever lies there next for locked, and refuse to copy what reaches over its end.
_LOCKED = WeakIdKeyDictionary()
# Addresses of what went while a CUDA graph was captured, which unlocking would break.
_LATE: list[int] = []


def pin(tensor: Tensor, name: str, way_out: str) -> None:
    """Page-locks the memory of a tensor for CUDA.

    Args:
        tensor: contiguous, on the CPU; it is unpinned when nobody holds it any more.
        name: of the argument that asked for it, for the message.
        way_out: what to do where it fails, for the message.

    Raises:
        RuntimeError: CUDA does not lock it.
    """
    _unlock_late()
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0))
    if code != 0:
        raise RuntimeError(f"`{name}`: pinning host memory failed with CUDA error {code}; {way_out}.")
    _LOCKED[tensor] = unlock = weakref.finalize(tensor, _unlock, tensor.data_ptr())
    # At the end of a process CUDA may be gone before the memory.
    unlock.atexit = False


def _unlock(address: int) -> None:
    if torch.cuda.is_current_stream_capturing():
        _LATE.append(address)
        return
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


def _unlock_late() -> None:
    while _LATE and not torch.cuda.is_current_stream_capturing():
        _unlock(_LATE.pop())


def unpin(tensor: Tensor) -> None:
    """Gives page-locked memory back to the system.

    Args:
        tensor: that was pinned, and that no copy reads or writes any more.
    """
    if (unlock := _LOCKED.pop(tensor, None)) is not None:
        unlock()


def locked_bytes() -> int:
    """Bytes of host memory that are page-locked now."""
    return sum(tensor.nbytes for tensor in list(_LOCKED))


class Pins:
    """Tensors of one owner that are page-locked as long as it holds them; copies of the owner hold none.

    Args:
        name: of the argument that asked for it, for messages.
        way_out: what to do where locking fails, for messages.
    """

    def __init__(self, name: str, way_out: str) -> None:
        self.name, self.way_out = name, way_out
        self._held: list[Tensor] = []

    def hold(self, *tensors: Tensor) -> None:
        """Locks these tensors, and unlocks others that were held before."""
        if len(self._held) == len(tensors) and all(map(operator.is_, self._held, tensors)):
            return
        self.release()
        for tensor in tensors:
            pin(tensor, self.name, self.way_out)
            self._held.append(tensor)

    def release(self) -> None:
        """Unlocks what is held, once nothing is being copied any more."""
        held, self._held = self._held, []
        if held and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            for tensor in held:
                unpin(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy that holds nothing."""
        return Pins, (self.name, self.way_out)

    def __del__(self) -> None:
        self.release()
