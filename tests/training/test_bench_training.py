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


class Rows(list):
    def add(self, **row):
        self.append(row)

    def time_left(self):
        return 100.0


def test_peaks_become_rows(bench, monkeypatch):
    options = SimpleNamespace(**{**vars(OPTIONS), "layers": 1, "lora": 0, "repeats": 0})
    held = bench.held_bytes(bench.build(options))

    def measure(model, length, *rest):
        if length > 512:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return bench.Measured(0.5, held + 5000 + 600 * length, 256 * length, held)

    monkeypatch.setattr(bench, "measure", measure)
    # Of the layer that is not there, the GPU holds weights and gradients too.
    layer = bench.held_bytes(bench.build(options).model.layers[0])
    monkeypatch.setattr(bench, "usable_bytes", lambda: held + layer + 5000 + 600 * 12345)
    rows = Rows()
    bench.run_peer(rows, "ours-lean", [128, 512, 1024], options)
    kinds = [("tokens", 128), ("tokens", 512), ("error", "CUDA out of memory. Tried to allocate")]
    assert all(row[name] == value for row, (name, value) in zip(rows, kinds, strict=False))
    assert rows[1]["kib_per_token"] == pytest.approx((5000 + 600 * 512) / 512 / 1024)
    assert rows[3]["slope_kib_per_token"] == 600 / 1024 and rows[3]["floor_kib_per_token"] == 512 / 1024
    assert (rows[4]["fits"], rows[4]["fits_layers"]) == (12345, 2)
    assert rows[4]["fits_host_gib"] * bench.GIB == pytest.approx(2 * 256 * 12345)
    rows = Rows()
    bench.run_peer(rows, "ours", [128, 512], options)
    assert "fits" not in rows[-1] and rows[-1]["between"] == "128-512"


def test_a_long_step_says_how_far_it_is(bench, capsys):
    model, ids = bench.build(OPTIONS), torch.arange(48)[None]
    firsts = [layer.self_attn.q_proj.weight for layer in model.model.layers]
    with bench.Progress(model, 7.0, every=0.01) as progress:
        bench.step(model, ids)
        assert progress.done == len(firsts) == 2
        assert all(weight._post_accumulate_grad_hooks for weight in firsts)
        progress.ended.wait(0.5)
    assert "of about 7: backward of 2 of 2 layers issued" in capsys.readouterr().out
    assert not any(weight._post_accumulate_grad_hooks for weight in firsts)


