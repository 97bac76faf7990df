"""What the training recipes share: text to packed rows, the loss curve, the report.

    text files -> documents -> tokens (cached by `datasets`) -> rows of equal length -> Trainer

A document is held out or trained on by the hash of its text, so that a second copy of it is on the same side.
Documents follow each other with the end token between them; only the last row is padded, so no token is lost.
The rows have one order for a seed: runs with the same text, length and seed see the same tokens in the same
order.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import lzma
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from _options import ROOT, Text, Training, say
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.trainer_utils import get_last_checkpoint

import hf_longattn
from hf_longattn.attention.lightning import lightning_attention_forward
from hf_longattn.cli.cloze import answer_cloze
from hf_longattn.cli.evaluate import find_numbers
from hf_longattn.modeling.lightning import modeling_lightning

sys.path.append(str(ROOT / "benchmarks"))
from _report import Report  # noqa: E402  the format of the result files has one home

# A longer document goes to the tokenizer in parts, cut behind a line.
PART = 1 << 20


# ---- text


def find_files(text: Text) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of every file to read: a changed file is tokenised again."""
    found = set()
    for name in text.text:
        path = Path(name)
        if not path.exists():
            raise SystemExit(f"--text: there is no {path}")
        files = [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())
        found |= {p for p in files if p == path or p.name.removesuffix(".xz").endswith(tuple(text.suffixes))}
    if not found:
        raise SystemExit("--text names no file to read")
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(found)]


def documents_of(path: str) -> Iterator[str]:
    """The documents of one file: its lines' `text` fields if it is .jsonl, or the whole of it."""
    opened = lzma.open if path.endswith(".xz") else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        if path.removesuffix(".xz").endswith(".jsonl"):
            yield from (json.loads(line)["text"] for line in file if line.strip())
        else:
            yield file.read()


def parts_of(document: str) -> Iterator[str]:
    """The document in parts of about `PART` characters."""
    start = 0
    while start < len(document):
        newline = document.find("\n", start + PART)
        stop = len(document) if newline < 0 else newline + 1
        yield document[start:stop]
        start = stop


def read_parts(files: list[tuple[str, int, int]], held_out: int) -> Iterator[dict[str, Any]]:
    """Parts of documents, with the side that their document is on and whether they end it."""
    for path, _, _ in files:
        for document in documents_of(path):
            digest = hashlib.sha256(document.encode("utf-8", "replace")).digest()
            side = int.from_bytes(digest[:8], "big") % held_out == 0
            parts = list(parts_of(document))
            for index, part in enumerate(parts):
                yield {"text": part, "held_out": side, "ends": index == len(parts) - 1}


