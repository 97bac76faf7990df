"""Times models with lightning attention on one GPU: a MiniMax layer, training by length, and `generate()`.

    python benchmarks/bench_lightning_models.py --sections minimax,training,generate --deadline 200
    python benchmarks/bench_lightning_models.py --check        all of it on tiny shapes; CPU too

Correctness comes first in every section, and what is wrong is not timed. Weights are random, bf16. Each row
holds what the card allows (`floor_*`), from the rates of a large copy and of a large matrix product measured
in the same run.

    minimax     the attention block of a lightning layer at the sizes of MiniMax-Text-01, 128K tokens:
                `transformers`, `prepared` (by `prepare_generation`, inside `generate`'s reading of a prompt)
                and `projections` alone
    training    tokens/s, forward and backward, of Llama shapes of 400M and 1B weights, 64K tokens a step
                (256K at that length): `lightning` and `softmax` are the same model behind `prepare_training`,
                with attn_implementation="lightning_attention" and with exact attention; `sdpa` is the same
                model under transformers with gradient checkpointing. `training-3b` is a third shape
    generate    `LightningForCausalLM` of 7B weights behind `prepare_generation` against Llama of as many
                under transformers (sdpa, dynamic cache), with 32 key heads (`softmax`) and 8 (`softmax-gqa`)
"""

import argparse
import copy
import math

import torch
from _report import Report
from bench_block_transformer import NOMINAL, free, rates, seconds_of
from bench_generation import Clock
from transformers import AutoModelForCausalLM, LlamaConfig, MiniMaxConfig
from triton.errors import TritonError

import hf_longattn
from hf_longattn.fusion import fused_prompt
from hf_longattn.modeling.lightning import LightningConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
GIB = 2**30
# What may go wrong in one row or section, and leaves the others alone.
FAILURES = (RuntimeError, ValueError, TypeError, TritonError)
SECTIONS = ("minimax", "training", "generate", "training-3b")
# Width, intermediate width, layers, heads, vocabulary.
SHAPES = {
    "400m": (1024, 2816, 24, 8, 32000),
    "1b": (2048, 5632, 16, 16, 32000),
    "3b": (3072, 8192, 28, 24, 32000),
    "7b": (4096, 11008, 32, 32, 32000),
    # A lightning layer has one more square matrix: as many weights in fewer layers.
    "lightning-7b": (4096, 11008, 30, 32, 32000),
    "tiny": (64, 96, 2, 4, 211),
}
# Shape, and (peer, lengths), the most important first.
TRAINING = {
    "training": [
        ("400m", [("lightning", (32768, 1024, 65536, 262144)), ("sdpa", (32768,)), ("softmax", (32768,))]),
        ("1b", [("lightning", (65536, 32768, 1024, 262144)), ("sdpa", (65536, 32768))]),
        ("1b", [("softmax", (65536, 32768, 1024))]),
        ("400m", [("sdpa", (1024, 65536)), ("softmax", (1024, 65536))]),
    ],
    "training-3b": [("3b", [("lightning", (65536, 1024)), ("sdpa", (65536,)), ("softmax", (65536,))])],
}
TINY_TRAINING = [("tiny", [(peer, (16, 64, 128)) for peer in ("lightning", "softmax", "sdpa")])]
STEP_TOKENS, TINY_STEP_TOKENS = 65536, 64
# Peer, key heads, and (prompt, batch, new tokens).
GENERATE = [
    ("lightning", 32, [(1024, 1, 48), (131072, 1, 48), (1024, 128, 128)]),
    ("softmax", 32, [(1024, 64, 128), (1024, 1, 48), (131072, 1, 48)]),
    ("softmax-gqa", 8, [(1024, 128, 128), (131072, 1, 48)]),
]
TINY_GENERATE = [("lightning", 4, [(24, 1, 5), (48, 3, 5)]), ("softmax-gqa", 2, [(24, 1, 5), (48, 3, 5)])]
# Of MiniMax-Text-01: width, heads, head dim, tokens.
MINIMAX, TINY_MINIMAX = (6144, 64, 128, 131072), (64, 4, 16, 96)


def make(config, dtype, implementation=None):
    """A model with random weights, made where it runs."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)


def draw(*shape, dtype=torch.float32):
    """Normal numbers, the same at every call."""
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)


def tokens(batch, length, vocabulary):
    """(batch, length) random ids."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(1, vocabulary, (batch, length), device=DEVICE, generator=generator)


def peak_gib():
    """GiB at the peak since `free`."""
    return torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0


