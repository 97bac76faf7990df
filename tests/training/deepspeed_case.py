"""A rank of DeepSpeed runs on CPUs. Run as `torchrun --nproc-per-node 2 deepspeed_case.py CASE ...`."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import peft
import tiny
import torch
from deepspeed.utils import safe_get_full_grad
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import hf_longattn

RATE, STEPS = 0.01, 3


def rows(rank, step):
    """Another length on each rank and in each step, and so other numbers of blocks and of chunks."""
    return tiny.tokens(1, 43 + 20 * rank + 9 * step, seed=1 + rank + 2 * step)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def prepare(model):
    return hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)


def start(model, stage):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(trained(model), RATE)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(model, stage, rows=rows):
    """The losses of this rank's own rows, and every gradient of each step."""
    engine = start(model, stage)
    losses, grads = [], []
    for step in range(STEPS):
        ids = rows(int(os.environ["RANK"]), step)
        with torch.no_grad():
            before = engine(input_ids=ids, labels=ids, use_cache=False).loss
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        assert torch.equal(loss, before)
        engine.backward(loss)
        grads.append([safe_get_full_grad(parameter).clone() for parameter in trained(model)])
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return torch.tensor(losses), grads


def train_alone(model, rows=rows):
    """The same in one process: the mean over the rows of all ranks."""
    optimizer = torch.optim.SGD(trained(model), RATE)
    losses, grads = [], []
    for step in range(STEPS):
        batches = [rows(rank, step) for rank in range(2)]
        parts = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
        optimizer.zero_grad()
        (sum(parts) / 2).backward()
        grads.append([parameter.grad.clone() for parameter in trained(model)])
        optimizer.step()
        losses.append(parts[int(os.environ["RANK"])].item())
    return torch.tensor(losses), grads


def join(grads):
    return torch.cat([grad.flatten() for grad in grads])


def compare(name, stage=3, change=lambda model: model, rows=rows, prepare=prepare):
    """Losses and gradients against one process: 2e-6; each parameter's against fp64."""
    exact = train_alone(change(tiny.build(name)).double(), rows)
    expected = train_alone(change(tiny.build(name)), rows)
    result = train(prepare(change(tiny.build(name).train())), stage, rows)
    assert tiny.relative_error(result[0], expected[0]) <= 2e-6
    for ours, plain, right in zip(result[1], expected[1], exact[1], strict=True):
        assert tiny.relative_error(join(ours), join(plain)) <= 2e-6
        for one, other, reference in zip(ours, plain, right, strict=True):
            assert one.shape == reference.shape
            # The gradient of a key's bias is a difference of large sums, in the plain model too.
            bound = 1.5 * (tiny.relative_error(other, reference) + 1e-6)
            assert tiny.relative_error(one, reference) <= bound


def compare_one_sequence():
    """Both ranks compute parts of the same rows."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))

    def share(model):
        return hf_longattn.prepare_training(model, device_mesh=mesh, block_size=8, loss_chunk_size=9)

    compare("llama", rows=lambda rank, step: tiny.tokens(1, 40 + 8 * step, seed=5 + step), prepare=share)


def load(model):
    """The same weights, cut while they are read, as under Trainer with a DeepSpeed file."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    if os.environ["RANK"] == "0":
        model.save_pretrained(folder[0])
    torch.distributed.barrier()
    # Read by transformers as long as it lives.
    config = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
    loaded = AutoModelForCausalLM.from_pretrained(folder[0], attn_implementation="eager").train()
    del config
    torch.distributed.barrier()
    shutil.rmtree(folder[0], ignore_errors=True)
    assert loaded.lm_head.weight.numel() == 0
    return prepare(loaded)


def refuses(model, words, before=lambda model: model, after=lambda model: model):
    """Whether the first step of stage 3 is refused with `words`."""
    engine = start(before(model), 3)
    after(engine)
    ids = rows(0, 0)
    try:
        engine(input_ids=ids, labels=ids, use_cache=False)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError("not refused")


def gathers_once():
    """A layer once forward and once backward, the same in every step whatever the lengths."""
    engine = start(prepare(tiny.build("llama").train()), 3)
    coordinator, seen = engine.optimizer.parameter_offload.get_param_coordinator(), []
    fetch = coordinator.fetch_sub_module

    def remember(module, forward):
        seen.append((type(module).__name__, forward))
        return fetch(module, forward)

    coordinator.fetch_sub_module = remember
    for step in range(STEPS):
        seen.clear()
        ids = rows(int(os.environ["RANK"]), step)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        for forward in (True, False):
            assert seen.count(("LlamaDecoderLayer", forward)) == 3
            # The head: once more forward, where the trunk runs inside the model's own forward.
            assert seen.count(("Linear", forward)) == 1 + forward
    assert coordinator.is_complete_trace()
    assert all(parameter.numel() == 0 for parameter in engine.module.parameters())


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


def lora(model, targets=("q_proj", "down_proj"), inputs=True):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    if inputs:
        model.enable_input_require_grads()
    return model


CASES = {
    "2": lambda: compare("llama", stage=2),
    "llama": lambda: compare("llama"),
    "qwen2": lambda: compare("qwen2"),
    "qwen3": lambda: compare("qwen3"),
    "gemma2": lambda: compare("gemma2"),
    "tied": lambda: compare("qwen2", change=tied),
    "gathers": gathers_once,
    "one-sequence": compare_one_sequence,
    "loaded": lambda: compare("qwen3", prepare=load),
    "lora": lambda: compare("llama", change=lora),
    "lora-head": lambda: compare("llama", change=lambda model: lora(model, ["o_proj", "lm_head"])),
    "lora-tied-head": lambda: compare("llama", change=lambda model: lora(tied(model), ["o_proj", "lm_head"])),
    "frozen": lambda: refuses(lora(tiny.build("llama"), inputs=False), "enable_input_require_grads", prepare),
    "late": lambda: refuses(tiny.build("llama"), "before `deepspeed.initialize`", after=prepare),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # An operator for shared memory, compiled on first use; gloo does without.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    for case in sys.argv[1:]:
        CASES[case]()
        # In one piece, for the ranks share a pipe.
        print(f"done {case}\n", end="", flush=True)
