"""Times `generate()` of Block Transformers beside vanilla models, on one GPU, against what the card allows.

    python benchmarks/bench_block_transformer.py --cases 2048/128:256,512,1024 --deadline 280
    python benchmarks/bench_block_transformer.py --cases 128/2048:512,1024 --peers block --deadline 280
    python benchmarks/bench_block_transformer.py --cases 2048/128:1 128/2048:1 --deadline 120
    python benchmarks/bench_block_transformer.py --check        correctness alone, tiny shapes; CPU too

A case is prompt/new tokens and batches. Weights are random, in the shapes of the released Block
Transformers and of GPT-NeoX. A row holds new tokens a second (prompt included in the time, as the paper
counts) of the third call of the shape, the seconds of the prompt alone, those of the first call and how many
of them a later one saves (`capture_s`), those of the second one, of one token (`second_call_s`), the peak
memory, and `floor_s`: for the prompt and for each step the larger of bytes over the copy rate and operations
over the rate of a large matrix product, both measured in the same run, block steps and token steps one after
the other. Before anything is timed, every peer must give the tokens of the plain model in fp32.
"""

import argparse
import gc
import time

import torch
from _report import Report
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import hf_longattn
from hf_longattn.modeling.block_transformer import BlockTransformerConfig, BlockTransformerForCausalLM

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Layers (of each decoder, or of the model), width, heads.
SHAPES = {
    "block-420m": (12, 1024, 16),
    "block-1.2b": (12, 2048, 16),
    "vanilla-410m": (24, 1024, 16),
    "vanilla-1.2b": (24, 2048, 16),
    "block-tiny": (2, 32, 2),
    "vanilla-tiny": (2, 32, 2),
}
PEERS = {
    "block": ("block-1.2b", {"cuda_graph": "auto"}),
    "block-eager": ("block-1.2b", {"cuda_graph": False}),
    "block-plain": ("block-1.2b", None),
    "vanilla": ("vanilla-410m", None),
    "vanilla-prepared": ("vanilla-410m", {"cuda_graph": "auto"}),
    "vanilla-prepared-1.2b": ("vanilla-1.2b", {"cuda_graph": "auto"}),
}
DEFAULT_PEERS = "block,vanilla-prepared,vanilla-prepared-1.2b,vanilla"
# An H100 by its datasheet, for floors where nothing can be measured.
NOMINAL = {"copy_rate": 3.35e12, "matmul_rate": 989e12}


def build(shape, dtype, **changes):
    """A model of `shape` with random weights."""
    layers, width, heads = SHAPES[shape]
    fields = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    fields |= {"num_hidden_layers": layers, "vocab_size": 50304, "max_position_embeddings": 8192} | changes
    torch.manual_seed(0)
    kinds = {"block": (BlockTransformerConfig, BlockTransformerForCausalLM)}
    config, model = kinds.get(shape.split("-")[0], (GPTNeoXConfig, GPTNeoXForCausalLM))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        made = model(config(**fields)).eval()
    torch.set_default_dtype(default)
    made.set_attn_implementation("sdpa")
    made.generation_config.eos_token_id = None
    return made


