"""Starts a Block Transformer from a vanilla model and trains it; or trains vanilla/Block pairs from scratch.

    python recipes/uptrain_block_transformer.py --text DIR --output_dir runs/uptrained
    python recipes/uptrain_block_transformer.py --text DIR --output_dir runs/scratch --from_scratch
    python recipes/uptrain_block_transformer.py --text DIR --output_dir runs/vanilla --keep_vanilla
    python recipes/uptrain_block_transformer.py --text DIR --output_dir runs/pair --preset 30M
    python recipes/uptrain_block_transformer.py --text DIR --output_dir runs/peer --preset 30M --keep_vanilla
    python recipes/uptrain_block_transformer.py --smoke --output_dir runs/smoke       seconds on a CPU

Several GPUs take rows of their own, each with the whole model:

    accelerate launch --config_file recipes/accelerate/two_gpus_ddp.yaml \
        recipes/uptrain_block_transformer.py

The first three train the same tokens: the vanilla model (SmolLM2-135M by default) cut into block decoder and
token decoder, the same architecture with random weights, and the vanilla model itself. A preset has random
weights and two shapes of equal training compute: with blocks of 4 tokens a block decoder layer works on a
quarter of the tokens and a token decoder layer on 5/4 of them (2 prefix vectors, 3 tokens), so that 4 + 4 of
them cost what 6 vanilla layers cost. The first block of a row, which no Block Transformer predicts, is scored
for no model.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from _common import Data, flops_a_token, load_rows, train, write_report, zero_shot
from _options import Preset, parse_training, run_recipe, smoke
from _tiny import tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_longattn
from hf_longattn.modeling.block_transformer import BlockTransformerConfig
from hf_longattn.modeling.block_transformer.convert import config_from_vanilla, convert_from_vanilla

# Of the vanilla Llama; its Block Transformer has two thirds of the layers in each decoder.
PRESETS = {
    "30M": Preset(384, 6, 6, 1152, 2e-3),
    "85M": Preset(576, 12, 9, 1920, 1.2e-3),
    "smoke": Preset(48, 3, 3, 96, 1e-2),
}


@dataclass
class Recipe:
    """What is trained."""

    from_vanilla: str | None = field(
        default=None, metadata={"help": "folder or id to start from (default: SmolLM2-135M, fetched)"}
    )
    preset: str | None = field(
        default=None, metadata={"help": "random weights of this shape: 30M or 85M", "choices": [*PRESETS]}
    )
    from_scratch: bool = field(default=False, metadata={"help": "random weights"})
    keep_vanilla: bool = field(default=False, metadata={"help": "train the vanilla model instead"})
    block_length: int = field(default=4, metadata={"help": "tokens of a block"})
    generate_batch: int = field(default=64, metadata={"help": "rows of the timed generate()"})
    generate_tokens: list[int] = field(
        default_factory=lambda: [128, 512], metadata={"help": "tokens of its prompt and of its answer"}
    )

    @property
    def run(self) -> str:
        """The name of the run in the report."""
        kind = "vanilla" if self.keep_vanilla else "block"
        if self.preset:
            return f"{kind}, {self.preset} from scratch"
        if self.from_scratch:
            return f"{kind}, from scratch"
        return "vanilla, trained on" if self.keep_vanilla else "block, from vanilla"


def preset_config(preset: Preset, vocab_size: int, length: int, recipe: Recipe) -> PreTrainedConfig:
    """The vanilla or the Block configuration of a shape."""
    shape = preset.fields(vocab_size, length) | {"intermediate_size": preset.intermediate_size}
    ids = {"bos_token_id": None, "eos_token_id": None}
    if recipe.keep_vanilla:
        return LlamaConfig(**shape, **ids, num_hidden_layers=preset.num_hidden_layers, pad_token_id=0)
    layers = 2 * preset.num_hidden_layers // 3
    return BlockTransformerConfig(
        **shape, **ids, decoder_type="llama", num_hidden_layers=layers, block_length=recipe.block_length
    )


def convert(recipe: Recipe, folder: Path) -> None:
    """Cuts the vanilla model into a Block Transformer, where that is what is trained."""
    if not (recipe.preset or recipe.from_scratch or recipe.keep_vanilla):
        convert_from_vanilla(recipe.from_vanilla, folder, block_length=recipe.block_length)


def build(recipe: Recipe, converted: Path, vocab_size: int, length: int) -> PreTrainedModel:
    """The model of a run before it is trained, its weights in fp32 for the optimizer."""
    if recipe.preset:
        config = preset_config(PRESETS[recipe.preset], vocab_size, length, recipe)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if recipe.from_scratch:
        config = AutoConfig.from_pretrained(recipe.from_vanilla)
        config = config if recipe.keep_vanilla else config_from_vanilla(config, recipe.block_length)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    source = recipe.from_vanilla if recipe.keep_vanilla else converted
    return AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)


def shares(config: PreTrainedConfig) -> dict[str, float]:
    """How often a weight is used a token, by the beginning of its name."""
    if config.model_type != "block_transformer":
        return {}
    length, prefix = config.block_length, config.num_prefix_tokens
    once = 1 / length
    return {
        "model.block_decoder": once,
        "model.embedder": once,
        "model.token_decoder.expansion": once,
        "model.token_decoder": (prefix + length - 1) / length,
    }


@torch.no_grad()
def score(model: PreTrainedModel, data: Data, device: torch.device) -> float:
    """The mean held-out loss of a model as it is."""
    model.to(device).eval()
    total = 0.0
    for index in range(len(data.held_out)):
        row = {name: tensor[None].to(device) for name, tensor in data.held_out[index].items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total += model(**row).loss.item()
    return total / len(data.held_out)


@torch.no_grad()
def generation_speed(recipe: Recipe, model: PreTrainedModel, data: Data) -> dict[str, float]:
    """Tokens a second of greedy `generate()` after `prepare_generation`, in bf16 on a GPU."""
    batch, (prompt, new) = recipe.generate_batch, recipe.generate_tokens
    if model.device.type == "cuda":
        model = model.to(torch.bfloat16)
    ids = torch.from_numpy(np.resize(data.held_out.tokens, (batch, prompt)).astype(np.int64)).to(model.device)
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    hf_longattn.prepare_generation(model.eval())
    model.generate(ids, max_new_tokens=new, **call)
    start = time.perf_counter()
    answer = model.generate(ids, max_new_tokens=new, **call).cpu()
    seconds = time.perf_counter() - start
    hf_longattn.restore(model)
    return {
        "generate_batch": batch,
        "generate_prompt": prompt,
        "generated_per_s": batch * (answer.shape[1] - prompt) / seconds,
    }


def main() -> None:
    recipe, text, training = parse_training(Recipe)
    folder = Path(training.output_dir)
    if training.learning_rate is None:
        training.learning_rate = PRESETS[recipe.preset].learning_rate if recipe.preset else 3e-4
    if text.smoke:
        smoke(text, training)
        recipe.generate_batch, recipe.generate_tokens = 2, [16, 16]
        recipe.from_vanilla = tiny_model(folder / "vanilla", training)
    # What one process has fetched, tokenised and converted, the others find.
    with training.main_process_first():
        if recipe.from_vanilla is None:
            from fetch_smollm2 import fetch

            recipe.from_vanilla = str(fetch())
        tokenizer = AutoTokenizer.from_pretrained(recipe.from_vanilla)
        data = load_rows(text, tokenizer, training.seed, unscored=recipe.block_length)
        if training.process_index == 0:
            convert(recipe, folder / "start")
    torch.manual_seed(training.seed)
    model = build(recipe, folder / "start", len(tokenizer), text.length)
    result = {"parameters": model.num_parameters(), "length": text.length, "unique_tokens": data.num_tokens}
    result["learning_rate"] = training.learning_rate
    if not recipe.preset:
        vanilla = AutoModelForCausalLM.from_pretrained(recipe.from_vanilla, dtype=torch.float32)
        result["untrained_vanilla_loss"] = score(vanilla, data, training.device)
        del vanilla
    flops = flops_a_token(model, shares(model.config))
    result |= {"flop_per_token": flops}
    result |= train(model, training, text, data, folder / "model", flops=flops)
    if training.process_index:
        # The questions and the report are for one process.
        return
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result |= zero_shot(model, tokenizer, data, text.questions)
    result |= generation_speed(recipe, model, data)
    write_report("uptrain_block_transformer", training, {recipe.run: result})


if __name__ == "__main__":
    run_recipe(main)
