"""Page and figure of the training benchmark, from the rows of bench_training.py.

rows with `step_s` or `error`    a length of a peer
rows with `between`              memory a token between two lengths; `fits` in the row behind
rows with `times_one_gpu`        several GPUs beside one, in the same run
rows with `check`                errors of gradients before anything was timed
"""

from _figures import FLOOR, OURS, THEIRS, has_line, legend_below, set_lengths
from _tables import Result, failure, length_name, number, run_of, table

PEERS = {
    "ours": "`prepare_training`",
    "ours-gpu": "`prepare_training(offload=False)`",
    "ours-offload": "`prepare_training(offload=True)`",
    "ours-lean": "`prepare_training(offload=True, save_attention=False)`",
    "ours-liger": "`prepare_training`, Liger's layers",
    "ours-liger-offload": "`prepare_training(offload=True)`, Liger's layers",
    "eager": "`eager`",
    "sdpa": "`sdpa`, checkpointing",
    "liger": "Liger, checkpointing",
    "liger-offload": "Liger, checkpoints offloaded",
    "liger-tiled": "Liger, tiled MLP, checkpointing",
    "liger-tiled-offload": "Liger, tiled MLP, checkpoints offloaded",
}
COLOURS = {"ours": OURS, "ours-lean": "#7fb0d8", "sdpa": THEIRS, "liger": "#8a8f3c"}
MODELS = {"1b": ("Llama-3.2-1B", 16), "8b": ("Llama-3.1-8B", 32)}
COLUMNS = {
    "tokens_per_s": "tokens/s",
    "step_s": "step, s",
    "floor_s": "floor, s",
    "peak_gib": "peak, GiB",
    "host_gib": "host, GiB",
}


def model_name(row: dict) -> str:
    """The shape, and how it differs from the whole model."""
    name, layers = MODELS.get(row["shape"], (row["shape"], None))
    parts = [name]
    if row.get("layers", layers) != layers:
        parts.append(f"{row['layers']} layer" + ("s" if row["layers"] > 1 else ""))
    if row.get("lora"):
        parts.append(f"LoRA {row['lora']}")
    return ", ".join(parts)


def peer_name(row: dict) -> str:
    """The peer, in the words of its calls."""
    return PEERS.get(row["peer"], row["peer"])


def count_name(tokens: int) -> str:
    """720,896 as 704K; a number that is no multiple of 1024 is written out."""
    name = length_name(tokens)
    return f"{tokens:,}" if name == str(tokens) else name


def with_floors(rows: list[dict]) -> list[dict]:
    """The rows, each with the floor of its model and length: an older row did not write its own."""
    floors = {floor_key(row): row["floor_s"] for row in rows if "floor_s" in row}
    return [{"floor_s": floors.get(floor_key(row)), **row} for row in rows]


def floor_key(row: dict) -> tuple:
    """What the floor of a step is counted from."""
    return model_name(row), row["tokens"], row.get("ranks", 1)


def step_table(rows: list[dict]) -> str:
    """A row a length, those of one model and length together."""
    models = list(dict.fromkeys(map(model_name, rows)))
    several = any(row.get("ranks", 1) > 1 for row in rows)
    cells = []
    for row in sorted(with_floors(rows), key=lambda row: (models.index(model_name(row)), row["tokens"])):
        measured = [row.get(field) for field in COLUMNS]
        if "error" in row:
            measured = [failure(row), *[None] * (len(COLUMNS) - 1)]
        gpus = [row.get("ranks", 1)] if several else []
        # Peers may stand from another run: each row says which it is of.
        cells.append(
            [model_name(row), peer_name(row), *gpus, count_name(row["tokens"]), *measured, run_of(row)]
        )
    head = ["model", "set up by", *(["GPUs"] if several else []), "tokens", *COLUMNS.values(), "run"]
    return table(head, cells)


def pairs(rows: list[dict]) -> list[dict]:
    """A row a slope, with what fits by it."""
    found: list[dict] = []
    for row in rows:
        if "between" in row:
            found.append(dict(row))
        elif "fits" in row and found and found[-1]["peer"] == row["peer"]:
            found[-1] |= row
    return found


