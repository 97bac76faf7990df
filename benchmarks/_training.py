"""Pages and figures of the training recipes, from the rows that `write_report` of recipes/_common.py writes.

section "result"    a run: what was trained, on how many tokens, its held-out loss
section "curve"     held-out loss of a run after so many tokens
section "passkey"   share of keys found at a length, by the run and by the model that it came from
section "position"  held-out loss of the tokens between two positions, before and after
"""

from collections.abc import Callable

from _figures import FLOOR, has_line, legend_below, set_lengths
from _tables import Result, length_name, table, values

COLUMNS = {
    "run": "run",
    "parameters": "parameters",
    "length": "row, tokens",
    "tokens": "tokens",
    "unique_tokens": "of text, tokens",
    "transfer_tokens": "of them for transfer",
    "loss_before": "loss before",
    "loss": "loss after",
    "untrained_vanilla_loss": "vanilla, untrained",
    "last_word": "last words, right",
    "next_sentence": "next sentences, right",
    "tokens_per_s": "tokens/s in training",
    "tflop_per_s": "TFLOP/s",
    "generated_per_s": "tokens/s in `generate()`",
}
LONG_COLUMNS = {
    "run": "run",
    "parameters": "parameters",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_s": "tokens/s in training",
    "peak_gib": "peak, GiB",
}
# Shares of right answers to zero-shot questions.
ANSWERS = ("last_word", "next_sentence")


def millions(field: str, value):
    """Counts of tokens and parameters in millions; the length of a row, and all else, as they are."""
    counts = ("parameters", "tokens", "unique_tokens", "transfer_tokens")
    return f"{value / 1e6:,.1f} million" if field in counts and value is not None else value


def training_text(result: Result) -> str:
    """A row a run, and the passkeys by length where there are any."""
    runs = result.where(section="result").rows
    fields = [field for field in COLUMNS if any(row.get(field) is not None for row in runs)]
    cells = [[exact(field, millions(field, row.get(field))) for field in fields] for row in runs]
    parts = [
        "Losses are means over the same held-out documents, in nats a token. Tokens a second in training "
        "count evaluations and checkpoints; TFLOP/s count six operations a weight and token.",
        table([COLUMNS[field] for field in fields], cells),
    ]
    if keys := result.where(section="passkey").rows:
        lengths = sorted({row["length"] for row in keys})
        share = {(row["run"], row["length"]): row["accuracy"] for row in keys}
        source = {row["length"]: row["source"] for row in keys}
        lines = [["the source", *(percent(source[n]) for n in lengths)]]
        lines += [[run, *(percent(share.get((run, n))) for n in lengths)] for run in values(keys, "run")]
        parts += [
            "Passkeys found, by length of the prompt:",
            table(["run", *map(length_name, lengths)], lines),
        ]
    return "\n\n".join(parts)


def position_text(result: Result) -> str:
    """What was trained, and the loss by position before and after."""
    runs = result.where(section="result").rows
    cells = [[millions(f, row.get(f)) for f in LONG_COLUMNS] for row in runs]
    parts = [
        "Tokens a second are those of training alone. Losses are means over the tokens of held-out pieces "
        "between two positions, in nats a token.",
        table(list(LONG_COLUMNS.values()), cells),
    ]
    for run in values(runs, "run"):
        rows = result.where(section="position", run=run).rows
        lines = [
            [f"{r['start']:,} to {r['stop']:,}", exact("loss", r["before"]), exact("loss", r["after"])]
            for r in rows
        ]
        parts += [f"{run}:", table(["positions", "loss before", "loss after"], lines)]
    return "\n\n".join(parts)


def draw_positions(result: Result, axis) -> None:
    """Held-out loss against the position, before and after."""
    for run in values(result.where(section="position").rows, "run"):
        rows = sorted(result.where(section="position", run=run).rows, key=lambda row: row["stop"])
        for kind in ("before", "after"):
            points = [(row["stop"], row[kind]) for row in rows if row[kind] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=f"{run}, {kind}")
    set_lengths(axis, [row["stop"] for row in result.where(section="position").rows])
    axis.set(xlabel="position in the piece, tokens, up to", title="held-out loss, nats a token")
    legend_below(axis)


def exact(field: str, value):
    """Shares in percent; losses to four digits behind the point: their differences are what is compared."""
    if field in ANSWERS:
        return percent(value)
    return f"{value:.4f}" if "loss" in field and value is not None else value


