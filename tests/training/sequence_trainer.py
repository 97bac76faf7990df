"""Trains under Trainer, and saves what it logs. Run as `sequence_trainer.py OUT plain|prepared|configured`.

"configured" has accelerate's `ParallelismConfig`, which takes no CPU: its check is left out, the rest runs.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
import torch
from accelerate import ParallelismConfig
from test_trainer import Losses, Rows
from transformers import Trainer, TrainingArguments

import hf_longattn


def main():
    out, kind = Path(sys.argv[1]), sys.argv[2]
    options = {"max_steps": 3, "eval_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_strategy": "steps"}
    options |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    if kind == "configured":
        ParallelismConfig._validate_accelerator = lambda *args: None
        options["parallelism_config"] = ParallelismConfig(cp_size=int(os.environ["WORLD_SIZE"]))
    model, losses = tiny.build("gemma2"), Losses()
    arguments = TrainingArguments(str(out.parent), dataloader_pin_memory=False, **options)
    rows = {"train_dataset": Rows(24, 10), "eval_dataset": Rows(6, 90)}
    trainer = Trainer(model, arguments, callbacks=[losses], **rows)
    if kind != "plain":
        hf_longattn.prepare_training(
            model, accelerator=trainer.accelerator, block_size=16, loss_chunk_size=20
        )
    trainer.train()
    if arguments.process_index == 0:
        torch.save((losses.values, model.state_dict()), out)


if __name__ == "__main__":
    main()
