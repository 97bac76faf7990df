"""Times forward + backward of a decoder at long context on one GPU: a prepared model beside its peers.

    python benchmarks/bench_training.py --lengths 32768,65536,131072 --peers ours,liger,sdpa --deadline 500

Random weights of the shape of Llama-3.2-1B (or `--shape 8b`), bf16, batch 1, no optimizer. Each row holds
tokens a second (median of the repeats), the peak of GPU memory, and that peak less weights and gradients a
token (KiB); `memory_slope` rows give the slope between the two shortest lengths, which leaves out what does
not grow with the length. Before anything is timed, loss and gradients of a prepared model are compared with
plain sdpa at 4K tokens, against fp32. Peers: `ours` (layer inputs kept where they fit), `ours-offload`,
`ours-lean` (offload, attention recomputed), `ours-liger` (Liger's norm, rope and MLP inside), `sdpa`
(checkpointing), `liger`, `liger-offload`. Name Liger's peers last: its rope replaces that of transformers for
the whole process.
"""

import argparse
import contextlib
import gc
import statistics
import time

import torch
from _report import Report
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_longattn

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
OURS = {
    "ours": {},
    "ours-gpu": {"offload": False},
    "ours-offload": {"offload": True},
    "ours-lean": {"offload": True, "save_attention": False},
    "ours-liger": {},
    "ours-liger-offload": {"offload": True},
}


def build(shape, layers):
    torch.manual_seed(0)
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = LlamaConfig(
        **{**SHAPES[shape], "vocab_size": 128256, "max_position_embeddings": 1 << 23, **changes}
    )
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        ).train()


def free():
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def prepare(model, peer, block_size):
    """Sets a model up as one of the peers."""
    if "liger" in peer:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=not peer.startswith("ours"))
    if peer in OURS:
        return hf_longattn.prepare_training(model, block_size=block_size, **OURS[peer])
    model.gradient_checkpointing_enable(offload=peer.endswith("offload"))
    return model


def tokens(length, vocab_size=128000):
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(0, vocab_size, (1, length), device="cuda", generator=generator)


def step(model, ids):
    """One forward and backward; gradients are freed but for their buffers."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def gradients(model):
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])


def check(shape):
    """Errors of a prepared model and of sdpa against fp32, at 4K tokens and two layers."""
    ids, errors, exact = tokens(4096), {}, None
    for name in ("fp32", "sdpa", "ours-gpu", "ours-offload"):
        model = build(shape, 2)
        if name == "fp32":
            model = model.float()
        elif name in OURS:
            hf_longattn.prepare_training(model, block_size=1000, **OURS[name])
        step(model, ids)
        found = gradients(model)
        exact = found if exact is None else exact
        errors[name] = ((found - exact).norm() / exact.norm()).item()
        del model
        free()
    worst = max(errors["ours-gpu"], errors["ours-offload"])
    if not worst <= 1.5 * (errors["sdpa"] + torch.finfo(torch.bfloat16).eps):
        raise SystemExit(f"wrong gradients, not timed: {errors}")
    return errors


def measure(model, length, repeats):
    """(seconds a step, peak bytes, bytes of weights and gradients)."""
    ids = tokens(length)
    step(model, ids if repeats else ids[:, :4096])
    held = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    free()
    times = []
    for _ in range(max(repeats, 1)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(model, ids)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), torch.cuda.max_memory_allocated(), held


def run_peer(report, peer, arguments, lengths):
    model = prepare(build(arguments.shape, arguments.layers), peer, arguments.block_size)
    peaks, seconds = {}, 0.0
    for length in lengths:
        # Four times the work for twice the length, warm-up included.
        if report.time_left() < 4 * seconds + 5:
            report.add(peer=peer, tokens=length, error="no time left")
            break
        row = {
            "shape": arguments.shape,
            "layers": model.config.num_hidden_layers,
            "peer": peer,
            "tokens": length,
        }
        try:
            start = time.time()
            duration, peak, held = measure(model, length, arguments.repeats)
            seconds, peaks[length] = time.time() - start, peak
            row |= {"tokens_per_s": length / duration, "step_s": duration, "peak_gib": peak / 2**30}
            row |= {"kib_per_token": (peak - held) / length / 1024}
        except torch.OutOfMemoryError as error:
            row |= {"error": str(error).splitlines()[0][:100]}
        report.add(**row)
        if "error" in row:
            break
    if len(peaks) > 1:
        (a, first), (b, second) = sorted(peaks.items())[-2:]
        slope = (second - first) / (b - a) / 1024
        report.add(shape=arguments.shape, peer=peer, between=f"{a}-{b}", slope_kib_per_token=slope)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--peers", default="ours,ours-offload,sdpa,liger")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--block-size", type=int, help="tokens of a block (16384)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed steps; 0 times the first, for steps of minutes"
    )
    parser.add_argument("--skip-check", action="store_true", help="when the check passed in the same session")
    parser.add_argument("--name", default="training")
    parser.add_argument("--deadline", type=float, default=500)
    arguments = parser.parse_args()
    report = Report(arguments.name, deadline=arguments.deadline)
    if not arguments.skip_check:
        report.add(check="gradients at 4K", **check(arguments.shape))
    for peer in arguments.peers.split(","):
        with contextlib.suppress(ModuleNotFoundError):
            run_peer(report, peer, arguments, list(map(int, arguments.lengths.split(","))))
        free()


if __name__ == "__main__":
    main()
