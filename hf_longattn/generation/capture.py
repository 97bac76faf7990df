"""Capturing work in a CUDA graph: the one place where it is done."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def capture(rehearse: Callable[[], Any], step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Captures `step` in a CUDA graph.

    Args:
        rehearse: what `step` does, without a trace; run once before, so that everything is compiled.
        step: launches work on buffers that stay where they are, and never waits for the device.

    Returns:
        the graph, and what `step` returned: tensors that every replay writes anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rehearse()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    return graph, result
