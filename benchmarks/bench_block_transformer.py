"""Times `generate()` of Block Transformers beside vanilla models, on one GPU, against what the card allows.

    python benchmarks/bench_block_transformer.py --cases 2048/128:256,512,1024 --deadline 280
    python benchmarks/bench_block_transformer.py --cases 128/2048:512,1024 --peers block --deadline 280
    python benchmarks/bench_block_transformer.py --cases 2048/128:1 128/2048:1 --deadline 120
    python benchmarks/bench_block_transformer.py --queue 2048/128:256 --requests 1024 --deadline 200
    python benchmarks/bench_block_transformer.py --train 16,32 --name block_training --deadline 150
    python benchmarks/bench_block_transformer.py --check        correctness alone, tiny shapes; CPU too

A case is prompt/new tokens and batches. Weights are random, in the shapes of the released Block
Transformers and of GPT-NeoX. A row holds new tokens a second (prompt included in the time, as the paper
counts) of the third call of the shape, the seconds of the prompt alone, those of the first call and how many
of them a later one saves (`capture_s`), those of the second one, of one token (`second_call_s`), the peak
memory, and `floor_s`: for the prompt and for each step the larger of bytes over the copy rate and operations
over the rate of a large matrix product, both measured in the same run, block steps and token steps one after
the other. Before anything is timed, every peer must give the tokens of the plain model in fp32.

`--queue` times many requests on so many rows: prompts of a quarter of the length to all of it, and as many
new tokens, drawn uniformly. "block-queue" is one call of `generate_batch`, "block-batches" are calls of
`generate` with as many prompts as rows, sorted by length and padded, until the longest answer of each batch.
Both count the tokens that were asked for; nothing ends early.

`--train` times steps of the 420M model at 2048 tokens: forward, backward and fused AdamW, all in bf16, as it
is ("block") and with each layer and the loss compiled ("block-compiled"). `share_of_matmul` is that of the
rate of a large matrix product: six operations for each use of a weight, the head's included, attention scores
not.
"""

import argparse
import functools
import gc
import time

import torch
from _report import Report
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.modeling_layers import GradientCheckpointingLayer

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
        if kind == "block":
            compared += check_queue(model)
    return compared


def check_queue(model):
    """Requests on three rows get the tokens that they get alone; returns how many tokens."""
    requests = draw_requests(997, 9, 24, 16)
    hf_longattn.prepare_generation(model)
    queue = answer_queue(model, *requests, 3)
    alone = [answer_batches(model, [prompt], [new], 1)[0] for prompt, new in zip(*requests, strict=True)]
    hf_longattn.restore(model)
    if queue != alone:
        raise SystemExit("generate_batch gives other tokens than each prompt alone; nothing is timed")
    return sum(map(len, queue))