def test_the_page_says_what_the_rows_say(bench):
    steps, tables = importlib.import_module("_steps"), importlib.import_module("_tables")
    facts = {"commit": "abc", "date": "2026-01-02T03:04:05"}
    lean = {"shape": "1b", "layers": 16, "peer": "ours-lean"}
    eager = {"shape": "1b", "layers": 16, "peer": "eager"}
    shared = {"shape": "8b", "layers": 8, "peer": "ours", "lora": 16, "ranks": 2, "tokens": 1 << 18}
    rows = [
        {"check": "gradients at 4096 tokens", "fp32": 0.0, "sdpa": 0.25, "ours-gpu": 0.125},
        {**lean, "tokens": 1 << 17, "tokens_per_s": 9000.0, "step_s": 14.5, "floor_s": 5.5, "peak_gib": 9.0},
        {**lean, "between": "65536-131072", "slope_kib_per_token": 10.25, "floor_kib_per_token": 10.0},
        {**lean, "fits": 7 << 20, "fits_host_gib": 448.0, "usable_gib": 78.5},
        {**eager, "tokens": 8192, "error": "CUDA out of memory. Tried"},
        {**eager, "between": "2048-4096", "slope_kib_per_token": 21700.0, "floor_kib_per_token": 10.0},
        {**eager, "fits": 7 << 10, "usable_gib": 78.5},
        {**eager, "tokens": 1 << 17, "tokens_per_s": 8000.0, "step_s": 16.0},
        {**eager, "shape": "8b", "layers": 32, "tokens": 1 << 17, "tokens_per_s": 4000.0, "step_s": 32.0},
        {**shared, "tokens_per_s": 12000.0, "step_s": 21.5},
        {**shared, "times_one_gpu": 1.875, "activations_of_one_gpu": 0.5},
    ]
    text = steps.steps_text(tables.Result("training", [{**row, **facts} for row in rows]))
    call = "`prepare_training(offload=True, save_attention=False)`"
    for line in (
        f"| Llama-3.2-1B | {call} | 1 | 128K | 9,000 | 14.5 | 5.5 | 9 |  | abc, 2026-01-02 |",
        f"| Llama-3.2-1B | {call} | 64K to 128K | 10.2 | 10 | 7M | 448 |  | abc, 2026-01-02 |",
        "| Llama-3.2-1B | `eager` | 1 | 8K | out of memory |  |  |  |  | abc, 2026-01-02 |",
        "| Llama-3.2-1B | `eager` | 2K to 4K | 21,700 | 10 | 7K |  | 1,024 times | abc, 2026-01-02 |",
        # The floor is that of the model and the length, whoever wrote it.
        "| Llama-3.2-1B | `eager` | 1 | 128K | 8,000 | 16 | 5.5 |  |  | abc, 2026-01-02 |",
        "| Llama-3.1-8B | `eager` | 1 | 128K | 4,000 | 32 |  |  |  | abc, 2026-01-02 |",
        "| Llama-3.1-8B, 8 layers, LoRA 16 | `prepare_training` | 2 | 256K | 12,000 | 21.5 |  |  |  |",
        "| `prepare_training` | 2 | 256K | 1.88 | 0.5 |",
        "against fp32 (abc, 2026-01-02): `sdpa` 0.25, `prepare_training(offload=False)` 0.125.",
    ):
        assert line in text, text
    # Those of one model and length stand together.
    assert text.index("| 8K | out of memory") < text.index("| 128K | 9,000") < text.index("| 128K | 8,000")
    assert steps.count_name(7266806) == "7,266,806" and steps.count_name(720896) == "704K"
    alone = [row for row in rows if "ranks" not in row and "check" not in row]
    text = steps.steps_text(tables.Result("training", [{**row, **facts} for row in alone]))
    assert "| model | set up by | tokens | tokens/s |" in text


def test_the_figure_of_memory_has_a_bar_a_peer_of_one_model(bench):
    steps, tables = importlib.import_module("_steps"), importlib.import_module("_tables")
    shape = {"shape": "1b", "layers": 16}
    slope = {"between": "1-2", "floor_kib_per_token": 10.0}
    rows = []
    for peer, fits, size in (
        ("eager", 4710, 21743.4),
        ("sdpa", 48801, 1583.3),
        ("ours-lean", 7266806, 10.26),
    ):
        rows += [{**shape, "peer": peer, **slope, "slope_kib_per_token": size}]
        rows += [{**shape, "peer": peer, "fits": fits}]
    other = {"shape": "8b", "layers": 32, "peer": "sdpa"}
    rows += [{**other, **slope, "slope_kib_per_token": 99.0}, {**other, "fits": 1 << 20}]
    result = tables.Result("training_memory", rows)
    assert steps.has_memory(result) and not steps.has_memory(tables.Result("training_memory", rows[:2]))
    figures = importlib.import_module("_figures")
    figure, axes = figures.new_figure(2)
    steps.draw_memory(result, axes)
    for axis, sizes in zip(axes, ([4710, 48801, 7266806], [21743.4, 1583.3, 10.26]), strict=True):
        assert axis.get_xscale() == "log" and [bar.get_width() for bar in axis.patches] == sizes
        assert all(axis.get_xlim()[0] < size < axis.get_xlim()[1] for size in sizes)
    assert [text.get_text() for text in axes[0].texts] == ["4,710", "48,801", "7,266,806"]
    assert [line.get_xdata()[0] for line in axes[1].lines] == [10.0]


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
