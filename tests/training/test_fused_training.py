"""Norms, gates and rotary embeddings as single kernels in layers that train, against the model unprepared."""

import functools
import os
import sys

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn import fusion

# fp32 sums in another order, relative; see `test_prepare_training.py`.
BOUND = 2e-6
# Which of the kernels a family has a use for.
FUSED = {
    "llama": {"row_norm", "gated_activation", "rotary_embedding"},
    "qwen3": {"row_norm", "gated_activation", "rotary_embedding"},
    "gemma2": {"row_norm", "gated_activation", "rotary_embedding"},
    "phi3": {"row_norm", "gated_activation", "rotary_embedding"},
    "olmo2": {"row_norm", "gated_activation", "rotary_embedding"},
    "gpt-neox": {"row_norm", "rotary_embedding"},
    # Its angles alternate, and its norm has a weight alone.
    "cohere": {"row_norm", "gated_activation"},
    "gpt-oss": {"row_norm"},
}


@pytest.fixture
def called(monkeypatch):
    """As on a GPU; the names of what was called, with whether a gradient was wanted."""
    found = []
    monkeypatch.setattr(fusion, "runs_on", lambda device: True)
    for name in FUSED["llama"]:
        real = getattr(fusion, name)
        impl = {"impl": "triton"} if os.environ.get("TRITON_INTERPRET") == "1" else {}

        def call(*args, real=real, name=name, impl=impl, **kwargs):
            found.append((name, torch.is_grad_enabled() and args[0].requires_grad))
            return real(*args, **kwargs, **impl)

        monkeypatch.setattr(fusion, name, call)
    return found


def build(family):
    model = tiny.build_to_train(family)
    for module in model.modules():
        # What a norm multiplies by must count.
        if type(module).__name__.endswith("Norm"):
            torch.nn.init.normal_(module.weight, 0.5, 0.2)
    return model


def step(model, length=43):
    ids = tiny.tokens(2, length)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(result, expected, bound=BOUND):
    assert tiny.relative_error(result[0], expected[0]) <= bound
    assert result[1].keys() == expected[1].keys() and expected[1]
    for name, grad in expected[1].items():
        assert tiny.relative_error(result[1][name], grad) <= 10 * bound, name
    ours, theirs = (torch.cat([g[name].flatten() for name in expected[1]]) for g in (result[1], expected[1]))
    assert tiny.relative_error(ours, theirs) <= bound


@pytest.mark.parametrize("family", FUSED)
def test_loss_and_gradients_are_those_of_the_model(family, called):
    expected = step(build(family))
    model = build(family)
    source = sys.modules[type(model).__module__]
    rotation = vars(source).get("apply_rotary_pos_emb")
    hf_longattn.prepare_training(model, block_size=16)
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    called.clear()
    assert_same(step(model), expected)
    assert {name for name, wanted in called if wanted} == FUSED[family]
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own
    assert vars(source).get("apply_rotary_pos_emb") is rotation


def test_the_last_norm_is_one_kernel_too(called):
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    # What a norm computes is asked at the first call of a process.
    model.model.norm(torch.randn(1, 43, 64, requires_grad=True)).sum().backward()
    for length in (43, 9):
        called.clear()
        hidden = torch.randn(2, length, 64, requires_grad=True)
        model.model.norm(hidden).sum().backward()
        blocks = -(-length // 16)
        # A block forward, and again in the backward; one block alone keeps its graph.
        assert len(called) == (2 * blocks if blocks > 1 else 1)


def test_what_is_frozen_gets_no_gradient(called):
    def frozen():
        model = build("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in name and "mlp.up_proj" not in name)
        return model

    expected = step(frozen())
    assert_same(step(hf_longattn.prepare_training(frozen(), block_size=16)), expected)
    assert ("row_norm", True) in called


def test_adapters_inside_gates(called):
    peft = pytest.importorskip("peft")

    def adapted(prepare_first):
        model = build("llama")
        if prepare_first:
            hf_longattn.prepare_training(model, block_size=16)
        targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False, modules_to_save=["input_layernorm"]
        )
        return peft.get_peft_model(model, config)

    expected = step(adapted(False))
    result = step(hf_longattn.prepare_training(adapted(False), block_size=16))
    assert_same(result, expected)
    assert ("gated_activation", True) in called
    called.clear()
    assert_same(step(adapted(True)), expected)
    assert ("gated_activation", True) in called


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "qwen3"])
def test_autocast_is_that_of_the_model(family, called):
    def loss_and_gradients(model):
        with torch.autocast("cpu", torch.bfloat16):
            ids = tiny.tokens(2, 43)
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact = step(build(family).double())[1]
    exact = torch.cat([grad.flatten() for grad in exact.values()])
    plain = tiny.relative_error(loss_and_gradients(build(family)), exact)
    result = loss_and_gradients(hf_longattn.prepare_training(build(family), block_size=16))
    assert tiny.relative_error(result, exact) <= 1.5 * (plain + torch.finfo(torch.bfloat16).eps)
    assert ("row_norm", True) in called


