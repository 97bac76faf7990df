"""Where the inputs of the layers wait for the backward: where they are, or in pinned host memory.

Host memory comes from one pool of slabs that are registered with CUDA at their exact size (torch's own pinned
allocator rounds to powers of two), and are used again by later layers and steps. A slab holds one tensor
block after block, so that every copy is contiguous; copies run on a stream of their own, writes behind the
layer that computes, reads one block ahead of it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_longattn.cache.pinned import pin, unpin
from hf_longattn.devices import free_on_gpu


class Blocks(Protocol):
    """A (B, T, ...) tensor that is written and read by blocks of T."""

    def write(self, index: int, block: Tensor) -> None:
        """Keeps one block."""
        ...

    def settle(self) -> None:
        """After it, a tensor that was written by its views may be freed or written over."""
        ...

    def read(self, order: list[int]) -> Iterator[Tensor]:
        """The blocks in some order, on the device."""
        ...

    def release(self) -> None:
        """Gives the memory back; nothing can be read any more."""
        ...


class DeviceBlocks:
    """A tensor that stays where it is.

    Args:
        tensor: (B, T, ...).
        rows: the blocks of T.
        filled: whether `tensor` already holds every block.
    """

    def __init__(self, tensor: Tensor, rows: list[slice], filled: bool) -> None:
        self.tensor: Tensor | None = tensor
        self.rows, self.filled = rows, filled

    def hand_over(self) -> Tensor:
        """The tensor, which is set again before it is read."""
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        return tensor

    def write(self, index: int, block: Tensor) -> None:
        """Keeps one block, unless the tensor is there already."""
        if not self.filled:
            assert self.tensor is not None
            self.tensor[:, self.rows[index]] = block

    def settle(self) -> None:
        """Nothing is under way."""

    def read(self, order: list[int]) -> Iterator[Tensor]:
        """Views of the blocks."""
        assert self.tensor is not None
        tensor = self.tensor
        return (tensor[:, self.rows[index]] for index in order)

    def release(self) -> None:
        """Forgets the tensor; autograd frees what it saved."""
        self.tensor = None


class PinnedPool:
    """Slabs of page-locked host memory, kept for the next tensor that fits."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A slab of at least `size` bytes."""
        fitting = [slab for slab in self._free if slab.numel() >= size]
        if fitting:
            best = min(fitting, key=torch.Tensor.numel)
            self._free = [slab for slab in self._free if slab is not best]
            return best
        # Slabs that this length has outgrown make room for the new one.
        self.clear()
        slab = torch.empty(size, dtype=torch.uint8)
        pin(slab, "offload", "lower the length, or use `offload=False`")
        return slab

    def give(self, slab: Tensor) -> None:
        """Takes a slab back."""
        self._free.append(slab)

    def clear(self) -> None:
        """Frees the slabs that nobody uses."""
        if not self._free:
            return
        torch.cuda.synchronize()
        for slab in self._free:
            unpin(slab)
        self._free.clear()

    def __del__(self) -> None:
        if self._free and torch.cuda.is_initialized():
            self.clear()


# Room for the activations of a block and a chunk of logits.
_ROOM = 4 << 30


def working_bytes(num_bytes: int, ranks: int, times: int = 0) -> int:
    """What the layer that runs takes, given the bytes of its input on one rank.

    Args:
        num_bytes: of a (B, T, D) tensor.
        ranks: that share the sequence.
        times: of its input that the backward of a layer takes which gets all tokens at once, else 0.
    """
    # It holds its input, two gradients, and of all ranks keys, values and fp32 sums.
    return _ROOM + max(4 + 4 * ranks, times) * num_bytes


def leaves_room(free: int, num_bytes: int, reserve: int) -> bool:
    """Whether a tensor may stay on the GPU: `offload="auto"`, and the plan of a step, ask here.

    Args:
        free: bytes of the GPU.
        num_bytes: of the tensor.
        reserve: bytes to be left for the computation.
    """
    return free >= num_bytes + reserve


def place(sizes: list[int], free: int, mode: bool | str, reserve: Callable[[int], int]) -> tuple[int, int]:
    """(bytes on the GPU, bytes on the host) of tensors that are kept one after the other.

    Args:
        sizes: bytes of each.
        free: bytes of the GPU.
        mode: of `Offloader`.
        reserve: bytes that "auto" leaves free, given those of a tensor.
    """
    kept = host = 0
    for size in sizes:
        stays = mode is False or (mode == "auto" and leaves_room(free - kept, size, reserve(size)))
        kept, host = (kept + size, host) if stays else (kept, host + size)
    return kept, host


def has_room(
    sizes: list[int], memory: tuple[int, int], mode: bool | str, reserve: Callable[[int], int]
) -> bool:
    """Whether tensors find room while the GPU computes.

    Args:
        sizes: bytes of each, the input of a layer first.
        memory: free bytes of the GPU and of the host.
        mode: of `Offloader`.
        reserve: bytes for the computation, given those of a tensor.
    """
    kept, host = place(sizes, memory[0], mode, reserve)
    # Those that "auto" leaves on the GPU have left room there.
    return host <= memory[1] and (mode is not False or leaves_room(memory[0], kept, reserve(sizes[0])))


