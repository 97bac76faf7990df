"""One sequence on several ranks in training: loss, gradients and refusals, each as of one process."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "sequence_cases.py"
FAST = ["families", "embeddings", "evaluation", "dropout", "refusals"]


def run(sizes, *topics):
    command = [sys.executable, str(CASES), sizes, *topics]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]


def test_two_ranks():
    run("2", *FAST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "topics"),
    [
        ("1,2", ["trajectory", "options", "wrapped"]),
        ("3", ["families", "embeddings", "evaluation", "dropout"]),
        ("4", ["groups", "refusals"]),
    ],
    ids=["options-P1-P2", "odd-P3", "groups-P4"],
)
def test_every_topic(sizes, topics):
    run(sizes, *topics)