def memory_table(rows: list[dict]) -> str:
    """Memory a token and the longest sequence by it, beside the longest of a prepared model."""
    ours: dict[str, int] = {}
    for row in rows:
        if row["peer"].startswith("ours") and "fits" in row:
            ours[row["shape"]] = max(ours.get(row["shape"], 0), row["fits"])
    floors = {row["shape"]: row["floor_kib_per_token"] for row in rows if "floor_kib_per_token" in row}
    cells = []
    for row in rows:
        a, b = map(int, row["between"].split("-"))
        fits, most = row.get("fits"), ours.get(row["shape"])
        is_other = fits and most and not row["peer"].startswith("ours")
        cells.append(
            [
                model_name(row),
                peer_name(row),
                f"{count_name(a)} to {count_name(b)}",
                row["slope_kib_per_token"],
                floors.get(row["shape"]),
                None if fits is None else count_name(fits),
                row.get("fits_host_gib"),
                f"{number(most / fits)} times" if is_other else None,
                run_of(row),
            ]
        )
    columns = ["model", "set up by", "between", "KiB a token", "floor", "GPU holds, tokens", "host then, GiB"]
    return table(*without_empty([*columns, "a prepared model holds", "run"], cells))


def without_empty(columns: list[str], rows: list[list]) -> tuple[list[str], list[list]]:
    """A table without the columns in which no row has anything."""
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def first_steps(rows: list[dict]) -> bool:
    """Whether a time of these rows is that of a first step."""
    return any("--repeats 0" in row.get("command", "") for row in rows)


def steps_parts(rows: list[dict]) -> list[str]:
    """A table of steps, and what its columns are."""
    steps = [row for row in rows if "tokens" in row and "times_one_gpu" not in row]
    text = (
        "Forward and backward of one sequence, random weights, bf16, no optimizer. K is 1024 tokens, M is "
        "1024 K. The floor is the time of the operations, without those that are done again, at 989 TFLOP/s "
        "a GPU. Host memory is what a prepared model pins, blank where it is not known."
    )
    if first_steps(rows):
        text += (
            " Steps of a run with `--repeats 0` are the first of their length: kernels are compiled and host "
            "memory is pinned in them. [Training](training.md) has later ones."
        )
    return ["## Steps", text, step_table(steps)]


def memory_parts(rows: list[dict]) -> list[str]:
    """Memory a token, and what follows from it."""
    memory = pairs(rows)
    if not memory:
        return []
    text = (
        "What a token takes on the GPU beyond weights and gradients, by the peaks at two lengths. The floor "
        "is what the backward of one layer cannot do without: one gradient, keys and values, and their fp32 "
        "gradients."
    )
    if any("fits" in row for row in memory):
        text += (
            " How many tokens the GPU holds is not run but computed, from the line through both peaks and "
            "the memory of the GPU; the host is taken to have what is needed then. `prepare_training` by "
            "itself has no such line, for it moves layer inputs to the host before the GPU is full."
        )
    if any(row["peer"] == "eager" for row in memory):
        text += " The memory of `eager` grows faster than its line."
    return ["## Memory a token", text, memory_table(memory)]


def several_parts(rows: list[dict]) -> list[str]:
    """Several GPUs beside one."""
    compared = [row for row in rows if "times_one_gpu" in row]
    if not compared:
        return []
    fields = ("times_one_gpu", "activations_of_one_gpu")
    lines = [
        [peer_name(r), r["ranks"], count_name(r["tokens"]), *(r.get(field) for field in fields)]
        for r in compared
    ]
    text = (
        "Both in the same run. Activations are the memory of a GPU and of the host for it, without weights "
        "and gradients. A prepared model keeps on the GPU what fits there: with more GPUs the peak of each "
        "may rise, for less goes to the host."
    )
    if first_steps(rows) and any(row["times_one_gpu"] > row["ranks"] for row in compared):
        text += (
            " A first step also pins host memory, less of it for each of several GPUs: they may be faster by "
            "more than their number."
        )
    columns = ["set up by", "GPUs", "tokens", "times as fast as one", "activations a GPU, of those of one"]
    return ["## Several GPUs beside one", text, table(columns, lines)]


def check_parts(rows: list[dict]) -> list[str]:
    """Errors of gradients, from before anything was timed."""
    parts = []
    for row in rows:
        if "check" in row:
            found = [name for name in row if name.startswith(("sdpa", "ours"))]
            errors = ", ".join(f"{PEERS[n] if n != 'sdpa' else '`sdpa`'} {number(row[n])}" for n in found)
            text = f"Relative errors of {row['check']} against fp32 ({run_of(row)}): {errors}."
            parts += ["## Check", text]
    return parts


