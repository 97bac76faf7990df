"""How ranks agree on the name of new connections, here each in a thread of one process."""

from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch.distributed as dist

from hf_longattn.parallel import connections


def meet(store, ranks, members, timeout=20.0):
    """The names that some of the members come to."""
    with patch.object(connections, "default_store", lambda: store), ThreadPoolExecutor() as threads:
        calls = [threads.submit(connections.meet, members, rank, timeout) for rank in ranks]
        return [call.result() for call in calls]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_agree_on_a_name_that_was_never_used(size):
    store, members = dist.HashStore(), tuple(range(size))
    names = [meet(store, range(size), members) for _ in range(3)]
    assert all(len(set(each)) == 1 for each in names)
    assert len({each[0] for each in names}) == 3


def test_what_ranks_left_behind_that_came_alone_does_no_harm():
    store = dist.HashStore()
    for early in ((0,), (1, 2), (2,)):
        with pytest.raises(RuntimeError, match=r"\[3, 5, 6\] did not all come .* within 0.05 s"):
            meet(store, early, (3, 5, 6), timeout=0.05)
    assert len(set(meet(store, range(3), (3, 5, 6)))) == 1
