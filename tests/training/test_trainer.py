"""A prepared model under transformers' Trainer: the same training as without, resumed or not."""

import pytest
import tiny
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_longattn

STEPS = 6


class Rows(Dataset):
    """Rows of random tokens of several lengths, padded on the right."""

    def __init__(self, count, seed):
        self.rows = [tiny.tokens(1, 30 + 5 * (i % 4), seed=seed + i)[0] for i in range(count)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids = torch.zeros(48, dtype=torch.long)
        row = self.rows[index]
        ids[: len(row)] = row
        mask = torch.arange(48) < len(row)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


class Losses(TrainerCallback):
    def __init__(self):
        self.values = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if name in (logs or {}):
                self.values[name, state.global_step] = logs[name]


def train(folder, prepare, resume=None, make=lambda: tiny.build("llama"), **changes):
    """(losses by step, the model)."""
    model, losses = make(), Losses()
    if prepare:
        hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=20)
    options = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    arguments = TrainingArguments(**options)
    trainer = Trainer(
        model, arguments, train_dataset=Rows(24, 10), eval_dataset=Rows(6, 90), callbacks=[losses]
    )
    trainer.train(resume_from_checkpoint=resume)
    return losses.values, model


def assert_close(result, expected):
    assert result.keys() == expected.keys() and len(result) >= STEPS
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name


@pytest.fixture(scope="module")
def unprepared(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), prepare=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_equal_those_of_the_plain_model(tmp_path, unprepared, checkpointing):
    losses, model = train(tmp_path, prepare=True, gradient_checkpointing=checkpointing)
    assert_close(losses, unprepared[0])
    before = tiny.build("llama").state_dict()
    moved, theirs = (
        torch.cat([(m.state_dict()[n] - before[n]).flatten() for n in before]) for m in (model, unprepared[1])
    )
    # Adam divides by the roots of tiny second moments, which makes rounding grow.
    assert tiny.relative_error(moved, theirs) <= 1e-2


def adapted():
    """GPT-2, which drops, with LoRA that drops too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    return peft.get_peft_model(
        tiny.build("gpt2"), peft.LoraConfig(target_modules=["c_attn"], lora_dropout=0.2)
    )


@pytest.mark.parametrize("name", ["llama", pytest.param("dropout-lora", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_the_losses_bit_by_bit(tmp_path, name):
    options = {"prepare": True, **({} if name == "llama" else {"make": adapted})}
    whole, model = train(tmp_path / "whole", **options)
    resumed, again = train(tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    tail = {name: value for name, value in whole.items() if name[1] > 3}
    assert tail and {name: value for name, value in resumed.items() if name[1] > 3} == tail
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_saved_models_carry_no_trace(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "plain")
    hf_longattn.prepare_training(model, block_size=16)
    model.save_pretrained(tmp_path / "prepared")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes(), name