def test_what_somebody_hung_on_a_module_is_still_called(called):
    model, seen = build("llama"), []
    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_pre_hook(lambda *args: seen.append("norm"))
    layer.mlp.gate_proj.register_forward_hook(lambda *args: seen.append("gate"))
    layer.mlp.register_full_backward_hook(lambda *args: seen.append("backward"))
    # As Liger does: a forward of its own stays.
    other = model.model.layers[1].mlp
    other.forward = functools.partial(lambda own, x: (seen.append("own"), own(x))[1], other.forward)
    step(hf_longattn.prepare_training(model, block_size=64))
    assert {"norm": 2, "gate": 2, "backward": 1, "own": 2} == {name: seen.count(name) for name in set(seen)}


def test_a_block_keeps_what_the_kernels_need_and_no_more(called):
    model = hf_longattn.prepare_training(build("llama"), block_size=16)
    mlp, states, kept = model.model.layers[0].mlp, torch.randn(1, 16, 64, requires_grad=True), []

    def run():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            mlp(states)
        inner = [t for t in kept if t.shape[-1] == 96 and t.ndim == 3]
        return sum({t.data_ptr(): t.numel() for t in inner}.values())

    plain = run()
    with fusion.fused_layer(model.model.layers[0], states):
        # On a CPU the same tensors as plain torch's; a kernel leaves the activation of the gate away.
        assert run() == plain - (16 * 96 if os.environ.get("TRITON_INTERPRET") == "1" else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [name for name in FUSED if name != "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_kernels_are_as_exact_as_the_model(family, dtype, monkeypatch):
    def gradients(kept, prepared):
        model = build(family).to(dtype).to("cuda", kept)
        if prepared:
            hf_longattn.prepare_training(model, block_size=100)
        ids = tiny.tokens(2, 333).cuda()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    found = []
    for name in FUSED[family]:
        real = getattr(fusion, name)

        def call(*args, real=real, name=name, **kwargs):
            # A probe, which asks what a module computes, has no gradient.
            if torch.is_grad_enabled() and args[0].requires_grad:
                found.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(fusion, name, call)
    exact, plain = gradients(torch.float64, False), gradients(dtype, False)
    error = tiny.relative_error(gradients(dtype, True), exact)
    assert error <= 1.5 * (tiny.relative_error(plain, exact) + torch.finfo(dtype).eps)
    # In 16 bit OLMo 2 turns by angles in fp32, which its own code alone knows.
    left = {"rotary_embedding"} if family == "olmo2" and dtype != torch.float32 else set()
    assert set(found) == FUSED[family] - left


@pytest.mark.slow
@pytest.mark.interpreted
def test_kernels_keep_less_of_a_block(called):
    test_a_block_keeps_what_the_kernels_need_and_no_more(called)


@pytest.mark.slow
@pytest.mark.interpreted
def test_kernels_in_a_layer(called):
    models = [build("llama"), build("llama")]
    for model in models:
        model.model.layers = model.model.layers[:1]
    hf_longattn.prepare_training(models[1], block_size=4)
    assert_same(step(models[1], 6), step(models[0], 6))
    assert {name for name, wanted in called if wanted} == FUSED["llama"]