def percent(share: float | None) -> str:
    """0.25 as 25 %."""
    return "" if share is None else f"{100 * share:.0f} %"


def draw_losses(result: Result, axis) -> None:
    """Held-out loss against tokens, a line a run."""
    for run in values(result.rows, "run"):
        points = sorted((r["tokens"], r["loss"]) for r in result.where(section="curve", run=run).rows)
        if points:
            tokens, losses = zip(*points, strict=True)
            axis.plot([n / 1e6 for n in tokens], losses, marker=".", label=run)
    # Before training a random model is far above all the others.
    finals = [row["loss"] for row in result.where(section="result").rows]
    axis.set(xlabel="tokens, millions", title="held-out loss", ylim=(min(finals) - 0.1, max(finals) + 1.5))
    legend_below(axis)


def draw_passkeys(result: Result, axis) -> None:
    """Passkeys found against the length of the prompt."""
    keys = result.where(section="passkey").rows
    source = sorted({(row["length"], 100 * row["source"]) for row in keys})
    if source:
        axis.plot(*zip(*source, strict=True), "--", color=FLOOR, label="the source")
    for run in values(keys, "run"):
        points = sorted((r["length"], 100 * r["accuracy"]) for r in keys if r["run"] == run)
        axis.plot(*zip(*points, strict=True), marker="o", label=run)
    set_lengths(axis, [row["length"] for row in keys])
    axis.set(xlabel="prompt, tokens", title="passkeys found, %", ylim=(-3, 103))


def front(runs: list[dict]) -> list[tuple[float, float]]:
    """(speed, loss) of the runs that none is at least as fast as and better than, the slowest first."""
    points = sorted(((r["generated_per_s"], r["loss"]) for r in runs), key=lambda p: (-p[0], p[1]))
    best = [p for i, p in enumerate(points) if all(p[1] < other[1] for other in points[:i])]
    return best[::-1]


def with_answers(row: dict) -> str:
    """The name of a run, and its shares of right answers where it was asked."""
    shares = [
        f"{name.replace('_', ' ')} {percent(row[name])}" for name in ANSWERS if row.get(name) is not None
    ]
    return ", ".join([row["run"], *shares])


def draw_pareto(result: Result, axis) -> None:
    """Held-out loss against tokens a second of `generate()`: further right and further down is better."""
    runs = [row for row in result.where(section="result").rows if row.get("generated_per_s")]
    for kind in ("vanilla", "block"):
        mine = sorted(
            (r["generated_per_s"], r["loss"], with_answers(r)) for r in runs if r["run"].startswith(kind)
        )
        if mine:
            speeds, losses, names = zip(*mine, strict=True)
            axis.plot(speeds, losses, "o", label=kind)
            for point in zip(names, speeds, losses, strict=True):
                axis.annotate(point[0], point[1:], fontsize=6, xytext=(3, 3), textcoords="offset points")
    if runs:
        axis.plot(*zip(*front(runs), strict=True), "--", color=FLOOR, linewidth=0.8, label="best of all")
    axis.set_xscale("log")
    axis.set(xlabel="generated tokens/s", title="held-out loss against speed")
    legend_below(axis)


def panels(*parts: Callable) -> Callable[[Result, list], None]:
    """One figure of several parts, a panel each."""

    def draw(result: Result, axes: list) -> None:
        for part, axis in zip(parts, axes, strict=True):
            part(result, axis)

    return draw


def has_curves(result: Result) -> bool:
    """Whether a run was looked at more than once, at a number of tokens, a length or a position."""
    ways = {"curve": "tokens", "passkey": "length", "position": "stop"}
    return any(has_line(result.where(section=name).rows, across, "run") for name, across in ways.items())


# Text, figure, how many panels it has, a field of every row with a loss, and whether there is a figure.
TRAINING = {
    "linearize": (training_text, panels(draw_losses, draw_passkeys), 2, "loss", has_curves),
    "pretrain_lightning": (training_text, panels(draw_losses), 1, "loss", has_curves),
    "finetune_long": (position_text, panels(draw_positions), 1, "after", has_curves),
    "uptrain_block_transformer": (training_text, panels(draw_losses, draw_pareto), 2, "loss", has_curves),
}
