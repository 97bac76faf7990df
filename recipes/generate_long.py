"""One prompt on all GPUs: every process holds its share of the cache and reads its share of the prompt.

    accelerate launch --num_processes 2 recipes/generate_long.py --model MODEL --prompt-file book.txt
    torchrun --nproc-per-node 2 recipes/generate_long.py --smoke          a tiny random model, on CPUs too
    python recipes/generate_long.py --model MODEL --prompt-file book.txt  one process, the same code

The answer is that of one process. Process 0 prints it as it comes, then the times and every process's memory.
"""

import argparse
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

import hf_longattn


@dataclass
class Arguments:
    """What to read and how to answer."""

    model: str | None
    prompt_file: Path | None
    question: str
    max_tokens: int | None
    new_tokens: int
    temperature: float
    cache_dtype: str | None
    smoke: bool


def parse() -> Arguments:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or id of a decoder with attention layers")
    parser.add_argument("--prompt-file", type=Path, help="a text of any length")
    parser.add_argument("--question", default="\n\nA summary of the text above:", help="put after the text")
    parser.add_argument("--max-tokens", type=int, help="cut the text to this many tokens")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of the answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--cache-dtype", choices=("int8", "fp8"), help="keys and values in 8 bits")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a prompt of 300 tokens")
    arguments = Arguments(**vars(parser.parse_args()))
    if not arguments.smoke and (arguments.model is None or arguments.prompt_file is None):
        parser.error("--model and --prompt-file are needed, or --smoke")
    return arguments


class Timed(BaseStreamer):
    """Notes when the prompt and each token come, and hands them on."""

    def __init__(self, streamer: BaseStreamer | None) -> None:
        self.streamer, self.times = streamer, []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def load(arguments: Arguments, device: torch.device) -> tuple:
    """(model, prompt ids, streamer): the whole model on every process, the whole prompt too."""
    if arguments.smoke:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation="tree_attention")
        return model.to(device).eval(), torch.randint(2, 97, (1, 300)), None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, attn_implementation="tree_attention", dtype=dtype, device_map={"": device}
    )
    text = tokenizer(arguments.prompt_file.read_text()).input_ids[: arguments.max_tokens]
    question = tokenizer(arguments.question, add_special_tokens=False).input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return model, torch.tensor([text + question]), streamer


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held, of its GPU where it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    arguments = parse()
    # Without a GPU, accelerate knows of the other processes where it is told to use CPUs alone.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, ids, streamer = load(arguments, accelerator.device)
    # The one line that shares the prompt: `generate` is called alike everywhere, and answers alike.
    hf_longattn.prepare_generation(
        model, accelerator=accelerator, progress=not arguments.smoke, cache_dtype=arguments.cache_dtype
    )

    ids = ids.to(accelerator.device)
    timed = Timed(streamer)
    set_seed(0)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    new_tokens = 16 if arguments.smoke else arguments.new_tokens
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, streamer=timed, **sampling
    )

    answers = gather_object([output[0, ids.shape[1] :].tolist()])
    peaks = gather_object([peak_gib(accelerator.device)])
    if any(answer != answers[0] for answer in answers):
        raise SystemExit("the processes answered differently")
    if accelerator.is_main_process:
        steps = sorted(b - a for a, b in zip(timed.times[1:], timed.times[2:], strict=False))
        print(f"\n{ids.shape[1]} tokens on {accelerator.num_processes} processes")
        print(f"time to first token  {timed.times[1] - timed.times[0]:8.2f} s")
        print(f"time a token         {1e3 * steps[len(steps) // 2]:8.1f} ms" if steps else "")
        print("peak memory          " + "  ".join(f"{peak:.2f}" for peak in peaks) + " GiB")
        if arguments.smoke:
            print("tokens", *answers[0])
    accelerator.end_training()


if __name__ == "__main__":
    main()
