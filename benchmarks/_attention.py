"""Pages and figures of bench_decode_attention.py and bench_blockwise_attention.py."""

import re

from _figures import OURS, THEIRS
from _tables import Result, length_name, run_of, table

DECODE_CASE = re.compile(r"(decode|sdpa)-(.+)-B(\d+)-S(\d+)")
SDPA_NAMES = {
    "flash_attention": "SDPA, flash",
    "cudnn_attention": "SDPA, cuDNN",
    "masked": "SDPA with a mask",
}
# What was timed, by the name in the rows of the blockwise benchmark.
BLOCKWISE_NAMES = {
    "sdpa": "SDPA kernels",
    "FlashKernels": "SDPA kernels, flash",
    "triton": "Triton",
    "PlainTorch": "torch alone",
}

DECODE_WORDS = (
    "One query on a cache of keys: 32 query heads, 8 key heads, head dim 128, bf16. K is 1024 keys.\n\n"
    "- `padding` hides a sixteenth of the keys of the first row, up to half of the last.\n"
    "- `window` sees seven eighths of the keys; one of 4096 reads too few for the full rate of the memory.\n"
    "- `capacity` has two thirds of the buffer filled.\n"
    "- `holes` hides a fifth of the keys at random.\n"
    "- `int8` and `fp8` are caches in 8 bits.\n\n"
    "The bytes counted are those of the keys and values that the mask leaves visible. The script checks "
    "errors against fp64 first and times nothing if a kernel is wrong."
)
BLOCKWISE_WORDS = (
    "32 query heads, 8 key heads, 32K tokens, bf16; `D128` and `D64` are head dims. TFLOP/s count 4 "
    "operations a visible pair and head dim forward, 10 backward. Of `blockwise_attention` there are two "
    "implementations on a GPU:\n\n"
    "- `SDPA kernels`: those of torch, by cuDNN or by flash, for dense and causal attention.\n"
    "- `Triton`: its own, for windows, packed documents, padding, softcap and sinks too.\n\n"
    "`torch alone` is `scaled_dot_product_attention` by cuDNN. Since commit 49182cc, it and the SDPA kernels "
    "are called in turns, one call of each, every turn the other way round, and each time is the median of "
    "its calls: the clock of a GPU that has just become warm is not that of a busy one. What differs by a "
    "few per cent between two runs (the last column) is no difference of the kernels. The script checks "
    "outputs and gradients against fp64 first and times nothing if a kernel is wrong."
)


# ---- a decoding step


def decode_cases(result: Result) -> list[tuple[str, str, int, int, dict]]:
    """(ours or sdpa, kind, batch, keys, row) of every timed case of a step, by batch and keys."""
    found = [(DECODE_CASE.fullmatch(str(row.get("case"))), row) for row in result.rows if "us" in row]
    cases = [(m[1], m[2], int(m[3]), int(m[4]), row) for m, row in found if m]
    # Ours together, and what they are held against behind them.
    kinds = sorted(dict.fromkeys(case[:2] for case in cases), key=lambda kind: kind[0] != "decode")
    return sorted(cases, key=lambda case: (*case[2:4], kinds.index(case[:2])))


def case_name(ours: str, kind: str) -> str:
    """The label of a case in tables and figures."""
    kind = kind.replace("window-", "window of ")
    return f"`decode_attention`, {kind}" if ours == "decode" else SDPA_NAMES.get(kind, f"SDPA, {kind}")


def decode_text(result: Result) -> str:
    """Time of one decoding step over a cache, and the share of the bandwidth."""
    columns = ["case", "batch", "keys", "eager, µs", "graph, µs", "GB/s", "share of 3.35 TB/s", "run"]
    fields = ("us", "graph_us", "gb_per_s")
    rows = [
        [case_name(o, kind), b, length_name(s), *(r.get(f) for f in fields), f"{r['share']:.0%}", run_of(r)]
        for o, kind, b, s, r in decode_cases(result)
    ]
    return "\n\n".join([DECODE_WORDS, table(columns, rows)])


def draw_decode(result: Result, axes: list) -> None:
    """Share of the bandwidth by case, at the longest cache of batch 1 at which SDPA was timed with a mask."""
    cases = [case for case in decode_cases(result) if case[2] == 1] or decode_cases(result)
    masked = [case for case in cases if case[:2] == ("sdpa", "masked")]
    keys = max(case[3] for case in (masked or cases))
    shown = [case for case in cases if case[3] == keys][::-1]
    names = [case_name(*case[:2]).replace("`", "") for case in shown]
    colours = [OURS if case[0] == "decode" else THEIRS for case in shown]
    bars = axes[0].barh(names, [100 * case[4]["share"] for case in shown], color=colours)
    axes[0].bar_label(bars, fmt="%.0f %%", fontsize=7, padding=2)
    axes[0].set(title=f"a step over {length_name(keys)} keys, % of 3.35 TB/s", xlim=(0, 108))
    axes[0].tick_params(axis="y", labelsize=7)


# ---- forward and backward


def blockwise_text(result: Result) -> str:
    """Speed forward and backward on the visible pairs, and memory a token."""
    columns = ["case", "kernel", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", "run"]
    fields = ("case", "impl", "forward_ms", "forward_tflops", "backward_ms", "backward_tflops")
    lines = [blockwise_cells(row, fields) for row in result.where(section="time").rows]
    parts = ["## Speed", BLOCKWISE_WORDS, table(columns, lines)]
    if memory := result.where(section="memory").rows:
        lines = [
            [length_name(int(row["case"].removeprefix("T"))), row["bytes_per_token"], run_of(row)]
            for row in memory
        ]
        parts += [
            "## Memory",
            "Peak memory a token above the inputs, forward and backward with a window of 1024:",
            table(["tokens", "bytes a token", "run"], lines),
        ]
    return "\n\n".join(parts)


def blockwise_cells(row: dict, fields: tuple[str, ...]) -> list:
    """The cells of one row, with the name of what was timed, and the run."""
    cells = [BLOCKWISE_NAMES.get(row[f], row[f]) if f == "impl" else row[f] for f in fields]
    return [*cells, run_of(row)]


def draw_blockwise(result: Result, axes: list) -> None:
    """TFLOP/s forward and backward of every case."""
    rows = result.where(section="time").rows[::-1]
    names = [f"{row['case']}, {BLOCKWISE_NAMES.get(row['impl'], row['impl'])}" for row in rows]
    colours = [THEIRS if row["impl"] == "PlainTorch" else OURS for row in rows]
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        bars = axis.barh(names, [row[f"{way}_tflops"] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
        axis.set(title=f"{way}, TFLOP/s on visible pairs")
        axis.tick_params(axis="y", labelsize=7, labelleft=axis is axes[0])
