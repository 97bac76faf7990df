"""The benchmark of models with lightning attention: its arithmetic, and all of it on tiny shapes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_longattn

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "bench_lightning_models.py"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("peer", ["lightning", "softmax"])
def test_kept_bytes_are_those_of_the_cache(bench, peer):
    config = bench.lightning_config("tiny") if peer == "lightning" else bench.llama("tiny", 2)
    model = bench.make(config, torch.float32, "lightning_attention" if peer == "lightning" else "sdpa").eval()
    cache = hf_longattn.LongContextCache(config, capacity=64)
    with torch.no_grad():
        model(bench.tokens(3, 64, 211), past_key_values=cache, use_cache=True)
    found = sum(part.nbytes for layer in cache.layers for part in layer.state().values())
    assert found == 3 * bench.kept_bytes(config, 64, 4)


def test_shapes_have_the_weights_that_they_are_named_after(bench):
    named = {"400m": 0.4e9, "1b": 1e9, "3b": 3e9, "7b": 7e9, "lightning-7b": 7e9}
    for shape, wanted in named.items():
        config = bench.lightning_config(shape) if "lightning" in shape else bench.llama(shape)
        with torch.device("meta"):
            model = bench.AutoModelForCausalLM.from_config(config)
        assert abs(sum(p.numel() for p in model.parameters()) / wanted - 1) < 0.15, shape


def test_what_is_wrong_is_refused(bench):
    bench.refuse("it", 1.4e-6, 1e-6, torch.float32)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.refuse("it", 2e-6, 1e-6, torch.float32)
    with pytest.raises(SystemExit, match="nothing is timed"):
        bench.refuse("it", float("nan"), 1e-6, torch.float32)


def test_a_section_that_fails_leaves_the_others_alone(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench, "distance", lambda *args: float("nan"))
    monkeypatch.setattr(bench, "run_generate", lambda report, card, tiny: report.add(section="generate"))
    monkeypatch.setattr(sys, "argv", ["bench", "--check", "--sections", "minimax,training,generate"])
    with pytest.raises(SystemExit, match="not measured: minimax, training"):
        bench.main()
    rows = json.loads((tmp_path / "lightning_models.json").read_text())
    assert ["error" in row for row in rows] == [True, True, False] and "nothing is timed" in rows[0]["error"]


def test_the_page_says_what_was_measured(tmp_path):
    facts = {"gpu": "A GPU", "torch": "2.11.0", "commit": "abc1234", "date": "2026-01-02T00:00:00"}
    facts |= {"command": "bench_lightning_models.py"}
    layer = {"section": "minimax", "tokens": 131072, "floor_ms": 100.0}
    step = {"section": "training", "shape": "400m", "floor_s": 0.25}
    token = {"section": "generate", "peer": "lightning", "prompt": 1024, "batch": 1, "new": 48}
    rows = [
        {"section": "minimax", "check": "torch.float32", "error_prepared": 2.5e-7},
        {**layer, "peer": "prepared", "ms": 128.0, "peak_gib": 20.0},
        {**step, "peer": "sdpa", "length": 65536, "batch": 1, "error": "OutOfMemoryError: CUDA"},
        {**step, "peer": "lightning", "length": 1024, "batch": 64, "tokens_per_s": 1000.0, "step_s": 0.5},
        {**step, "peer": "lightning", "length": 65536, "batch": 1, "tokens_per_s": 980.0, "step_s": 0.5},
        {**token, "token_ms": 6.5, "floor_token_ms": 5.0, "tokens_per_s": 100.0},
    ]
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "lightning_models.json").write_text(json.dumps([{**row, **facts} for row in rows]))
    shutil.copy(FOLDER.parent / "README.md", tmp_path)
    command = [sys.executable, str(FOLDER / "plot.py"), "--root", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "docs/benchmarks/lightning_models.md").read_text()
    assert "| prepared | 128K | 128 | 100 | 20 |" in page
    assert "| 400m | sdpa | 64K | 1 | out of memory |" in page
    assert "| 400m | lightning | 1K | 64 | 1,000 | 0.5 | 0.25 |  | 1 |" in page
    assert "| 400m | lightning | 64K | 1 | 980 | 0.5 | 0.25 |  | 0.98 |" in page
    assert "| lightning | 1K | 1 | 48 |  | 6.5 | 5 |  | 100 |  |" in page
    assert (tmp_path / "docs/images/lightning_models.png").exists()


@pytest.mark.slow
def test_every_section_has_its_rows(tmp_path):
    variables = os.environ | {"OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(SCRIPT), "--check"], env=variables, check=True, timeout=200)
    rows = json.loads((tmp_path / "lightning_models.json").read_text())
    assert not [row for row in rows if "error" in row]
    layer = {r["peer"]: r["ms"] for r in rows if r["section"] == "minimax" and "peer" in r}
    assert layer.keys() == {"projections", "prepared", "transformers"} and min(layer.values()) > 0
    steps = [r for r in rows if r["section"] == "training" and "peer" in r]
    assert [(r["peer"], r["length"], r["batch"]) for r in steps] == [
        (peer, length, batch)
        for peer in ("lightning", "softmax", "sdpa")
        for length, batch in ((16, 4), (64, 1), (128, 1))
    ]
    assert all(r["tokens_per_s"] * r["step_s"] == pytest.approx(r["batch"] * r["length"]) for r in steps)
    answers = [r for r in rows if r["section"] == "generate" and "peer" in r]
    assert {(r["peer"], r["batch"]) for r in answers} == {
        (peer, batch) for peer in ("lightning", "softmax-gqa") for batch in (1, 3)
    }
    assert all(r["first_token_s"] < r["total_s"] and r["tokens_per_s"] > 0 for r in answers)
    assert sum("check" in r for r in rows) == 3
