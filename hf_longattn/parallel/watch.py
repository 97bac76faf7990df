"""Finding out which rank is missing, so that an error can name it and nobody waits for ever.

While a group works, a thread of every rank writes a sign of life and the number of operations that the rank
has begun to the job's key-value store. When an operation fails, the ranks whose signs stand still, or whose
count is behind, are named; what the first rank finds out or fails with is left in the store for the others.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch.distributed as dist

from hf_longattn.parallel.connections import default_store

logger = logging.getLogger("hf_longattn")

# Seconds between two signs of life.
_BEAT = 0.5
# Seconds that a rank has to leave by itself once a fault is known: an error of all ranks must not end what a
# later call needs.
_GRACE = 5.0


class Watch:
    """Signs of life of the ranks of a group, given inside a `with` block, which every rank must enter alike.

    Args:
        rank: this rank, in the group.
        ranks: the members, as ranks of the whole job.
        timeout: seconds without a sign of life after which a rank counts as gone.
        abort: ends the operations that are under way; called where this rank still waits for one some seconds
            after a fault is known.
    """

    def __init__(
        self, rank: int, ranks: Sequence[int], timeout: float, abort: Callable[[], None] | None = None
    ) -> None:
        self.rank, self.ranks, self.timeout = rank, list(ranks), timeout
        self._abort = abort
        self._operations = 0
        self._fault: str | None = None
        self._store: Any = None
        # That of the last call in which a fault was known.
        self._left: Any = None
        # Whether that fault has ended it at different operations, the same answer on every rank: what one has
        # sent and another never took would meet the next operation of the same connections. It stays so until
        # who opens new ones says that it has.
        self.is_out_of_step = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        # Calls count from the beginning of each watch: who prepares a model again leaves behind calls that
        # some ranks made alone.
        self._members = f"hf_longattn/{'-'.join(map(str, self.ranks))}"
        self._number = default_store().add(f"{self._members}/watches/{rank}", 1) if len(self.ranks) > 1 else 0

    def __enter__(self) -> "Watch":
        if len(self.ranks) > 1:
            # First of all: others may take until the timeout to leave the last call.
            self.is_out_of_step |= self._compare_counts()
            self._operations, self._fault = 0, None
            self._store = self._open_store()
            self._stop.clear()
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if error is not None and self._fault is None:
            self._leave_note(f"rank {self.rank} stopped with {type(error).__name__}: {error}".rstrip(".: "))
        if self._fault is not None:
            self._leave_count()
        self._stop.set()
        self._thread.join()
        # The connection closes with the call.
        self._thread = self._store = None

    def _open_store(self) -> Any:
        """The keys of this call: every rank counts its calls in the store, and all have made as many."""
        # A connection of its own: the thread must not wait for what others wait for.
        store = dist.PrefixStore(f"{self._members}/{self._number}", default_store().clone())
        call = store.add(f"calls/{self.rank}", 1)
        for key in (f"{call - 2}/signs/{self.rank}", f"{call - 2}/words/{self.rank}", f"{call - 2}/note"):
            # Nobody looks at a call that all have left.
            store.delete_key(key)
        return dist.PrefixStore(str(call), store)

    def _compare_counts(self) -> bool:
        store, self._left = self._left, None
        if store is None:
            return False
        counts = {self._count_left(store, rank) for rank in range(len(self.ranks))}
        return len(counts - {None}) > 1

    def _leave_count(self) -> None:
        self._left = self._store
        try:
            self._store.set(f"left/{self.rank}", str(self._operations))
        except RuntimeError:
            # The store went with the process that held it: the next call says so.
            self._left = None

    def _count_left(self, store: Any, rank: int) -> int | None:
        """The operations that a rank had begun when it left a call; None where it is gone."""
        signs, since = None, time.monotonic()
        while not store.check([f"left/{rank}"]):
            known = store.get(f"signs/{rank}") if store.check([f"signs/{rank}"]) else None
            if known != signs:
                signs, since = known, time.monotonic()
            if time.monotonic() - since > 4 * _BEAT:
                return None
            time.sleep(_BEAT / 10)
        return int(store.get(f"left/{rank}"))

    def tell(self, words: str) -> list[str]:
        """What every rank has to say, once a `with` block; who is not there yet is waited for while it lives.

        Args:
            words: of this rank.

        Raises:
            RuntimeError: another rank has stopped, or is gone.
        """
        self._store.set(f"words/{self.rank}", words)
        everyone = [f"words/{rank}" for rank in range(len(self.ranks))]
        while not self._store.check(everyone):
            self._raise_fault()
            time.sleep(_BEAT / 50)
        return [said.decode() for said in self._store.multi_get(everyone)]

    def check(self) -> None:
        """Counts an operation.

        Raises:
            RuntimeError: another rank has stopped, and said why.
        """
        self._operations += 1
        self._raise_fault()

    def _raise_fault(self) -> None:
        if self._fault is not None and self._thread is not None:
            raise RuntimeError(f"one prompt over several processes: {self._fault}.")

    def diagnosis(self, error: BaseException) -> RuntimeError:
        """The error of an operation that failed, with the ranks that are to blame in it."""
        if self._thread is None:
            return RuntimeError(f"an operation over the ranks {self.ranks} failed: {error}")
        if self._fault is None:
            self._leave_note(self._find_missing() or f"an operation failed on rank {self.rank}: {error}")
        return RuntimeError(f"one prompt over several processes: {self._fault}.")

    def _find_missing(self) -> str | None:
        try:
            everyone = range(len(self.ranks))
            before = self._read(everyone)
            time.sleep(4 * _BEAT)
            after = self._read(everyone)
        except RuntimeError:
            return f"the store of the job is gone; it lives in rank {self.ranks[0]} or in the launcher"
        gone = [rank for rank, signs in after.items() if signs is None or signs == before[rank]]
        if gone:
            return f"{_names(gone)} gone (no sign of life)"
        counts = {rank: signs[1] for rank, signs in after.items() if signs is not None}
        behind = [rank for rank, count in counts.items() if count == min(counts.values())]
        if len(behind) == len(counts):
            return None
        return f"{_names(behind)} behind the others, who waited for {self.timeout:g} s"

    def _read(self, ranks: Iterable[int]) -> dict[int, tuple[int, int] | None]:
        signs: dict[int, tuple[int, int] | None] = {}
        for rank in ranks:
            known = self._store.check([f"signs/{rank}"])
            beat, count = self._store.get(f"signs/{rank}").decode().split() if known else (0, 0)
            signs[rank] = (int(beat), int(count)) if known else None
        return signs

    def _beat(self) -> None:
        beat, since, seen, is_over = 0, 0.0, {}, False
        try:
            while not self._stop.is_set():
                beat += 1
                self._store.set(f"signs/{self.rank}", f"{beat} {self._operations}")
                if self._fault is None:
                    self._look_around(seen)
                    since = time.monotonic()
                elif not is_over and self._has_to_abort(since):
                    assert self._abort is not None
                    logger.error("one prompt over several processes: %s.", self._fault)
                    self._abort()
                    is_over = True
                self._stop.wait(_BEAT)
        except RuntimeError:
            # The store went with the process that held it: the next operation says so.
            return

    def _has_to_abort(self, since: float) -> bool:
        # Who has begun no operation waits for none: it may be writing a file.
        return self._abort is not None and self._operations > 0 and time.monotonic() - since > _GRACE

    def _look_around(self, seen: dict[int, tuple[Any, float]]) -> None:
        """Notes a fault that another rank has left, or that the signs of the next rank have stood still.

        Each watches the next alone: a rank that is gone has somebody before it who is not.
        """
        if self._store.check(["note"]):
            self._fault = self._store.get("note").decode()
            return
        now = time.monotonic()
        for rank, signs in self._read([(self.rank + 1) % len(self.ranks)]).items():
            sign = signs and signs[0]
            if rank not in seen or seen[rank][0] != sign:
                seen[rank] = sign, now
        if gone := [rank for rank, (_, since) in seen.items() if now - since > self.timeout]:
            self._leave_note(f"{_names(gone)} gone (no sign of life)")

    def _leave_note(self, note: str) -> None:
        try:
            # The first note stays: later errors are consequences.
            self._fault = self._store.compare_set("note", "", note).decode()
        except RuntimeError:
            self._fault = note


def _names(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"rank {listed} is" if len(ranks) == 1 else f"ranks {listed} are"
