"""The process groups that ranks send over: the caller's, and connections of our own that close again.

torch names what `new_group` makes by its ranks and by how many groups there are. Once one of them is
destroyed, a name comes again: while another group has it, that is an error, and afterwards the ranks find in
the store where the old group listened (seen in 2.13). So gloo connections are made here, under names that are
never used twice, and close when nobody holds them any more.
"""

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_longattn.parallel.peers import PeerBoards

# Seconds between two looks for the others.
_PAUSE = 0.005


@dataclass(frozen=True)
class Link:
    """A process group, with what torch tells only of those that it has registered.

    Args:
        group: the process group.
        members: as ranks of the whole job, in the order of the group.
        backend: "gloo", "nccl" or another.
    """

    group: Any
    members: tuple[int, ...]
    backend: str

    @classmethod
    def over(cls, group: Any, timeout: float) -> "Link":
        """A group of the caller's; where it is one of gloo, connections of our own between its ranks.

        Args:
            group: the process group.
            timeout: seconds after which operations of gloo end; others keep the timeout they have.
        """
        members, backend = tuple(dist.get_process_group_ranks(group)), str(dist.get_backend(group))
        return cls.connect(members, timeout) if backend == "gloo" else cls(group, members, backend)

    @classmethod
    def between(cls, members: Sequence[int], timeout: float) -> "Link":
        """A group of some ranks, in the job's backend; each of them must call it.

        Args:
            members: as ranks of the whole job.
            timeout: as for `over`.
        """
        members, backend = tuple(sorted(members)), str(dist.get_backend())
        if backend == "gloo":
            return cls.connect(members, timeout)
        return cls(dist.new_group(list(members), use_local_synchronization=True), members, backend)

    @classmethod
    def connect(cls, members: tuple[int, ...], timeout: float) -> "Link":
        """Connections of gloo between some ranks, which close with the last reference to the link.

        Args:
            members: as ranks of the whole job; each of them must call it.
            timeout: seconds until an operation ends, and for which the others are waited for here.

        Raises:
            RuntimeError: some did not come.
        """
        rank, size = members.index(dist.get_rank()), len(members)
        store = dist.PrefixStore(meet(members, rank, timeout), default_store())
        backend = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
        group = dist.ProcessGroup(store, rank, size)
        for device in ("cpu", "cuda"):
            group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.GLOO, backend)
        return cls(group, members, "gloo")

    def renewed(self, timeout: float) -> "Link":
        """New connections between the same ranks.

        Args:
            timeout: seconds until an operation ends.
        """
        if self.backend == "gloo":
            return self.connect(self.members, timeout)
        limit, members = timedelta(seconds=timeout), list(self.members)
        group = dist.new_group(members, limit, self.backend, use_local_synchronization=True)
        return Link(group, self.members, self.backend)


class Connections:
    """The process groups of one `SequenceGroup`, and the boards that its GPUs read.

    Nothing in here refers back to who holds it: connections close with their last holder, and not when Python
    looks for circles.

    Args:
        whole: all ranks, or None for this process alone.
        levels: of a hierarchy, innermost first; None for one level, `whole` itself.
    """

    def __init__(self, whole: Link | None, levels: Sequence[Link] | None = None) -> None:
        self.whole = whole
        self.levels: list[Link | None] = [whole] if levels is None else list(levels)
        # By level, once asked for: None where the GPUs do not reach each other's memory.
        self.boards: dict[int, PeerBoards | None] = {}

    def _links(self) -> dict[int, Link]:
        return {id(link): link for link in (self.whole, *self.levels) if link is not None}

    def renew(self, timeout: float) -> None:
        """Opens new connections in the place of all; every rank must call it.

        Args:
            timeout: seconds until an operation ends.

        Raises:
            RuntimeError: not all of them did.
        """
        # What reads the memory of peers belongs to the old groups, and may have been told to stop.
        self.boards.clear()
        fresh = {key: link.renewed(timeout) for key, link in self._links().items()}
        self.levels = [None if link is None else fresh[id(link)] for link in self.levels]
        self.whole = None if self.whole is None else fresh[id(self.whole)]

    def abort(self) -> None:
        """Ends what is under way. GPUs alone need it: what waits there is beyond our timeout."""
        for boards in self.boards.values():
            if boards is not None:
                boards.stop()
        for link in self._links().values():
            if link.backend == "nccl":
                link.group.abort()


def default_store() -> Any:
    """The key-value store of the job."""
    return dist.distributed_c10d._get_default_store()


def meet(members: tuple[int, ...], rank: int, timeout: float) -> str:
    """A name that some ranks agree on, and that nothing had before.

    Each says a number of its own, and then what it makes of all numbers: they have met once all make the
    same. What a rank has left behind where the others never came is not the same, and does no harm.

    Args:
        members: as ranks of the whole job; each of them must call it.
        rank: this one, in the order of the members.
        timeout: seconds for which the others are waited for.

    Raises:
        RuntimeError: some did not come.
    """
    store = dist.PrefixStore(f"hf_longattn/{'-'.join(map(str, members))}/meeting", default_store())
    said, made = ([f"{word}/{place}" for place in range(len(members))] for word in ("said", "made"))
    store.set(said[rank], secrets.token_hex(8))
    end = time.monotonic() + timeout
    while True:
        if store.check(said):
            name = hashlib.blake2b(b" ".join(store.multi_get(said)), digest_size=16).hexdigest()
            store.set(made[rank], name)
            if store.check(made) and set(store.multi_get(made)) == {name.encode()}:
                return f"hf_longattn/{name}"
        if time.monotonic() > end:
            raise RuntimeError(
                f"the ranks {list(members)} did not all come to open connections within {timeout:g} s; call "
                "`prepare_generation` or `prepare_training` on every process."
            )
        time.sleep(_PAUSE)
