"""The tests marked `interpreted`, all in one process: triton asks for its interpreter when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_longattn.kernels.dispatch import interpreting

TESTS = Path(__file__).parents[1]


# Many tests in one, of a minute: on a machine that does other work as well they may take ten.
@pytest.mark.timeout(1800)
@pytest.mark.skipif(interpreting(), reason="is that process")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(chosen):
    pytest.importorskip("triton")
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.interpreted" in path.read_text()]
    options = ["-q", "-p", "no:cacheprovider", "-m", f"interpreted and not gpu and {chosen}"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "skipped" not in result.stdout.splitlines()[-1], result.stdout[-4000:]
