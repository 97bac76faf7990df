"""When Liger's kernel takes the loss, that it gives the same loss, and layers that run its kernels."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers.models.llama import modeling_llama

import hf_longattn
from hf_longattn.training import liger

installed = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


def newest(hidden, weight, targets, *, reduction, label_smoothing, accum_dtype, chunk_mem_const):
    """The signature of Liger's function, in plain torch."""
    assert accum_dtype == torch.float32
    # How Liger 0.8 cuts: the logits of a chunk are to be no more than those of nine tokens.
    parts = -(-weight.shape[0] // (chunk_mem_const * hidden.shape[1]))
    chunk = min(1 << (-(-len(hidden) // parts) - 1).bit_length(), len(hidden))
    assert chunk <= 9, (len(hidden), chunk)
    logits = hidden @ weight.T
    return nn.functional.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)


def older(hidden, weight, targets, *, reduction, label_smoothing, accum_dtype):
    raise AssertionError("must not be called")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What a machine with a GPU and Liger looks like, with a stand-in for the kernel; what was said."""
    said = []
    monkeypatch.setattr(liger, "triton_runs_on", lambda device: True)
    monkeypatch.setattr(liger, "log_once", lambda level, message: said.append(message))
    monkeypatch.setattr(liger, "_INSTALLED", True)
    monkeypatch.setattr(liger, "_function", lambda: newest)
    return said


def pick(family="llama", change=lambda model: None, dtype=torch.float32):
    model = tiny.build(family).to(dtype)
    change(model)
    head = functools.partial(project, model)
    return liger.fused_loss(head, model.get_output_embeddings(), torch.zeros(7, 64, dtype=dtype), 9)


def project(model, hidden):
    """The model's own scaling and capping, after its head."""
    logits = model.get_output_embeddings()(hidden)
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits * (getattr(model.config, "logit_scale", None) or 1.0)


CHANGES = {
    "bias": (lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(97))), "without bias"),
    "another kind": (lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "linear layer"),
    "hooks": (lambda model: model.lm_head.register_forward_hook(lambda *a: None), "hooks"),
    "backward hooks": (lambda model: model.lm_head.register_full_backward_hook(lambda *a: None), "hooks"),
    "fp64": (lambda model: model.double(), "fp64"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_taken(on_a_gpu, dtype):
    assert pick(dtype=dtype) is not None
    assert on_a_gpu == ["loss: chunks are taken by Liger's fused linear cross-entropy"]


@pytest.mark.parametrize(
    "shape", [(128256, 2048), (128256, 4096), (32000, 4096), (97, 64), (50, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_call_takes_several_chunks_and_cuts_them_as_asked(shape, dtype):
    vocabulary, width = shape
    with torch.device("meta"):
        head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    fused = liger.FusedLoss(head, 2048, liger._chunks(head))
    assert fused.chunks == (1 if dtype == torch.float16 else min(8, -(-vocabulary // width)))
    for tokens in {1, 2047, min(2049, fused.tokens), fused.tokens // 2, fused.tokens - 1, fused.tokens}:
        parts = -(-vocabulary // (fused.budget(tokens) * width))
        size = -(-tokens // parts)
        assert 1 << (size - 1).bit_length() <= 2048 or tokens <= 2048
        # No more calls of the kernel than twice what is needed.
        assert -(-tokens // (1 << (size - 1).bit_length())) <= max(2 * -(-tokens // 2048), 1)


def test_a_batch_without_a_token_that_counts(on_a_gpu, monkeypatch):
    def divides(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(liger, "_function", lambda: divides)
    monkeypatch.setattr(liger, "_obstacle", lambda linear, hidden: None)
    model = hf_longattn.prepare_training(tiny.build("llama").train())
    ids = tiny.tokens(2, 9)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0 and on_a_gpu == ["loss: chunks are taken by Liger's fused linear cross-entropy"]
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("family", "words"), [("gemma2", "caps"), ("cohere", "scales")])
def test_a_head_that_does_more_is_left_alone(on_a_gpu, family, words):
    assert pick(family) is None
    assert words in on_a_gpu[0]


@pytest.mark.parametrize("name", CHANGES)
def test_heads_that_the_kernel_does_not_know(on_a_gpu, name):
    change, words = CHANGES[name]
    assert pick(change=change) is None
    assert words in on_a_gpu[0]


def test_versions_without_the_size_of_a_chunk(on_a_gpu, monkeypatch):
    monkeypatch.setattr(liger, "_function", lambda: older)
    assert pick() is None and "0.8" in on_a_gpu[0]
    monkeypatch.setattr(liger, "_INSTALLED", False)
    assert pick() is None and "not installed" in on_a_gpu[1]


def test_on_a_cpu_it_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(liger, "_INSTALLED", True)
    monkeypatch.setattr(liger, "_function", lambda: older)
    assert pick() is None


def train(labels, **fields):
    ids = tiny.tokens(2, 37)
    model = hf_longattn.prepare_training(tiny.build("llama"), block_size=16, loss_chunk_size=9, **fields)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_prepared_model_gets_the_same_loss_through_it(on_a_gpu, smoothing):
    labels = tiny.tokens(2, 37).masked_fill(torch.arange(37) % 4 == 0, -100)
    result = train(labels, label_smoothing=smoothing)
    assert "by Liger" in on_a_gpu[0]
    liger._INSTALLED = False
    for ours, theirs in zip(result, train(labels, label_smoothing=smoothing), strict=True):
        assert tiny.relative_error(ours, theirs) <= 2e-6


@installed
@pytest.mark.slow
def test_the_kernel_itself_in_the_interpreter():
    script = Path(__file__).with_name("liger_case.py")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "by Liger's fused" in result.stdout and "scales or caps" in result.stdout
    assert "layers by Liger" in result.stdout


def step_on_a_gpu(rows, dtype, kept, change=lambda model: None, **fields):
    """(loss, gradients) in fp64, of a model whose weights were rounded to a dtype."""
    ids = tiny.tokens(rows, 600).cuda()
    model = tiny.build("llama").to(dtype).to("cuda", kept)
    change(model)
    hf_longattn.prepare_training(model, block_size=256, loss_chunk_size=100, **fields)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    return loss.detach().double().reshape(1), gradients


def assert_as_exact(ours, plain, exact, dtype):
    for result, other, expected in zip(ours, plain, exact, strict=True):
        bound = 1.5 * (tiny.relative_error(other, expected) + torch.finfo(dtype).eps)
        assert tiny.relative_error(result, expected) <= bound


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_is_as_exact_as_plain_torch(dtype, monkeypatch):
    results = {}
    for kind, kept in (("exact", torch.float64), ("torch", dtype), ("liger", dtype)):
        monkeypatch.setattr(liger, "_INSTALLED", kind == "liger")
        results[kind] = step_on_a_gpu(2, dtype, kept)
    assert_as_exact(results["liger"], results["torch"], results["exact"], dtype)


@pytest.fixture
def llama_as_it_was():
    """Liger changes the module of transformers, not one model alone."""
    names = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(names)


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_layers_of_liger_are_as_exact(dtype, rows, offload, monkeypatch, llama_as_it_was):
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    def change(model):
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)

    monkeypatch.setattr(liger, "_INSTALLED", False)
    exact = step_on_a_gpu(rows, dtype, torch.float64)
    plain = step_on_a_gpu(rows, dtype, dtype)
    ours = step_on_a_gpu(rows, dtype, dtype, change, offload=offload)
    assert_as_exact(ours, plain, exact, dtype)
