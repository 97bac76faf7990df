"""Page and figure of bench_generation.py: one long prompt through `generate()`, beside transformers."""

from _figures import FLOOR, OURS, THEIRS, has_line, legend_below, set_lengths
from _tables import Result, failure, length_name, run_of, table, values

PEERS = {
    "prepared": "`prepare_generation`",
    "prepared-int8": '`prepare_generation(cache_dtype="int8")`',
    "prepared-fp8": '`prepare_generation(cache_dtype="fp8")`',
    "eager-prepared": "`prepare_generation(cuda_graph=False)`",
    "sdpa": "transformers, `sdpa`",
    "sdpa-static": "transformers, `sdpa`, static cache",
    "prepared-tp": "`prepare_generation`, weights and heads divided",
    "eager-prepared-tp": "`prepare_generation(cuda_graph=False)`, weights and heads divided",
    "sdpa-tp": 'transformers, `sdpa`, `tp_plan="auto"`',
    "sdpa-device-map": 'transformers, `sdpa`, `device_map="auto"`',
}
COLOURS = {
    "prepared": OURS, "eager-prepared": "#7fb0d8", "sdpa": THEIRS, "sdpa-static": "#e8b18f",
    "prepared-int8": "#2a9d6f", "prepared-fp8": "#7a4fa3",
}  # fmt: skip
SEVERAL = " Several GPUs share a prompt: floor and peak are those of one of them, with its share."
PADDING = " Padding is the number of pads in front of the first row."
MEASURED = ("first_token_s", "token_ms", "floor_ms", "peak_gib")


def generation_text(result: Result) -> str:
    """Time to the first token, time a token and peak memory of `generate()`."""
    several = any(num_gpus(row) > 1 for row in result.rows)
    rows = sorted(result.rows, key=lambda row: (row["batch"], row.get("pad", 0), row["prompt"]))
    columns = ["prompt", "batch", "padding", *(["GPUs"] if several else []), "set up by"]
    columns += ["first token, s", "a token, ms", "floor, ms", "peak, GiB", "run"]
    lines = [
        [
            length_name(row["prompt"]),
            row["batch"],
            row.get("pad", 0),
            *([num_gpus(row)] if several else []),
            PEERS.get(row["peer"], row["peer"]),
            *measured(row),
            run_of(row),
        ]
        for row in rows
    ]
    intro = introduction(result) + PADDING + (SEVERAL if several else "")
    return "\n\n".join([intro, table(columns, lines), agreement(result.rows)]).rstrip()


def short_text(result: Result, folder: str) -> str:
    """The rows of the figure alone; pages are linked to in this folder."""
    columns = ["prompt", "set up by", "first token, s", "a token, ms", "floor, ms", "peak, GiB"]
    rows = sorted(one_setting(result), key=lambda row: row["prompt"])
    lines = [
        [length_name(row["prompt"]), PEERS.get(row["peer"], row["peer"]), *measured(row)] for row in rows
    ]
    parts = [introduction(result), table(columns, lines), agreement(result.rows, folder)]
    return "\n\n".join(parts).rstrip()


def introduction(result: Result) -> str:
    """What was run, and what the floor is."""
    return (
        f"`generate()` with one long prompt, {model_shape(result.rows)}, random weights, bf16, greedy. "
        "K is 1024 tokens. The floor is the time to move weights and cache once at the copy rate "
        "measured in the same run."
    )


def measured(row: dict) -> list:
    """The numbers of a row; what went wrong stands in the place of the first."""
    return [failure(row) if "error" in row else row["first_token_s"], *(row.get(f) for f in MEASURED[1:])]


def num_gpus(row: dict) -> int:
    """GPUs that share a prompt: one a process, or all those of a single one."""
    return row.get("ranks", row.get("gpus", 1))


def model_shape(rows: list[dict]) -> str:
    """The model of the generation benchmark, in words."""
    layers = ", ".join(values(rows, "layers"))
    return "the shape of Llama-3.1-8B" + ("" if layers == "32" else f" with {layers} layers")


