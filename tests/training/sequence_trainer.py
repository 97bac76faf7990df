"""Trains under Trainer, plain on one rank and prepared on two. Run as `sequence_trainer.py FOLDER`.

What is logged and learnt is saved as FOLDER/plain.pt, prepared.pt, configured.pt and whole-logits.pt.

The last two have accelerate's `ParallelismConfig`, which takes no CPU: its check is left out, the rest runs.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import tiny
import torch

import hf_longattn


def train(rank, size, folder, kind):
    # Trainer loads pyarrow, which starts a thread: only where nothing is forked any more.
    from accelerate import ParallelismConfig
    from test_trainer import Losses, Rows
    from transformers import Trainer, TrainingArguments

    options = {"max_steps": 3, "eval_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_strategy": "steps"}
    options |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    if kind in ("configured", "whole-logits"):
        ParallelismConfig._validate_accelerator = lambda *args: None
        options["parallelism_config"] = ParallelismConfig(cp_size=int(os.environ["WORLD_SIZE"]))
    model, losses = tiny.build("gemma2"), Losses()
    arguments = TrainingArguments(folder, dataloader_pin_memory=False, **options)
    rows = {"train_dataset": Rows(24, 10), "eval_dataset": Rows(6, 90)}
    trainer = Trainer(model, arguments, callbacks=[losses], **rows)
    assert trainer.accelerator.num_processes == size
    if kind != "plain":
        loss = {"loss": "model"} if kind == "whole-logits" else {"loss_chunk_size": 20}
        hf_longattn.prepare_training(model, accelerator=trainer.accelerator, block_size=16, **loss)
    trainer.train()
    if arguments.process_index == 0:
        torch.save((losses.values, model.state_dict()), Path(folder, f"{kind}.pt"))


if __name__ == "__main__":
    for kind, size in (("plain", 1), ("prepared", 2), ("configured", 2), ("whole-logits", 2)):
        ranks.run(train, size, sys.argv[1], kind)
