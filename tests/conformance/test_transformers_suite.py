"""transformers' own common model tests pass with our attention in the place of sdpa."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "tests" / "conformance" / "run_transformers_tests.py"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("implementation", "family"),
    [
        ("tree_attention", "gpt-oss"),
        ("blockwise_attention", "mistral"),
        ("tree_attention", "lightning-hybrid"),
        ("tree_attention", "block-transformer"),
    ],
)
def test_common_model_tests(implementation, family):
    command = [sys.executable, RUNNER, "--cache", ROOT / ".cache", "--implementation", implementation]
    result = subprocess.run([*command, "--family", family], capture_output=True, text=True, cwd=ROOT)
    if result.returncode == 2:
        pytest.skip(f"offline: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
