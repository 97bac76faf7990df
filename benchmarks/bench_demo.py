"""Records the demo: pretrained weights, a real long text, `tree_attention` beside `sdpa`.

    python benchmarks/bench_demo.py --tokens 8000

A row an implementation: time to the first token, median time a token, peak memory, whether the number that is
hidden in the text came back, and whether the greedy tokens are those of sdpa or part from them at a tie. On a
GPU each answers twice, and the second time counts.
"""

import argparse
import sys
from pathlib import Path

from _report import Report

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import demo  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Records the demo.")
    parser.add_argument("--model", type=Path, default=demo.DEFAULT_FOLDER)
    parser.add_argument("--tokens", type=int, help="length of the prompt")
    arguments = parser.parse_args()
    report = Report("demo")
    result = demo.compare(arguments.model, arguments.tokens)
    for peer, run in result.runs.items():
        report.add(
            peer=peer,
            prompt=result.num_tokens,
            first_token_s=run.first_token,
            token_ms=1e3 * run.per_token,
            peak_gib=run.peak_gib,
            needle_found=result.needle_found,
            agree=result.agree,
            verdict=f"greedy tokens {result.verdict}",
        )
    raise SystemExit(0 if result.agree else 1)


if __name__ == "__main__":
    main()
