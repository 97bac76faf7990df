"""Page and figure of bench_cross_entropy.py: the times of a loss beside their floor, and the checks."""

from _figures import FLOOR, OURS, THEIRS
from _tables import Result, dtype_name, table, values
from _words import COLUMNS, SENTENCES

NAMES = {"kernel": "`cross_entropy`", "torch": "torch, fp32", "liger": "Liger"}
COLOURS = {"kernel": OURS, "torch": THEIRS, "liger": "#8a8f3c"}
PLACES = {"none": "not taken", "apart": "apart", "in place": "over the logits"}
TIMED = ("case", "peer", "gradient", "ms", "floor", "over_floor", "extra_mib")
CHECKED = (
    "case", "dtype", "smoothing", "loss", "standard_loss", "gradient_error", "standard_gradient", "good",
)  # fmt: skip


def case_name(case: str) -> str:
    """8,192 × 32,000 for n8192-V32000."""
    rows, vocabulary = case[1:].split("-V")
    return f"{int(rows):,} × {int(vocabulary):,}"


def shown(row: dict) -> dict:
    """A row with the words and units of the page."""
    return row | {
        "case": case_name(row["case"]),
        "peer": NAMES.get(row.get("peer", ""), row.get("peer")),
        "dtype": dtype_name(row.get("dtype", "")),
        "gradient": PLACES.get(row.get("gradient", ""), row.get("gradient")),
        "extra_mib": float(f"{1024 * row.get('extra_gib', 0.0):.2f}"),
    }


def losses_text(result: Result) -> str:
    """Times and memory, and errors before anything was timed."""
    parts, names = [], COLUMNS["cross_entropy"]
    for section, fields in (("time", TIMED), ("check", CHECKED)):
        rows = [shown(row) for row in result.where(section=section).rows]
        columns = [names.get(field, field) for field in fields]
        lines = [[row[field] for field in fields] for row in rows]
        parts += [f"## {section.capitalize()}", SENTENCES["cross_entropy"][section], table(columns, lines)]
    return "\n\n".join(parts)


def draw_losses(result: Result, axes: list) -> None:
    """Milliseconds by shape, a mark a peer, and the floor; the loss alone, and with its gradient."""
    rows = result.where(section="time").rows
    cases = values(rows, "case")[::-1]
    for axis, alone in zip(axes, (True, False), strict=True):
        mine = [row for row in rows if (row["gradient"] == "none") == alone]
        for peer, gradient in dict.fromkeys((row["peer"], row["gradient"]) for row in mine):
            points = [row for row in mine if (row["peer"], row["gradient"]) == (peer, gradient)]
            axis.plot(
                [row["ms"] for row in points], [cases.index(row["case"]) for row in points], "o",
                label=", ".join([NAMES.get(peer, peer).replace("`", "")] + [PLACES[gradient]] * (not alone)),
                color=COLOURS.get(peer),
                # Where the gradient has memory of its own, the mark is hollow.
                fillstyle="none" if gradient == "apart" else "full",
            )  # fmt: skip
        floors = {row["case"]: row["floor"] for row in mine}
        places = [cases.index(case) for case in floors]
        axis.plot(floors.values(), places, "|", color=FLOOR, markersize=20, label="floor")
        axis.set_yticks(range(len(cases)), [case_name(case) for case in cases])
        axis.set(xscale="log", xlim=(0.1, 30), ylim=(-0.5, len(cases) + 0.6), ylabel="rows × vocabulary")
        axis.set_title("loss alone, ms" if alone else "loss and gradient, ms")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=6.5, ncols=2, loc="upper right", markerscale=0.6)
