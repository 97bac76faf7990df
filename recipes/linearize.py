"""Turns a pretrained softmax decoder into a lightning-attention one, or a hybrid, on your text.

    python recipes/linearize.py --text DIR --output_dir runs/hybrid --softmax_every 4
    python recipes/linearize.py --text DIR --output_dir runs/lightning
    python recipes/linearize.py --text DIR --output_dir runs/scratch --from_scratch    baseline
    python recipes/linearize.py --text DIR --output_dir runs/softmax --keep_softmax    baseline
    python recipes/linearize.py --smoke --output_dir runs/smoke                        seconds on a CPU

Several GPUs take rows of their own, each with the whole model:

    accelerate launch --config_file recipes/accelerate/two_gpus_ddp.yaml recipes/linearize.py --text DIR ...

Stage 1, attention transfer: the model stays softmax; beside each layer that is to become lightning a copy of
its attention reads the same hidden states and learns to give the same output,

    loss = mean over layers and rows of |lightning(x) - softmax(x)|^2 / |softmax(x)|^2

Stage 2: the copies take their places, and the whole model trains on the next token. Both stages share the
budget, so that every run sees the same tokens. Passkeys are asked of the source and of the result.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import (
    Data,
    flops_a_token,
    load_rows,
    passkeys,
    train,
    write_report,
)
from _options import Text, Training, parse_training, run_recipe, smoke
from _tiny import tiny_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

import hf_longattn  # noqa: F401  registers the implementation
from hf_longattn.cli.evaluate import needle_prompt

LIGHTNING = "lightning_attention"


@dataclass
class Recipe:
    """What becomes of the model."""

    model: str | None = field(default=None, metadata={"help": "folder or id (SmolLM2-135M, fetched)"})
    softmax_every: int = field(default=0, metadata={"help": "every n-th layer stays softmax; 0: none"})
    transfer: float = field(default=0.1, metadata={"help": "share of the tokens for stage 1"})
    transfer_learning_rate: float = field(default=1e-3, metadata={"help": "of stage 1"})
    distill: float = field(default=0.0, metadata={"help": "weight of the teacher's logits in stage 2"})
    from_scratch: bool = field(default=False, metadata={"help": "random weights, stage 2 alone"})
    keep_softmax: bool = field(default=False, metadata={"help": "the model as it is, stage 2 alone"})
    passkey_lengths: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096], metadata={"help": "tokens of the prompts"}
    )
    passkey_trials: int = field(default=20, metadata={"help": "prompts of each length"})

    @property
    def run(self) -> str:
        """The name of the run in the report."""
        kind = f"hybrid, softmax every {self.softmax_every}" if self.softmax_every else "lightning"
        kind = "softmax" if self.keep_softmax else kind
        return f"{kind}, from scratch" if self.from_scratch else kind


def target_config(recipe: Recipe, source: str) -> PreTrainedConfig:
    """The configuration of what is trained: it says which layers are lightning, and keeps saying so."""
    config = AutoConfig.from_pretrained(source)
    if not recipe.keep_softmax:
        number, every = config.num_hidden_layers, recipe.softmax_every
        config.lightning_layers = [i for i in range(number) if not every or (i + 1) % every]
    return config


def load(recipe: Recipe, source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a run before it is trained, its weights in fp32 for the optimizer."""
    implementation = "sdpa" if recipe.keep_softmax else LIGHTNING
    if recipe.from_scratch:
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation, dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(
        source, config=config, attn_implementation=implementation, dtype=torch.float32
    )


def attentions(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention module of each layer."""
    return {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")}


class Pair(nn.Module):
    """A softmax attention module and the copy that reads the same states; gives what the former gives.

    Args:
        module: the softmax attention.
        student: the copy.
    """

    def __init__(self, module: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.module, self.student = module, student
        self.loss: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> tuple:
        """Notes the loss of the copy, for rows without padding."""
        output = self.module(*args, **kwargs)
        target, found = (
            output[0].float(),
            self.student(*args, **{**kwargs, "attention_mask": None})[0].float(),
        )
        # A row at a time, so that it does not matter which rows stand in one batch.
        self.loss = ((found - target).square().mean((1, 2)) / target.square().mean((1, 2))).mean()
        return output


class AttentionTransfer(nn.Module):
    """Lightning copies of attention modules inside a frozen softmax model, each with its own loss.

    The hidden states are the softmax model's own, so no layer has to bear with what others have yet to learn,
    and no gradient passes from layer to layer. The state dict holds the copies alone.

    Args:
        teacher: the softmax model, whose attention modules become `Pair`s.
        config: of the lightning model.
    """

    def __init__(self, teacher: PreTrainedModel, config: PreTrainedConfig) -> None:
        super().__init__()
        own = copy.deepcopy(config)
        own._attn_implementation = LIGHTNING
        found = {i: m for i, m in attentions(teacher).items() if i in config.lightning_layers}
        self.students = nn.ModuleDict({str(i): copy.deepcopy(module) for i, module in found.items()})
        for student in self.students.values():
            student.config = own
        # In lists, so that neither optimizer nor checkpoint sees what is frozen.
        self.teacher = [teacher.requires_grad_(False).eval()]
        self.pairs = [Pair(module, self.students[str(i)]) for i, module in found.items()]
        pairs = {pair.module: pair for pair in self.pairs}
        for parent in list(teacher.modules()):
            for name, part in list(parent.named_children()):
                if part in pairs and parent is not pairs[part]:
                    setattr(parent, name, pairs[part])

    @torch.no_grad()
    def match_norms(self, input_ids: Tensor) -> None:
        """Scales the output projections: lightning heads leave a norm, softmax heads are means of values."""
        norms: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple, output: tuple) -> None:
            norms[module] = output[0].norm()

        parts = [part for pair in self.pairs for part in (pair.module, pair.student)]
        hooks = [part.register_forward_hook(note) for part in parts]
        self(input_ids)
        for hook in hooks:
            hook.remove()
        for pair in self.pairs:
            pair.student.o_proj.weight *= norms[pair.module] / norms[pair.student]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The mean loss over layers, for (B, T) ids without padding."""
        self.teacher[0].base_model(input_ids, use_cache=False)
        losses = [pair.loss for pair in self.pairs]
        for pair in self.pairs:
            # Else the graph would live until the next step.
            pair.loss = None
        return {"loss": torch.stack(losses).mean()}


def transfer(
    recipe: Recipe, training: Training, text: Text, data: Data, source: str, model: PreTrainedModel
) -> dict:
    """Stage 1; puts what was learned into `model`."""
    folder = Path(training.output_dir) / "transfer"
    teacher = AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)
    module = AttentionTransfer(teacher.to(training.device), model.config).to(training.device)
    module.match_norms(data.train[0]["input_ids"][None].to(training.device))
    stage, budget = copy.copy(training), copy.copy(text)
    stage.learning_rate = recipe.transfer_learning_rate
    budget.tokens = int(recipe.transfer * text.tokens)
    # Scoring the held-out rows costs as much as training on them, and this stage is short.
    stage.eval_steps = max(training.eval_steps or 0, 0.25)
    result = train(module, stage, budget, data, folder, network=teacher)
    for index, attention in attentions(model).items():
        if str(index) in module.students:
            attention.load_state_dict(module.students[str(index)].state_dict())
    names = {"loss_before": "transfer_before", "loss": "transfer_after", "tokens": "transfer_tokens"}
    return {new: result[old] for old, new in {**names, "seconds": "transfer_seconds"}.items()}


