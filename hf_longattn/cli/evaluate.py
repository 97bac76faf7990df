"""`hf-longattn eval`: loss by position of a long text, a hidden number, cloze questions, lm_eval's tasks."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from hf_longattn import LongContextCache, prepare_generation
from hf_longattn.cli.cloze import Answers, answer_cloze
from hf_longattn.cli.measure import pick_device, pick_dtype, read_config

TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.\n"
)
NEEDLE = " One of the special magic numbers for long-context is: {}. "
QUESTION = (
    "\nWhat is the special magic number for long-context mentioned in the provided text? The special magic "
    "number for long-context mentioned in the provided text is"
)
IMPLEMENTATIONS = ("tree_attention", "blockwise_attention", "lightning_attention", "sdpa", "eager")
# Logits of so many tokens at a time.
_CHUNK = 1024


@dataclass
class PositionLoss:
    """Mean loss, in nats, of the tokens at positions start to stop - 1."""

    start: int
    stop: int
    loss: float


@dataclass
class Retrieval:
    """How often the hidden number was found in prompts of `length` tokens."""

    length: int
    found: int
    asked: int


@dataclass
class Evaluation:
    """What `hf-longattn eval` found."""

    model: str
    implementation: str
    dtype: str
    device: str
    windows: int = 0
    losses: list[PositionLoss] = field(default_factory=list)
    retrievals: list[Retrieval] = field(default_factory=list)
    cloze: list[Answers] = field(default_factory=list)
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Args:
        model: a folder that `save_pretrained` wrote, or an id on the hub.
        text: file with a long text; needed for `context` and `passkey`.
        context: tokens of a window of the text for the loss by position; 0 leaves it out.
        windows: so many windows of the text at most.
        passkey: lengths of prompts that hide a number.
        tasks: names of lm_eval tasks.
        implementation: one of `IMPLEMENTATIONS`.
        device: "auto" or a torch device.
        dtype: "auto", "float32", "bfloat16" or "float16".
        cloze: file with a text to ask last words and next sentences of.
        questions: of each of the two kinds at most.
    """

    model: str
    text: str | None = None
    context: int = 0
    windows: int = 4
    passkey: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    implementation: str = "tree_attention"
    device: str = "auto"
    dtype: str = "auto"
    cloze: str | None = None
    questions: int = 200


