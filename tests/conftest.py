"""Fixtures that every test gets: memory that nothing wrote is NaN, and the same seed."""

import gc
import os

import pytest
import torch
from torch._subclasses import FakeTensor

# Imports and collection make millions of objects that stay: the collector never walks over them.
gc.disable()

# As in the Makefile, also for the processes that tests start: ranks are forked from one that has one thread,
# and sums are taken in one order.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
# `with torch.device(...)` looks the functions that make tensors up once: before they are replaced below.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """`torch.empty` and its kin hand out NaN, so that an output nobody wrote cannot pass."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            floating = tensor.is_floating_point() or tensor.is_complex()
            # A compiler's decompositions call these too, where a fill would be a write in a functional graph.
            if not floating or tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
                return tensor
            with torch.no_grad():
                return tensor.fill_(float("nan"))

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    method = poisoned(torch.Tensor.new_empty)

    def new_empty(tensor, *size, **kwargs):
        # A compiler traces what stands for a method, but not the method that it calls.
        if torch.compiler.is_dynamo_compiling():
            return torch.empty(*size, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})
        return method(tensor, *size, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        apart = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in set(apart)]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
