"""Two processes under DDP on the CPU, each with its own sequences: the gradients of one with all."""

import os
import socket

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import hf_longattn

BOUND = 2e-6


def model():
    return tiny.build("llama").train()


def rows(rank):
    ids = tiny.tokens(1, 43, seed=rank)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def work(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    parallel = DistributedDataParallel(hf_longattn.prepare_training(model(), block_size=16))
    with parallel.no_sync():
        parallel(**rows(rank)).loss.backward()
    parallel(**rows(rank + 2)).loss.backward()
    gradients = {name: p.grad for name, p in parallel.module.named_parameters()}
    torch.save(gradients, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_are_averaged_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, args=(port, tmp_path), nprocs=2)
    plain = model()
    for rank in range(4):
        (plain(**rows(rank)).loss / 2).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in plain.named_parameters():
            assert tiny.relative_error(found[name], parameter.grad) <= 10 * BOUND, name
        whole = (torch.cat([g[n].flatten() for n in found]) for g in (found, dict_of_gradients(plain)))
        assert tiny.relative_error(*whole) <= BOUND


def dict_of_gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}