def median_seconds(function, repeats):
    """The median of some calls, behind one that is not counted."""
    seconds_of(function)
    times = sorted(seconds_of(function) for _ in range(repeats))
    return times[repeats // 2]


def distance(actual, exact):
    """Relative error of a tensor, or of the first of several."""
    actual, exact = (x[0] if isinstance(x, tuple) else x for x in (actual, exact))
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def refuse(what, ours, theirs, dtype):
    """Ends the run where ours is further from fp64 than the standard by more than half."""
    if not ours <= 1.5 * (theirs + torch.finfo(dtype).eps):
        raise SystemExit(f"{what}: error {ours:.3g}, transformers {theirs:.3g}; nothing is timed")


def attempt(report, row, expected, function, *arguments):
    """One row: what is known of it, and what the function measures; False where memory ran out."""
    if report.time_left() < expected + 3:
        report.add(**row, error="deadline")
        return True
    free()
    try:
        report.add(**row, **function(*arguments))
        return True
    except FAILURES as error:
        # The other rows are worth their time all the same.
        report.add(**row, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        return not isinstance(error, torch.OutOfMemoryError)


# ---- one layer of MiniMax


def minimax(size, dtype):
    """A model of one lightning layer and one softmax layer, little beside them, and the first's attention."""
    width, heads, dim, _ = size
    model = make(
        MiniMaxConfig(
            hidden_size=width, num_attention_heads=heads, head_dim=dim, num_key_value_heads=heads // 4,
            intermediate_size=64, num_local_experts=2, num_hidden_layers=2, vocab_size=64,
            layer_types=["linear_attention", "full_attention"],
        ),
        dtype,
    ).eval()  # fmt: skip
    return model, model.model.layers[0].self_attn


def mix(layer, states):
    """The attention block on (1, T, D)."""
    return layer(states, position_embeddings=None, attention_mask=None)[0]


def check_minimax(size, dtype, report):
    """Errors against fp64 of the plain and of the prepared layer, on the same rounded weights."""
    model, layer = minimax(size, dtype)
    # The buffers with the decays would be rounded with the weights.
    exact = minimax(size, torch.float32)[1]
    for wide, weight in zip(exact.parameters(), layer.parameters(), strict=True):
        wide.copy_(weight)
    states = draw(1, 1100 if CUDA else 300, size[0], dtype=dtype)
    expected = mix(exact.double(), states.double())
    plain = distance(mix(layer, states), expected)
    hf_longattn.prepare_generation(model)
    with fused_prompt(model):
        ours = distance(mix(layer, states), expected)
    refuse("minimax", ours, plain, dtype)
    report.add(section="minimax", check=str(dtype), error_prepared=ours, error_transformers=plain)


def run_minimax(report, card, tiny):
    """Rows of the layer as transformers has it, prepared, and of its three products alone."""
    check_minimax(TINY_MINIMAX, torch.float32, report)
    if CUDA and not tiny:
        check_minimax(MINIMAX, torch.bfloat16, report)
    free()
    size, dtype = (TINY_MINIMAX, torch.float32) if tiny else (MINIMAX, torch.bfloat16)
    width, heads, dim, length = size
    model, layer = minimax(size, dtype)
    states, mixed = draw(1, length, width, dtype=dtype), draw(1, length, heads * dim, dtype=dtype)
    products = 2 * length * width * heads * dim * 5 / card["matmul_rate"]
    # Queries, keys, values, outputs and gates, each once.
    others = 5 * length * heads * dim * dtype.itemsize / card["copy_rate"]

    def project():
        return layer.qkv_proj(states), layer.output_gate(states), layer.out_proj(mixed)

    calls = {"projections": project, "prepared": lambda: mix(layer, states)}
    for peer, call in {**calls, "transformers": lambda: mix(layer, states)}.items():
        row = {"section": "minimax", "peer": peer, "tokens": length, **card, "floor_ms": 1e3 * products}
        row["floor_ms"] += 1e3 * others if peer != "projections" else 0.0
        if peer == "prepared":
            hf_longattn.prepare_generation(model)
            with fused_prompt(model):
                attempt(report, row, 3, measure_layer, call, 5)
            hf_longattn.restore(model)
        else:
            attempt(report, row, 3, measure_layer, call, 5 if peer == "projections" else 3)


def measure_layer(call, repeats):
    """Milliseconds and peak of a call."""
    return {"ms": 1e3 * median_seconds(call, repeats), "peak_gib": peak_gib()}


# ---- training


def llama(shape, key_heads=None):
    """A Llama of one of the shapes, head dim 128."""
    width, inner, layers, heads, vocabulary = SHAPES[shape]
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads or heads, vocab_size=vocabulary, max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )  # fmt: skip


def training_model(shape, peer, dtype):
    """A model that trains as one of the peers."""
    implementation = "lightning_attention" if peer == "lightning" else "sdpa"
    model = make(llama(shape), dtype, implementation).train()
    if peer == "sdpa":
        model.gradient_checkpointing_enable()
        return model
    return hf_longattn.prepare_training(model)


def step(model, ids):
    """Forward and backward; gradients are added to those that are there."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def check_training(report):
    """Loss and gradients of a prepared lightning model and of the plain one in fp32, against fp64."""
    plain = make(llama("tiny"), torch.float32, "lightning_attention").train()
    models = {"exact": copy.deepcopy(plain).double(), "plain": plain, "prepared": copy.deepcopy(plain)}
    hf_longattn.prepare_training(models["prepared"], block_size=37, loss_chunk_size=29)
    losses, found = {}, {}
    for name, model in models.items():
        losses[name] = step(model, tokens(2, 150, 211))
        found[name] = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    row = {name: distance(found[name], found["exact"]) for name in ("prepared", "plain")}
    refuse("gradients", row["prepared"], row["plain"], torch.float32)
    # One number may hit the exact one by chance: a sum of 300 terms by halves rounds eight times.
    loss = distance(losses["prepared"], losses["exact"])
    refuse("loss", loss, 8 * torch.finfo(torch.float32).eps, torch.float32)
    report.add(section="training", check="gradients", **{f"error_{k}": v for k, v in row.items()}, loss=loss)


def training_floor(model, batch, length, peer, card):
    """Seconds that a step takes at least: products, and softmax attention or the memory of lightning's."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    weights -= model.get_input_embeddings().weight.numel()
    mixed = batch * length * config.hidden_size * config.num_hidden_layers
    attention = 7 * mixed * length / card["matmul_rate"]
    if peer == "lightning":
        # Forward four tensors, backward ten.
        attention = 14 * mixed * model.dtype.itemsize / card["copy_rate"]
    return 6 * weights * batch * length / card["matmul_rate"] + attention


def measure_step(model, batch, length):
    """Tokens a second of the second step of a shape."""
    ids = tokens(batch, length, model.config.vocab_size)
    step(model, ids)
    found = []
    seconds = seconds_of(lambda: found.append(step(model, ids)))
    if not math.isfinite(found[0].item()):
        raise SystemExit(f"{length} tokens: the loss is {found[0].item()}")
    return {"tokens_per_s": batch * length / seconds, "step_s": seconds, "peak_gib": peak_gib()}


def run_training(report, card, tiny, section):
    """A row a shape, peer and length; a length that does not fit ends the longer ones."""
    if section == "training":
        check_training(report)
    plan = TINY_TRAINING * (section == "training") if tiny else TRAINING[section]
    dtype, whole = (torch.float32, TINY_STEP_TOKENS) if tiny else (torch.bfloat16, STEP_TOKENS)
    for shape, peers in plan:
        for peer, lengths in peers:
            free()
            model = training_model(shape, peer, dtype)
            for length in lengths:
                batch = max(whole // length, 1)
                floor = training_floor(model, batch, length, peer, card)
                row = {"section": "training", "shape": shape, "peer": peer, "length": length, "batch": batch}
                row |= {"parameters": sum(p.numel() for p in model.parameters()), **card, "floor_s": floor}
                # Two steps, each at about half the rate of a large product, and kernels to compile.
                if not attempt(report, row, 5 * floor, measure_step, model, batch, length):
                    break
            model = None


# ---- generate


def lightning_config(shape):
    """A `LightningConfig` of one of the shapes."""
    width, inner, layers, heads, vocabulary = SHAPES[shape]
    return LightningConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary,
    )  # fmt: skip


def answer(model, ids, new, mask=None, streamer=None):
    """`generate` of exactly `new` tokens, the most likely ones."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new}
    return model.generate(ids, attention_mask=mask, streamer=streamer, **options)


def check_generate(report):
    """A prepared model gives the tokens of the plain one in fp32, with and without padding."""
    config = lightning_config("tiny")
    config.initializer_range = 0.3
    model = make(config, torch.float32).eval()
    ids = tokens(3, 40, 211)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    plain = [answer(model, ids, 24, m) for m in (None, mask)]
    hf_longattn.prepare_generation(model, prefill_chunk_size=16)
    ours = [answer(model, ids, 24, m) for m in (None, mask)]
    if not all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True)):
        raise SystemExit("generate: a prepared model gives other tokens; nothing is timed")
    report.add(section="generate", check="tokens", compared=sum(x[:, 40:].numel() for x in ours))


def generating_model(peer, key_heads, dtype, tiny):
    """A model that generates as one of the peers."""
    if peer == "lightning":
        model = make(lightning_config("tiny" if tiny else "lightning-7b"), dtype).eval()
        return hf_longattn.prepare_generation(model)
    return make(llama("tiny" if tiny else "7b", key_heads), dtype, "sdpa").eval()


def kept_bytes(config, length, itemsize):
    """Bytes of one row's states, or of its keys and values, behind `length` tokens."""
    dim = config.hidden_size // config.num_attention_heads
    if config.model_type == "lightning_attention":
        # The position encoding doubles the keys of its layers.
        layers = config.num_hidden_layers + len(config.lrpe_layers)
        return layers * config.hidden_size * dim * 4
    return 2 * config.num_hidden_layers * config.num_key_value_heads * dim * length * itemsize


def generating_floor(model, prompt, batch, new, card):
    """(seconds of the prompt, seconds a token) that the card needs at least."""
    config, item = model.config, model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    kept = batch * kept_bytes(config, prompt + new // 2, item)
    lightning = config.model_type == "lightning_attention"
    # States are read and written.
    memory = (weights * item + (2 if lightning else 1) * kept) / card["copy_rate"]
    pairs = 0 if lightning else 2 * prompt**2 * config.hidden_size * config.num_hidden_layers
    first = batch * (2 * weights * prompt + pairs) / card["matmul_rate"]
    return first, max(memory, 2 * weights * batch / card["matmul_rate"])


def measure_answer(model, prompt, batch, new):
    """Seconds to the first token, milliseconds a token (the median), and new tokens a second of the whole."""
    ids = tokens(batch, prompt, model.config.vocab_size)
    # A prompt is read by chunks of 8192 tokens, all rows together: two of them meet every kernel.
    answer(model, ids[:, : max(16384 // batch, 256)], 4)
    free()
    clock = Clock()
    seconds = seconds_of(lambda: answer(model, ids, new, streamer=clock))
    times = clock.times
    # The first of these holds the capture of the step.
    steps = sorted(b - a for a, b in zip(times[1:], times[2:], strict=False))
    step_s = steps[len(steps) // 2]
    row = {"first_token_s": times[1] - times[0], "token_ms": 1e3 * step_s, "total_s": seconds}
    row |= {"step_tokens_per_s": batch / step_s, "tokens_per_s": batch * new / seconds}
    return row | {"peak_gib": peak_gib()}


@torch.no_grad()
def run_generate(report, card, tiny):
    """A row a peer, prompt and batch."""
    check_generate(report)
    dtype = torch.float32 if tiny else torch.bfloat16
    room = torch.cuda.get_device_properties(0).total_memory if CUDA else math.inf
    for peer, key_heads, points in TINY_GENERATE if tiny else GENERATE:
        free()
        model = generating_model(peer, key_heads, dtype, tiny)
        weights = sum(p.numel() for p in model.parameters())
        for prompt, batch, new in points:
            first, each = generating_floor(model, prompt, batch, new, card)
            row = {"section": "generate", "peer": peer, "prompt": prompt, "batch": batch, "new": new}
            row |= {"parameters": weights, **card, "floor_first_s": first, "floor_token_ms": 1e3 * each}
            needed = weights * dtype.itemsize + batch * kept_bytes(model.config, prompt + new, dtype.itemsize)
            if needed > room:
                report.add(**row, error=f"weights and cache take {needed / GIB:.0f} GiB")
                continue
            # The prompt at half the rate, and steps that wait for the host.
            expected = 2 * first + new * max(2 * each, 0.03 if CUDA else 0.0)
            attempt(report, row, expected, measure_answer, model, prompt, batch, new)
        model = None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}, in order")
    parser.add_argument("--check", action="store_true", help="correctness, and rows of tiny shapes")
    parser.add_argument("--name", default="lightning_models")
    parser.add_argument("--deadline", type=float, default=200, help="seconds after which nothing is begun")
    arguments = parser.parse_args()
    report = Report(arguments.name, arguments.deadline)
    card = NOMINAL if arguments.check else rates()
    wrong = [name for name in arguments.sections.split(",") if not run(name, report, card, arguments.check)]
    if wrong:
        raise SystemExit(f"not measured: {', '.join(wrong)}")


def run(section, report, card, tiny):
    """Runs one section; whether its results were right, so that it was timed."""
    try:
        if section.startswith("training"):
            run_training(report, card, tiny, section)
        else:
            with torch.no_grad():
                {"minimax": run_minimax, "generate": run_generate}[section](report, card, tiny)
        return True
    except (SystemExit, *FAILURES) as error:
        report.add(section=section, error=f"{type(error).__name__}: {error}"[:300])
        return False
    finally:
        free()


if __name__ == "__main__":
    main()
