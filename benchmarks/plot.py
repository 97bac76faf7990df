"""Makes the tables and figures of the documentation from the result files of the benchmarks.

    python benchmarks/plot.py            write docs/benchmarks/*.md, docs/images/*.png and the README's blocks
    python benchmarks/plot.py --check    change nothing; fail if any of them is stale

Every file in benchmarks/results becomes a page. A row is a dict that carries the facts of its machine (see
`_report.py`). A figure carries a digest of the rows it was drawn from, so that a stale one is told without
drawing it again.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _attention import blockwise_text, decode_text, draw_blockwise, draw_decode
from _losses import draw_losses, losses_text
from _models import draw_models, models_text
from _several import draw_prefill, prefill_text
from _steps import draw_steps, steps_text
from _tables import (
    FACTS,
    Result,
    conditions,
    days,
    how_measured,
    length_name,
    load,
    run_of,
    table,
    values,
    versions,
)
from _training import TRAINING
from _words import COLUMNS, HIDDEN, SENTENCES, of_page

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
    "prepared": "#1f6fb4", "eager-prepared": "#7fb0d8", "sdpa": "#d1622b", "sdpa-static": "#e8b18f",
    "prepared-int8": "#2a9d6f", "prepared-fp8": "#7a4fa3",
}  # fmt: skip
SEVERAL = " Several GPUs share a prompt: floor and peak are those of one of them, with its share."


# ---- pages


def generation_text(result: Result) -> str:
    """Time to the first token, time a token and peak memory of `generate()`."""
    columns = [
        "prompt",
        "batch",
        "padding",
        "set up by",
        "first token, s",
        "a token, ms",
        "floor, ms",
        "peak, GiB",
        "run",
    ]
    several = any(num_gpus(row) > 1 for row in result.rows)
    columns += ["GPUs"] if several else []
    rows = []
    for row in result.rows:
        cells = [
            length_name(row["prompt"]),
            row["batch"],
            row.get("pad", 0),
            PEERS.get(row["peer"], row["peer"]),
        ]
        if "error" in row:
            measured = ["out of memory", "", row["floor_ms"], ""]
        else:
            measured = [row["first_token_s"], row["token_ms"], row["floor_ms"], row["peak_gib"]]
        rows.append([*cells, *measured, run_of(row), *([num_gpus(row)] if several else [])])
    return "\n\n".join(
        [
            f"`generate()` with one long prompt, {model_shape(result.rows)}, random weights, bf16, greedy. "
            "K is 1024 tokens. The floor is the time to move weights and cache once at the copy rate "
            "measured in the same run." + (SEVERAL if several else ""),
            table(columns, rows),
            agreement(result.rows),
        ]
    ).rstrip()


def num_gpus(row: dict) -> int:
    """GPUs that share a prompt: one a process, or all those of a single one."""
    return row.get("ranks", row.get("gpus", 1))


def model_shape(rows: list[dict]) -> str:
    """The model of the generation benchmark, in words."""
    layers = ", ".join(values(rows, "layers"))
    return "the shape of Llama-3.1-8B" + ("" if layers == "32" else f" with {layers} layers")


def agreement(rows: list[dict]) -> str:
    """How many runs gave the tokens of the first peer that ran the same prompt."""
    firsts, compared = set(), []
    for row in rows:
        # Rows of one run share its date.
        prompt = row["date"], row["prompt"], *setting(row)
        if prompt in firsts and "same_tokens_as_first_peer" in row:
            compared.append(row["same_tokens_as_first_peer"])
        if "error" not in row:
            firsts.add(prompt)
    if not compared:
        return ""
    return (
        f"Runs whose greedy tokens equal those of the first peer on the same prompt: {sum(compared)} of "
        f"{len(compared)}. In bf16 a tie between two logits may fall either way."
    )


def plain_text(result: Result) -> str:
    """All rows as they are, a table a section, with the words that there are for them."""
    parts, sentences = [], of_page(SENTENCES, result.name)
    names = of_page(COLUMNS, result.name)
    hidden = {*of_page(HIDDEN, result.name), *FACTS, "section", "target"}
    # Sections may stand from different runs.
    hidden -= {"commit"} if len(values(result.rows, "commit")) > 1 else set()
    for section in values(result.rows, "section") or [None]:
        rows = result.where(section=section).rows if section else result.rows
        fields = [f for f in dict.fromkeys(key for row in rows for key in row) if f not in hidden]
        parts += [f"## {section.capitalize()}"] if section else []
        parts += [sentences[section]] if section in sentences else []
        columns = [names.get(field, field) for field in fields]
        parts.append(table(columns, [[row.get(field) for field in fields] for row in rows]))
    return "\n\n".join(parts)


def spaced(name: str) -> str:
    """The name of a result file in words."""
    return name.replace("_", " ").replace("gpu", "GPU")


def page(result: Result, text: str, has_figure: bool) -> str:
    """One page: title, machine, figure, tables, commands."""
    title = spaced(result.name)
    machine = f"{versions(result.rows)}, {days(result.rows)}: [commits and commands](#how-it-was-measured)."
    parts = [f"# {title[0].upper()}{title[1:]}", machine]
    parts += [f"![{result.name}](../images/{result.name}.png)"] if has_figure else []
    return "\n\n".join([*parts, text, how_measured(result.rows)]) + "\n"


# ---- figures


def new_figure(panels: int):
    """A figure with panels side by side; matplotlib is imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.6 * panels, 3.6), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def save(figure, path: Path, rows: list[dict], digest: str) -> None:
    """Writes the figure with its conditions below and its digest inside."""
    # About 20 letters of this size are an inch wide.
    text = textwrap.fill(conditions(rows), int(20 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=6, color="#555555")
    figure.savefig(path, dpi=150, metadata={"Description": digest, "Software": None})


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
    lengths = sorted({row["prompt"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [length_name(length) for length in lengths])
    axis.set(xlabel="prompt, tokens", title=title, ylim=(0, None))


def draw_generation(result: Result, axes: list) -> None:
    """Time a token beside its floor, and peak memory."""
    rows = one_setting(result)
    draw_lines(axes[0], rows, "token_ms", "time a token, ms")
    draw_floors(axes[0], rows)
    axes[0].set_ylim(0, 1.15 * axes[0].get_ylim()[1])
    axes[0].legend(frameon=False, fontsize=7)
    draw_lines(axes[1], rows, "peak_gib", "peak memory, GiB")


def draw_floors(axis, rows: list[dict]) -> None:
    """The floor of each kind of cache, a bar where there is but one length of it."""
    label: str | None = "floor: bytes over copy rate"
    for bits in dict.fromkeys(row["peer"].endswith(("int8", "fp8")) for row in rows):
        mine = [row for row in rows if row["peer"].endswith(("int8", "fp8")) == bits]
        floor = sorted({(row["prompt"], row["floor_ms"]) for row in mine})
        line = {"linestyle": "--"} if floor[1:] else {"marker": "_", "markersize": 14, "linestyle": ""}
        axis.plot(*zip(*floor, strict=True), color="#555555", label=label, zorder=3, **line)
        label = None


@dataclass(frozen=True)
class Kind:
    """How the results of one benchmark become text and a figure."""

    text: Callable[[Result], str]
    draw: Callable[[Result, list], None] | None = None
    panels: int = 1
    # A field of every timed row: a file without one holds checks alone.
    timed: str = ""


KINDS = {
    "generation": Kind(generation_text, draw_generation, 2, "floor_ms"),
    "decode_attention": Kind(decode_text, draw_decode, 1, "us"),
    "blockwise_attention": Kind(blockwise_text, draw_blockwise, 2, "forward_ms"),
    "two_gpus": Kind(generation_text, None, 1, "floor_ms"),
    "tree_prefill": Kind(prefill_text, draw_prefill, 2, "tflop_a_rank"),
    "training": Kind(steps_text, draw_steps, 2, "step_s"),
    "lightning_models": Kind(models_text, draw_models, 2, "peer"),
    "cross_entropy": Kind(losses_text, draw_losses, 2, "over_floor"),
    **{name: Kind(*kind) for name, kind in TRAINING.items()},
}


def kind_of(result: Result) -> Kind:
    """The kind of a result file, by its name: "generation_b8" is one of generation; sweeps have no figure."""
    if not result.name.endswith("_tune"):
        for name, kind in KINDS.items():
            if result.name.startswith(name) and any(kind.timed in row for row in result.rows):
                return kind
    return Kind(plain_text)


# ---- the whole


@dataclass(frozen=True)
class Figure:
    """One image: how to draw it, and the rows it shows."""

    name: str
    draw: Callable[[list], None]
    panels: int
    rows: list[dict]

    @property
    def digest(self) -> str:
        """What the image must carry to be up to date."""
        return Result(self.name, self.rows).digest


def headline(results: dict[str, Result]) -> Figure | None:
    """Time a token, memory and decoding bandwidth in one figure, from what there is."""
    found = [(results[n], kind_of(results[n])) for n in ("generation", "decode_attention") if n in results]
    parts = [(result, kind) for result, kind in found if kind.draw is not None]
    if not parts:
        return None

    def draw(axes: list) -> None:
        for result, kind in parts:
            kind.draw(result, [axes.pop(0) for _ in range(kind.panels)])

    rows = [row for result, _ in parts for row in result.rows]
    return Figure("headline", draw, sum(kind.panels for _, kind in parts), rows)


def figures(results: dict[str, Result]) -> list[Figure]:
    """Every image there should be."""
    found = [headline(results)]
    for result in results.values():
        kind = kind_of(result)
        if kind.draw is not None:
            draw = lambda axes, r=result, k=kind: k.draw(r, axes)  # noqa: E731
            found.append(Figure(result.name, draw, kind.panels, result.rows))
    return [figure for figure in found if figure is not None]


def readme_blocks(results: dict[str, Result]) -> dict[str, str]:
    """What stands between the README's markers."""
    first = headline(results)
    if first is None:
        return {"headline": "", "benchmarks": "This checkout holds no measurements yet."}
    image = "![Time a token, peak memory and decoding bandwidth](docs/images/headline.png)"
    lines = "\n".join(f"- [{spaced(name)}](docs/benchmarks/{name}.md)" for name in results)
    if "generation" not in results:
        return {"headline": f"{image}\n\n{machine_of(results, first.rows)}", "benchmarks": lines}
    generation = results["generation"]
    caption = f"`generate()` on one GPU, {model_shape(generation.rows)}, bf16, batch 1."
    text = [generation_text(generation), machine_of(results, generation.rows), lines]
    return {
        "headline": f"{image}\n\n{caption} {machine_of(results, first.rows)}",
        "benchmarks": "\n\n".join(text),
    }


def machine_of(results: dict[str, Result], rows: list[dict]) -> str:
    """GPU, versions and days, and the pages that have the commits and commands of these rows."""
    names = [name for name, result in results.items() if any(row in rows for row in result.rows)]
    pages = " and ".join(f"[{spaced(name)}](docs/benchmarks/{name}.md#how-it-was-measured)" for name in names)
    return f"{versions(rows)}, {days(rows)}; commits and commands: {pages}."


def with_blocks(text: str, blocks: dict[str, str]) -> str:
    """The text with each marked block replaced."""
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no block between <!-- {name} --> and <!-- /{name} -->.")
        text = pattern.sub(
            lambda match, b=block: f"{match[1]}{b}\n{match[2]}" if b else match[1] + match[2], text
        )
    return text


def texts(root: Path, results: dict[str, Result]) -> dict[Path, str]:
    """Every text file there should be, by path."""
    folder, readme = root / "docs" / "benchmarks", root / "README.md"
    lines = [f"- [{spaced(name)}]({name}.md)" for name in results] or ["No result file yet."]
    intro = (
        "# Benchmarks\n\nEach page is made by `python benchmarks/plot.py` from a result file in "
        "`benchmarks/results`, which a script of the same name in `benchmarks/` wrote on a GPU. Every row of "
        "such a file names the GPU, the versions, the commit, the date and the command.\n\n"
    )
    found = {folder / "index.md": intro + "\n".join(lines) + "\n"}
    for name, result in results.items():
        kind = kind_of(result)
        found[folder / f"{name}.md"] = page(result, kind.text(result), kind.draw is not None)
    found[readme] = with_blocks(readme.read_text(), readme_blocks(results))
    return found


def stale(root: Path, wanted: dict[Path, str], images: list[Figure]) -> list[Path]:
    """Files that are missing, out of date, or made from a result that is gone."""
    folder = root / "docs" / "images"
    paths = {folder / f"{image.name}.png": image.digest.encode() for image in images}
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    wrong += [path for path, digest in paths.items() if not path.exists() or digest not in path.read_bytes()]
    there = {*(root / "docs" / "benchmarks").glob("*.md"), *folder.glob("*.png")}
    return wrong + sorted(there - wanted.keys() - paths.keys())


def write(root: Path, wanted: dict[Path, str], images: list[Figure]) -> None:
    """Writes what is out of date and removes what belongs to no result."""
    for path in stale(root, wanted, images):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path in wanted:
            path.write_text(wanted[path])
        elif not any(path.stem == image.name and path.suffix == ".png" for image in images):
            path.unlink()
        else:
            image = next(image for image in images if image.name == path.stem)
            figure, axes = new_figure(image.panels)
            image.draw(axes)
            save(figure, path, image.rows, image.digest)
        print(path.relative_to(root))


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail if something is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="of the repository")
    options = parser.parse_args(arguments)
    paths = sorted((options.root / "benchmarks" / "results").glob("*.json"))
    results = {path.stem: load(path) for path in paths}
    wanted, images = texts(options.root, results), figures(results)
    if not options.check:
        write(options.root, wanted, images)
        return 0
    wrong = stale(options.root, wanted, images)
    for path in wrong:
        print(f"stale: {path.relative_to(options.root)}; run `python benchmarks/plot.py`", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