def steps_text(result: Result) -> str:
    """Speed, memory and what follows from it."""
    rows = result.rows
    parts = [*steps_parts(rows), *memory_parts(rows), *several_parts(rows), *check_parts(rows)]
    return "\n\n".join(parts)


def memory_text(result: Result) -> str:
    """Memory first: these steps were taken for it."""
    rows = result.rows
    parts = [*memory_parts(rows), *steps_parts(rows), *several_parts(rows), *check_parts(rows)]
    return "\n\n".join(parts)


# ---- figures


def has_steps(result: Result) -> bool:
    """Whether a peer took steps of two lengths."""
    rows = [row for row in result.rows if "step_s" in row]
    return has_line(rows, "tokens", "shape", "layers", "lora", "peer", "ranks")


def draw_steps(result: Result, axes: list) -> None:
    """Tokens a second and peak memory against the length, a line a peer of one model."""
    rows = [row for row in result.rows if "step_s" in row]
    settings = list(dict.fromkeys((model_name(row), row["peer"], row.get("ranks", 1)) for row in rows))
    speed = "tokens/s, first step" if first_steps(rows) else "tokens/s"
    for axis, field, title in zip(
        axes, ("tokens_per_s", "peak_gib"), (speed, "peak memory, GiB"), strict=True
    ):
        for setting in settings:
            mine = [r for r in rows if (model_name(r), r["peer"], r.get("ranks", 1)) == setting]
            points = sorted((row["tokens"], row[field]) for row in mine if field in row)
            if points:
                # A second model or number of GPUs takes the colours that come next.
                colour = COLOURS.get(setting[1]) if setting[::2] == settings[0][::2] else None
                axis.plot(
                    *zip(*points, strict=True), marker="o", label=label(settings, setting), color=colour
                )
        set_lengths(axis, [row["tokens"] for row in rows])
        axis.set(xlabel="tokens", title=title, ylim=(0, None))
        axis.yaxis.set_major_formatter("{x:,.0f}")
    legend_below(axes[0], columns=1)


def label(settings: list[tuple], setting: tuple) -> str:
    """The peer, and the model and the GPUs where they differ between lines."""
    model, peer, ranks = setting
    parts = [PEERS.get(peer, peer).replace("`", "")]
    if len({other[0] for other in settings}) > 1:
        parts.append(model)
    if len({other[2] for other in settings}) > 1:
        parts.append(f"{ranks} GPU" + ("s" if ranks > 1 else ""))
    return ", ".join(parts)


def held(result: Result) -> list[dict]:
    """The rows that say how long a sequence a GPU holds, those of the first model, the longest first."""
    rows = [row for row in pairs(result.rows) if "fits" in row]
    return sorted((r for r in rows if model_name(r) == model_name(rows[0])), key=lambda row: -row["fits"])


def has_memory(result: Result) -> bool:
    """Whether there are two bars to compare."""
    return len(held(result)) > 1


def draw_memory(result: Result, axes: list) -> None:
    """The longest sequence a GPU holds, and its memory a token beside the floor, a bar a peer."""
    rows = held(result)[::-1]
    names = [PEERS.get(row["peer"], row["peer"]).replace("`", "").replace("(", "(\n") for row in rows]
    colours = [OURS if row["peer"].startswith("ours") else THEIRS for row in rows]
    titles = (f"{model_name(rows[0])}: longest sequence, tokens", "memory a token, KiB")
    for axis, field, title in zip(axes, ("fits", "slope_kib_per_token"), titles, strict=True):
        sizes = [row[field] for row in rows]
        bars = axis.barh(names, sizes, color=colours, height=0.6)
        axis.bar_label(bars, [count_label(size) for size in sizes], fontsize=8, padding=3)
        # A bar begins a decade below the shortest of them, and its number needs room behind the longest.
        axis.set(xscale="log", title=title, xlim=(min(sizes) / 10, 15 * max(sizes)), xlabel="log scale")
        axis.minorticks_off()
    axes[1].tick_params(labelleft=False)
    for floor in {row["floor_kib_per_token"] for row in rows if "floor_kib_per_token" in row}:
        axes[1].axvline(floor, linestyle="--", color=FLOOR)
        axes[1].text(
            floor, 1.0, f" floor: {floor:g}", transform=axes[1].get_xaxis_transform(), va="top", fontsize=8,
            color=FLOOR,
        )  # fmt: skip


def count_label(value: float) -> str:
    """A whole number with its thousands apart, or one digit behind the point of a small one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
