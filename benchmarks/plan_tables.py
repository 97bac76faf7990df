"""Holds `hf-longattn plan` against the measurements, in the tables of docs/concepts/memory_and_latency.md.

python benchmarks/plan_tables.py            write the tables
python benchmarks/plan_tables.py --check    change nothing; fail if one is stale
"""

import json
import sys
from pathlib import Path

from _tables import length_name, table
from transformers import LlamaConfig

from hf_longattn import BlockTransformerConfig, LightningConfig
from hf_longattn.cache.quantized import read_cache_dtype
from hf_longattn.generation.clock import Hardware
from hf_longattn.generation.planning import plan_generation
from hf_longattn.generation.sizes import Ranks
from hf_longattn.parallel.cost import Links, message_bytes, received_bytes, reduction_seconds

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "concepts" / "memory_and_latency.md"
RESULTS = ROOT / "benchmarks" / "results"
# The shape of Llama-3.1-8B and the length of the answer, as in bench_generation.py.
SHAPE = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=1 << 20,
)
# The 1.2B Block Transformer of bench_block_transformer.py, and the 7B model of bench_lightning_models.py.
BLOCK_SHAPE = BlockTransformerConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=12,
    num_attention_heads=16,
    vocab_size=50304,
    max_position_embeddings=8192,
)
LIGHTNING_SHAPE = LightningConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    num_attention_heads=32,
    vocab_size=32000,
)
NEW_TOKENS = 48
# What bench_generation.py calls a prepared model, and the bits of its cache where they are 8.
PREPARED = {"prepared": None, "prepared-int8": "int8", "prepared-fp8": "fp8"}
MESSAGE = message_bytes(1, 32, 128)
LONG = 1 << 20


def measured():
    """Rows of prepared generation in the shape that plans are made for, on H100s."""
    for path in [*sorted(RESULTS.glob("generation*.json")), RESULTS / "two_gpus.json"]:
        for row in json.loads(path.read_text()):
            ours = row.get("peer") in PREPARED and row.get("layers") == 32 and "peak_gib" in row
            if ours and "H100" in row["gpu"]:
                yield row


def plan_of(row):
    """The plan of what a row measured."""
    hardware = Hardware(bandwidth=row["copy_rate"])
    sizes = {"new_tokens": NEW_TOKENS, "batch_size": row["batch"], "ranks": Ranks(row.get("ranks", 1))}
    sizes["cache_dtype"] = read_cache_dtype(PREPARED[row["peer"]])
    return plan_generation(SHAPE, row["prompt"] + NEW_TOKENS, hardware=hardware, **sizes)


def measured_blocks():
    """Rows of the prepared 1.2B Block Transformer on one H100."""
    for row in json.loads((RESULTS / "block_transformer.json").read_text()):
        if row.get("peer") == "block" and row.get("shape") == "block-1.2b" and "peak_gib" in row:
            yield row


def measured_lightning():
    """Rows of `generate()` with the prepared 7B lightning model on one H100."""
    for row in json.loads((RESULTS / "lightning_models.json").read_text()):
        if (row.get("section"), row.get("peer")) == ("generate", "lightning") and "peak_gib" in row:
            yield row


def plan_of_other(config, row):
    """The plan of what a row of another model measured, the token in the middle of its answer."""
    sizes = {"new_tokens": row["new"], "batch_size": row["batch"]}
    hardware = Hardware(bandwidth=row["copy_rate"])
    return plan_generation(config, row["prompt"] + row["new"], hardware=hardware, **sizes)


def reductions():
    """(keys, microseconds of a rank's own attention, of a step, of the ring) of two GPUs, captured."""
    cases = {}
    for row in json.loads((RESULTS / "tree_decode.json").read_text()):
        cases.setdefault(row["case"], {})[row["form"]] = row.get("graph_us")
    for name, forms in cases.items():
        yield int(name.split("-")[0][1:]), forms["local"], forms["ours"], forms["ring"]


def measured_table():
    """Memory and times of the plan beside those measured."""
    head = ["GPUs", "prompt", "batch", "padding", "cache"]
    head += paired("peak, GiB", "first token, s", "a token, ms")
    rows = []
    for row in measured():
        plan = plan_of(row)
        pairs = [
            (row["peak_gib"], plan.peak / 2**30),
            (row["first_token_s"], plan.expected_first_token),
            (row["token_ms"], 1e3 * plan.expected_a_token),
        ]
        cells = [str(row.get("ranks", 1)), length_name(row["prompt"])]
        cells += [str(row["batch"]), str(row.get("pad", 0)), PREPARED[row["peer"]] or "bf16"]
        key = (row.get("ranks", 1), row["batch"], row.get("pad", 0), row["prompt"])
        rows.append((key, [*cells, *(f"{value:.2f}" for pair in pairs for value in pair)]))
    return table(head, [cells for _, cells in sorted(rows)])