def distilling(teacher: PreTrainedModel, weight: float) -> type[Trainer]:
    """A Trainer whose loss has weight * KL(teacher || model) in it."""

    class Distiller(Trainer):
        def compute_loss(
            self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training:
                with torch.no_grad(), self.accelerator.autocast():
                    target = teacher(inputs["input_ids"], use_cache=False).logits
                count = inputs["labels"].numel()
                if num_items_in_batch is not None:
                    # Of all processes, whose gradients are averaged.
                    count = num_items_in_batch / self.args.world_size
                # A row at a time: fp32 logits of the whole batch are the largest tensors of the step.
                for ours, theirs in zip(outputs["logits"], target, strict=True):
                    parts = (logits.float().log_softmax(-1) for logits in (ours, theirs))
                    loss = loss + weight / count * F.kl_div(*parts, reduction="sum", log_target=True)
            return (loss, outputs) if return_outputs else loss

    return Distiller


@torch.no_grad()
def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, data: Data) -> None:
    """Writes the model and proves that it reads back as it was."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=model.config._attn_implementation, dtype=torch.float32
    ).to(model.device)
    ids = data.held_out[0]["input_ids"][None].to(model.device)
    if not torch.equal(model.eval()(ids).logits, again.eval()(ids).logits):
        raise SystemExit(f"{folder} does not give the logits of the model that was saved there")


def main() -> None:
    recipe, text, training = parse_training(Recipe)
    folder = Path(training.output_dir)
    if training.learning_rate is None:
        training.learning_rate = 3e-4
    if text.smoke:
        smoke(text, training)
        recipe.model = tiny_model(folder / "source", training)
        recipe.transfer, recipe.transfer_learning_rate = 0.5, 1e-2
        recipe.passkey_lengths, recipe.passkey_trials = [400, 500], 2
    # What one process has fetched and tokenised, the others find.
    with training.main_process_first():
        if recipe.model is None:
            from fetch_smollm2 import fetch

            recipe.model = str(fetch())
        tokenizer = AutoTokenizer.from_pretrained(recipe.model)
        data = load_rows(text, tokenizer, training.seed)
    for length in recipe.passkey_lengths:
        # What is too short for the question is to be known before the training.
        needle_prompt(tokenizer, torch.zeros(length, dtype=torch.long), length, 0.0, 1_000_000)
    torch.manual_seed(training.seed)
    model = load(recipe, recipe.model, target_config(recipe, recipe.model))
    size, flops = model.num_parameters(), flops_a_token(model)
    result = {"source": recipe.model, "parameters": size, "unique_tokens": data.num_tokens}
    result["length"] = text.length
    if not (recipe.from_scratch or recipe.keep_softmax):
        result |= transfer(recipe, training, text, data, recipe.model, model)
    first = result.get("transfer_tokens", 0)
    kind = Trainer
    if recipe.distill:
        teacher = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
        kind = distilling(teacher.requires_grad_(False).eval().to(training.device), recipe.distill)
    rest, place = data.after(first // text.length), folder / "model"
    result |= train(model, training, text, rest, place, first_tokens=first, trainer=kind, flops=flops)
    if training.process_index:
        # The questions and the report are for one process.
        return
    save(model, tokenizer, folder, data)
    after = passkeys(model, tokenizer, data, recipe.passkey_lengths, recipe.passkey_trials)
    source = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32).to(training.device)
    before = passkeys(source, tokenizer, data, recipe.passkey_lengths, recipe.passkey_trials)
    probes = [
        {"section": "passkey", "run": recipe.run, "length": n, "source": before[n], "accuracy": after[n]}
        for n in after
    ]
    write_report("linearize", training, {recipe.run: result}, probes)


if __name__ == "__main__":
    run_recipe(main)
