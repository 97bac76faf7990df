"""Bookkeeping of the benchmarks: rows of measurements with the facts of the machine, saved after each.

Import it from a script in this folder:

    from _report import Report

    report = Report("decode_attention", deadline=150)
    if report.time_left() > 5:
        report.add(case="S65536-B1", us=61.0)
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch


def commit() -> str:
    """The commit under test: `GIT_COMMIT` where set (a copy without history), else what git says."""
    if "GIT_COMMIT" in os.environ:
        return os.environ["GIT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def facts() -> dict:
    """What a reader needs to judge a number: GPU, versions, commit, date and command."""
    try:
        import triton
    except ModuleNotFoundError:
        triton = None
    cuda = torch.cuda.is_available()
    ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = [] if ranks == "1" else ["torchrun", "--standalone", "--nproc-per-node", ranks]
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


class Report:
    """Rows of one benchmark, in `folder`, `$OUT` or benchmarks/results; every `add` rewrites the file."""

    def __init__(self, name: str, deadline: float = float("inf"), folder: Path | None = None):
        self.start, self.deadline = time.time(), deadline
        folder = folder or Path(os.environ.get("OUT") or Path(__file__).parent / "results")
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.machine, self.rows = folder / f"{name}.json", facts(), []

    def time_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - (time.time() - self.start)

    def add(self, **row) -> dict:
        """Prints and saves one row, with the machine's facts in it."""
        words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(*words, flush=True)
        self.rows.append({**row, **self.machine})
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return row
