"""Runs a function in several processes that share a gloo group, the way a launcher would."""

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# A thread that holds a lock while its process forks leaves the lock held for ever in the child, so nothing
# here may start one: the bars' monitor is off, and the store has a process of its own.
tqdm.monitor_interval = 0
FORK = multiprocessing.get_context("fork")


def _serve(connection):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection.send(store.port)
    connection.recv()


def _enter(function, rank, world_size, port, timeout, args):
    # A rank that hangs says where, and ends.
    faulthandler.dump_traceback_later(timeout, exit=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # The store lives beside the ranks, as it lives in the agent of torchrun: a rank may die without it.
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


def run(function, world_size, *args, timeout=200):
    """Forks `world_size` processes that run `function(rank, world_size, *args)`; raises where one failed.

    Call it from a script that has started no thread and touched no device.
    """
    threads = [entry.joinpath("comm").read_text().strip() for entry in Path("/proc/self/task").glob("*")]
    if len(threads) > 1:
        raise RuntimeError(f"a process with the threads {threads} cannot be forked safely")
    ours, theirs = FORK.Pipe()
    server = FORK.Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    port, end = ours.recv(), time.monotonic() + timeout + 10
    processes = [
        FORK.Process(target=_enter, args=(function, rank, world_size, port, timeout, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    server.kill()
    if any(code != 0 for code in codes):
        raise SystemExit(f"exit codes of {world_size} ranks: {codes}")


def run_topics(topics, expect, make_mesh):
    """What a file of cases does as `python FILE P,P... TOPIC...`.

    Args:
        topics: name -> function of (rank, world_size, mesh).
        expect: called with the names before the ranks start, so that they inherit what it computes.
        make_mesh: world size -> mesh.
    """
    torch.set_num_threads(1)
    sizes, names = sys.argv[1].split(","), sys.argv[2:]
    expect(names)

    def enter(rank, size):
        mesh = make_mesh(size)
        for name in names:
            started = time.monotonic()
            topics[name](rank, size, mesh)
            if rank == 0:
                print(f"P{size} {name}: {time.monotonic() - started:.1f} s", flush=True)

    for size in sizes:
        run(enter, int(size))
