"""A rank of a DeepSpeed run on CPUs. Run as `torchrun --nproc-per-node 2 deepspeed_case.py STAGE`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import tiny
import torch

import hf_longattn


def run(stage, prepared):
    """The losses of three steps on rows of this rank's own, and the weights after them."""
    model = tiny.build("llama").train()
    if prepared:
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)
    engine = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
        },
    )[0]
    losses = []
    for step in range(3):
        ids = tiny.tokens(1, 43, seed=int(os.environ["RANK"]) + 2 * step)
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    engine.destroy()
    return torch.tensor(losses), weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    # An operator for shared memory, compiled on first use; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    if sys.argv[1] == "3":
        try:
            run(3, prepared=True)
        except ValueError as error:
            assert "ZeRO stage 3" in str(error), error
        else:
            raise AssertionError("not refused")
    else:
        expected, result = run(int(sys.argv[1]), prepared=False), run(int(sys.argv[1]), prepared=True)
        for ours, theirs in zip(result, expected, strict=True):
            assert tiny.relative_error(ours, theirs) <= 2e-6
    print("done")
