"""`hf-longattn verify`: a right model passes, planted faults are caught, and errors are one clear line."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny
import tiny_blocks
import torch
import transformers as tf
from transformers import AttentionInterface
from typer.testing import CliRunner

from hf_longattn.attention.tree import tree_attention_forward
from hf_longattn.cli import measure, verify
from hf_longattn.cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    saved = {}

    def get(family):
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            tiny.build(family).save_pretrained(saved[family])
        return str(saved[family])

    return get


def run(model, *arguments):
    result = CliRunner().invoke(app, ["verify", model, "--tokens", "24", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_block_transformer_is_refused_by_name(tmp_path):
    tiny_blocks.make().save_pretrained(tmp_path)
    result = run(str(tmp_path))
    assert result.exit_code == 2 and "Block Transformer" in result.stderr


def failed(result):
    return {check["name"] for check in json.loads(result.stdout)["checks"] if not check["passed"]}


@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        ("llama", "tree_attention", "float32"),
        pytest.param("gemma2", "both", "float32", marks=pytest.mark.slow),
        pytest.param("llama", "both", "bfloat16", marks=pytest.mark.slow),
        pytest.param("gemma2", "both", "float16", marks=pytest.mark.slow),
        pytest.param("gpt-oss", "both", "float32", marks=pytest.mark.slow),
        pytest.param("gpt-neox", "both", "float32", marks=pytest.mark.slow),
        pytest.param("gpt2", "both", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_right_model_passes(folder, family, implementation, dtype):
    result = run(folder(family), "--implementation", implementation, "--dtype", dtype)
    assert result.exit_code == 0, result.stdout
    assert "every check passed" in result.stdout


def test_what_a_cache_in_8_bits_changes_is_said(folder):
    call = ("--implementation", "tree_attention", "--dtype", "float32", "--json", "--cache-dtype")
    errors = {}
    for dtype in ("int8", "fp8"):
        result = run(folder("gemma2"), *call, dtype)
        assert result.exit_code == 0, result.stdout
        errors[dtype] = json.loads(result.stdout)["cache"]
        assert errors[dtype]["cache_dtype"] == dtype and "first_difference" in errors[dtype]
    assert 1e-4 < errors["int8"]["logits"] < errors["fp8"]["logits"] < 0.2
    assert 0 < errors["int8"]["divergence"] < errors["fp8"]["divergence"]
    result = run(folder("gemma2"), *call, "int3")
    assert result.exit_code == 2 and "`cache_dtype` must be" in result.stderr


def forgets_padding(module, query, key, value, mask, *args, **kwargs):
    rows, columns = query.shape[2], key.shape[2]
    visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    return tree_attention_forward(module, query, key, value, visible[None, None], *args, **kwargs)


def sees_one_token_ahead(module, query, key, value, mask, *args, **kwargs):
    rows, columns = query.shape[2], key.shape[2]
    visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows + 1)
    return tree_attention_forward(module, query, key, value, visible[None, None], *args, **kwargs)


def shifts_the_window(module, query, key, value, mask, *args, **kwargs):
    limits = mask.key_range()
    if limits.lower is not None:
        mask._ranges = {query.device: dataclasses.replace(limits, lower=limits.lower + 1)}
    output = tree_attention_forward(module, query, key, value, mask, *args, **kwargs)
    mask._ranges = {}
    return output


def loses_gradient(module, query, key, value, mask, *args, **kwargs):
    return tree_attention_forward(module, query, key.detach(), value, mask, *args, **kwargs)


def is_wrong_at_a_chunk_border(module, query, key, value, mask, *args, **kwargs):
    output, weights = tree_attention_forward(module, query, key, value, mask, *args, **kwargs)
    if 1 < query.shape[2] < key.shape[2]:
        output[:, 0] *= 1.001
    return output, weights


@pytest.mark.parametrize(
    ("fault", "family", "caught_by"),
    [
        (sees_one_token_ahead, "llama", {"a later token moves nothing"}),
        (forgets_padding, "llama", {"padding moves nothing", "logits, left padding"}),
        (shifts_the_window, "mistral-window", {"logits, no padding"}),
        (loses_gradient, "llama", {"gradients"}),
        (is_wrong_at_a_chunk_border, "llama", {"logits, chunks of 9"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_planted_faults_are_caught(folder, monkeypatch, fault, family, caught_by):
    monkeypatch.setitem(AttentionInterface._global_mapping, "tree_attention", fault)
    result = run(folder(family), "--implementation", "tree_attention", "--json")
    assert result.exit_code == 1
    assert caught_by <= failed(result)


def test_what_restore_leaves_behind_is_caught(folder, monkeypatch):
    monkeypatch.setattr("hf_longattn.restore", lambda model: model)
    assert "prepare and restore change nothing" in failed(
        run(folder("llama"), "--implementation", "tree_attention", "--json")
    )


def test_another_token_passes_only_as_a_tie():
    scores = torch.tensor([[[0.0, 1.0, 1.0 - 1e-6, 0.2]]])
    noise = scores + torch.tensor([0.0, 0.0, 2e-6, 0.0])
    measured = measure.Measured({}, scores, "sdpa", 0.0, 0.0, torch.tensor([[1]]), noise)
    standard = verify._Standard(measure.Exact({}, scores), measured, scores, 1e-7)
    tie, wrong = (
        verify._token_check(torch.tensor([[token]]), standard, "ours", "greedy") for token in (2, 3)
    )
    assert tie.passed and "tie, margin 1.0e-06" in tie.remark
    assert not wrong.passed and "margin 8.0e-01" in wrong.remark


def falcon(folder):
    config = tf.FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    tf.FalconForCausalLM(config).save_pretrained(folder)


def t5(folder):
    tf.T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=97).save_pretrained(folder)


def no_weights(folder):
    tiny.CONFIGS["llama"]().save_pretrained(folder)


def bert(folder):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tf.BertForMaskedLM(tf.BertConfig(vocab_size=97, **sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "arguments", "names"),
    [
        (None, (), "`MODEL`"),
        (lambda folder: None, (), "`MODEL`"),
        (falcon, (), "falcon"),
        (t5, (), "'t5'"),
        (bert, (), "both directions"),
        (no_weights, (), "`MODEL`"),
        (falcon, ("--implementation", "flash"), "`--implementation`"),
        (falcon, ("--dtype", "int8"), "`--dtype`"),
        (falcon, ("--device", "toaster"), "`--device`"),
        (falcon, ("--tokens", "4000"), "`--tokens`"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_errors_are_one_line_that_names_the_cause(tmp_path, make, arguments, names):
    model = tmp_path / "model"
    if make is not None:
        model.mkdir()
        make(model)
    result = run(str(model), *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert names in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(folder("llama"), "--device", "cuda")
    assert result.exit_code == 2 and "`--device`" in result.stderr and "--device cpu" in result.stderr


def test_the_command_exists_and_help_names_the_commands():
    command = [sys.executable, "-m", "hf_longattn_cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("doctor", "verify", "plan", "generate", "convert"))
