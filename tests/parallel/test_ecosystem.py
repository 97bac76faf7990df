"""One prompt over two processes, of a model with adapters or with quantised weights: the tokens of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import quantized

CASES = Path(__file__).with_name("ecosystem_cases.py")


def run(*arguments):
    command = [sys.executable, str(CASES), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]


@pytest.mark.slow
def test_adapters():
    pytest.importorskip("peft", reason="peft is not installed")
    run("adapters")


@pytest.mark.slow
@quantized.kinds
def test_quantised_weights(make):
    pytest.importorskip("peft", reason="peft is not installed")
    run("quantized", make.__name__)
