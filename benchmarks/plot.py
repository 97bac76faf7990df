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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from _attention import blockwise_text, decode_text, draw_blockwise, draw_decode
from _figures import new_figure, save
from _generation import draw_generation, generation_text, has_generation, model_shape, short_text
from _losses import draw_losses, losses_text
from _models import draw_models, has_models, models_text
from _plain import plain_text
from _several import draw_prefill, has_prefill, prefill_text
from _steps import draw_memory, draw_steps, has_memory, has_steps, memory_text, steps_text
from _tables import Result, days, how_measured, load, versions
from _training import TRAINING
from _words import ABOUT, TITLES

# ---- pages


def title(name: str) -> str:
    """The title of a page; of one that has no words, the name of its result file."""
    spaced = name.replace("_", " ").replace("gpu", "GPU")
    return TITLES.get(name, spaced[0].upper() + spaced[1:])


def index(names: Collection[str]) -> str:
    """A line a page, with what is found there; pages without words come last."""
    parts = []
    for heading, pages in ABOUT.items():
        lines = [f"- [{title(name)}]({name}.md): {pages[name][1]}" for name in pages if name in names]
        parts += [f"## {heading}", "\n".join(lines)] if lines else []
    others = [f"- [{title(name)}]({name}.md)" for name in names if name not in TITLES]
    parts += ["## Others", "\n".join(others)] if others else []
    return "\n\n".join(parts or ["No result file yet."])


def page(result: Result, text: str, has_figure: bool) -> str:
    """One page: title, machine, figure, tables, commands."""
    machine = f"{versions(result.rows)}, {days(result.rows)}: [commits and commands](#how-it-was-measured)."
    parts = [f"# {title(result.name)}", machine]
    parts += [f"![{title(result.name)}](../images/{result.name}.png)"] if has_figure else []
    return "\n\n".join([*parts, text, how_measured(result.rows)]) + "\n"


# ---- kinds


def always(result: Result) -> bool:
    """Bars and marks need no second length."""
    return bool(result.rows)


@dataclass(frozen=True)
class Kind:
    """How the results of one benchmark become text and a figure."""

    text: Callable[[Result], str]
    draw: Callable[[Result, list], None] | None = None
    panels: int = 1
    # A field of every timed row: a file without one holds checks alone.
    timed: str = ""
    # Whether there is something to draw.
    has_figure: Callable[[Result], bool] = always


KINDS = {
    "generation": Kind(generation_text, draw_generation, 2, "floor_ms", has_generation),
    "decode_attention": Kind(decode_text, draw_decode, 1, "us"),
    "blockwise_attention": Kind(blockwise_text, draw_blockwise, 2, "forward_ms"),
    "two_gpus": Kind(generation_text, None, 1, "floor_ms"),
    "tree_prefill": Kind(prefill_text, draw_prefill, 2, "tflop_a_rank", has_prefill),
    "training": Kind(steps_text, draw_steps, 2, "step_s", has_steps),
    "training_memory": Kind(memory_text, draw_memory, 2, "fits", has_memory),
    "lightning_models": Kind(models_text, draw_models, 2, "peer", has_models),
    "cross_entropy": Kind(losses_text, draw_losses, 2, "over_floor"),
    **{name: Kind(*kind) for name, kind in TRAINING.items()},
}


def kind_of(result: Result) -> Kind:
    """The kind of a result file, by the beginning of its name: a sweep shows its rows as they are."""
    if not result.name.endswith("_tune"):
        for name in sorted(KINDS, key=len, reverse=True):
            if result.name.startswith(name) and any(KINDS[name].timed in row for row in result.rows):
                return KINDS[name]
    return Kind(plain_text)


def drawn(result: Result) -> Callable[[Result, list], None] | None:
    """What draws the figure of a result file, where there is one to draw."""
    kind = kind_of(result)
    return kind.draw if kind.draw is not None and kind.has_figure(result) else None


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
    parts = [results[n] for n in ("generation", "decode_attention") if n in results and drawn(results[n])]
    if not parts:
        return None

    def draw(axes: list) -> None:
        for result in parts:
            kind_of(result).draw(result, [axes.pop(0) for _ in range(kind_of(result).panels)])

    rows = [row for result in parts for row in result.rows]
    return Figure("headline", draw, sum(kind_of(result).panels for result in parts), rows)


def figures(results: dict[str, Result]) -> list[Figure]:
    """Every image there should be."""
    found = [headline(results)]
    for result in results.values():
        if drawn(result):
            draw = partial(drawn(result), result)
            found.append(Figure(result.name, draw, kind_of(result).panels, result.rows))
    return [figure for figure in found if figure is not None]


def readme_blocks(results: dict[str, Result]) -> dict[str, str]:
    """What stands between the README's markers."""
    if not results:
        return {"headline": "", "benchmarks": "This checkout holds no measurements yet."}
    return {"headline": readme_figure(results), "benchmarks": readme_table(results)}


def readme_figure(results: dict[str, Result]) -> str:
    """The first figure and its conditions."""
    first = headline(results)
    if first is None:
        return ""
    image = "![Time a token, peak memory and decoding bandwidth](docs/images/headline.png)"
    caption = ""
    if "generation" in results:
        shape = model_shape(results["generation"].rows)
        caption = f"`generate()` with one long prompt on one GPU, {shape}, random weights, bf16"
        caption += "; right, one step of attention. " if "decode_attention" in results else ". "
    return f"{image}\n\n{caption}{machine_of(results, first.rows)}"


def readme_table(results: dict[str, Result]) -> str:
    """The rows of `generate()`, and where the others are."""
    everything = "All measurements: [Benchmarks](docs/benchmarks/index.md)."
    if "generation" not in results:
        return everything
    rows = results["generation"]
    end = f"{machine_of(results, rows.rows)} Batches and padding are there too. {everything}"
    return f"{short_text(rows, 'docs/benchmarks/')}\n\n{end}"


def machine_of(results: dict[str, Result], rows: list[dict]) -> str:
    """GPU, versions and days, and the pages that have the commits and commands of these rows."""
    names = [name for name, result in results.items() if any(row in rows for row in result.rows)]
    pages = " and ".join(f"[{title(name)}](docs/benchmarks/{name}.md#how-it-was-measured)" for name in names)
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
    intro = (
        "# Benchmarks\n\nEach page is made by `python benchmarks/plot.py` from a result file in "
        "`benchmarks/results`, which a script of the same name in `benchmarks/` wrote on a GPU. Every row of "
        "such a file names the GPU, the versions, the commit, the date and the command, and a page ends with "
        "them.\n\n"
    )
    found = {folder / "index.md": intro + index(results) + "\n"}
    for name, result in results.items():
        found[folder / f"{name}.md"] = page(result, kind_of(result).text(result), bool(drawn(result)))
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
