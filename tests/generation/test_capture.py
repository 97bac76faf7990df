"""Capturing a step: nothing but the step may run on the device meanwhile."""

import contextlib
import gc

import pytest
import torch

from hf_longattn.generation.capture import _without_collection, capture


def test_no_cycles_are_collected_during_a_capture(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def graph(*args, **kwargs):
        seen.append(gc.isenabled())
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    for name, stand_in in (("graph", graph), ("stream", lambda stream: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stream)

    def step():
        seen.append(gc.isenabled())
        return 7

    assert capture(lambda: seen.append(gc.isenabled()), step)[1] == 7
    assert seen == [True, False, False] and gc.isenabled()
    with pytest.raises(RuntimeError, match="no room"):
        capture(lambda: None, lambda: (_ for _ in ()).throw(RuntimeError("no room")))
    assert gc.isenabled()


def test_a_thread_that_is_done_leaves_collection_off_for_another_one():
    """As threads interleave, whose first capture may end before the second."""
    first, second = _without_collection(), _without_collection()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


@pytest.mark.gpu
def test_garbage_of_another_model_does_not_end_a_capture():
    x = torch.zeros(8, device="cuda")

    def leave_garbage():
        graph, _ = capture(lambda: x.add(1), lambda: x.add(1))
        graph.replay()
        pinned = torch.empty(1 << 20, pin_memory=True)
        pinned.copy_(torch.zeros(1 << 20, device="cuda"), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        cycle = [graph, pinned, event]
        cycle.append(cycle)

    def step():
        # As many containers as make Python look for cycles, of every generation.
        kept = [[index] for index in range(200_000)]
        return x.add(len(kept))

    for _ in range(3):
        leave_garbage()
        graph, result = capture(lambda: x.add(1), step)
        graph.replay()
        assert result.tolist() == [200_000.0] * 8
