"""Holds `hf-longattn plan` against the measurements, in the tables of docs/concepts/memory_and_latency.md.

python benchmarks/plan_tables.py            write the tables
python benchmarks/plan_tables.py --check    change nothing; fail if one is stale
"""

import json
import sys
from pathlib import Path

from transformers import LlamaConfig

from hf_longattn.generation.planning import Hardware, Ranks, plan_generation
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
NEW_TOKENS = 48
MESSAGE = message_bytes(1, 32, 128)
LONG = 1 << 20


def measured():
    """Rows of prepared generation in the shape that plans are made for: one H100, a cache in bf16."""
    for path in sorted(RESULTS.glob("generation*.json")):
        for row in json.loads(path.read_text()):
            plain = row.get("peer") == "prepared" and row.get("layers") == 32 and "peak_gib" in row
            if plain and not row.get("cache_dtype") and "H100" in row["gpu"]:
                yield row


def plan_of(row):
    """The plan of what a row measured."""
    hardware = Hardware(bandwidth=row["copy_rate"])
    sizes = {"new_tokens": NEW_TOKENS, "batch_size": row["batch"]}
    return plan_generation(SHAPE, row["prompt"] + NEW_TOKENS, hardware=hardware, **sizes)


def reductions():
    """(keys, microseconds of a rank's own attention, of a step, of the ring) of two GPUs, captured."""
    cases = {}
    for row in json.loads((RESULTS / "tree_decode.json").read_text()):
        cases.setdefault(row["case"], {})[row["form"]] = row.get("graph_us")
    for name, forms in cases.items():
        yield int(name.split("-")[0][1:]), forms["local"], forms["ours"], forms["ring"]


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_table():
    """Memory and times of the plan beside those measured."""
    head = [
        "prompt",
        "batch",
        "padding",
        "peak, GiB",
        "plan",
        "first token, s",
        "plan",
        "a token, ms",
        "plan",
    ]
    rows = []
    for row in measured():
        plan = plan_of(row)
        pairs = [
            (row["peak_gib"], plan.peak / 2**30),
            (row["first_token_s"], plan.expected_first_token),
            (row["token_ms"], 1e3 * plan.expected_a_token),
        ]
        cells = [f"{row['prompt'] // 1024}K", str(row["batch"]), str(row.get("pad", 0))]
        rows.append([*cells, *(f"{value:.2f}" for pair in pairs for value in pair)])
    return table(head, rows)


def reduction_table():
    """What the reduction adds with two GPUs."""
    head = ["keys in all", "a rank's own, µs", "a step, µs", "added", "model", "ring, µs"]
    model = 1e6 * reduction_seconds(MESSAGE, 2, Links())
    rows = [
        [f"{keys // 1024}K", f"{own:.1f}", f"{step:.1f}", f"{step - own:.1f}", f"{model:.1f}", f"{ring:,.0f}"]
        for keys, own, step, ring in reductions()
    ]
    return table(head, rows)


def scaling_table():
    """One prompt of 1 M tokens by the number of GPUs."""
    head = [
        "GPUs",
        "peak, GiB",
        "longest",
        "a token, ms",
        "of it reductions",
        "first token, s",
        "received",
        "ring",
    ]
    rows, links = [], Links()
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        plan = plan_generation(SHAPE, LONG, ranks=Ranks(count))
        reduction = 1e3 * SHAPE.num_hidden_layers * reduction_seconds(MESSAGE, count, links)
        ring = 4096 * LONG // count * (count - 1)
        rows.append(
            [
                str(count),
                f"{plan.peak / 2**30:.1f}" + ("" if plan.fits else ", does not fit"),
                f"{plan.longest / 1e6:.2f} M",
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
