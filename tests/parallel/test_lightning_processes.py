"""Lightning attention of one sequence over several processes: the results of one."""

from pathlib import Path

import preloaded
import pytest
import torch

from hf_longattn.cache.token_rows import TokenRows, scan_rows

CASES = Path(__file__).parent / "lightning_cases.py"


ALL = ("scan", "generation", "lengths", "prompts", "turns", "operations", "clocks")
TOPICS = [
    ("1,3", ("scan", "prompts")),
    ("2", ("generation", "operations")),
    pytest.param("2", ("lengths", "turns", "clocks"), marks=pytest.mark.slow),
    pytest.param("3", ALL[1:], marks=pytest.mark.slow),
    pytest.param("4", ("scan", "generation", "operations"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "topics"), TOPICS)
def test_equals_one_process(sizes, topics):
    preloaded.run(CASES, sizes, *topics)


def test_documents_by_their_bounds_cut_the_rows_and_let_the_first_state_in():
    bounds = torch.tensor([0, 5, 12, 12, 17, 24])
    rows = TokenRows.from_bounds(bounds, 2, 12)
    assert rows.starts.nonzero().tolist() == [[0, 5], [1, 0], [1, 5]]
    q, k, v, state = (torch.randn(2, 3, 12, 8), *torch.randn(2, 2, 3, 12, 8), torch.randn(2, 3, 8, 8))
    slopes = torch.tensor([0.5, 0.1, 1e-3])
    result, last = scan_rows(q, k, v, slopes, 1.0, rows, state, stateful=True)
    for row, (begin, stop), entering in ((0, (0, 5), state), (0, (5, 12), None), (1, (5, 12), None)):
        part = [x[row : row + 1, :, begin:stop] for x in (q, k, v)]
        entering = None if entering is None else entering[row : row + 1]
        want, left = scan_rows(*part, slopes, 1.0, TokenRows(), entering, stateful=True)
        torch.testing.assert_close(result[row : row + 1, begin:stop], want)
    torch.testing.assert_close(last[1:], left)
