"""Caches that several processes share, saved and loaded by as many or others: the tokens of one process."""

from pathlib import Path

import preloaded
import pytest

CASES = Path(__file__).parent / "saved_cases.py"
RUNS = [
    ("2,1", ("saved", "whole")),
    ("2", ("faults",)),
    pytest.param("3,2", ("more_saved",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "topics"), RUNS)
def test_goes_on_where_it_stopped(sizes, topics):
    preloaded.run(CASES, sizes, *topics)
