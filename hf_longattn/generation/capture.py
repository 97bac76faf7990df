"""Capturing work in a CUDA graph: the one place where it is done."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
# Captures under way in all threads, and whether there was collection before the first of them.
_lock = threading.Lock()
_captures, _was_enabled = 0, False


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keeps Python from collecting cycles: to free a graph or an event of another model ends a capture."""
    global _captures, _was_enabled
    with _lock:
        _captures, _was_enabled = _captures + 1, _was_enabled if _captures else gc.isenabled()
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _captures -= 1
            # A thread that is done must not collect in the capture of another one.
            if not _captures and _was_enabled:
                gc.enable()


def capture(
    rehearse: Callable[[], Any], step: Callable[[], Result], like: torch.cuda.CUDAGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures `step` in a CUDA graph.

    Args:
        rehearse: what `step` does, without a trace; run once before, so that everything is compiled.
        step: launches work on buffers that stay where they are, and never waits for the device.
        like: a graph whose memory this one may use too, where neither needs what it made once the other runs.

    Returns:
        the graph, and what `step` returned: tensors that every replay writes anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            rehearse()
    finally:
        # Also of one that fails: what it wrote or put back is there before anybody goes on.
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    pool = None if like is None else like.pool()
    with _without_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()
    return graph, result
