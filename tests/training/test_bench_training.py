"""The training benchmark: its arithmetic, and every way through it on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("bench_training", FOLDER / "bench_training.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules[spec.name]


OPTIONS = SimpleNamespace(shape="tiny", layers=None, lora=0, block_size=None, keep_every=None)


def test_operations_are_those_that_torch_counts(bench):
    model, ids = bench.build(OPTIONS, implementation="eager"), torch.arange(48)[None]
    with FlopCounterMode(display=False) as counter:
        bench.step(model, ids)
    config = model.config
    scores = 2 * 48**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    needed, done = bench.operations(model, 48, "eager")
    # Eager attention multiplies what the mask hides too, and computes no scores again: 6 in the place of 3.5.
    angles = 48 * config.head_dim
    assert needed == done and counter.get_total_flops() == needed + (6 - 3.5) * scores + angles
    inside = sum(2 * p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert bench.operations(model, 48, "ours") == (needed, needed + 48 * inside)
    for peer in ("ours-lean", "sdpa"):
        assert bench.operations(model, 48, peer) == (needed, needed + 48 * inside + scores)


def test_what_fits_follows_from_two_peaks(bench):
    def at(length):
        return bench.Measured(1.0, 700.0 + 10 * length, 4.0 * length, 300.0)

    row, slope = bench.slope_row({8: at(8), 16: at(16), 32: bench.Measured(1.0, 1020.0, 128.0, 300.0)}, 512)
    assert slope == 10 and row["between"] == "16-32" and row["floor_kib_per_token"] == 0.5
    measured = {16: at(16), 32: at(32)}
    assert bench.fits_row(measured, slope, 10_700, 0, 50)["fits"] == 1000
    assert bench.fits_row(measured, slope, 10_700, 4, 50)["fits"] == 980
    assert bench.host_at(measured, 1000, 2, 8) * bench.GIB == 16_000


def rows_of(command, folder, name):
    variables = os.environ | {"OUT": str(folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
def test_every_peer_has_a_row_a_length(tmp_path):
    peers = "ours,ours-lean:256/384,sdpa,eager"
    command = [sys.executable, FOLDER / "bench_training.py", "--shape", "tiny", "--repeats", "1"]
    rows = rows_of([*command, "--lengths", "128,256", "--peers", peers], tmp_path, "training")
    assert rows[0]["ours-gpu"] <= 1.5 * (rows[0]["sdpa"] + torch.finfo(torch.bfloat16).eps)
    found = [(row["peer"], row["tokens"]) for row in rows if "step_s" in row]
    lean = [("ours-lean", 256), ("ours-lean", 384)]
    others = [[(peer, 128), (peer, 256)] for peer in ("ours", "sdpa", "eager")]
    assert found == others[0] + lean + others[1] + others[2]
    assert all(0 < row["floor_s"] < row["step_s"] for row in rows if "step_s" in row)


@pytest.mark.slow
def test_two_processes_are_compared_with_one(tmp_path):
    pytest.importorskip("peft")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(FOLDER / "bench_training.py"), "--alone", "--shape", "tiny", "--layers", "1"]
    command += ["--lora", "4", "--repeats", "0", "--peers", "ours", "--lengths", "256", "--name", "two"]
    rows = rows_of(command, tmp_path, "two")
    assert [row.get("ranks") for row in rows] == [None, 1, 2, 2]
    assert all(row["lora"] == 4 and row["layers"] == 1 for row in rows[1:3])
    assert rows[3]["times_one_gpu"] == pytest.approx(rows[1]["step_s"] / rows[2]["step_s"])
    assert rows[2]["floor_s"] == pytest.approx(rows[1]["floor_s"] / 2)