def tokenise(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Ids of the parts, with the end token behind each document."""
    ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids
    end = [tokenizer.eos_token_id]
    return {"input_ids": [part + end * ends for part, ends in zip(ids, batch["ends"], strict=True)]}


def tokens_of(text: Text, tokenizer: PreTrainedTokenizerFast) -> dict[bool, np.ndarray]:
    """All tokens to train on (False) and all that are held out (True), int32."""
    files = find_files(text)
    readers = min(text.readers, len(files))
    parts = datasets.Dataset.from_generator(
        read_parts,
        gen_kwargs={"files": files, "held_out": text.held_out},
        num_proc=readers if readers > 1 else None,
    )
    # A tokenizer changes its own hash when it is used, so the cache is named by what it says of itself.
    print_of_both = f"{parts._fingerprint} {tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
    table = parts.map(
        tokenise,
        batched=True,
        batch_size=64,
        remove_columns=["text", "ends"],
        fn_kwargs={"tokenizer": tokenizer},
        features=datasets.Features(
            {"held_out": datasets.Value("bool"), "input_ids": datasets.List(datasets.Value("int32"))}
        ),
        num_proc=readers if readers > 1 else None,
        new_fingerprint=hashlib.sha256(print_of_both.encode()).hexdigest()[:32],
    ).data.table
    found = {}
    for side in (False, True):
        chunks = table.filter(pc.field("held_out") == side)["input_ids"].chunks
        found[side] = np.concatenate([c.flatten().to_numpy() for c in chunks] or [np.empty(0, np.int32)])
    return found


class Rows(Dataset):
    """A run of tokens cut in rows of equal length; the last one is filled up with tokens that do not count.

    Args:
        tokens: (n,) ids.
        length: tokens of a row.
        order: which row comes when; as they stand where left out.
        unscored: the first tokens of a row that no model predicts.
    """

    def __init__(
        self, tokens: np.ndarray | Tensor, length: int, order: np.ndarray | None = None, unscored: int = 0
    ) -> None:
        self.tokens, self.length, self.unscored = np.asarray(tokens), length, unscored
        self.order = np.arange(-(-len(self.tokens) // length)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.order[index]) * self.length
        row = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        ids, labels = row.new_zeros(self.length), row.new_full((self.length,), -100)
        ids[: len(row)] = row
        labels[self.unscored : len(row)] = row[self.unscored :]
        return {"input_ids": ids, "labels": labels}


@dataclass
class Data:
    """Rows to train on and rows to score, and how much text there was."""

    train: Rows
    held_out: Rows
    num_tokens: int

    def after(self, rows: int) -> "Data":
        """The same text from a later row on; what was passed comes last."""
        rows_left = Rows(self.train.tokens, self.train.length, np.roll(self.train.order, -rows))
        rows_left.unscored = self.train.unscored
        return Data(rows_left, self.held_out, self.num_tokens)


def load_rows(text: Text, tokenizer: PreTrainedTokenizerFast, seed: int, unscored: int = 0) -> Data:
    """Reads, tokenises, packs and shuffles.

    Args:
        text: what to read.
        tokenizer: with an end token.
        seed: of the order of the rows.
        unscored: as in `Rows`.
    """
    tokens = tokens_of(text, tokenizer)
    train, held_out = tokens[False], tokens[True]
    num_rows, num_held_out = -(-len(train) // text.length), min(len(held_out) // text.length, text.eval_rows)
    if not num_rows or not num_held_out:
        raise SystemExit(
            f"too little text: {len(train)} tokens to train on and {len(held_out)} held out, and a row has "
            f"{text.length}; name more files, or hold out more documents with a smaller --held_out"
        )
    say(f"{len(train):,} tokens to train on, {len(held_out):,} held out")
    order = np.random.default_rng(seed).permutation(num_rows)
    return Data(
        Rows(train, text.length, order, unscored),
        Rows(held_out, text.length, np.arange(num_held_out), unscored),
        len(train),
    )


# ---- training


def read_curve(path: Path) -> list[dict]:
    """The lines that a run has logged; none before it began."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Curve(TrainerCallback):
    """Writes every line of the log as JSON; a resumed run goes on where its checkpoint was.

    Every process keeps the lines, and one writes them.

    Args:
        path: the file to write.
        step_tokens: tokens of a step.
        first_tokens: tokens that an earlier stage took.
    """

    def __init__(self, path: Path, step_tokens: int, first_tokens: int = 0) -> None:
        self.path, self.step_tokens, self.first_tokens = path, step_tokens, first_tokens
        self.start = time.perf_counter()
        self.rows: list[dict] = []

    def points(self) -> dict[int, float]:
        """Held-out losses by tokens."""
        return {row["tokens"]: row["eval_loss"] for row in self.rows if "eval_loss" in row}

    def _tokens_at(self, step: int) -> int:
        return self.first_tokens + step * self.step_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets what was logged behind the checkpoint; refuses one whose steps had other sizes."""
        found = [row for row in read_curve(self.path) if row["step"] <= state.global_step]
        # The file may change under whoever reads it later.
        self.rows = broadcast_object_list([found if state.global_step else []])[0]
        for row in self.rows:
            if row["tokens"] != (tokens := self._tokens_at(row["step"])):
                # Its checkpoint counts steps: what is left would be counted, and skipped, in others.
                raise SystemExit(
                    f"--resume: step {row['step']} was at {row['tokens']:,} tokens and would now be at "
                    f"{tokens:,}; start as many processes as before, with the same batches and --length"
                )
        self.start = time.perf_counter() - (self.rows[-1]["seconds"] if self.rows else 0.0)
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Adds a line."""
        if not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        row = {"step": state.global_step, "tokens": self._tokens_at(state.global_step)}
        names = ("loss", "eval_loss", "learning_rate", "grad_norm")
        row |= {name: float(logs[name]) for name in names if name in logs}
        row["seconds"] = round(time.perf_counter() - self.start, 3)
        self.rows.append(row)
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def narrow_residual(model: nn.Module) -> None:
    """Has embeddings follow autocast: in fp32 they would keep the sums of all layers in fp32 too."""

    def follow(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kind = output.device.type
        return output.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else output

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(follow)


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Gives the model its forward back behind the context: Trainer leaves it in autocast."""
    before = {name: vars(model).get(name) for name in ("forward", "_original_forward")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                vars(model).pop(name, None)
            else:
                setattr(model, name, value)


@contextlib.contextmanager
def compiled_layers(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Compiles the layers and the loss for the time of the context: elementwise work runs in few kernels.

    Layers of a kind share one program. Lightning attention stays outside of them, since it would be a
    constant of theirs which slopes a layer has.

    Args:
        model: a language model; others stay as they are.
        backend: as `torch.compile` takes it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not isinstance(model, PreTrainedModel) or not layers:
        yield
        return
    own, loss = lightning_attention_forward, model.loss_function
    apart = torch.compiler.disable(own)
    try:
        modeling_lightning.lightning_attention_forward = apart
        ALL_ATTENTION_FUNCTIONS["lightning_attention"] = apart
        model.loss_function = torch.compile(loss, backend=backend, dynamic=False)
        for layer in layers:
            layer.compile(backend=backend, dynamic=False)
        yield
    finally:
        modeling_lightning.lightning_attention_forward = own
        ALL_ATTENTION_FUNCTIONS["lightning_attention"] = own
        model.loss_function = loss
        for layer in layers:
            layer._compiled_call_impl = None
        # Programs of one stage count against the few that torch makes of the same code in the next.
        torch.compiler.reset()


def flops_a_token(model: PreTrainedModel, shares: dict[str, float] | None = None) -> float:
    """Operations of the products with weights, forward and backward, a token; attention scores left out.

    Args:
        model: a language model; tables are looked up, not multiplied, but the head counts.
        shares: how often a weight is used a token, by the beginning of its name; once where none fits.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    total = 1.0 * model.get_output_embeddings().weight.numel()
    for name, weight in model.named_parameters():
        if id(weight) not in tables and weight is not model.get_output_embeddings().weight:
            total += weight.numel() * next((s for p, s in (shares or {}).items() if name.startswith(p)), 1.0)
    return 6 * total


def train(
    model: nn.Module,
    training: Training,
    text: Text,
    data: Data,
    folder: Path,
    *,
    first_tokens: int = 0,
    trainer: type[Trainer] = Trainer,
    flops: float = 0.0,
    network: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Trains on `text.tokens` less `first_tokens` and scores the held-out rows before, meanwhile and after.

    Args:
        model: what Trainer trains.
        training: its arguments; `folder` takes the place of the output folder.
        text: the budget, and whether to resume.
        data: the rows.
        folder: for checkpoints, `curve.jsonl` and `curve.png`.
        first_tokens: tokens that an earlier stage took.
        trainer: the class, called as Trainer is.
        flops: operations a token, for the time that is announced.
        network: the language model whose layers run, where it is not `model` itself.

    Returns:
        processes, held-out losses before and after, tokens, seconds with evaluations and checkpoints, and the
        held-out losses by tokens.
    """
    arguments = copy.copy(training)
    arguments.output_dir = str(folder)
    step_tokens = text.length * arguments.train_batch_size * arguments.gradient_accumulation_steps
    step_tokens *= arguments.world_size
    arguments.max_steps = max((text.tokens - first_tokens) // step_tokens, 1)
    if flops:
        work = flops * step_tokens * arguments.max_steps
        minutes = work / 60 / 3e14 / arguments.world_size
        say(f"{work:.3g} FLOP: {minutes:.1f} minutes at 300 TFLOP/s a process")
    network = model if network is None else network
    narrow_residual(network)
    folder.mkdir(parents=True, exist_ok=True)
    curve = Curve(folder / "curve.jsonl", step_tokens, first_tokens)
    worker = trainer(
        model, arguments, train_dataset=data.train, eval_dataset=data.held_out, callbacks=[curve]
    )
    checkpoint = get_last_checkpoint(str(folder)) if text.resume else None
    tokens = first_tokens + arguments.max_steps * step_tokens
    compiled = compiled_layers(network) if training.compile_layers else contextlib.nullcontext()
    with compiled, own_forward(model):
        worker.train(resume_from_checkpoint=checkpoint)
        if tokens not in curve.points():
            worker.evaluate()
    if worker.is_world_process_zero():
        draw(folder / "curve.png", {folder.name: curve.rows})
    points, seconds = curve.points(), curve.rows[-1]["seconds"]
    return {
        "processes": arguments.world_size,
        "loss_before": points[first_tokens],
        "loss": points[tokens],
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": (tokens - first_tokens) / seconds,
        "tflop_per_s": flops * (tokens - first_tokens) / seconds / 1e12,
        "points": points,
    }


def passkeys(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, lengths: list[int], trials: int
) -> dict[int, float]:
    """Share of numbers hidden in held-out text that the model repeats, by the length of the prompt.

    Args:
        model: on its device.
        tokenizer: of the model.
        data: the text, repeated where it is shorter than a prompt.
        lengths: of the prompts, in tokens.
        trials: prompts of each length; the number moves from the beginning to the end.
    """
    text = torch.from_numpy(np.resize(data.held_out.tokens, max(lengths, default=0)))
    hf_longattn.prepare_generation(model.eval(), cuda_graph=False)
    found = [find_numbers(model, tokenizer, text, length, trials, batch_size=trials) for length in lengths]
    hf_longattn.restore(model)
    return {row.length: row.found / row.asked for row in found}


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, questions: int
) -> dict[str, Any]:
    """Shares of right answers to questions on the held-out documents, those of `hf-longattn eval --cloze`.

    Args:
        model: on its device.
        tokenizer: of the model.
        data: the rows; runs with the same text are asked the same.
        questions: of each kind at most; 0 asks none.

    Returns:
        `last_word` and `next_sentence` with the numbers of questions; empty where the text holds none.
    """
    if not questions:
        return {}
    tokens, model = np.asarray(data.held_out.tokens), model.eval()
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    documents = [tokenizer.decode(part, skip_special_tokens=True) for part in np.split(tokens, ends)]
    kind = model.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        answers = answer_cloze(model, tokenizer, documents, questions)
    found: dict[str, Any] = {}
    for answer in answers:
        name = answer.task.replace(" ", "_")
        found |= {name: answer.accuracy, f"{name}_asked": answer.asked}
    return found


def draw(path: Path, curves: dict[str, list[dict]]) -> None:
    """Losses against tokens, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = FigureCanvasAgg(figure).figure.subplots()
    for name, rows in curves.items():
        for kind, style in (("loss", "-"), ("eval_loss", "o")):
            points = [(row["tokens"], row[kind]) for row in rows if kind in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=f"{name}, {kind}")
    axis.set(xlabel="tokens", ylabel="loss, nats a token")
    axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def write_report(
    name: str,
    training: TrainingArguments,
    runs: dict[str, dict[str, Any]],
    more: list[dict[str, Any]] | None = None,
) -> None:
    """The result file `NAME.json` in the output folder: every run, its curve, and what was probed.

    Args:
        name: of the recipe.
        training: whose `output_dir` it is written to.
        runs: what `train` returned and anything else that describes the run, by its name.
        more: rows of their own.
    """
    report = Report(name, folder=Path(training.output_dir))
    for run, result in runs.items():
        report.add(section="result", run=run, **{k: v for k, v in result.items() if k != "points"})
    for row in more or []:
        report.add(**row)
    for run, result in runs.items():
        for tokens, loss in result["points"].items():
            report.add(section="curve", run=run, tokens=tokens, loss=loss)