def prompts(vocab_size, batch, length):
    """(batch, length) random ids."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(1, vocab_size, (batch, length), device=DEVICE, generator=generator)


def answer(model, ids, new, **options):
    """`generate` of exactly `new` tokens."""
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": new,
        "min_new_tokens": None,
        **options,
    }
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def check():
    """Every peer gives the tokens of its plain model, in fp32, at small shapes; returns how many tokens."""
    tiny = {"vocab_size": 997, "initializer_range": 0.3, "max_position_embeddings": 256}
    if CUDA:
        tiny |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    compared = 0
    for kind in ("block", "vanilla"):
        model = build(f"{kind}-tiny", torch.float32, **tiny)
        ids = prompts(997, 3, 22)
        for options in ({}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
            results = []
            for setup in (None, {"cuda_graph": "auto"}, {"cuda_graph": False}):
                if setup is not None:
                    hf_longattn.prepare_generation(model, **setup)
                torch.manual_seed(5)
                results.append(answer(model, ids, 21, **options))
                hf_longattn.restore(model)
            if not all(torch.equal(result, results[0]) for result in results):
                raise SystemExit(f"{kind} {options}: a prepared model gives other tokens; nothing is timed")
            compared += sum(result[:, 22:].numel() for result in results[1:])
    return compared


def rates():
    """Bytes a second of a large copy and operations a second of a large matrix product, measured."""
    if not CUDA:
        return NOMINAL
    from triton.testing import do_bench

    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    seconds = 1e-3 * do_bench(lambda: target.copy_(source), return_mode="median")
    left = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    product = 1e-3 * do_bench(lambda: left @ left, return_mode="median")
    return {"copy_rate": 2 * source.numel() * 4 / seconds, "matmul_rate": 2 * 8192**3 / product}


def size(module):
    """Parameters."""
    return sum(weight.numel() for weight in module.parameters())


def floor(model, prompt, new, batch, card, itemsize):
    """(seconds of the whole, seconds of the prompt) that the card needs at least."""

    def step(weights, rows, kept=0, attended=0):
        # Keys and values that are read, and the operations on as many.
        bytes_moved = (weights + kept) * itemsize
        operations = 2 * weights * rows + 4 * attended
        return max(bytes_moved / card["copy_rate"], operations / card["matmul_rate"])

    config = model.config
    width, layers, context = config.hidden_size, config.num_hidden_layers, prompt + new // 2
    head = size(model.get_output_embeddings())
    if config.model_type != "block_transformer":
        weights = size(model.gpt_neox.layers)
        held = batch * context * layers * width
        triangle = batch * prompt * prompt // 2 * layers * width
        first = step(weights, batch * prompt, attended=triangle)
        return first + new * step(weights + head, batch, 2 * held, held), first
    length, vectors = config.block_length, config.num_prefix_tokens
    block, token = size(model.model.block_decoder), size(model.model.token_decoder.decoder)
    expansion = size(model.model.token_decoder.expansion)
    blocks, held = prompt // length, batch * (context // length) * layers * width
    first = step(block, batch * blocks, attended=batch * blocks * blocks // 2 * layers * width)
    each = step(block + expansion, batch, 2 * held, held)
    # In front of the first token of a block stand P vectors in the place of one.
    each += step(token + head, batch) * (length - 1) + step(token + head, batch * vectors)
    return first + new / length * each, first


def seconds_of(function):
    """Wall time of one call."""
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(model, ids, new):
    """Seconds of the prompt with one token, and of all; the first two calls of a shape are a row's own."""
    early = seconds_of(lambda: answer(model, ids, new))
    second = seconds_of(lambda: answer(model, ids, 1))
    free()
    whole = seconds_of(lambda: answer(model, ids, new))
    first = seconds_of(lambda: answer(model, ids, 1))
    row = {"prompt_s": first, "total_s": whole, "tokens_per_s": ids.shape[0] * new / whole}
    # What only the first call does: compiling kernels, timing products, capturing the steps.
    row["first_call_s"], row["capture_s"] = early, max(early - whole, 0.0)
    # What only the second one does: capturing the reading of a prompt.
    row["second_call_s"] = second
    row["step_ms"] = 1e3 * (whole - first) / (new - 1)
    if CUDA:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def time_peer(report, peer, cases, card, dtype, tiny):
    """One row a case; a batch that does not fit ends the larger ones of its case."""
    shape, setup = PEERS[peer]
    changes = {"vocab_size": 997, "max_position_embeddings": 256} if tiny else {}
    model = build(f"{shape.split('-')[0]}-tiny" if tiny else shape, dtype, **changes)
    if setup is not None:
        hf_longattn.prepare_generation(model, **setup)
    for prompt, new, batches in cases:
        for batch in batches:
            row = {"peer": peer, "shape": shape, "prompt": prompt, "new": new, "batch": batch, **card}
            row["floor_s"], row["floor_prompt_s"] = floor(model, prompt, new, batch, card, dtype.itemsize)
            row["floor_tokens_per_s"] = batch * new / row["floor_s"]
            if report.time_left() < 10 * row["floor_s"] + 5:
                report.add(**row, error="deadline")
                continue
            try:
                row |= measure(model, prompts(model.config.vocab_size, batch, prompt), new)
            except torch.OutOfMemoryError as error:
                report.add(**row, error=str(error).splitlines()[0][:100])
                free()
                break
            report.add(**row, share_of_floor=row["floor_s"] / row["total_s"])
            free()


def read_case(text):
    """`2048/128:1,256` as (2048, 128, [1, 256])."""
    lengths, _, batches = text.partition(":")
    prompt, new = map(int, lengths.split("/"))
    return prompt, new, [int(batch) for batch in (batches or "1").split(",")]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="correctness alone, and rows of tiny shapes")
    parser.add_argument("--cases", nargs="+", default=["2048/128:256,512,1024", "128/2048:512,1024"])
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"of {', '.join(PEERS)}")
    parser.add_argument("--name", default="block_transformer")
    parser.add_argument("--deadline", type=float, default=280, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    report = Report(arguments.name, arguments.deadline)
    print("tokens compared", check(), flush=True)
    cases = [(14, 9, [2])] if arguments.check else [read_case(case) for case in arguments.cases]
    card, dtype = (NOMINAL, torch.float32) if arguments.check else (rates(), torch.bfloat16)
    for peer in list(PEERS) if arguments.check else arguments.peers.split(","):
        time_peer(report, peer, cases, card, dtype, arguments.check)
        free()


if __name__ == "__main__":
    main()
