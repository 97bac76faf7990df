"""The blocks of one prompt over several processes: the tokens of one."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "block_cases.py"
RUNS = [
    ("2", ("few", "shares", "refusals")),
    pytest.param("3", ("more", "shares"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "topics"), RUNS)
def test_equals_one_process(sizes, topics):
    command = [sys.executable, str(CASES), sizes, *topics]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