def draw_requests(vocab_size, count, longest, most):
    """Prompts of `longest` / 4 to `longest` tokens, and how many new tokens each asks for."""
    generator = torch.Generator().manual_seed(2)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).tolist()

    inputs = [draw(1, vocab_size, length) for length in draw(longest // 4, longest + 1, count)]
    return inputs, draw(most // 4, most + 1, count)


def answer_queue(model, inputs, limits, rows):
    """`generate_batch` on so many rows; the new tokens of every request."""
    config = ContinuousBatchingConfig(max_requests_per_batch=rows)
    options = {"do_sample": False, "max_new_tokens": limits, "continuous_batching_config": config}
    return [result.generated_tokens for result in model.generate_batch(inputs, **options).values()]


def answer_batches(model, inputs, limits, rows):
    """`generate` on batches of prompts sorted by length, padded; the new tokens of every request."""
    order = sorted(range(len(inputs)), key=lambda number: len(inputs[number]))
    answers = {}
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        length, new = (max(values) for values in ([len(inputs[n]) for n in part], [limits[n] for n in part]))
        ids = torch.tensor([[0] * (length - len(inputs[n])) + inputs[n] for n in part], device=DEVICE)
        mask = torch.tensor([[0] * (length - len(inputs[n])) + [1] * len(inputs[n]) for n in part])
        options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new}
        tokens = model.generate(ids, attention_mask=mask.to(DEVICE), **options)[:, length:].tolist()
        answers |= {n: tokens[row][: limits[n]] for row, n in enumerate(part)}
    return [answers[number] for number in range(len(inputs))]


def time_queue(report, cases, count, card, dtype, tiny):
    """Two rows a case: the requests in a queue, and in batches one after the other."""
    changes = {"vocab_size": 997, "max_position_embeddings": 256} if tiny else {}
    model = build("block-tiny" if tiny else "block-1.2b", dtype, **changes)
    hf_longattn.prepare_generation(model)
    for prompt, new, batches in cases:
        inputs, limits = draw_requests(model.config.vocab_size, count, prompt, new)
        wanted = {"prompt_tokens": sum(map(len, inputs)), "new_tokens": sum(limits)}
        for batch in batches:
            for peer, ask in (("block-queue", answer_queue), ("block-batches", answer_batches)):
                row = {"peer": peer, "shape": "block-1.2b", "prompt": prompt, "new": new, "batch": batch}
                row |= {"requests": count, **wanted, **card}
                if report.time_left() < 20:
                    report.add(**row, error="deadline")
                    continue
                # What the first call compiles, the others find.
                seconds_of(functools.partial(ask, model, inputs[:batch], [9] * batch, batch))
                free()
                total = seconds_of(functools.partial(ask, model, inputs, limits, batch))
                if CUDA:
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                report.add(**row, total_s=total, tokens_per_s=sum(limits) / total)
                free()


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


def training_flops(model):
    """Operations a token of a training step, for each use of a weight by its share of the tokens."""
    config, sizes = model.config, {}
    parts = {"block": model.model.block_decoder, "token": model.model.token_decoder.decoder}
    parts |= {"expansion": model.model.token_decoder.expansion, "head": model.lm_head}
    for name, part in parts.items():
        sizes[name] = sum(weight.numel() for weight in part.parameters())
    in_blocks = sizes["block"] + sizes["expansion"]
    rows = config.num_prefix_tokens + config.block_length - 1
    return 6 * (in_blocks / config.block_length + sizes["token"] * rows / config.block_length + sizes["head"])


@torch.enable_grad()
def time_training(report, batches, card, dtype, tiny):
    """Two rows a batch: steps of the model as it is, and with compiled layers."""
    length = 32 if tiny else 2048
    changes = {"vocab_size": 997, "max_position_embeddings": 256} if tiny else {}
    for peer in ("block", "block-compiled"):
        model = build("block-tiny" if tiny else "block-420m", dtype, **changes).train()
        if peer == "block-compiled":
            backend = "aot_eager" if tiny else "inductor"
            model.loss_function = torch.compile(model.loss_function, backend=backend, dynamic=False)
            for module in model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.compile(backend=backend, dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for batch in batches:
            row = {"section": "training", "peer": peer, "batch": batch, "length": length, **card}
            if report.time_left() < 30:
                report.add(**row, error="deadline")
                continue
            try:
                row["step_s"] = time_steps(model, optimizer, prompts(model.config.vocab_size, batch, length))
            except torch.OutOfMemoryError as error:
                report.add(**row, error=str(error).splitlines()[0][:100])
                break
            rate = training_flops(model) * batch * length / row["step_s"]
            row |= {"tokens_per_s": batch * length / row["step_s"], "tflop_per_s": rate / 1e12}
            report.add(**row, share_of_matmul=rate / card["matmul_rate"])
            free()
        del model, optimizer
        free()
        torch.compiler.reset()


def time_steps(model, optimizer, ids, repeats=5):
    """Seconds of one step, behind two that warm up."""

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    return seconds_of(lambda: [step() for _ in range(repeats)]) / repeats


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
    parser.add_argument(
        "--queue", nargs="+", default=[], help="cases of many requests, in the place of --cases"
    )
    parser.add_argument("--train", help="batches of training steps, in the place of --cases")
    parser.add_argument("--requests", type=int, default=1024, help="of each case of --queue")
    parser.add_argument("--peers", default=DEFAULT_PEERS, help=f"of {', '.join(PEERS)}")
    parser.add_argument("--name", default="block_transformer")
    parser.add_argument("--deadline", type=float, default=280, help="seconds after which no case is begun")
    arguments = parser.parse_args()
    report = Report(arguments.name, arguments.deadline)
    print("tokens compared", check(), flush=True)
    cases = [(14, 9, [2])] if arguments.check else [read_case(case) for case in arguments.cases]
    card, dtype = (NOMINAL, torch.float32) if arguments.check else (rates(), torch.bfloat16)
    if arguments.train or arguments.check:
        batches = [2] if arguments.check else [int(batch) for batch in arguments.train.split(",")]
        time_training(report, batches, card, dtype, arguments.check)
    if arguments.train:
        return
    if arguments.queue or arguments.check:
        queue = [(24, 16, [3])] if arguments.check else [read_case(case) for case in arguments.queue]
        count = 9 if arguments.check else arguments.requests
        time_queue(report, queue, count, card, dtype, arguments.check)
    if arguments.queue:
        return
    for peer in list(PEERS) if arguments.check else arguments.peers.split(","):
        time_peer(report, peer, cases, card, dtype, arguments.check)
        free()


if __name__ == "__main__":
    main()
