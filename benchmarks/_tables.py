"""Result files and what is written about them: machines, commands, numbers, tables."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FACTS = ("gpu", "cuda", "torch", "triton", "python", "commit", "date", "command")


@dataclass(frozen=True)
class Result:
    """The rows of one result file."""

    name: str
    rows: list[dict]

    def where(self, **wanted) -> "Result":
        """Only the rows whose fields have these values."""
        return Result(self.name, [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())])

    @property
    def digest(self) -> str:
        """What tells these rows from others."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()[:20]


def load(path: Path) -> Result:
    """Rows with the machine's facts in each, whichever way the file keeps them."""
    data = json.loads(path.read_text())
    rows = data if isinstance(data, list) else [{**data["machine"], **row} for row in data["rows"]]
    return Result(path.stem, rows)


def values(rows: list[dict], field: str) -> list[str]:
    """The different values of a field, in the order they come."""
    return list(dict.fromkeys(str(row[field]) for row in rows if row.get(field) is not None))


def command_line(command: str) -> str:
    """The command as a reader types it at the root of the repository."""
    words = command.split()
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = Path(words[script]).name
    recipe = Path(__file__).parents[1] / "recipes" / name
    folder = "recipes" if recipe.exists() else "benchmarks"
    launcher = words[:script] if words[0] == "torchrun" else ["python"]
    return " ".join([*launcher, f"{folder}/{name}", *words[script + 1 :]])


def days(rows: list[dict]) -> str:
    """The days of the rows, the first to the last."""
    found = sorted({date[:10] for date in values(rows, "date")})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def versions(rows: list[dict]) -> str:
    """GPU and versions."""
    parts = [", ".join(values(rows, "gpu"))]
    for field, label in (("torch", "torch"), ("triton", "Triton"), ("cuda", "CUDA"), ("python", "Python")):
        if found := values(rows, field):
            parts.append(f"{label} {', '.join(found)}")
    return ", ".join(parts)


def conditions(rows: list[dict]) -> str:
    """GPU, versions, commits and days, for the small print of a figure."""
    return f"{versions(rows)}, commit {', '.join(values(rows, 'commit'))}, {days(rows)}"


def how_measured(rows: list[dict]) -> str:
    """The end of a page: the command of every run under its commit and day, a block a machine."""
    parts = ["## How it was measured"]
    machines: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        machines.setdefault(versions([row]), []).append(row)
    for machine, found in machines.items():
        commands: dict[str, dict[str, None]] = {}
        for row in found:
            commands.setdefault(run_of(row), {})[command_line(row["command"])] = None
        blocks = ["\n".join([f"# commit {run}", *lines]) for run, lines in commands.items()]
        parts += [f"{machine}:", "```bash\n" + "\n\n".join(blocks) + "\n```"]
    return "\n\n".join(parts)


def run_of(row: dict) -> str:
    """Which run a row is of: those of one table may stand from several."""
    return f"{row['commit']}, {row['date'][:10]}"


def failure(row: dict) -> str:
    """What went wrong, in short."""
    return "out of memory" if "memory" in row["error"].lower() else row["error"]


def number(value) -> str:
    """Three significant digits, thousands apart."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item) for item in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(columns: list[str], rows: list[list]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *[[number(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def dtype_name(dtype: str) -> str:
    """bf16 for torch.bfloat16."""
    return dtype.removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def length_name(tokens: int) -> str:
    """64K for 65536."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
