"""Trains LightningForCausalLM (TransNormerLLM) from scratch beside a softmax Llama of as many parameters.

    python recipes/pretrain_lightning.py --text DIR --preset 30M --tokens 200000000 --output_dir runs/30M
    python recipes/pretrain_lightning.py --text DIR --preset 85M --models lightning --output_dir runs/85M
    python recipes/pretrain_lightning.py --smoke --output_dir runs/smoke              seconds on a CPU

Several GPUs take rows of their own, each with the whole model:

    accelerate launch --config_file recipes/accelerate/two_gpus_ddp.yaml recipes/pretrain_lightning.py ...

Both models see the same rows in the same order with the same settings: AdamW (0.9, 0.95), weight decay 0.1,
a cosine down to a tenth. The feed-forward layer of the Llama is wider by what the lightning layer's gate
costs. Held-out losses stand side by side at the end.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _common import (
    draw,
    flops_a_token,
    load_rows,
    read_curve,
    train,
    write_report,
    zero_shot,
)
from _options import Preset, parse_training, run_recipe, smoke
from _tiny import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_longattn.modeling.lightning import LightningConfig

# Of the lightning model: where 3 divides the width, the parameters of both are equal.
PRESETS = {
    "30M": Preset(384, 6, 6, 1024, 2e-3),
    "85M": Preset(576, 13, 9, 1536, 1.2e-3),
    "smoke": Preset(48, 2, 3, 96, 1e-2),
}


@dataclass
class Recipe:
    """What is trained."""

    preset: str = field(
        default="30M", metadata={"help": "shape: 30M or 85M parameters", "choices": [*PRESETS]}
    )
    models: list[str] = field(
        default_factory=lambda: ["lightning", "llama"], metadata={"help": "of lightning and llama, in order"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or id (default: SmolLM2's, fetched)"}
    )


def build(name: str, preset: Preset, tokenizer: PreTrainedTokenizerBase, length: int) -> PreTrainedModel:
    """A random model.

    A lightning layer has 5 D^2 + 3 D F weights (q, k, v, gate, out; a gated unit of width F), a Llama layer
    4 D^2 + 3 D F', so F' = F + D / 3.
    """
    shape = preset.fields(len(tokenizer), length) | {
        "num_hidden_layers": preset.num_hidden_layers,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if name == "lightning":
        config = LightningConfig(**shape, intermediate_size=preset.intermediate_size)
    elif name == "llama":
        config = LlamaConfig(**shape, intermediate_size=preset.intermediate_size + preset.hidden_size // 3)
    else:
        raise SystemExit(f"--models knows lightning and llama, got {name}")
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def fetch_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for."""
    if recipe.tokenizer is None:
        from fetch_smollm2 import fetch

        recipe.tokenizer = str(fetch())
    return AutoTokenizer.from_pretrained(recipe.tokenizer)


def main() -> None:
    recipe, text, training = parse_training(Recipe)
    if training.learning_rate is None:
        training.learning_rate = PRESETS[recipe.preset].learning_rate
    if text.smoke:
        smoke(text, training)
        recipe.preset = "smoke"
    preset, folder = PRESETS[recipe.preset], Path(training.output_dir)
    # What one process has fetched and tokenised, the others find.
    with training.main_process_first():
        tokenizer = byte_tokenizer() if text.smoke else fetch_tokenizer(recipe)
        data = load_rows(text, tokenizer, training.seed)
    runs = {}
    for name in recipe.models:
        torch.manual_seed(training.seed)
        model = build(name, preset, tokenizer, text.length)
        size = {"parameters": model.num_parameters(), "length": text.length, "unique_tokens": data.num_tokens}
        result = train(model, copy.copy(training), text, data, folder / name, flops=flops_a_token(model))
        if training.process_index == 0:
            result |= zero_shot(model, tokenizer, data, text.questions)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        runs[name] = {"preset": recipe.preset, "learning_rate": training.learning_rate, **size, **result}
        del model
    if training.process_index == 0:
        draw(folder / "curves.png", {name: read_curve(folder / name / "curve.jsonl") for name in runs})
        write_report("pretrain_lightning", training, {f"{n}, {recipe.preset}": r for n, r in runs.items()})
        print("\nheld-out loss: " + ", ".join(f"{name} {run['loss']:.4f}" for name, run in runs.items()))


if __name__ == "__main__":
    run_recipe(main)
