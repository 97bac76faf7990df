"""Memory that the GPUs of one host read from each other, for the join of one decoding step.

A collective of NCCL costs 11-15 us in a CUDA graph, whatever it carries; a decoding layer over 64K keys takes
50. Where the GPUs reach each other's memory, one kernel writes, signals, reads and merges instead. NVLink
multicast is never used: torch sets it up for symmetric memory unless `TORCH_SYMM_MEM_DISABLE_MULTICAST=1` is
in the environment, so without that the collective stays.
"""

import os
import socket
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_longattn.kernels.dispatch import warn_slow

_SWITCH = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class PeerBoards:
    """The boards of the ranks of a process group (see `kernels/merge_partials/triton_peers.py`).

    Args:
        board: this rank's, (bytes,) uint8, in symmetric memory.
        handle: what torch returned for it; keeps the mapping alive.
        rank: this rank in the group.
    """

    def __init__(self, board: Tensor, handle: Any, rank: int) -> None:
        self.board, self.handle, self.rank = board, handle, rank
        self.addresses = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=board.device)
        self._stop = torch.cuda.Stream(board.device)

    @classmethod
    def open(cls, group: Any, device: torch.device) -> "PeerBoards | None":
        """Boards for the ranks of a group, or None where they cannot read each other's memory.

        Every rank must call it, and all get boards or none does.

        Args:
            group: a process group.
            device: of this rank.
        """
        if dist.get_backend(group) != "nccl":
            return None
        if not _agree(group, device, _reachable(group, device)):
            return None
        import torch.distributed._symmetric_memory as symmetric_memory

        from hf_longattn.kernels.merge_partials.triton_peers import board_bytes, open_board

        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        handle, board = None, None
        try:
            board = symmetric_memory.empty(board_bytes(ranks), dtype=torch.uint8, device=device)
            handle = symmetric_memory.rendezvous(board, group)
        except RuntimeError as error:
            warn_slow("symmetric memory", f"the GPUs cannot map each other's memory ({error})")
        if not _agree(group, device, handle is not None) or board is None:
            return None
        open_board(board, rank, ranks)
        # Nobody signals on a board that its owner still clears.
        torch.cuda.synchronize(device)
        _agree(group, device, True)
        return cls(board, handle, rank)

    def merge(self, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
        """Joins the partial results of all ranks, or returns None where they find no room.

        Args:
            output: (B, H, T, V), this rank's.
            lse: (B, H, T), -inf where the rank has no key.
        """
        from hf_longattn.kernels.merge_partials.triton_peers import fits, pull_merge

        wide = lse.dtype != torch.float32 or output.requires_grad
        if wide or not fits(lse.numel(), output.shape[-1] * output.element_size()):
            return None
        return pull_merge(self.addresses, self.rank, output, lse)

    def stop(self) -> None:
        """Ends every wait of this rank's kernels, under way or to come; what they return has no meaning."""
        with torch.cuda.stream(self._stop):
            self.board[:4].view(torch.int32).fill_(1)


def _reachable(group: Any, device: torch.device) -> bool:
    """Whether the ranks may map each other's memory: no multicast, one host, links between all GPUs."""
    allowed = os.environ.get(_SWITCH) == "1"
    host = zlib.crc32(socket.gethostname().encode())
    index = torch.cuda.current_device() if device.index is None else device.index
    own = torch.tensor([host, index, int(allowed)], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    hosts, devices, switches = torch.stack(everyone).T.tolist()
    # Processes that each see one GPU cannot ask about the others.
    if len(set(hosts)) > 1 or len(set(devices)) < len(devices) or not all(switches):
        return False
    return all(torch.cuda.can_device_access_peer(index, other) for other in devices if other != index)


def _agree(group: Any, device: torch.device, answer: bool) -> bool:
    """Whether every rank answers yes."""
    answers = torch.tensor([int(answer)], device=device)
    dist.all_reduce(answers, dist.ReduceOp.MIN, group=group)
    return bool(answers.item())
