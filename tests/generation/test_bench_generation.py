"""The benchmarks of `generate` walk through what they time, with tiny models on a CPU."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def walk(monkeypatch, tmp_path):
    """Runs a script with some options and returns its rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OUT", str(tmp_path))

    def run(script, name, *options):
        monkeypatch.setattr("sys.argv", [f"{script}.py", "--tiny", *options])
        importlib.import_module(script).main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


@pytest.mark.slow
def test_peers_give_the_same_tokens(walk):
    peers = ["sdpa", "prepared", "sdpa-static", "eager-prepared"]
    options = ["--lengths", "150", "--peers", ",".join(peers), "--pad", "1"]
    rows = walk("bench_generation", "generation", *options)
    assert [row["peer"] for row in rows] == peers and all(row["same_tokens_as_first_peer"] for row in rows)


@pytest.mark.slow
def test_questions_are_asked_in_all_ways(walk):
    rows = walk("bench_generation", "generation", "--lengths", "150", "--questions", "3")
    assert [row["peer"] for row in rows] == ["alone", "shared", "repeated"]
    assert all(row["same_tokens_as_alone"] for row in rows)


def test_offloaded_layers_give_the_same_tokens(walk):
    """Other tokens are an error of the script."""
    rows = walk("bench_offload", "offload", "--lengths", "150", "--layers", "4", "--offload", "0,1,3")
    assert [row["offloaded"] for row in rows] == [0, 1, 3] and rows[2]["floor_ms"] > 0