@dataclass(frozen=True)
class Layout:
    """Shape and place of a (B, T, ...) tensor, and the blocks of T it is cut in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: list[slice]

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class HostBlocks:
    """A tensor in pinned host memory.

    Args:
        pool: where the memory comes from.
        stream: on which copies run.
        layout: of the tensor.
        lent: whether the blocks are views of one tensor, which stays as it is until `settle`.
    """

    def __init__(
        self, pool: PinnedPool, stream: torch.cuda.Stream, layout: Layout, lent: bool = False
    ) -> None:
        self.pool, self.stream, self.device, self.lent = pool, stream, layout.device, lent
        slab = pool.take(layout.num_bytes)
        self.slab: Tensor | None = slab
        flat = slab[: layout.num_bytes].view(layout.dtype)
        self.parts, start = [], 0
        for part in layout.rows:
            shape = (layout.shape[0], part.stop - part.start, *layout.shape[2:])
            self.parts.append(flat[start : start + math.prod(shape)].view(shape))
            start += math.prod(shape)
        self.written: Any = None

    def write(self, index: int, block: Tensor) -> None:
        """Starts the copy of one block to the host."""
        packed = block.contiguous()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.parts[index].copy_(packed, non_blocking=True)
            self.written = self.stream.record_event()
        # The allocator keeps what a stream was noted on until the copy is over and the host looks again: no
        # matter for a block, but a tensor of the whole sequence would outlive its layer.
        if packed is not block or not self.lent:
            packed.record_stream(self.stream)

    def settle(self) -> None:
        """Lets the stream that computes wait for the copies."""
        if self.written is not None:
            torch.cuda.current_stream(self.device).wait_event(self.written)

    def _fetch(self, index: int) -> tuple[Tensor, Any]:
        # Behind the blocks that are queued already: else a host that runs ahead would fetch them all at once.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            block = torch.empty(self.parts[index].shape, dtype=self.parts[index].dtype, device=self.device)
            block.copy_(self.parts[index], non_blocking=True)
            return block, self.stream.record_event()

    def read(self, order: list[int]) -> Iterator[Tensor]:
        """The blocks, each copied to the device while the one before it is used."""
        if self.slab is None:
            raise RuntimeError(
                "a second backward through the same graph needs layer inputs that the first one gave back; "
                "use `prepare_training(offload=False)` with `retain_graph=True`."
            )
        current = torch.cuda.current_stream(self.device)
        ahead = self._fetch(order[0])
        for following in [*order[1:], None]:
            block, event = ahead
            if following is not None:
                ahead = self._fetch(following)
            current.wait_event(event)
            block.record_stream(current)
            yield block

    def release(self) -> None:
        """Gives the slab back to the pool."""
        if self.slab is not None:
            # Later writes run on the same stream, so they cannot overtake a read.
            self.pool.give(self.slab)
            self.slab, self.parts = None, []

    def __del__(self) -> None:
        self.release()


class Offloader:
    """Decides where each tensor waits.

    Args:
        mode: True sends everything to the host, False nothing; "auto" sends what would not leave room on the
            GPU for the layer that runs. Tensors of a CPU stay.
        reserve: bytes that "auto" leaves free for the computation, given those of a tensor.
    """

    def __init__(self, mode: bool | str, reserve: Callable[[int], int]) -> None:
        self.mode, self.reserve = mode, reserve
        self.pool = PinnedPool()
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, layout: Layout, tensor: Tensor | None = None, lent: bool = True) -> Blocks:
        """A place for a tensor.

        Args:
            layout: shape and blocks.
            tensor: the tensor, where it is there already; else it is written block by block.
            lent: whether a `tensor` that goes to the host stays as it is until `settle`.

        Returns:
            where to write and read it.
        """
        if self._moves(layout):
            if layout.device not in self.streams:
                self.streams[layout.device] = torch.cuda.Stream(layout.device)
            return HostBlocks(
                self.pool, self.streams[layout.device], layout, lent=lent and tensor is not None
            )
        if tensor is not None:
            return DeviceBlocks(tensor, layout.rows, filled=True)
        made = torch.empty(layout.shape, dtype=layout.dtype, device=layout.device)
        return DeviceBlocks(made, layout.rows, filled=False)

    def _moves(self, layout: Layout) -> bool:
        if layout.device.type != "cuda" or not self.mode:
            return False
        if self.mode != "auto":
            return True
        free = self.free(layout.device)
        return not leaves_room(free, layout.num_bytes, self.reserve(layout.num_bytes))

    def free(self, device: torch.device) -> int:
        """Bytes of a GPU that the driver and the allocator have free.

        Args:
            device: the GPU.
        """
        return free_on_gpu(device)
