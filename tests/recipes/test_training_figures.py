"""Pages and figures that benchmarks/plot.py makes from the result files of the training recipes."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _training  # noqa: E402
import plot  # noqa: E402

FACTS = {
    "gpu": "A GPU", "cuda": "12.8", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.0",
    "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


def result(run, loss, **more):
    row = {"parameters": 30_400_000, "length": 2048, "tokens": 100_000_000, "loss_before": 11.0}
    # Where losses are told by position, the run has none of its own.
    return {"section": "result", "run": run, **row, **({} if loss is None else {"loss": loss}), **more}


def curve(run, *losses):
    rows = enumerate(losses)
    return [{"section": "curve", "run": run, "tokens": i * 10**7, "loss": loss} for i, loss in rows]


def passkey(run, length, share):
    return {"section": "passkey", "run": run, "length": length, "source": 0.5, "accuracy": share}


PLACES = [
    {"start": 0, "stop": 1024, "before": 3.5, "after": 3.25},
    {"start": 1024, "stop": 32768, "before": None, "after": 2.98768},
]
FILES = {
    "linearize": [result("hybrid", 2.71234), *curve("hybrid", 9.0, 3.0), passkey("hybrid", 1024, 0.25)],
    "finetune_long": [
        result("32768 tokens a piece", None, seconds=60.0),
        *({"section": "position", "run": "32768 tokens a piece", **place} for place in PLACES),
    ],
    "pretrain_lightning": [result("llama", 3.5), *curve("llama", 11.0, 3.5)],
    "uptrain_block_transformer": [
        result("vanilla, 30M", 3.0, generated_per_s=100.0),
        result("block, 30M", 3.25, generated_per_s=900.0, last_word=0.125, next_sentence=0.3),
        *curve("block, 30M", 11.0, 3.25),
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_each_recipe_has_a_page_and_a_figure(name, tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    facts = {**FACTS, "command": f"{name}.py --text books"}
    (folder / f"{name}.json").write_text(json.dumps([{**row, **facts} for row in FILES[name]]))
    shutil.copy(ROOT / "README.md", tmp_path)
    assert plot.main(["--root", str(tmp_path)]) == 0
    assert plot.main(["--root", str(tmp_path), "--check"]) == 0
    page = (tmp_path / "docs" / "benchmarks" / f"{name}.md").read_text()
    assert f"\npython recipes/{name}.py --text books\n" in page and "30.4 million" in page
    assert f"](../images/{name}.png)" in page and (tmp_path / f"docs/images/{name}.png").exists()
    if name == "finetune_long":
        assert "| 0 to 1,024 | 3.5000 | 3.2500 |" in page and "| 1,024 to 32,768 |  | 2.9877 |" in page
    if name == "linearize":
        assert "| 2.7123 |" in page and "| the source | 50 % |" in page and "| hybrid | 25 % |" in page
    if name == "uptrain_block_transformer":
        assert "| last words, right | next sentences, right |" in page and "| 12 % | 30 % |" in page


def test_a_point_says_what_the_run_answered():
    asked = result("block, 30M", 3.25, last_word=0.125, next_sentence=0.3)
    assert _training.with_answers(asked) == "block, 30M, last word 12 %, next sentence 30 %"
    assert _training.with_answers(result("vanilla", 3.0)) == "vanilla"


def test_the_front_leaves_out_what_is_slower_and_worse():
    points = [(100, 3.0), (900, 3.25), (500, 3.4), (50, 3.0), (900, 3.5)]
    runs = [{"generated_per_s": speed, "loss": loss} for speed, loss in points]
    assert _training.front(runs) == [(100, 3.0), (900, 3.25)]