@torch.no_grad()
def token_losses(model: PreTrainedModel, input_ids: Tensor, chunk_size: int = _CHUNK) -> Tensor:
    """The loss of every token given all that come before it, a chunk of logits at a time.

    Args:
        model: a causal language model; a Block Transformer and a lightning model too.
        input_ids: (1, T) tokens, without padding.
        chunk_size: tokens a forward pass; the result does not depend on it.

    Returns:
        (T - 1,) fp32, nats.
    """
    cache: Any = model(input_ids=input_ids[:, :1], use_cache=True).past_key_values
    # A model with a cache of its own kind keeps it.
    cache = LongContextCache(model.config) if type(cache) is DynamicCache else None
    losses = []
    for start in range(0, input_ids.shape[1] - 1, chunk_size):
        stop = min(start + chunk_size, input_ids.shape[1] - 1)
        output = model(input_ids=input_ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        targets = input_ids[0, start + 1 : stop + 1].to(output.logits.device)
        losses.append(torch.nn.functional.cross_entropy(output.logits[0].float(), targets, reduction="none"))
    return torch.cat(losses)


def loss_by_position(losses: Tensor) -> list[PositionLoss]:
    """Means between powers of two.

    Args:
        losses: (N, T) losses of N windows.

    Returns:
        one mean for each of the positions 0 to 15, 16 to 31, 32 to 63 ..., T - 1.
    """
    length = losses.shape[1]
    edges = [0, *(1 << power for power in range(4, length.bit_length()) if 1 << power < length), length]
    return [
        PositionLoss(start, stop, losses[:, start:stop].double().mean().item())
        for start, stop in zip(edges, edges[1:], strict=False)
    ]


def needle_prompt(tokenizer: Any, text: Tensor, length: int, depth: float, number: int) -> Tensor:
    """A prompt that hides a number in a text and asks for it.

    Args:
        tokenizer: the tokenizer of the model.
        text: (N,) tokens to hide it in.
        length: tokens of the whole prompt.
        depth: where the number stands, 0 at the beginning and 1 at the end of the text.
        number: what is hidden.

    Returns:
        (1, length) tokens.

    Raises:
        ValueError: the text is too short, or the length too small for the question alone.
    """
    special = {"add_special_tokens": False}
    task = tokenizer(TASK).input_ids
    needle, question = (tokenizer(part, **special).input_ids for part in (NEEDLE.format(number), QUESTION))
    room = length - len(task) - len(needle) - len(question)
    if not 0 < room <= len(text):
        least = length - room + 1
        raise ValueError(
            f"`--passkey` must be {least} to {least - 1 + len(text)} with this text of {len(text)} tokens, "
            f"got {length}; give a longer `--text`."
        )
    at = int(depth * room)
    return torch.tensor([[*task, *text[:at].tolist(), *needle, *text[at:room].tolist(), *question]])


def find_numbers(
    model: Any, tokenizer: Any, text: Tensor, length: int, depths: int = 5, batch_size: int = 1
) -> Retrieval:
    """Hides a number at evenly spaced depths and asks for it, greedily.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        text: (N,) tokens to hide numbers in.
        length: tokens of a prompt.
        depths: so many prompts.
        batch_size: prompts at a time.
    """
    numbers = [1_000_003 * (index + 7) % 9_000_000 + 1_000_000 for index in range(depths)]
    prompts = [
        needle_prompt(tokenizer, text, length, (index + 0.5) / depths, number)
        for index, number in enumerate(numbers)
    ]
    answers: list[str] = []
    for ids in torch.cat(prompts).to(model.device).split(batch_size):
        rows = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        answers += [tokenizer.decode(row[length:]) for row in rows]
    found = sum(str(number) in answer for number, answer in zip(numbers, answers, strict=True))
    return Retrieval(length, found, depths)


def run_tasks(model: PreTrainedModel, tokenizer: Any, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Runs tasks of lm_eval on a loaded model.

    Returns:
        task -> metric -> value.

    Raises:
        ValueError: lm_eval is not installed.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "`--tasks` needs lm_eval, which is not installed; `pip install 'lm_eval>=0.4.9'` brings it."
        ) from None
    results = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return {
        name: {metric: value for metric, value in values.items() if isinstance(value, float)}
        for name, values in results["results"].items()
    }


def read_lengths(text: str) -> tuple[int, ...]:
    """The numbers of "1024,4096".

    Raises:
        ValueError: a part is not a number of tokens.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"`--passkey` must be numbers of tokens with commas, as 1024,4096, got {text!r}.")
    return tuple(map(int, parts))


def _read_tokens(request: Request, tokenizer: Any) -> Tensor:
    if not (request.context or request.passkey):
        return torch.empty(0, dtype=torch.long)
    if request.text is None or not Path(request.text).is_file():
        got = "nothing" if request.text is None else repr(request.text)
        raise ValueError(f"`--text` must be a text file for `--context` and `--passkey`, got {got}.")
    words = Path(request.text).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(words, add_special_tokens=False).input_ids, dtype=torch.long)


def _answer_cloze(request: Request, model: Any, tokenizer: Any) -> list[Answers]:
    if request.cloze is None:
        return []
    text = Path(request.cloze).read_text(encoding="utf-8")
    answers = answer_cloze(model, tokenizer, [text], request.questions)
    if not answers:
        raise ValueError(
            f"`--cloze` must be a text of sentences that follow each other, got {request.cloze!r} without "
            "four passages of 50 words; give a book."
        )
    return answers


def _windows(tokens: Tensor, request: Request) -> Iterator[Tensor]:
    count = min(len(tokens) // request.context, request.windows)
    if count == 0:
        raise ValueError(
            f"`--context` must be at most the {len(tokens)} tokens of `--text`, got {request.context}."
        )
    rows = tokens[: count * request.context].view(count, 1, request.context)
    yield from track(rows, "loss by position", console=Console(stderr=True), transient=True)


def evaluate(request: Request) -> Evaluation:
    """Loads a model, prepares it for long prompts and measures what was asked for.

    Raises:
        ValueError: names the argument that cannot be honoured, what was got and what is needed.
    """
    if not (request.context or request.passkey or request.tasks or request.cloze):
        raise ValueError("nothing to do: give `--context`, `--passkey`, `--cloze` or `--tasks`.")
    if request.cloze is not None and not Path(request.cloze).is_file():
        raise ValueError(f"`--cloze` must be a text file, got {request.cloze!r}.")
    if request.implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"`--implementation` must be one of {known}, got {request.implementation!r}.")
    read_config(request.model)
    device, dtype = pick_device(request.device), pick_dtype(request.dtype)
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    tokens = _read_tokens(request, tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(
        request.model, attn_implementation=request.implementation, dtype=dtype
    )
    model = model.to(device).eval()
    result = Evaluation(request.model, request.implementation, str(model.dtype), str(device))
    if request.context:
        losses = torch.stack(
            [token_losses(model, window.to(device)).cpu() for window in _windows(tokens, request)]
        )
        result.windows, result.losses = len(losses), loss_by_position(losses)
    result.cloze = _answer_cloze(request, model, tokenizer)
    if request.implementation not in ("sdpa", "eager"):
        prepare_generation(model)
    result.retrievals = [find_numbers(model, tokenizer, tokens, length) for length in request.passkey]
    if request.tasks:
        result.tasks = run_tasks(model, tokenizer, request.tasks)
    return result


def show(result: Evaluation, *, as_json: bool) -> None:
    """Prints an evaluation on standard output.

    Args:
        result: from `evaluate`.
        as_json: print one JSON object instead of tables.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    if as_json:
        console.print_json(json.dumps(asdict(result)))
        return
    console.print(f"{escape(result.model)}: {result.implementation}, {result.dtype} on {result.device}")
    if result.losses:
        table = Table("positions", "loss (nats)", title=f"loss by position, {result.windows} windows")
        for row in result.losses:
            table.add_row(f"{row.start:,} to {row.stop - 1:,}", f"{row.loss:.4f}")
        console.print(table)
    if result.retrievals:
        table = Table("prompt", "found", title="a number hidden in the text")
        for row in result.retrievals:
            table.add_row(f"{row.length:,} tokens", f"{row.found} of {row.asked}")
        console.print(table)
    if result.cloze:
        table = Table("task", "right", "share", "by chance", title="zero-shot questions on the text")
        for row in result.cloze:
            share, chance = f"{100 * row.accuracy:.1f} %", f"{100 * row.chance:.0f} %"
            table.add_row(row.task, f"{row.right} of {row.asked}", share, chance)
        console.print(table)
    for name, metrics in result.tasks.items():
        for metric, value in metrics.items():
            console.print(f"{escape(name)}  {escape(metric)}  {value:.4f}")
