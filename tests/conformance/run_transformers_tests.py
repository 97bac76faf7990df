"""Runs transformers' own common model tests with our attention in the place of sdpa.

    python tests/conformance/run_transformers_tests.py [--cache .cache] [--implementation tree_attention]
        [--family llama ...] [--device cpu]

The source archive of the installed transformers version is fetched from the package index once and kept in
the cache folder, with the one package that its tests need. Prints a table, the reason of every skip and every
failure; exits with 0 if nothing failed, 1 if something did, 2 if the suite could not be fetched.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

CASES = Path(__file__).parent / "common_model_tests.py"
FAMILIES = {
    "llama": "LlamaTest", "qwen3": "Qwen3Test", "mistral": "MistralTest", "gemma2": "Gemma2Test",
    "gpt-neox": "GPTNeoXTest", "gpt-oss": "GptOssTest", "lightning": "LightningTest",
    "lightning-hybrid": "LightningHybridTest", "block-transformer": "BlockTransformerTest",
}  # fmt: skip
# The archive leaves these folders out; the common tests only inherit from the two classes.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def pip(*arguments: str) -> None:
    """Runs pip, quietly, and raises if it fails."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(command, check=True)


def fetch_suite(cache: Path) -> Path:
    """The folder that holds the package `transformers_tests` and what it imports; fetched if not there."""
    release = version("transformers")
    root = cache / f"transformers-tests-{release}"
    if root.exists():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    # Built aside and put in place whole: another process may be at it too.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        aside = Path(folder)
        pip("install", "--target", str(aside / "suite"), "parameterized")
        pip("download", "--no-binary=:all:", "--dest", str(aside), f"transformers=={release}")
        unpack_tests(next(aside.glob("*.tar.gz")), aside / "suite" / "transformers_tests")
        if not root.exists():
            (aside / "suite").rename(root)
    return root


def unpack_tests(archive_path: Path, package: Path) -> None:
    """Takes the files of the top `tests` folder out of a source archive."""
    package.mkdir()
    with tarfile.open(archive_path) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and len(parts) == 3:
                (package / parts[2]).write_bytes(archive.extractfile(member).read())
    for path, name in ABSENT.items():
        (package / path).parent.mkdir()
        (package / path).write_text(f"class {name}:\n    pass\n")


class Results:
    """A pytest plugin that counts what happened, by family and by reason."""

    def __init__(self):
        self.outcomes: dict[str, dict[str, str]] = defaultdict(dict)
        self.skips: Counter = Counter()
        self.failures: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report):
        _, family, test = report.nodeid.split("::")
        outcomes = self.outcomes[family]
        if report.failed:
            outcomes[test] = "failed"
            self.failures.append((f"{family}.{test}", reason(report)))
        elif report.skipped and outcomes.get(test) != "failed":
            if type(report).__name__ != "SubtestReport":
                outcomes[test] = "skipped"
            self.skips[reason(report)] += 1
        elif report.when == "call":
            outcomes.setdefault(test, "passed")


def reason(report) -> str:
    """The first line of a failure, or the words of a skip, without the name of the class."""
    if isinstance(report.longrepr, tuple):
        words = report.longrepr[2].removeprefix("Skipped: ")
        return re.sub(r"<class [^>]*>|\b[A-Z]\w*(Model|For[A-Z]\w+)\b( class)?", "the model", words)
    crash = getattr(report.longrepr, "reprcrash", None)
    return getattr(crash, "message", str(report.longrepr)).splitlines()[0]


def run_suite(root: Path, implementation: str, families: list[str], device: str) -> Results:
    """Runs the suite in this process, with `implementation` behind the name "sdpa"."""
    os.environ.update(TRANSFORMERS_TEST_DEVICE=device, HF_HUB_OFFLINE="1")
    sys.path.insert(0, str(root))
    import pytest
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import logging

    from hf_longattn.masking import lazy_mask
    from hf_longattn.registration import ATTENTION_FUNCTIONS

    logging.disable_progress_bar()
    AttentionInterface.register("sdpa", ATTENTION_FUNCTIONS[implementation])
    AttentionMaskInterface.register("sdpa", lazy_mask)
    results = Results()
    names = [f"{CASES}::{FAMILIES[family]}" for family in families]
    # The suite allocates without writing, by design: our fixtures stay out of it.
    options = "--noconftest --import-mode=importlib -q -p no:cacheprovider -p no:warnings --tb=short"
    pytest.main([*names, *options.split(), "-o", "addopts=", f"--rootdir={CASES.parent}"], plugins=[results])
    return results


def report(results: Results, implementation: str) -> None:
    """Prints the table, every reason for a skip and every failure."""
    print(f"\n{implementation}, transformers {version('transformers')}")
    print(f"{'family':16}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for family, outcomes in results.outcomes.items():
        count = Counter(outcomes.values())
        print(f"{family:16}" + "".join(f"{count[kind]:8}" for kind in ("passed", "failed", "skipped")))
    print("\nskipped, by reason:")
    for why, count in results.skips.most_common():
        print(f"{count:6}  {why}")
    for name, why in results.failures:
        print(f"FAILED {name}: {why}")


def main() -> int:
    """Parses the arguments, fetches, runs and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument(
        "--implementation", default="tree_attention", choices=("tree_attention", "blockwise_attention")
    )
    parser.add_argument("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    try:
        root = fetch_suite(arguments.cache.resolve())
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"the tests of transformers could not be fetched: {error}", file=sys.stderr)
        return 2
    results = run_suite(root, arguments.implementation, arguments.family, arguments.device)
    report(results, arguments.implementation)
    ran = any("passed" in outcomes.values() for outcomes in results.outcomes.values())
    return 0 if ran and not results.failures else 1


if __name__ == "__main__":
    sys.exit(main())
