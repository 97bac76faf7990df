"""The page that lists what trains: every model that transformers has, and what the script finds today."""

import importlib.util
import re
from pathlib import Path

import pytest
import transformers as tf

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/reference/architectures.md"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_every_model", HERE / "train_every_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(script):
    """Name to the kind under whose heading the page has it."""
    kinds = {heading: kind for kind, heading in script.HEADINGS.items()}
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading, body = section.split("\n", 1)
        names = re.findall(r"(?:^|, |\| )`([^`]+)`(?=,| \||$)", body, re.MULTILINE)
        found |= dict.fromkeys(names, kinds[heading.rpartition(" (")[0]])
    return found


def test_the_page_has_every_model(script):
    if f"transformers {'.'.join(tf.__version__.split('.')[:2])}," not in PAGE.read_text():
        pytest.skip("the page is of another version of transformers")
    assert listed(script).keys() == set(script.model_names())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt"])
def test_the_page_says_what_the_script_finds(script, name):
    assert script.judge(name)[0] == listed(script)[name]


def test_a_wrong_gradient_is_found(script, monkeypatch):
    prepare = script.hf_longattn.prepare_training
    monkeypatch.setattr(
        script.hf_longattn,
        "prepare_training",
        lambda model, **fields: prepare(model, label_smoothing=1e-4, **fields),
    )
    assert script.judge("gpt2")[0] == "differs"
