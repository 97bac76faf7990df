"""Fixtures that every test gets: memory that nothing wrote is NaN, and the same seed."""

import gc
import os

import pytest
import torch

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
            with torch.no_grad():
                return tensor.fill_(float("nan")) if floating and tensor.device.type != "meta" else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


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