def paired(*names):
    """Two columns a quantity: what was measured, and what the plan says."""
    return [column for name in names for column in (name, "planned")]


def measured_others():
    """(model, row, plan, measured seconds to the first token, milliseconds a token) of other models."""
    for name, config, found in (
        ("Block Transformer", BLOCK_SHAPE, measured_blocks()),
        ("lightning model", LIGHTNING_SHAPE, measured_lightning()),
    ):
        for row in sorted(found, key=lambda row: (row["prompt"], row["new"], row["batch"])):
            first = row.get("prompt_s", row.get("first_token_s"))
            token = row.get("step_ms", row.get("token_ms"))
            yield name, row, plan_of_other(config, row), first, token


def other_table():
    """The same of a Block Transformer and of a lightning model, and how far off the times are."""
    head = ["model", "prompt", "new tokens", "batch"]
    head += paired("peak, GiB", "first token, ms", "a token, ms")
    rows, shares = [], {}
    for name, row, plan, first, token in measured_others():
        cells = [name, length_name(row["prompt"]), length_name(row["new"]), str(row["batch"])]
        cells += [f"{size:.2f}" for size in (row["peak_gib"], plan.peak / 2**30)]
        cells += [f"{1e3 * seconds:,.0f}" for seconds in (first, plan.expected_first_token)]
        rows.append([*cells, f"{token:.2f}", f"{1e3 * plan.expected_a_token:.2f}"])
        ratios = (plan.expected_first_token / first, 1e3 * plan.expected_a_token / token)
        for quantity, ratio in zip(("first token", "a token"), ratios, strict=True):
            shares.setdefault(f"{quantity} of the {name}", []).append(ratio)
    spans = [f"{name} {100 * min(found):.0f} to {100 * max(found):.0f} %" for name, found in shares.items()]
    return f"{table(head, rows)}\n\nThe plan over what was measured: {'; '.join(spans)}."


def reduction_table():
    """What the reduction adds with two GPUs."""
    head = ["keys in all", "own keys alone, µs", "a step, µs", "added, µs", "planned", "ring, µs"]
    model = 1e6 * reduction_seconds(MESSAGE, 2, Links())
    rows = [
        [length_name(keys), *(f"{value:.1f}" for value in (own, step, step - own, model)), f"{ring:,.0f}"]
        for keys, own, step, ring in reductions()
    ]
    return table(head, rows)


def scaling_table():
    """One prompt of 1 M tokens by the number of GPUs."""
    head = ["GPUs", "peak of each, GiB", "fits", "longest, tokens", "a token, ms", "of it reductions, ms"]
    head += ["first token, s", "received", "by a ring"]
    rows, links = [], Links()
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        plan = plan_generation(SHAPE, LONG, ranks=Ranks(count))
        reduction = 1e3 * SHAPE.num_hidden_layers * reduction_seconds(MESSAGE, count, links)
        ring = 4096 * LONG // count * (count - 1)
        rows.append(
            [
                str(count),
                f"{plan.peak / 2**30:.1f}",
                plan.fits,
                f"{plan.longest / 2**20:.2f}M",
                f"{1e3 * plan.expected_a_token:.1f}",
                f"{reduction:.1f}",
                f"{plan.expected_first_token:,.0f}",
                f"{received_bytes(MESSAGE, count, links) / 1024:.0f} KiB",
                f"{ring / 2**20:,.0f} MiB",
            ]
        )
    return table(head, rows)


def filled(text):
    """The page with its tables made anew."""
    for name, make in (
        ("measured", measured_table),
        ("others", other_table),
        ("reduction", reduction_table),
        ("scaling", scaling_table),
    ):
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        _, after = rest.split(f"<!-- end of {name} -->\n", 1)
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- end of {name} -->\n{after}"
    return text


def main():
    old = PAGE.read_text()
    new = filled(old)
    if "--check" not in sys.argv:
        PAGE.write_text(new)
    elif new != old:
        sys.exit(f"stale: {PAGE.relative_to(ROOT)}; run `python benchmarks/plan_tables.py`")


if __name__ == "__main__":
    main()
