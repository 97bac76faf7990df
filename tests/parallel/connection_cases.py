"""Topics of `cases.py`: connections are opened for whom they serve, and close behind the last of them."""

import contextlib
import gc
import os

import tiny
import torch.distributed as dist
from several import TIMEOUT, assert_same, build, error_of, expected, generate, prepare

import hf_longattn


def descriptors():
    """Open files and connections of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def without_collector():
    """Inside, only what nobody holds any more is let go: circles stay."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def connections(rank, size, mesh):
    """Models that are prepared, used and restored again and again hold on to no connection."""
    if size == 1:
        return
    for turn in (generate_once, train_once):
        with without_collector():
            counts = [turn(mesh) for _ in range(5)]
        assert len(set(counts[1:])) == 1, f"{turn.__name__}: {counts}"
    # The group of the caller is still there.
    dist.barrier(mesh.get_group("cp"))


def generate_once(mesh):
    model = prepare("llama", mesh)
    assert_same("llama", generate(model, tiny.tokens(1, 23), do_sample=False), expected("llama", length=23))
    hf_longattn.restore(model)
    return descriptors()


def train_once(mesh):
    model = hf_longattn.prepare_training(build("llama"), device_mesh=mesh)
    ids = tiny.tokens(1, 23)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    hf_longattn.restore(model)
    return descriptors()


def several_models(rank, size, mesh):
    """Each of several prepared models has connections of its own; a cache keeps those that it needs."""
    if size == 1:
        return
    ids, want = tiny.tokens(1, 23), expected("llama", length=23)
    with without_collector():
        before, models = descriptors(), [prepare("llama", mesh) for _ in range(2)]
        caches = [generate(model, ids, do_sample=False).past_key_values for model in models]
        # The first goes while the second is there, and a third comes.
        hf_longattn.restore(models[0])
        models.append(prepare("llama", mesh))
        for model in models[1:]:
            assert_same("side by side", generate(model, ids, do_sample=False), want)
        # The cache of a model that was restored goes on with another one.
        caches[0].crop(15)
        assert_same("goes on", generate(models[1], ids, past_key_values=caches[0], do_sample=False), want)
        # So does that of an earlier set-up.
        hf_longattn.prepare_generation(models[1], device_mesh=mesh, timeout=TIMEOUT)
        caches[1].crop(15)
        assert_same("again", generate(models[1], ids, past_key_values=caches[1], do_sample=False), want)
        for model in models[1:]:
            hf_longattn.restore(model)
        caches.clear()
        error_of(ValueError, lambda: prepare("llama", mesh, offload_layers=1))
        assert descriptors() == before


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    if {"connections", "several_models"} & set(topics):
        expected("llama", length=23)
