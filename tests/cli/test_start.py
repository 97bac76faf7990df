"""The command line starts without the package: help, the version and what the parser refuses."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hf_longattn
import hf_longattn_cli
from hf_longattn.cli.main import app, main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "triton", "hf_longattn"}
# `import hf_longattn_cli` loads about 190, `import hf_longattn` 2,900.
MOST_MODULES = 600
# A source tree that is on the path alone has its version in the package.
INSTALLED = any(metadata.distributions(name="hf_longattn"))


def start(*arguments):
    """(exit status, output, errors, modules) of the command line in a fresh interpreter."""
    code = """
import sys, json
sys.path.insert(0, sys.argv.pop(1))
from hf_longattn_cli import main
try:
    main()
finally:
    sys.stdout.flush()
    print(json.dumps(sorted(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    *output, modules = result.stdout.splitlines()
    return result.returncode, "\n".join(output), result.stderr, json.loads(modules)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "verify"),
        pytest.param(
            ["--version"],
            0,
            f"hf-longattn {hf_longattn.__version__}",
            marks=pytest.mark.skipif(not INSTALLED, reason="the package is not installed"),
        ),
        (["eval", "--help"], 0, "--cloze"),
        (["convert", "lightning", "--help"], 0, "TransNormerLLM"),
        ([], 2, "Usage"),
        (["plan", "model"], 2, "Missing option"),
        (["plan", "model", "--context", "many"], 2, "Invalid value"),
        (["swim"], 2, "No such command"),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_the_parser_needs_no_torch(arguments, status, words):
    found, output, errors, modules = start(*arguments)
    assert found == status and words in output + errors
    assert not HEAVY & set(modules) and len(modules) < MOST_MODULES


def test_a_command_registers_the_package():
    modules = start("eval", "nowhere")[3]
    assert set(modules) >= HEAVY - {"triton", "datasets"}


def test_a_transformers_that_does_not_fit_takes_one_line(monkeypatch):
    def fail(name):
        def command():
            raise ImportError("too old", name=name)

        return command

    monkeypatch.setattr(hf_longattn_cli, "app", fail("transformers"))
    with pytest.raises(SystemExit, match="^error: too old$"):
        main()
    monkeypatch.setattr(hf_longattn_cli, "app", fail("transformers.cache_utils"))
    with pytest.raises(ImportError, match="too old"):
        main()


def test_the_entry_point_is_there():
    assert 'hf-longattn = "hf_longattn_cli:main"' in (ROOT / "pyproject.toml").read_text()
    assert main is hf_longattn_cli.main and app is hf_longattn_cli.app
