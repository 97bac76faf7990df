"""The examples in docstrings run as they stand, and print what they say."""

import ast
import doctest
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.cross_entropy import cross_entropy
from hf_longattn.kernels.few_key_attention import few_key_attention
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.quantized_states import quantized_states
from hf_longattn.kernels.rotary_cache_write import rotary_cache_write
from hf_longattn.modeling.block_transformer.cache_block_transformer import BlockTransformerCache

PACKAGE = Path(hf_longattn.__file__).parent
DEFINED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstrings_with_examples():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, DEFINED) else None
            if text and ">>>" in text:
                name = f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', 'module')}"
                yield pytest.param(text, id=name)


def stage():
    """The names that examples take as given: one new token behind five that are held, and small models."""
    functions = [cache_write, cross_entropy, few_key_attention, quantized_states, rotary_cache_write]
    names = {name: getattr(hf_longattn, name) for name in hf_longattn.__all__}
    names |= {function.__name__: function for function in functions}
    names |= {f"{name}{n}": torch.randn(1, 4, 3, 16) for name in "qkv" for n in ("", "2")}
    names |= {f"{name}_{n}": torch.randn(1, 2, 3, 16) for name in ("key", "value") for n in range(2)}
    keys, values = torch.randn(2, 1, 2, 8, 16)
    half = torch.randn(2, 1, 1, 8)
    cos, sin = torch.cat([half, half], dim=-1)
    block = tiny_block_transformer()
    return names | {
        "torch": torch, "KeyRange": KeyRange, "BlockTransformerCache": BlockTransformerCache,
        "AutoModelForCausalLM": tf.AutoModelForCausalLM,
        "query": torch.randn(1, 4, 1, 16), "key": torch.randn(1, 2, 1, 16), "value": torch.randn(1, 2, 1, 16),
        "keys": keys, "values": values, "cache": SimpleNamespace(keys=keys, values=values),
        "start": 5, "length": 5, "places": torch.tensor([[5]]), "cos": cos, "sin": sin,
        "slopes": torch.rand(4), "logits": torch.randn(3, 11), "targets": torch.tensor([0, 10, 4]),
        "model": block, "prompt_ids": tiny.tokens(1, 8), "next_ids": tiny.tokens(1, 1),
    }  # fmt: skip


def tiny_block_transformer():
    config = hf_longattn.BlockTransformerConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return hf_longattn.BlockTransformerForCausalLM(config).eval()


def run(text, names):
    """Runs every line of a docstring's examples, and holds what is printed against what it says."""
    # A fence is none of what an example prints.
    for example in doctest.DocTestParser().get_examples(re.sub(r"(?m)^ *```.*$", "", text)):
        if example.want:
            assert repr(eval(example.source, names)) == example.want.strip(), example.source
        else:
            exec(example.source, names)


@pytest.mark.parametrize("text", list(docstrings_with_examples()))
def test_examples_of_docstrings_run(text, tmp_path):
    names = stage()
    if "from_pretrained(path" in text:
        tiny.build("llama").save_pretrained(tmp_path)
    run(text, names | {"path": tmp_path})


def test_what_an_example_prints_is_compared():
    with pytest.raises(AssertionError, match="1 \\+ 1"):
        run(">>> 1 + 1\n3\n", {})
    run("```python\n>>> 1 + 1\n2\n```\n", {})
