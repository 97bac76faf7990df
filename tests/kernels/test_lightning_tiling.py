"""The tilings of lightning attention, and the benchmark that searches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_longattn.kernels.lightning_attention import tiling


def test_tilings_fit_their_problem():
    """Tiles are no wider than the head, few short sequences get narrow ones, precision where it counts."""
    for dim in (16, 48, 64, 96, 128, 192, 256):
        for length, rows in ((1, 4), (64, 4), (1024, 32), (16384, 32), (1024, 4096)):
            chosen = tiling.choose_tiling(dim, dim, torch.bfloat16, length, rows)
            columns = -(-dim // chosen.block_v)
            assert chosen.block_v // 2 < dim and chosen.block_v * max(dim, 64) <= 64 * 128
            assert length > 2048 or chosen.block_v == 16 or rows * columns >= tiling.FULL
            assert (chosen.split == tiling.EVERYTHING) == (length <= chosen.chunk)
            half = tiling.choose_tiling(dim, dim, torch.float16, length, rows)
            assert half.split == tiling.EVERYTHING and half.block_v == chosen.block_v
        block, warps = tiling.choose_step_tiling(dim, dim)
        assert block // 2 < dim and block * dim <= 255 * 32 * warps


@pytest.mark.slow
def test_benchmark_searches_every_goal(tmp_path):
    """The benchmark's search, interpreted: each goal ends in one row that holds the fastest right choice."""
    script = Path(__file__).parents[2] / "benchmarks" / "bench_lightning_attention.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, "--best"], env=environment, check=True, timeout=150)
    rows = json.loads((tmp_path / "lightning_attention_best.json").read_text())
    best = [row for row in rows if row.get("role") == "best"]
    assert [row["section"] for row in best] == ["forward", "backward", "decode"]
    for row in best:
        same = [r for r in rows if r["case"] == row["case"] and r["section"] == row["section"]]
        choices = {(r["tiling"], r.get("cut")): r["ms"] for r in same if r["role"] != "best"}
        assert choices[row["tiling"], row.get("cut")] == min(choices.values())
        assert row["error"] < 1e-4 and row["over_floor"] > 0
    assert not any(isinstance(row.get("error"), str) for row in rows)
