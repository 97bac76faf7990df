"""The benchmark of the cross-entropy: what it refuses to time, and all of it on tiny shapes."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longattn.kernels.cross_entropy import cross_entropy

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "bench_cross_entropy.py"
WAYS = [
    ("torch", "none"),
    ("kernel", "none"),
    ("torch", "apart"),
    ("kernel", "apart"),
    ("kernel", "in place"),
]


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CUDA", False)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    return module


def kernel(fault):
    """Plain torch in the place of the kernel, with something wrong."""

    def run(logits, targets, *, impl, overwrite=False, **options):
        losses, gradient = cross_entropy(logits, targets, impl="reference", **options)
        if gradient is not None and overwrite and fault != "apart":
            gradient = logits.copy_(gradient)
        if fault == "loss":
            losses *= 1 + 1e-5
        if gradient is not None and fault == "gradient":
            gradient *= 1.01
        if gradient is not None and fault == "nan":
            gradient[1, 2] = math.nan
        return losses, gradient

    return run


def rows_of(bench, monkeypatch, folder, fault):
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(bench, "cross_entropy", kernel(fault))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--check"])
    bench.main()
    return json.loads((folder / "cross_entropy.json").read_text())


@pytest.mark.parametrize("fault", ["loss", "gradient", "nan", "apart"])
def test_what_is_wrong_is_not_timed(bench, monkeypatch, tmp_path, fault):
    with pytest.raises(SystemExit, match="8 of 8 are wrong: nothing is timed"):
        rows_of(bench, monkeypatch, tmp_path, fault)
    rows = json.loads((tmp_path / "cross_entropy.json").read_text())
    assert {row["section"] for row in rows} == {"check"} and not any(row["good"] for row in rows)


def test_the_floor_moves_what_must_be_moved_and_the_page_says_so(bench, monkeypatch, tmp_path):
    rows = rows_of(bench, monkeypatch, tmp_path / "benchmarks" / "results", None)
    timed = [row for row in rows if row["section"] == "time"]
    assert [(row["peer"], row["gradient"]) for row in timed] == 2 * WAYS
    for row in timed:
        n, V = (int(part) for part in row["case"][1:].split("-V"))
        moved = n * V * 2 * (1 if row["gradient"] == "none" else 2)
        assert row["floor"] == pytest.approx(1e3 * moved / row["copy_rate"])
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor"])
    shutil.copy(FOLDER.parent / "README.md", tmp_path)
    command = [sys.executable, str(FOLDER / "plot.py"), "--root", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "docs/benchmarks/cross_entropy.md").read_text()
    assert "| rows and vocabulary | peer | gradient is | ms | floor, ms | time ÷ floor |" in page
    assert "| 4 × 300 | `cross_entropy` | over the logits |" in page and "copy_rate" not in page
    assert (tmp_path / "docs/images/cross_entropy.png").exists()


@pytest.mark.slow
def test_the_kernel_passes_under_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    variables = {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    variables = os.environ | variables | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), "--check"], env=variables, check=True, timeout=200)
    rows = json.loads((tmp_path / "cross_entropy.json").read_text())
    assert [row["good"] for row in rows if row["section"] == "check"] == [True] * 8
    assert [(row["peer"], row["gradient"]) for row in rows if row["section"] == "time"] == 2 * WAYS
