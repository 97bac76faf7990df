"""The options of the training recipes: what is read, Trainer's arguments with other defaults, presets."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

ROOT = Path(__file__).parents[1]


@dataclass
class Text:
    """What is read, and how it is cut."""

    text: list[str] = field(default_factory=list, metadata={"help": "files and folders to read"})
    suffixes: list[str] = field(
        default_factory=lambda: [".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cpp", ".cu", ".jsonl"],
        metadata={"help": "which files of a folder are text; each may end in .xz too"},
    )
    length: int = field(default=2048, metadata={"help": "tokens of a row"})
    tokens: int = field(default=100_000_000, metadata={"help": "tokens to train on"})
    held_out: int = field(default=100, metadata={"help": "one document in so many is held out"})
    eval_rows: int = field(default=256, metadata={"help": "held-out rows that are scored"})
    questions: int = field(
        default=200,
        metadata={"help": "last words and next sentences of held-out text asked at the end, of each"},
    )
    readers: int = field(default=1, metadata={"help": "processes that read and tokenise"})
    smoke: bool = field(default=False, metadata={"help": "tiny models on the project's own text, on a CPU"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint"})


@dataclass
class Training(TrainingArguments):
    """Trainer's own arguments with other defaults.

    Weights and optimizer state are fp32, products bf16 by autocast: updates of 1e-4 of a weight are lost in
    bf16 weights. Nothing waits for the GPU between two lines of the log.
    """

    bf16: bool = field(default_factory=torch.cuda.is_available)
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "compile a layer of each kind: seconds; the whole model, --torch_compile, takes minutes"
        },
    )
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    learning_rate: float | None = field(default=None, metadata={"help": "3e-4, or that of the preset"})
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    warmup_steps: float = 0.02
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    logging_steps: float = 10
    # Looking for NaN would wait for the GPU at every step.
    logging_nan_inf_filter: bool = False
    eval_strategy: str = "steps"
    eval_on_start: bool = True
    eval_steps: float | None = 0.05
    prediction_loss_only: bool = True
    save_steps: float = 0.2
    save_total_limit: int | None = 1
    # The rows come shuffled.
    train_sampling_strategy: str = "sequential"
    dataloader_num_workers: int = 4
    # A copy that is waited for would empty the queue of the GPU before every batch.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"non_blocking": True})


@dataclass(frozen=True)
class Preset:
    """The shape of a model with random weights, and the learning rate of it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    learning_rate: float

    def fields(self, vocab_size: int, length: int) -> dict[str, Any]:
        """Fields of a configuration, all but the number of layers and the feed-forward width."""
        return {
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": length,
            "tie_word_embeddings": True,
        }


def parse(*kinds: Any) -> tuple[Any, ...]:
    """The options of the command line, by dataclass; the last is of Trainer's arguments.

    Those look for the device and for other processes while they are made: that a smoke run is on a CPU, they
    have to be told before.
    """
    arguments = sys.argv[1:] + ["--use_cpu", "--bf16", "false"] * ("--smoke" in sys.argv)
    options = HfArgumentParser(kinds).parse_args_into_dataclasses(arguments)
    # `accelerate launch` may say so too: Trainer computes by it then, and DeepSpeed refuses what differs.
    options[-1].bf16 = options[-1].mixed_precision == "bf16"
    if int(os.environ.get("WORLD_SIZE", "1")) > options[-1].world_size:
        raise SystemExit(
            "the processes do not find one another and would train apart: on CPUs, add --use_cpu"
        )
    return options


def parse_training(kind: Any) -> tuple[Any, Text, Training]:
    """The same for a recipe that reads `Text`: each process trains the whole model on rows of its own."""
    recipe, text, training = parse(kind, Text, Training)
    if training.n_gpu > 1:
        raise SystemExit(
            "one process drives one GPU: start one for each by accelerate launch --config_file "
            "recipes/accelerate/two_gpus_ddp.yaml, or pick one with CUDA_VISIBLE_DEVICES=0"
        )
    cut = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if training.fsdp or training.deepspeed or any(cut):
        raise SystemExit(
            "this recipe keeps the whole model on every process, which FSDP and DeepSpeed do not: launch it "
            "with recipes/accelerate/two_gpus_ddp.yaml"
        )
    return recipe, text, training


def run_recipe(main: Callable[[], None]) -> None:
    """Runs a recipe; several processes leave their group together, before they exit.

    One that exits while another still writes may abort behind its work.
    """
    main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def say(line: str) -> None:
    """Prints on one process."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def smoke(text: Text, training: Training) -> None:
    """Shrinks everything for a run of seconds on a CPU: bytes of the project's own pages, or of `--text`."""
    text.text = text.text or [str(ROOT / "docs")]
    text.length, text.eval_rows, text.held_out, text.questions = 64, 16, 4, min(text.questions, 4)
    text.tokens = min(text.tokens, 40 * 8 * text.length)
    training.use_cpu, training.bf16, training.dataloader_num_workers = True, False, 0
    training.gradient_accumulation_steps, training.learning_rate = 1, 1e-2
    training.logging_steps, training.eval_steps, training.save_steps = 5, 0.25, 0.5
    training.dataloader_pin_memory = training.accelerator_config.non_blocking = False
