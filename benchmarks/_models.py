"""Page and figure of bench_lightning_models.py.

section "minimax"     a layer's attention block: `ms` of a peer
section "training"    `tokens_per_s` of a shape, a peer and a length
section "generate"    `token_ms` and tokens a second of a peer, a prompt and a batch
rows with `check`     errors before anything was timed
"""

from _figures import OURS, THEIRS, has_line, legend_below, set_lengths
from _tables import Result, dtype_name, failure, length_name, run_of, table, values

# The heading of a section, and what its table shows.
TITLES = {
    "training": (
        "Training",
        "Forward and backward of Llama shapes with random weights, 64K tokens a step, or one row where it is "
        "longer. K is 1024 tokens. `lightning` and `softmax` are one model behind `prepare_training`, with "
        "lightning and with exact attention; `sdpa` is that model under transformers with gradient "
        "checkpointing. `over lightning` is the speed over that of `lightning` at the shortest length.",
    ),
    "generate": (
        "Generation",
        "`generate()` of new tokens behind a prompt, random weights, bf16, greedy: `lightning` is "
        "`LightningForCausalLM` behind `prepare_generation`; Llama of as many weights under transformers, "
        "with `sdpa` and a dynamic cache, has 32 key heads (`softmax`) or 8 (`softmax-gqa`).",
    ),
    "minimax": (
        "The attention block of MiniMax-Text-01",
        "One lightning layer at the sizes of that model, one prompt. `projections` are its three matrix "
        "products alone; the floor adds queries, keys, values, outputs and gates, each moved once.",
    ),
}
ORDER = ("length", "prompt", "batch")
CHECKS = {
    "section": "of", "check": "compared", "error_prepared": "error, prepared", "error_plain": "error, plain",
    "error_transformers": "error, transformers", "compared": "tokens that agreed",
}  # fmt: skip
COLUMNS = {
    "minimax": {
        "peer": "set up by", "tokens": "tokens", "ms": "ms", "floor_ms": "floor, ms", "peak_gib": "peak, GiB",
    },
    "training": {
        "shape": "weights", "peer": "attention", "length": "length", "batch": "rows",
        "tokens_per_s": "tokens/s", "step_s": "step, s", "floor_s": "floor, s", "peak_gib": "peak, GiB",
        "over": "over lightning",
    },
    "generate": {
        "peer": "attention", "prompt": "prompt", "batch": "rows", "new": "new tokens",
        "first_token_s": "first token, s",
        "token_ms": "a token, ms", "floor_token_ms": "floor, ms", "step_tokens_per_s": "tokens/s, steps",
        "tokens_per_s": "tokens/s, whole", "peak_gib": "peak, GiB",
    },
}  # fmt: skip
LENGTHS = ("tokens", "length", "prompt")
COLOURS = {"lightning": OURS, "softmax": "#7fb0d8", "sdpa": THEIRS, "softmax-gqa": THEIRS}


def timed(result: Result, section: str) -> list[dict]:
    """The rows of a section but for its checks."""
    return [row for row in result.where(section=section).rows if "peer" in row]


def with_ratio(rows: list[dict]) -> list[dict]:
    """The rows of training, each with its speed over that of its shape's lightning at the shortest length."""
    ours = [row for row in rows if row["peer"] == "lightning" and "tokens_per_s" in row]
    first = {row["shape"]: row["tokens_per_s"] for row in sorted(ours, key=lambda row: -row["length"])}
    return [
        row | {"over": row["tokens_per_s"] / first[row["shape"]]}
        if "tokens_per_s" in row and row["shape"] in first
        else row
        for row in rows
    ]


def cells(row: dict, fields: list[str]) -> list:
    """A row of a table; what went wrong stands in the place of the first number."""
    shown = [length_name(row[f]) if f in LENGTHS else row.get(f) for f in fields]
    if "error" in row:
        missing = next(i for i, field in enumerate(fields) if field not in row)
        shown[missing] = failure(row)
    return shown


def in_order(rows: list[dict]) -> list[dict]:
    """Rows of one shape together, those of one length beside each other."""
    shapes = values(rows, "shape")
    return sorted(
        rows,
        key=lambda row: [shapes.index(row["shape"]) if shapes else 0, *(row.get(f, 0) for f in ORDER)],
    )


def models_text(result: Result) -> str:
    """A table a section, and the errors of the checks."""
    parts = []
    for section, (heading, words) in TITLES.items():
        if rows := in_order(timed(result, section)):
            fields = list(COLUMNS[section])
            shown = with_ratio(rows) if section == "training" else rows
            lines = [[*cells(row, fields), run_of(row)] for row in shown]
            parts += [f"## {heading}", words, table([*COLUMNS[section].values(), "run"], lines)]
    if checks := [row for row in result.rows if "check" in row]:
        named = [row | {"check": dtype_name(row["check"])} for row in checks]
        lines = [[*(row.get(field) for field in CHECKS), run_of(row)] for row in named]
        parts += [
            "## Checks",
            "Before anything was timed: relative errors against fp64, and tokens that agreed.",
            table([*CHECKS.values(), "run"], lines),
        ]
    return "\n\n".join(parts)


def draw_models(result: Result, axes: list) -> None:
    """Tokens a second of training by length, and milliseconds a token of `generate()` by prompt."""
    rows = timed(result, "training")
    for shape, style in zip(values(rows, "shape"), ("-", "--", ":"), strict=False):
        for peer in values(rows, "peer"):
            mine = [row for row in rows if (row["shape"], row["peer"]) == (shape, peer)]
            draw_line(axes[0], mine, "length", "tokens_per_s", f"{shape}, {peer}", style)
    set_lengths(axes[0], [row["length"] for row in rows])
    axes[0].set(xlabel="length, tokens", title="training, tokens/s", ylim=(0, None))
    axes[0].yaxis.set_major_formatter("{x:,.0f}")
    rows = one_row(result)
    for peer in values(rows, "peer"):
        draw_line(axes[1], [row for row in rows if row["peer"] == peer], "prompt", "token_ms", peer)
    set_lengths(axes[1], [row["prompt"] for row in rows])
    longest = max((row["token_ms"] for row in rows if "token_ms" in row), default=1.0)
    axes[1].set(xlabel="prompt, tokens", title="generate(), one row, ms a token", ylim=(0, 1.2 * longest))
    for axis in axes:
        legend_below(axis)


def one_row(result: Result) -> list[dict]:
    """The rows of `generate()` with a batch of one."""
    return [row for row in timed(result, "generate") if row["batch"] == 1]


def has_models(result: Result) -> bool:
    """Whether a peer was timed at two lengths."""
    steps = [row for row in timed(result, "training") if "tokens_per_s" in row]
    return has_line(steps, "length", "shape", "peer") or has_line(one_row(result), "prompt", "peer")


def draw_line(axis, rows: list[dict], across: str, field: str, label: str, style: str = "-") -> None:
    """One field against a length, where it was measured."""
    points = sorted((row[across], row[field]) for row in rows if field in row)
    if points:
        colour = COLOURS.get(rows[0]["peer"])
        axis.plot(*zip(*points, strict=True), marker="o", label=label, color=colour, linestyle=style)
