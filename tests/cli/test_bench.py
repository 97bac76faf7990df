"""`hf-longattn bench`: it checks before it times, and prints what it measured."""

import json

import pytest
from typer.testing import CliRunner

from hf_longattn.cli import bench
from hf_longattn.cli.main import app

SIZES = ((64,), (32,), (64,))


def test_every_operation_is_timed_and_has_a_floor(monkeypatch):
    monkeypatch.setattr(bench, "_CPU_SIZES", SIZES)
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    names = [row["operation"] for row in rows]
    assert names == ["decode", "causal prefill", "lightning"]
    assert all(row["ours"] > 0 and row["floor"] > 0 for row in rows)
    assert [row["sdpa"] is None for row in rows] == [False, False, True]
    result = CliRunner().invoke(app, ["bench", "--device", "cpu"])
    assert result.exit_code == 0 and "causal prefill" in result.stdout


def test_a_wrong_operation_is_not_timed(monkeypatch):
    real = bench.decode_attention
    monkeypatch.setattr(bench, "decode_attention", lambda *states: (real(*states)[0] * 1.01, None))
    with pytest.raises(ValueError, match="`decode` is wrong here"):
        bench.bench("cpu", SIZES)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(device):
    result = CliRunner().invoke(app, ["bench", "--device", device])
    assert result.exit_code == 2 and "`--device`" in result.stderr and repr(device) in result.stderr
