"""One sequence on several ranks in training: loss, gradients and refusals, each as of one process."""

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parent / "sequence_cases.py"


def run(sizes, *topics):
    command = [sys.executable, str(CASES), sizes, *topics]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]


def test_families():
    run("2", "families")
