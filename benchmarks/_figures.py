"""What the figures share: panels, axes of lengths, legends, and whether there is a line to draw."""

import math
import textwrap
from pathlib import Path

from _tables import conditions, length_name

OURS, THEIRS, FLOOR = "#1f6fb4", "#d1622b", "#555555"


def new_figure(panels: int):
    """A figure with panels side by side; matplotlib is imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.6 * panels, 3.9), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def save(figure, path: Path, rows: list[dict], digest: str) -> None:
    """Writes the figure with its conditions below and its digest inside."""
    # About 20 letters of this size are an inch wide.
    text = textwrap.fill(conditions(rows), int(20 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=6, color=FLOOR)
    figure.savefig(path, dpi=150, metadata={"Description": digest, "Software": None})


def has_line(rows: list[dict], across: str, *fields: str) -> bool:
    """Whether some line, of rows alike in `fields`, joins two points: lone ones are read in the table."""
    lines: dict[tuple, set] = {}
    for row in rows:
        if across in row:
            lines.setdefault(tuple(row.get(field) for field in fields), set()).add(row[across])
    return any(len(points) > 1 for points in lines.values())


def named(lengths: list[int]) -> list[int]:
    """Of ascending lengths those that are named on a logarithmic axis: names too near each other overlap."""
    least = 0.1 * math.log2(lengths[-1] / lengths[0])
    found = [lengths[-1]]
    for length in lengths[-2::-1]:
        if math.log2(found[-1] / length) >= least:
            found.append(length)
    return found[::-1]


def set_lengths(axis, lengths: list[int]) -> None:
    """A logarithmic axis of lengths, a tick at each that was measured."""
    found = sorted(set(lengths))
    shown = named(found) if found else []
    axis.set_xscale("log", base=2)
    axis.set_xticks(found, [length_name(length) if length in shown else "" for length in found])


def legend_below(axis, columns: int = 2) -> None:
    """The legend where no point can be."""
    axis.legend(frameon=False, fontsize=7, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.17))
