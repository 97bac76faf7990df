"""The fine-tuning recipe, in its smoke mode, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune_long.py"


@pytest.mark.slow
def test_smoke_mode_trains_saves_and_reports(tmp_path):
    losses = {}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind, start, more in (("one", [], []), ("share", launcher, ["--share"])):
        losses[kind] = smoke(tmp_path / kind, start, more)
    assert losses["share"] == pytest.approx(losses["one"], abs=2e-3)


def smoke(tmp_path, launcher, more):
    tmp_path.mkdir()
    options = ["--output_dir", str(tmp_path), "--report_to", "none", "--learning_rate", "1e-2", "--seed", "1"]
    command = [sys.executable, *launcher, str(RECIPE), "--smoke", "--use_cpu", *options, *more]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^ *(\d+)-(\d+) +(\S+) +(\S+)$", result.stdout, re.MULTILINE)
    assert [int(stop) for _, stop, _, _ in rows] == [16, 32, 64, 128, 256, 512]
    before, after = (sum(float(row[column]) for row in rows) for column in (2, 3))
    assert before != after
    assert (tmp_path / "model.safetensors").exists()
    report = json.loads((tmp_path / "finetune_long.json").read_text())
    assert report[0]["section"] == "result" and report[0]["tokens_per_s"] > 0
    # Printed to three digits.
    written = [f"{row[column]:.3f}" for row in report[1:] for column in ("before", "after")]
    assert written == [f"{float(row[column]):.3f}" for row in rows for column in (2, 3)]
    return [float(row[column]) for row in rows for column in (2, 3)]
