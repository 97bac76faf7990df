"""The ranks that share one sequence, and every operation they do together."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_longattn.parallel.peers import PeerBoards
from hf_longattn.parallel.watch import Watch

# `all_gather_into_tensor` has this name from torch 2.12 on.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Pending:
    """What an operation will have received; it goes on while this rank computes.

    Args:
        received: where it arrives.
        work: what torch returned for it, or None where it has ended.
        sent: kept until then.
        watch: for the words of an error.
    """

    def __init__(
        self, received: Tensor, work: Any = None, sent: Tensor | None = None, watch: Watch | None = None
    ) -> None:
        self._received, self._work, self._sent, self._watch = received, work, sent, watch

    def wait(self) -> Tensor:
        """What was received. A GPU waits for it before what is launched next, the host does not.

        Raises:
            RuntimeError: the operation failed, with the ranks that are to blame.
        """
        if self._work is not None:
            assert self._watch is not None
            try:
                self._work.wait()
            except RuntimeError as error:
                raise self._watch.diagnosis(error) from error
            self._work = self._sent = None
        return self._received


class SequenceGroup:
    """The ranks that share one sequence; all communication of sequence sharding goes through here.

    Without a process group it is a group of one, in which every operation is the identity.

    Args:
        group: the process group, or None for this process alone.
        levels: process groups of a hierarchy, innermost first: each rank is in one of each, and joining over
            one after the other reaches everyone. None for one level, `group` itself.
        timeout: seconds that a rank waits for the others.

    Raises:
        ValueError: `timeout` is not positive.
    """

    def __init__(
        self, group: Any = None, levels: Sequence[Any] | None = None, timeout: float = 120.0
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, got {timeout}.")
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self._group = None if self.world_size == 1 else _with_timeout(group, timeout)
        self._levels = [self._group]
        if levels is not None:
            self._levels = [_with_timeout(level, timeout) for level in levels]
        # By level, once asked for: None where the GPUs do not reach each other's memory.
        self._boards: dict[int, PeerBoards | None] = {}
        self.watch = Watch(self.rank, self.ranks, timeout, self._abort)
        # Every process that must do the same: these ranks, and on a mesh those of its other dimensions too.
        self.control: SequenceGroup = self

    @classmethod
    def from_mesh(cls, mesh: Any, timeout: float = 120.0) -> "SequenceGroup":
        """The group of a device mesh's dimension "cp", or of "cp_inter" and "cp_intra" together.

        Args:
            mesh: a `torch.distributed.DeviceMesh`; other dimensions ("tp") are left to others.
            timeout: seconds that a rank waits for the others.

        Raises:
            ValueError: the mesh names no such dimension.
        """
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "cp" in names:
            group = cls(mesh.get_group("cp"), timeout=timeout)
        elif {"cp_inter", "cp_intra"} <= set(names):
            both = mesh["cp_inter", "cp_intra"]
            levels = [both.get_group("cp_intra"), both.get_group("cp_inter")]
            group = cls(_new_group(both), levels, timeout)
        else:
            raise ValueError(
                f"`device_mesh` must name a dimension 'cp', or 'cp_inter' and 'cp_intra', got {names}; build "
                "it with `init_device_mesh(device, shape, mesh_dim_names=('cp',))`."
            )
        if mesh.size() > group.world_size:
            group.control = cls(_new_group(mesh), timeout=timeout)
            group.watch = Watch(group.control.rank, group.control.ranks, timeout, group._abort)
            group.control.watch = group.watch
        return group

    @classmethod
    def find(cls, accelerator: Any, device_mesh: Any, timeout: float = 120.0) -> "SequenceGroup | None":
        """The group that the arguments of `prepare_*` name, or None where there is but this process.

        Args:
            accelerator: an `accelerate.Accelerator`, or None. The "cp" of its own mesh counts where its
                `ParallelismConfig` has one; else all its processes share a sequence.
            device_mesh: a mesh as for `from_mesh`, or None; it goes first.
            timeout: seconds that a rank waits for the others.

        Raises:
            TypeError: `accelerator` is none.
            ValueError: the mesh names no dimension of a sequence.
        """
        if accelerator is not None and not hasattr(accelerator, "num_processes"):
            raise TypeError(
                f"`accelerator` must be an accelerate.Accelerator, got {type(accelerator).__name__}; "
                "settings are given by keyword."
            )
        own = getattr(accelerator, "torch_device_mesh", None)
        if device_mesh is None and "cp" in (getattr(own, "mesh_dim_names", None) or ()):
            device_mesh = own
        if device_mesh is not None:
            return cls.from_mesh(device_mesh, timeout)
        if accelerator is not None and accelerator.num_processes > 1:
            return cls(dist.group.WORLD, timeout=timeout)
        return None

    def renew(self) -> None:
        """Opens new connections in the place of those on which a fault has left operations that never met.

        Every rank must call it.

        Raises:
            RuntimeError: not all of them did, with the ranks that are to blame.
        """
        if self._group is None:
            return
        # What reads the memory of peers belongs to the old groups, and may have been told to stop.
        self._boards.clear()
        old = {id(group): group for group in (self._group, *self._levels) if group is not None}
        try:
            fresh = {
                key: _group_of(
                    dist.get_process_group_ranks(group), self.watch.timeout, dist.get_backend(group)
                )
                for key, group in old.items()
            }
        except RuntimeError as error:
            raise self.watch.diagnosis(error) from error
        self._group = fresh[id(self._group)]
        self._levels = [None if group is None else fresh[id(group)] for group in self._levels]

    @property
    def ranks(self) -> list[int]:
        """The members, as ranks of the whole job."""
        return [0] if self._group is None else dist.get_process_group_ranks(self._group)

    @property
    def levels(self) -> int:
        """Steps of a join: 1, or 2 for nodes and GPUs inside them."""
        return len(self._levels)

    def gather(self, tensor: Tensor, level: int | None = None) -> Tensor:
        """What every rank holds.

        Args:
            tensor: of the same shape and dtype on every rank.
            level: of the hierarchy, 0 innermost; None for the whole group.

        Returns:
            (ranks, *shape), in the order of the ranks, the same bits everywhere.
        """
        group = self._group if level is None else self._levels[level]
        return self._gather(group, tensor, async_op=False).wait()

    def begin_gather(self, tensor: Tensor) -> Pending:
        """Begins `gather` over the whole group, on a stream of its own where the ranks are GPUs.

        Operations that are begun may be waited for in any order, but every rank must begin the same ones in
        the same order.

        Args:
            tensor: of the same shape and dtype on every rank; not to be written to before the end.
        """
        return self._gather(self._group, tensor, async_op=True)

    def _gather(self, group: Any, tensor: Tensor, async_op: bool) -> Pending:
        if group is None:
            return Pending(tensor[None])
        sent = tensor.contiguous()
        received = sent.new_empty((dist.get_world_size(group), *sent.shape))
        work = self._run(_all_gather, _bytes(received), _bytes(sent), group=group, async_op=async_op)
        return Pending(received, work, sent, self.watch)

    def join(self, output: Tensor, lse: Tensor, level: int) -> tuple[Tensor, Tensor] | None:
        """Joins small partial results through memory that the GPUs of a host read from each other.

        Args:
            output: (B, H, T, V), this rank's.
            lse: (B, H, T), -inf where the rank has no key.
            level: of the hierarchy, 0 innermost.

        Returns:
            output and lse over the keys of all ranks of the level, the same bits on each; or None on every
            rank where there is no such memory, or the results are too large for it.
        """
        group = self._levels[level]
        if group is None or not output.is_cuda:
            return None
        if level not in self._boards:
            if torch.cuda.is_current_stream_capturing():
                return None
            self._boards[level] = PeerBoards.open(group, output.device)
        boards = self._boards[level]
        if boards is None:
            return None
        self.watch.check()
        return boards.merge(output, lse)

    def begin_exchange(self, parts: Tensor) -> Pending:
        """Begins to send every other rank its part, as `begin_gather` does.

        Args:
            parts: (P - 1, ...), those of the other ranks in their order; not to be written to before the end.

        Returns:
            (P - 1, ...) to come, from the other ranks in their order.
        """
        if self._group is None:
            return Pending(parts)
        sent = parts.contiguous()
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        sizes = [_bytes(sent).numel() // (self.world_size - 1)] * self.world_size
        sizes[self.rank] = 0
        work = self._run(
            dist.all_to_all_single,
            _bytes(received),
            _bytes(sent),
            sizes,
            sizes,
            group=self._group,
            async_op=True,
        )
        return Pending(received, work, sent, self.watch)

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """All-reduces a copy of a tensor.

        Args:
            tensor: of the same shape and dtype on every rank.
            op: a `torch.distributed.ReduceOp`.
        """
        result = tensor.clone(memory_format=torch.contiguous_format)
        if self._group is not None:
            self._run(dist.all_reduce, result, op, group=self._group)
        return result

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor by the sum of those of every rank, in its own memory."""
        if self._group is not None:
            self._run(dist.all_reduce, tensor, group=self._group)
        return tensor

    def add_up_parts(self, parts: Tensor) -> Tensor:
        """Adds up part r of every rank on rank r.

        Args:
            parts: (P, ...), floating.

        Returns:
            (...), the sum of this rank's part.
        """
        if self._group is None:
            return parts[0]
        if dist.get_backend(self._group) != "nccl":
            # gloo reduces to parts in some builds only; as many bytes travel this way.
            others = torch.cat([parts[: self.rank], parts[self.rank + 1 :]])
            return torch.cat([parts[self.rank, None], self.begin_exchange(others).wait()]).sum(0)
        sent = parts.contiguous()
        result = torch.empty_like(sent[0])
        self._run(dist.reduce_scatter_tensor, result, sent, group=self._group)
        return result

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, in the place of everyone's own."""
        if self._group is not None:
            self._run(dist.broadcast, tensor, group=self._group, group_src=0)
        return tensor

    def _run(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.watch.check()
        try:
            return operation(*args, **kwargs)
        except RuntimeError as error:
            raise self.watch.diagnosis(error) from error

    def _abort(self) -> None:
        """Ends what is under way. GPUs alone need it: what waits there is beyond our timeout."""
        for boards in self._boards.values():
            if boards is not None:
                boards.stop()
        for group in {id(group): group for group in (self._group, *self._levels)}.values():
            if group is not None and dist.get_backend(group) == "nccl":
                group.abort()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        return self


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: every backend moves those, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def _new_group(mesh: Any) -> Any:
    """One process group of all members of a mesh, in its order."""
    return dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)


def _with_timeout(group: Any, timeout: float) -> Any:
    """A gloo group of our own, whose operations end after `timeout`; others keep the timeout they have."""
    if dist.get_backend(group) != "gloo":
        return group
    return _group_of(dist.get_process_group_ranks(group), timeout, "gloo")


def _group_of(members: list[int], timeout: float, backend: str) -> Any:
    return dist.new_group(members, timedelta(seconds=timeout), backend, use_local_synchronization=True)
