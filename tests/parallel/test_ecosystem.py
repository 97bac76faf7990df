"""One prompt over two processes, of a model with adapters or with quantised weights: the tokens of one."""

from pathlib import Path

import preloaded
import pytest
import quantized

CASES = Path(__file__).with_name("ecosystem_cases.py")


@pytest.mark.slow
def test_adapters():
    pytest.importorskip("peft", reason="peft is not installed")
    preloaded.run(CASES, "adapters")


@pytest.mark.slow
@quantized.kinds
def test_quantised_weights(make):
    pytest.importorskip("peft", reason="peft is not installed")
    preloaded.run(CASES, "quantized", make.__name__)
