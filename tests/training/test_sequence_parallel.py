"""One sequence on several ranks in training: loss, gradients and refusals, each as of one process."""

import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
import tiny
import torch

CASES = Path(__file__).parent / "sequence_cases.py"
FAST = ["families", "embeddings", "evaluation", "dropout", "refusals"]


def test_two_ranks():
    preloaded.run(CASES, "2", *FAST)


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
    preloaded.run(CASES, sizes, *topics)


def trained(folder, kind, size):
    """(losses by step, weights) of Trainer on `size` processes."""
    script, out = Path(__file__).parent / "sequence_trainer.py", folder / f"{kind}.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *(launcher if size > 1 else []), str(script), str(out), kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-6000:]
    return torch.load(out)


@pytest.mark.slow
def test_trainer_on_two_ranks_trains_as_on_one(tmp_path):
    losses, weights = trained(tmp_path, "plain", 1)
    before = tiny.build("gemma2").state_dict()
    moved = torch.cat([(weights[name] - before[name]).flatten() for name in before])
    assert len(losses) == 4
    for kind in ("prepared", "configured"):
        found, theirs = trained(tmp_path, kind, 2)
        assert found == pytest.approx(losses, rel=1e-5), kind
        apart = torch.cat([(theirs[name] - weights[name]).flatten() for name in before])
        # Adam divides by the roots of tiny second moments, which makes rounding grow.
        assert apart.norm() <= 1e-2 * moved.norm(), kind