def agreement(rows: list[dict], folder: str = "") -> str:
    """How many answers were those of the first peer of the same run, and why others were not."""
    firsts, compared = set(), []
    for row in rows:
        # Rows of one run share its date. The first equals itself, and another run may have taken its place.
        prompt = row["date"], row["prompt"], *setting(row)
        same = row.get("same_tokens_as_first_peer")
        if same is False or (same and prompt in firsts):
            compared.append(same)
        if "error" not in row:
            firsts.add(prompt)
    if not compared:
        return ""
    text = (
        "Do they answer alike? All greedy tokens were equal in "
        f"{sum(compared)} of {len(compared)} comparisons with the first set-up of a run on the same prompt."
    )
    if all(compared):
        return text
    return (
        f"{text} Of random weights more is not to be expected: every few steps their best two logits lie "
        "within one rounding of bf16, each implementation sums in another order, and behind the first token "
        "that differs all others do. With trained weights on a real text the tokens are equal: "
        f"[the demo]({folder}demo.md)."
    )


def one_setting(result: Result) -> list[dict]:
    """The rows of batch 1 without padding, or of whatever single setting there is."""
    rows = [row for row in result.rows if row["batch"] == 1 and not row.get("pad")]
    return rows or [r for r in result.rows if (r["batch"], r.get("pad")) == setting(result.rows[0])]


def setting(row: dict) -> tuple:
    """What a line of the figure keeps fixed: the batch and the padding."""
    return row["batch"], row.get("pad")


def draw_lines(axis, rows: list[dict], field: str, title: str) -> None:
    """One field against the prompt length, a line a peer; runs out of memory are crosses at the top."""
    for peer in values(rows, "peer"):
        mine = [row for row in rows if row["peer"] == peer]
        good = sorted((row["prompt"], row[field]) for row in mine if field in row)
        colour = COLOURS.get(peer)
        lengths, heights = zip(*good, strict=True) if good else ((), ())
        label = PEERS.get(peer, peer).replace("`", "")
        axis.plot(lengths, heights, marker="o", label=label, color=colour)
        for row in mine:
            if "error" in row:
                axis.plot(row["prompt"], 0.97, "x", color=colour, transform=axis.get_xaxis_transform())
                axis.annotate(
                    "out of memory", (row["prompt"], 0.93), xycoords=axis.get_xaxis_transform(),
                    ha="right", va="top", fontsize=7, color=colour,
                )  # fmt: skip
    set_lengths(axis, [row["prompt"] for row in rows])
    axis.set(xlabel="prompt, tokens", title=title, ylim=(0, None))


def draw_generation(result: Result, axes: list) -> None:
    """Time a token beside its floor, and peak memory."""
    rows = one_setting(result)
    draw_lines(axes[0], rows, "token_ms", "time a token, ms")
    draw_floors(axes[0], rows)
    axes[0].set_ylim(0, 1.15 * axes[0].get_ylim()[1])
    legend_below(axes[0])
    draw_lines(axes[1], rows, "peak_gib", "peak memory, GiB")


def has_generation(result: Result) -> bool:
    """Whether a peer read two lengths."""
    return has_line(one_setting(result), "prompt", "peer")


def draw_floors(axis, rows: list[dict]) -> None:
    """The floor of each kind of cache, a bar where there is but one length of it."""
    label: str | None = "floor: bytes over copy rate"
    for bits in dict.fromkeys(row["peer"].endswith(("int8", "fp8")) for row in rows):
        mine = [row for row in rows if row["peer"].endswith(("int8", "fp8")) == bits]
        floor = sorted({(row["prompt"], row["floor_ms"]) for row in mine})
        line = {"linestyle": "--"} if floor[1:] else {"marker": "_", "markersize": 14, "linestyle": ""}
        axis.plot(*zip(*floor, strict=True), color=FLOOR, label=label, zorder=3, **line)
        label = None
