"""One sequence on several ranks in training: loss, gradients and refusals, each as of one process."""

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


@pytest.mark.slow
def test_trainer_on_two_ranks_trains_as_on_one(tmp_path):
    preloaded.run(CASES.with_name("sequence_trainer.py"), tmp_path)
    losses, weights = torch.load(tmp_path / "plain.pt")
    before = tiny.build("gemma2").state_dict()
    moved = torch.cat([(weights[name] - before[name]).flatten() for name in before])
    assert len(losses) == 4
    for kind in ("prepared", "configured", "whole-logits"):
        found, theirs = torch.load(tmp_path / f"{kind}.pt")
        assert found == pytest.approx(losses, rel=1e-5), kind
        apart = torch.cat([(theirs[name] - weights[name]).flatten() for name in before])
        # Adam divides by the roots of tiny second moments, which makes rounding grow.
        assert apart.norm() <= 1e-2 * moved.norm(), kind
