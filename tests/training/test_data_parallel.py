"""Two processes on the CPU under DDP and FSDP, each with its own rows: the gradients of one with all."""

import functools
import os
import socket
import types

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_longattn
from hf_longattn.training import node

BOUND = 2e-6


def model():
    return tiny.build("llama").train()


def rows(rank):
    ids = tiny.tokens(1, 43, seed=rank)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def ddp_gradients(prepared, rank):
    parallel = DistributedDataParallel(prepared)
    with parallel.no_sync():
        parallel(**rows(rank)).loss.backward()
    parallel(**rows(rank + 2)).loss.backward()
    return {name: p.grad for name, p in parallel.module.named_parameters()}


def fsdp_gradients(prepared, rank, apart=None):
    mesh = init_device_mesh("cpu", (2,))
    for unit in (*([] if apart is None else [apart(prepared)]), *prepared.model.layers, prepared):
        fully_shard(unit, mesh=mesh)
    if apart is not None:
        # Once more, after it was sharded.
        hf_longattn.prepare_training(prepared, block_size=16, loss_chunk_size=9)
    return two_steps(prepared, rank)


def two_steps(prepared, rank):
    for offset in (0, 2):
        prepared(**rows(rank + offset)).loss.backward()
    return {name: p.grad.full_tensor() for name, p in prepared.named_parameters()}


def accelerate_gradients(prepared, rank):
    """As accelerate cuts a model: its embedding, each layer, and the final norm with the head."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    # An `Accelerator` takes no FSDP on a CPU; this is what is read of it.
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=types.SimpleNamespace(fsdp_dim_names=["fsdp"]),
        torch_device_mesh=mesh,
        mixed_precision="no",
    )
    return two_steps(fsdp2_prepare_model(accelerator, prepared), rank)


KINDS = {
    "ddp": ddp_gradients,
    "fsdp": fsdp_gradients,
    "fsdp-head": functools.partial(fsdp_gradients, apart=lambda model: model.lm_head),
    "accelerate": accelerate_gradients,
}
SETTINGS = {"every layer": {}, "every third": {"keep_every": 3}}
CASES = [("ddp", "every layer"), ("fsdp", "every layer"), ("fsdp", "every third")]
CASES += [("fsdp-head", "every layer"), ("accelerate", "every layer")]


def join(rank, world_size, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def work(rank, port, folder, kind, settings):
    join(rank, 2, port)
    recall, recalls = node._recall, []
    node._recall = lambda last: recalls.append(last.run) or recall(last)
    gradients = KINDS[kind](hf_longattn.prepare_training(model(), block_size=16, **SETTINGS[settings]), rank)
    # Two backward passes, each of one group of three layers, whose second and third are without an input.
    assert len(recalls) == (2 if SETTINGS[settings] else 0)
    torch.save(gradients, folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_gradients_are_averaged_once(tmp_path, kind, settings):
    mp.spawn(work, args=(free_port(), tmp_path, kind, settings), nprocs=2)
    plain = model()
    for rank in range(4):
        (plain(**rows(rank)).loss / 2).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in plain.named_parameters():
            assert tiny.relative_error(found[name], parameter.grad) <= 10 * BOUND, name
        whole = (torch.cat([g[n].flatten() for n in found]) for g in (found, dict_of_gradients(plain)))
        assert tiny.relative_error(*whole) <= BOUND


def shard_mlp(prepared, mesh):
    for layer in prepared.model.layers:
        fully_shard(layer.mlp, mesh=mesh)


def shard_inside_head(prepared, mesh):
    prepared.lm_head = torch.nn.Sequential(prepared.lm_head)
    fully_shard(prepared.lm_head[0], mesh=mesh)


def shard_flat(prepared, mesh):
    return FullyShardedDataParallel(prepared, device_mesh=mesh, device_id=torch.device("cpu"))


REFUSED = {
    "LlamaMLP inside .*LlamaDecoderLayer.*as a whole": shard_mlp,
    "`loss='chunked'`.*FSDPLinear.*`loss='model'`": shard_inside_head,
    "flat tensor.*`use_orig_params=True`": shard_flat,
}


def work_refused(rank, port):
    join(rank, 1, port)
    mesh = init_device_mesh("cpu", (1,))
    for words, shard in REFUSED.items():
        prepared = hf_longattn.prepare_training(model(), block_size=16)
        with pytest.raises(ValueError, match=words):
            (shard(prepared, mesh) or prepared)(**rows(0))
    dist.destroy_process_group()


@pytest.mark.slow
def test_parameters_that_are_gone_between_blocks_are_refused():
    mp.spawn(work_refused, args=(free_port(),), nprocs=1)


def dict_of_gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}
