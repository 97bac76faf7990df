"""`hf-longattn generate`: a long prompt from a file or from stdin, the answer streamed to the terminal."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from hf_longattn import prepare_generation
from hf_longattn.cache.quantized import read_cache_dtype
from hf_longattn.cli.measure import read_config
from hf_longattn.generation.offloading import read_offload


@dataclass(frozen=True)
class Request:
    """What `hf-longattn generate` is asked, by the names of its options.

    Args:
        model: folder or hub id.
        prompt: the text.
        new_tokens: length of the answer at most.
        question: put behind the text.
        chat: give text and question as a user's turn in the tokenizer's chat template; None where there are
            a question and a template.
        sample: draw tokens in place of taking the likeliest.
        progress: show a bar on stderr while the prompt is read.
        cache_dtype: "int8" or "fp8" keeps keys and values in 8 bits.
        offload_layers: layers that keep keys and values in host memory, or "auto".
    """

    model: str
    prompt: str
    new_tokens: int
    question: str | None = None
    chat: bool | None = None
    sample: bool = False
    progress: bool = True
    cache_dtype: str | None = None
    offload_layers: Any = 0


@dataclass
class Statistics:
    """What one answer cost: tokens, seconds and bytes."""

    prompt_tokens: int
    new_tokens: int
    first_token: float
    per_token: float
    peak: int | None

    def lines(self) -> list[str]:
        """The statistics in words, a line each."""
        rate = self.prompt_tokens / self.first_token
        lines = [
            f"prompt          {self.prompt_tokens:,} tokens",
            f"first token     {self.first_token:.2f} s ({rate:,.0f} tokens/s)",
            f"answer          {self.new_tokens} tokens, {1e3 * self.per_token:.1f} ms a token",
        ]
        return lines if self.peak is None else [*lines, f"peak memory     {self.peak / 2**30:.2f} GiB"]


class TimedStreamer(TextStreamer):
    """Prints the answer as it comes and notes the time of every token."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Takes the prompt, then token after token."""
        self.times.append(time.perf_counter())
        super().put(value)


def read_prompt(path: str) -> str:
    """The text of a file, or of stdin where the path is "-".

    Raises:
        ValueError: there is no such file, or it is empty.
    """
    # Not `is_file`: a shell's <(command) is a pipe.
    if path != "-" and (not Path(path).exists() or Path(path).is_dir()):
        raise ValueError(f"`--prompt-file`: there is no file {path!r}; give a file, or - for stdin.")
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError("`--prompt-file` is empty; a prompt needs at least one word.")
    return text


def _tokens(request: Request, tokenizer: Any) -> Any:
    """Ids and mask (1, T) of the text and the question behind it."""
    text = "\n\n".join(part for part in (request.prompt, request.question) if part)
    chat = request.chat
    if chat is None:
        chat = bool(request.question and tokenizer.chat_template)
    if not chat:
        inputs = tokenizer(text, return_tensors="pt")
    elif not tokenizer.chat_template:
        raise ValueError(
            f"`--chat`: the tokenizer of {request.model!r} has no chat template; leave `--chat` out."
        )
    else:
        turns = [{"role": "user", "content": text}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(turns, **options)
    if inputs["input_ids"].numel() == 0:
        raise ValueError(
            f"`--prompt-file`: the tokenizer of {request.model!r} makes no tokens of this text; give another "
            "text, or look whether the folder holds the model's own tokenizer."
        )
    return inputs


def generate(request: Request) -> Statistics:
    """Loads a model, reads the prompt and streams the answer to stdout.

    Args:
        request: the options.

    Raises:
        ValueError: there is no such model; an option that is unknown, or that the device does not have; a
            prompt of no tokens, or one that does not fit.
    """
    read_cache_dtype(request.cache_dtype)
    read_offload(request.offload_layers)
    read_config(request.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(request.model)
    # Before the weights are loaded, which takes longer.
    inputs = _tokens(request, tokenizer).to(device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        request.model, attn_implementation="tree_attention", dtype="auto"
    )
    model = model.to(device).eval()
    options = {"cache_dtype": request.cache_dtype, "offload_layers": request.offload_layers}
    prepare_generation(model, progress=request.progress, **options)
    streamer = TimedStreamer(tokenizer)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    call = {"max_new_tokens": request.new_tokens, "do_sample": request.sample, "streamer": streamer}
    model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **call)
    first, last, count = streamer.times[1], streamer.times[-1], len(streamer.times) - 1
    return Statistics(
        prompt_tokens=inputs["input_ids"].shape[1],
        new_tokens=count,
        first_token=first - streamer.times[0],
        per_token=(last - first) / max(count - 1, 1),
        peak=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )
