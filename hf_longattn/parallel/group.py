"""The ranks that share one sequence, and every operation they do together."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_longattn.parallel.connections import Connections, Link
from hf_longattn.parallel.peers import PeerBoards
from hf_longattn.parallel.watch import Watch

# Errors of one rank that are told to the others as what they are.
_TOLD = (OSError, ValueError, RuntimeError)
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

    Without a process group it is a group of one, in which every operation is the identity. Connections that
    were opened for it close when it goes; process groups of the caller stay.

    Args:
        group: the process group, or None for this process alone.
        timeout: seconds that a rank waits for the others.

    Raises:
        ValueError: `timeout` is not positive.
        RuntimeError: not all ranks of `group` made it.
    """

    def __init__(self, group: Any = None, timeout: float = 120.0) -> None:
        if not timeout > 0:
            raise ValueError(f"`timeout` must be a positive number of seconds, got {timeout}.")
        is_alone = group is None or dist.get_world_size(group) == 1
        self._connect(Connections(None if is_alone else Link.over(group, timeout)), timeout)

    def _connect(self, connections: Connections, timeout: float) -> None:
        self._connections, link = connections, connections.whole
        self.ranks = [0] if link is None else list(link.members)
        self.world_size = len(self.ranks)
        self.rank = 0 if link is None else self.ranks.index(dist.get_rank())
        self.watch = Watch(self.rank, self.ranks, timeout, connections.abort)
        self._others: SequenceGroup | None = None

    @classmethod
    def _between(cls, members: list[int], levels: Sequence[Any] | None, timeout: float) -> "SequenceGroup":
        """The group of some ranks, in which they are joined over process groups of a hierarchy.

        Args:
            members: as ranks of the whole job.
            levels: innermost first: each rank is in one of each, and joining over one after the other reaches
                everyone. None for one level of all.
            timeout: seconds that a rank waits for the others.
        """
        group = cls(timeout=timeout)
        if len(members) > 1:
            links = None if levels is None else [Link.over(level, timeout) for level in levels]
            group._connect(Connections(Link.between(members, timeout), links), timeout)
        return group

    @property
    def control(self) -> "SequenceGroup":
        """Every process that must do the same: these ranks, and those of a mesh's other dimensions too."""
        return self if self._others is None else self._others

    @classmethod
    def from_mesh(cls, mesh: Any, timeout: float = 120.0) -> "SequenceGroup":
        """The group of a device mesh's dimension "cp", or of "cp_inter" and "cp_intra" together.

        Args:
            mesh: a `torch.distributed.DeviceMesh`; other dimensions ("tp") are left to others.
            timeout: seconds that a rank waits for the others.

        Raises:
            ValueError: the mesh names no such dimension.
            RuntimeError: not all ranks of the mesh came.
        """
        names = getattr(mesh, "mesh_dim_names", None) or ()
        if "cp" in names:
            group = cls(mesh.get_group("cp"), timeout=timeout)
        elif {"cp_inter", "cp_intra"} <= set(names):
            both = mesh["cp_inter", "cp_intra"]
            levels = [both.get_group("cp_intra"), both.get_group("cp_inter")]
            group = cls._between(_members(both), levels, timeout)
        else:
            raise ValueError(
                f"`device_mesh` must name a dimension 'cp', or 'cp_inter' and 'cp_intra', got {names}; build "
                "it with `init_device_mesh(device, shape, mesh_dim_names=('cp',))`."
            )
        if mesh.size() > group.world_size:
            others = cls._between(_members(mesh), None, timeout)
            abort = group._connections.abort
            group._others, group.watch = others, Watch(others.rank, others.ranks, timeout, abort)
            others.watch = group.watch
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
        try:
            self._connections.renew(self.watch.timeout)
        except RuntimeError as error:
            raise self.watch.diagnosis(error) from error

    @property
    def levels(self) -> int:
        """Steps of a join: 1, or 2 for nodes and GPUs inside them."""
        return len(self._connections.levels)

    def gather(self, tensor: Tensor, level: int | None = None) -> Tensor:
        """What every rank holds.

        Args:
            tensor: of the same shape and dtype on every rank.
            level: of the hierarchy, 0 innermost; None for the whole group.

        Returns:
            (ranks, *shape), in the order of the ranks, the same bits everywhere.
        """
        link = self._connections.whole if level is None else self._connections.levels[level]
        return self._gather(link, tensor, async_op=False).wait()

    def begin_gather(self, tensor: Tensor) -> Pending:
        """Begins `gather` over the whole group, on a stream of its own where the ranks are GPUs.

        Operations that are begun may be waited for in any order, but every rank must begin the same ones in
        the same order.

        Args:
            tensor: of the same shape and dtype on every rank; not to be written to before the end.
        """
        return self._gather(self._connections.whole, tensor, async_op=True)

    def _gather(self, link: Link | None, tensor: Tensor, async_op: bool) -> Pending:
        if link is None:
            return Pending(tensor[None])
        sent = tensor.contiguous()
        received = sent.new_empty((len(link.members), *sent.shape))
        work = self._run(_all_gather, _bytes(received), _bytes(sent), link.group, async_op)
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
        link, known = self._connections.levels[level], self._connections.boards
        if link is None or not output.is_cuda:
            return None
        if level not in known:
            if torch.cuda.is_current_stream_capturing():
                return None
            known[level] = PeerBoards.open(link.group, output.device) if link.backend == "nccl" else None
        boards = known[level]
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
        if (link := self._connections.whole) is None:
            return Pending(parts)
        sent = parts.contiguous()
        received = torch.empty_like(sent, memory_format=torch.contiguous_format)
        sizes = [_bytes(sent).numel() // (self.world_size - 1)] * self.world_size
        sizes[self.rank] = 0
        pair = (_bytes(received), _bytes(sent))
        work = self._run(dist.all_to_all_single, *pair, sizes, sizes, link.group, True)
        return Pending(received, work, sent, self.watch)

    def reduce(self, tensor: Tensor, op: Any) -> Tensor:
        """All-reduces a copy of a tensor.

        Args:
            tensor: of the same shape and dtype on every rank.
            op: a `torch.distributed.ReduceOp`.
        """
        result = tensor.clone(memory_format=torch.contiguous_format)
        if (link := self._connections.whole) is not None:
            self._run(dist.all_reduce, result, op, link.group)
        return result

    def add_up(self, tensor: Tensor) -> Tensor:
        """Replaces a contiguous tensor by the sum of those of every rank, in its own memory."""
        if (link := self._connections.whole) is not None:
            self._run(dist.all_reduce, tensor, dist.ReduceOp.SUM, link.group)
        return tensor

    def add_up_parts(self, parts: Tensor) -> Tensor:
        """Adds up part r of every rank on rank r.

        Args:
            parts: (P, ...), floating.

        Returns:
            (...), the sum of this rank's part.
        """
        if (link := self._connections.whole) is None:
            return parts[0]
        if link.backend != "nccl":
            # gloo reduces to parts in some builds only; as many bytes travel this way.
            others = torch.cat([parts[: self.rank], parts[self.rank + 1 :]])
            return torch.cat([parts[self.rank, None], self.begin_exchange(others).wait()]).sum(0)
        sent = parts.contiguous()
        result = torch.empty_like(sent[0])
        self._run(dist.reduce_scatter_tensor, result, sent, dist.ReduceOp.SUM, link.group)
        return result

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, in the place of everyone's own."""
        if (link := self._connections.whole) is not None:
            self._run(dist.broadcast, tensor, None, link.group, False, 0)
        return tensor

    def do_together(self, work: Callable[[], str]) -> list[str]:
        """Has every rank do its part of a task; where one cannot, all raise.

        The others are waited for while they give signs of life: files may take longer than the timeout.

        Args:
            work: this rank's part; what it returns is told to the others.

        Returns:
            what each rank's part has returned.

        Raises:
            OSError: this part raised it, or that of another rank, which is named.
            ValueError: the same.
            RuntimeError: the same; or another rank is gone.
        """
        if self.world_size == 1:
            return [work()]
        own: Exception | None = None
        with self.watch:
            try:
                said = ["", work()]
            except (OSError, ValueError, RuntimeError) as error:
                kind = next(kind for kind in _TOLD if isinstance(error, kind))
                own, said = error, [kind.__name__, str(error)]
            everyone = [json.loads(words) for words in self.watch.tell(json.dumps(said))]
        if own is not None:
            raise own
        for rank, (name, words) in enumerate(everyone):
            for kind in _TOLD:
                if name == kind.__name__:
                    raise kind(f"rank {rank} of {self.world_size}: {words}")
        return [words for _, words in everyone]

    def _run(self, operation: Callable[..., Any], *args: Any) -> Any:
        # By position: torch describes a failed operation by the group that it was given by keyword, and has
        # another error in the place of the first where it has not registered that group (2.13).
        self.watch.check()
        try:
            return operation(*args)
        except RuntimeError as error:
            raise self.watch.diagnosis(error) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceGroup":
        return self


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: every backend moves those, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def _members(mesh: Any) -> list[int]:
    """All members of a mesh, as ranks of the whole job."""
    return mesh.mesh.flatten().tolist()
