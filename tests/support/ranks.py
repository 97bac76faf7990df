"""Runs a function in several processes that share a gloo group, the way a launcher would."""

import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def _enter(function, rank, world_size, port, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # The store lives in the parent, as it lives in the agent of torchrun: a rank may die without it.
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, world_size, *args)
    except BaseException:
        print(f"--- rank {rank} of {world_size}", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        # No farewell: the others must notice by themselves.
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def start(function, world_size, *args):
    """Forks `world_size` processes that run `function(rank, world_size, *args)`; returns them and the store.

    Call it from a script, before it has started a thread or touched a device.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_enter, args=(function, rank, world_size, store.port, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, store


def run(function, world_size, *args, timeout=200):
    """As `start`, and waits; raises where a process failed."""
    processes, _store = start(function, world_size, *args)
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    if any(codes):
        raise SystemExit(f"exit codes of {world_size} ranks: {codes}")
