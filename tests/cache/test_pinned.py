"""Page-locked memory, on a stand-in for the CUDA runtime: nothing stays locked that is freed."""

import gc

import pytest
import torch

from hf_longattn.cache.pinned import Pins, locked_bytes, pin, unpin
from hf_longattn.training.offload import PinnedPool


class Runtime:
    def __init__(self, refuse=False):
        self.locked, self.refuse, self.waits = set(), refuse, 0

    def cudaHostRegister(self, address, size, flags):
        if not self.refuse:
            self.locked.add(address)
        return 2 if self.refuse else 0

    def cudaHostUnregister(self, address):
        self.locked.remove(address)


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda *device: setattr(runtime, "waits", runtime.waits + 1)
    )
    return runtime


def test_memory_that_nobody_unpins_is_unlocked_before_it_is_freed(runtime):
    tensor = torch.empty(64)
    pin(tensor, "offload", "")
    view, address = tensor.view(8, 8), tensor.data_ptr()
    del tensor
    gc.collect()
    # The view still needs it.
    assert runtime.locked == {address}
    del view
    gc.collect()
    assert runtime.locked == set() and runtime.waits == 1


def test_unpinned_memory_is_unlocked_once(runtime):
    tensor = torch.empty(64)
    pin(tensor, "offload", "")
    unpin(tensor)
    unpin(tensor)
    assert runtime.locked == set()
    del tensor
    gc.collect()


def test_slabs_that_come_back_to_a_pool_that_is_gone_are_unlocked(runtime):
    pool = PinnedPool()
    slab = pool.take(100)
    pool.__del__()
    pool.give(slab)
    assert len(runtime.locked) == 1
    del slab, pool
    gc.collect()
    assert runtime.locked == set()


def test_what_goes_during_a_capture_is_unlocked_after_it(runtime, monkeypatch):
    tensor = torch.empty(64)
    pin(tensor, "offload", "")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        del tensor
        gc.collect()
        assert len(runtime.locked) == 1
    following = torch.empty(64)
    pin(following, "offload", "")
    assert runtime.locked == {following.data_ptr()}
    unpin(following)


def test_what_is_locked_is_counted(runtime):
    before, first, second = locked_bytes(), torch.empty(8), torch.empty(3, dtype=torch.uint8)
    pin(first, "offload", "")
    pin(second, "offload", "")
    assert locked_bytes() - before == 35
    unpin(first)
    assert locked_bytes() - before == 3
    del second
    gc.collect()
    assert locked_bytes() == before


def test_pins_unlock_what_they_held_before(runtime):
    pins, first, second = Pins("offload_layers", ""), torch.empty(8), torch.empty(8)
    pins.hold(first)
    pins.hold(second)
    assert runtime.locked == {second.data_ptr()}
    pins.release()
    assert runtime.locked == set()


def test_memory_that_cannot_be_locked_is_refused_with_the_way_out(runtime):
    runtime.refuse = True
    with pytest.raises(
        RuntimeError, match="`offload`: pinning host memory failed with CUDA error 2; do less"
    ):
        pin(torch.empty(8), "offload", "do less")
