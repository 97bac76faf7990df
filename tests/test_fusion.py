"""Single kernels in place of norms and rotary embeddings: where proven, while capturing."""

import contextlib
import itertools
import sys
import threading
import time

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from hf_longattn import fusion, prepare_generation, restore
from hf_longattn.fusion import fused
from hf_longattn.generation import linear, prefill
from hf_longattn.instance import Setup, plain_settings


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gpt-oss", "gpt-neox", "cohere", "phi3", "olmo2"]
)
def test_logits_stay_and_everything_is_put_back(family):
    model, ids = tiny.build(family, "tree_attention"), tiny.tokens(2, 9)
    source = sys.modules[type(model).__module__]
    before = vars(source).get("apply_rotary_pos_emb")
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model):
            result = model(input_ids=ids).logits
    assert tiny.relative_error(result, expected) <= 2e-6
    assert vars(source).get("apply_rotary_pos_emb") is before
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own


@pytest.mark.parametrize(
    ("family", "kind", "activation"),
    [
        ("llama", "rms", "silu"),
        ("gemma2", "rms_plus_one", "gelu_tanh"),
        ("olmo2", "rms_wide", "silu"),
        ("phi3", "rms", "silu"),
        ("gpt-neox", "layer", None),
    ],
)
def test_norms_and_gates_are_told_apart(family, kind, activation, monkeypatch):
    model, seen = tiny.build(family, dtype=torch.bfloat16), []
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            torch.nn.init.normal_(module.weight)
    for name, option in (("row_norm", "kind"), ("gated_activation", "activation")):
        real = getattr(fusion, name)
        monkeypatch.setattr(
            fusion, name, lambda *a, real=real, option=option, **k: (seen.append(k[option]), real(*a, **k))[1]
        )
    with torch.no_grad(), fused(model):
        seen.clear()
        model(input_ids=tiny.tokens(2, 5))
    assert set(seen) == {kind, activation} - {None}


def test_modules_of_another_kind_are_left_alone():
    class HalfRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, states):
            return states * torch.rsqrt(states[..., :32].square().mean(-1, keepdim=True) + self.eps)

    model = tiny.build("llama")
    layer = model.model.layers[1]
    layer.input_layernorm = HalfRMSNorm()
    layer.mlp.act_fn = torch.nn.ReLU()
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output)
    model.model.layers[2].input_layernorm.compile(backend="eager")
    with fused(model):
        assert "forward" not in vars(layer.input_layernorm) and "forward" not in vars(layer.mlp)
        assert "forward" not in vars(model.model.layers[2].mlp)
        assert "forward" not in vars(model.model.layers[2].input_layernorm)
        assert "forward" in vars(model.model.layers[0].mlp)


def test_layers_of_one_class_with_other_settings_are_tried_apart():
    class Scaled(LlamaMLP):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    model, ids = tiny.build("llama"), tiny.tokens(2, 5)
    for layer, scale in zip(model.model.layers, (1.0, 0.5, 2.0), strict=True):
        layer.mlp.__class__, layer.mlp.scale = Scaled, scale
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model):
            assert ["forward" in vars(layer.mlp) for layer in model.model.layers] == [True, False, False]
            result = model(input_ids=ids).logits
    assert tiny.relative_error(result, expected) <= 2e-6


def test_parameters_that_are_ones_today_do_not_hide_what_a_module_computes():
    class SquaredRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x):
            return self.weight**2 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    class GainMLP(LlamaMLP):
        def forward(self, x):
            return self.gain * super().forward(x)

    model = tiny.build("llama")
    first, second, third = model.model.layers
    first.input_layernorm = SquaredRMSNorm()
    first.mlp.__class__, first.mlp.gain = GainMLP, torch.nn.Parameter(torch.ones(64))
    # A part that does nothing yet, and may learn to.
    second.mlp.between = torch.nn.LayerNorm(64)
    with fused(model):
        assert "forward" not in vars(first.input_layernorm) and "forward" not in vars(first.mlp)
        assert "forward" not in vars(second.mlp) and "forward" in vars(third.mlp)


@pytest.mark.parametrize("part", ["nothing", "model", "forward", "layer", "wrapped"])
def test_what_is_compiled_stays_as_it_is(part):
    """Each call would put other functions there, which a compiler traces again until it gives up."""
    model = tiny.build("llama")
    mlp = model.model.layers[1].mlp
    {
        "nothing": lambda: None,
        "model": model.compile,
        "forward": lambda: setattr(model, "forward", torch.compile(model.forward)),
        "layer": model.model.layers[1].compile,
        "wrapped": lambda: setattr(model.model.layers[1], "mlp", torch.compile(mlp)),
    }[part]()
    prepare_generation(model)
    source = sys.modules[type(model).__module__]
    rotation, forwards = source.apply_rotary_pos_emb, [vars(m).get("forward") for m in model.modules()]
    with fused(model):
        same = [vars(m).get("forward") for m in model.modules()] == forwards
        assert same == (source.apply_rotary_pos_emb is rotation) == (part != "nothing")
    torch._dynamo.reset()


@pytest.mark.parametrize("cut", ["gate", "up", "active"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gates_that_cut_large_values_off_are_left_alone(cut, dtype):
    class CuttingMLP(LlamaMLP):
        def forward(self, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
            gate = gate.clamp(max=self.limit) if cut == "gate" else gate
            up = up.clamp(-self.limit, self.limit) if cut == "up" else up
            active = self.act_fn(gate)
            return self.down_proj((active.clamp(max=self.limit) if cut == "active" else active) * up)

    config = tiny.build("llama").config
    layers = torch.nn.ModuleList([CuttingMLP(config), LlamaMLP(config)]).to(dtype)
    layers[0].limit = 10.0
    with fused(layers):
        assert ["forward" in vars(layer) for layer in layers] == [False, True]
    (products, _), changes = chooses(ours=True), Setup(layers)
    if dtype == torch.bfloat16:
        with torch.no_grad():
            products.replace(changes, layers, 1, fusion._close)
        own = ["_gated_few_rows" in repr(vars(layer).get("forward")) for layer in layers]
        changes.undo()
        assert own == [False, True]


def test_gates_between_adapted_layers_are_fused_and_their_layers_called():
    peft = pytest.importorskip("peft")
    model, ids = tiny.build("llama"), tiny.tokens(2, 9)
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model):
            mlps = [module for module in model.modules() if isinstance(module, LlamaMLP)]
            assert mlps and all("forward" in vars(module) for module in mlps)
            result = model(input_ids=ids).logits
    assert tiny.relative_error(result, expected) <= 2e-6


@pytest.mark.parametrize("states", [torch.bfloat16, torch.float32], ids=str)
def test_norms_of_states_in_another_dtype_take_their_own_way(states, monkeypatch):
    model, seen = tiny.build("llama"), []
    real = fusion.row_norm
    monkeypatch.setattr(fusion, "row_norm", lambda *a, **k: (seen.append(a[0].dtype), real(*a, **k))[1])
    x = torch.randn(3, 64).to(states)
    with torch.no_grad(), fused(model):
        expected = type(model.model.norm).forward(model.model.norm, x)
        seen.clear()
        assert model.model.norm(x).dtype == expected.dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert model.model.norm(x).dtype == expected.dtype
    assert seen == [torch.float32] * 2 * (states == torch.float32)


@pytest.mark.parametrize("hooks", ["its own", "of all modules", "of its backward"])
def test_an_activation_that_is_watched_goes_on_being_called(hooks):
    model, seen = tiny.build("llama"), []
    activation = model.model.layers[1].mlp.act_fn = torch.nn.SiLU()
    register = {
        "its own": activation.register_forward_hook,
        "of all modules": torch.nn.modules.module.register_module_forward_hook,
        "of its backward": activation.register_full_backward_hook,
    }[hooks]
    hook = register(lambda module, *args: seen.append(module) if module is activation else None)
    try:
        with fused(model):
            model(input_ids=tiny.tokens(1, 4)).logits.sum().backward()
    finally:
        hook.remove()
    assert len(seen) == 1


def test_what_a_module_takes_beside_the_states_reaches_its_own_forward():
    class AddingRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x, residual=None):
            x = x if residual is None else x + residual
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    model, states = tiny.build("llama"), torch.randn(3, 64)
    norm = model.model.norm = AddingRMSNorm()
    expected = norm(states, states), norm(x=states)
    with torch.no_grad(), fused(model):
        assert "forward" in vars(norm)
        assert torch.equal(norm(states, states), expected[0]) and torch.equal(norm(x=states), expected[1])


def test_a_probe_that_fails_leaves_everything_as_it_was():
    class Full(linear.Products):
        def replace(self, *args):
            raise torch.OutOfMemoryError("no memory")

    model = tiny.build("llama")
    source = sys.modules[type(model).__module__]
    before = source.apply_rotary_pos_emb
    with pytest.raises(torch.OutOfMemoryError), fused(model, 1, Full()):
        pass
    assert source.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())


def test_threads_that_begin_at_once_leave_the_rotary_embedding_as_it_was(monkeypatch):
    models = [tiny.build("llama"), tiny.build("llama")]
    source = sys.modules[type(models[0]).__module__]
    before, real, meet = source.apply_rotary_pos_emb, fusion._same_rotation, threading.Barrier(2)
    monkeypatch.setattr(fusion, "_FOUND", {})

    contexts = [fused(model) for model in models]

    def probe(*args):
        # Both are in the middle of it, unless one waits for the other.
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(0.3)
        if threading.current_thread() is threads[1]:
            time.sleep(0.1)
        return real(*args)

    monkeypatch.setattr(fusion, "_same_rotation", probe)
    threads = [threading.Thread(target=context.__enter__) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for context in contexts:
        context.__exit__(None, None, None)
    found, source.apply_rotary_pos_emb = source.apply_rotary_pos_emb, before
    assert found is before


def test_a_prompt_is_fused_on_a_gpu_alone():
    model = tiny.build("llama")
    with torch.no_grad(), fusion.fused_prompt(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_is_fused_on_the_current_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(fusion, "has_triton", lambda: True)
    found = {str(d): fusion.runs_on(d) for d in map(torch.device, ("cpu", "cuda", "cuda:0", "cuda:1"))}
    assert found == {"cpu": False, "cuda": True, "cuda:0": False, "cuda:1": True}
    model = tiny.build("llama")
    with fusion.fused_layer(model.model.layers[0], torch.zeros(1, 1, 64)):
        assert not any("forward" in vars(module) for module in model.modules())


def test_what_a_model_has_shown_is_not_asked_again(monkeypatch):
    model = tiny.build("llama")
    with fused(model):
        pass
    monkeypatch.setattr(fusion, "_draw", None)
    with fused(model):
        assert all("forward" in vars(m) for m in model.modules() if type(m).__name__ == "LlamaRMSNorm")


def _halve(model):
    model.model.layers[1].input_layernorm.register_forward_hook(lambda module, args, output: output / 2)


def _adapt(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj, torch.nn.Linear(64, 64))


def _swap(model):
    model.model.layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())


def _nest(model):
    # Of one class and without settings: what tells them apart lies inside.
    model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.ReLU())


class BufferLinear(torch.nn.Module):
    """A linear layer whose weight is a buffer, as some quantised ones keep theirs."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", 3 * linear.weight.detach())

    def forward(self, states):
        return states @ self.packed.T


def _quantise(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = BufferLinear(mlp.down_proj)


CHANGES = {"hook": (_halve, 3), "adapter": (_adapt, 2), "module": (_swap, 2), "activation": (_nest, 2),
           "quantised": (_quantise, 2), "dtype": (torch.nn.Module.double, 3)}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_prompts_is_seen(name):
    change, gates = CHANGES[name]
    model, ids = tiny.build("llama"), tiny.tokens(2, 5)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU())
    with torch.no_grad():
        with fused(model):
            before = model(input_ids=ids).logits
            assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
        change(model)
        expected = model(input_ids=ids).logits
        with fused(model):
            result = model(input_ids=ids).logits
            assert sum("forward" in vars(layer.mlp) for layer in model.model.layers) == gates
    assert result.dtype == expected.dtype and tiny.relative_error(result, expected) <= 2e-6
    assert (tiny.relative_error(before, expected) > 1e-3) == (name != "dtype")


def test_settings_are_read_without_asking_a_config():
    asked = []

    class Config:
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    module = torch.nn.ReLU()
    module.config, module.eps, module.kind = Config(), 1e-6, "plain"
    asked.clear()
    assert {("training", True), ("inplace", False), ("eps", 1e-6), ("kind", "plain")} <= {
        *plain_settings(module)
    }
    assert not asked


def test_two_calls_at_once_leave_the_rotary_embedding_as_it_was():
    llama, other = tiny.build("llama"), tiny.build("llama")
    before = sys.modules[type(llama).__module__].apply_rotary_pos_emb
    first, second = fused(llama), fused(other)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert sys.modules[type(llama).__module__].apply_rotary_pos_emb is before


def test_llama_is_fused():
    llama = tiny.build("llama")
    with fused(llama):
        assert all("forward" in vars(m) for m in llama.modules() if type(m).__name__ == "LlamaRMSNorm")
        assert "_rotate" in repr(sys.modules[type(llama).__module__].apply_rotary_pos_emb)


def test_a_rotation_is_traced_whole():
    """By torch 2.11 too, whose compiler raises where a truth value is the index of a tuple."""
    model = tiny.build("llama")
    query, key = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16)
    angle = torch.randn(2, 3, 8).repeat(1, 1, 2)
    states = query, key, angle.cos(), angle.sin()
    torch._dynamo.reset()
    with fused(model), torch.no_grad():
        turn = sys.modules[type(model).__module__].apply_rotary_pos_emb
        results = torch.compile(turn, fullgraph=True, backend="eager")(*states)
    torch._dynamo.reset()
    for result, expected in zip(results, apply_rotary_pos_emb(*states), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("family", ["gpt-neox", "llama"])
def test_heads_that_turn_in_part_are_fused_where_the_model_can(family, monkeypatch):
    model, calls = tiny.build(family), []
    real = fusion.rotary_embedding
    monkeypatch.setattr(fusion, "rotary_embedding", lambda *args: (calls.append(1), real(*args))[1])
    source = sys.modules[type(model).__module__]
    query, key, angle = (
        torch.randn(2, 4, 3, 24),
        torch.randn(2, 2, 3, 24),
        torch.randn(2, 3, 4).repeat(1, 1, 2),
    )
    own = source.apply_rotary_pos_emb
    with fused(model):
        calls.clear()
        if family == "llama":
            # Its function takes whole heads only, and says so.
            with pytest.raises(RuntimeError):
                source.apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
            assert not calls
            return
        turned = source.apply_rotary_pos_emb(query, key, angle.cos(), angle.sin())
        across = source.apply_rotary_pos_emb(
            query.transpose(1, 2), key.transpose(1, 2), angle.cos(), angle.sin(), unsqueeze_dim=2
        )
    assert len(calls) == 2
    for result, sideways, expected in zip(
        turned, across, own(query, key, angle.cos(), angle.sin()), strict=True
    ):
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(sideways.transpose(1, 2), expected)


def chooses(ours):
    """Products whose clock says that ours are always, or never, the faster ones."""

    def clock(calls):
        for call in calls:
            call()
        return -float(len(clocked)) if ours else float(len(clocked))

    clocked = []

    def counted(calls):
        clocked.append(len(calls))
        return clock(calls)

    return linear.Products(counted), clocked


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt-oss", "gpt-neox"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
def test_products_are_replaced_where_they_are_faster_and_put_back(family, ours):
    model, ids = tiny.build(family, "tree_attention", dtype=torch.bfloat16), tiny.tokens(2, 4)
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    products, clocked = chooses(ours)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with fused(model, 8, products):
            plain = [m for m in model.modules() if type(m) is torch.nn.Linear]
            assert all(("forward" in vars(m)) == ours for m in plain) and plain
            result = model(input_ids=ids).logits
            gated = [m.forward for m in model.modules() if type(m).__name__ == "LlamaMLP"]
        timed = len(clocked)
        with fused(model, 8, products):
            pass
    assert len(clocked) == timed, "a shape was timed twice"
    assert {"_gated_few_rows" in repr(forward) for forward in gated} <= {ours}
    assert tiny.relative_error(result.float(), expected.float()) <= 2**-7
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own


def test_more_rows_than_the_kernel_takes_and_layers_that_are_not_plain_are_left_alone():
    products, clocked = chooses(True)
    model = tiny.build("llama", dtype=torch.bfloat16)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.model.layers[0].mlp.gate_proj.forward = model.model.layers[0].mlp.gate_proj.forward
    with fused(model, 17, products):
        assert not any("forward" in vars(m) for m in model.model.layers[1].mlp.children())
    assert not clocked
    fp32 = tiny.build("llama")
    with fused(fp32, 1, products):
        assert not any("forward" in vars(m) for m in fp32.modules() if type(m) is torch.nn.Linear)


def test_a_product_that_disagrees_is_not_used(monkeypatch):
    monkeypatch.setattr(
        linear, "few_row_linear", lambda x, w, b, **_: 1.1 * torch.nn.functional.linear(x, w, b)
    )
    products, clocked = chooses(True)
    model = tiny.build("gpt-neox", dtype=torch.bfloat16)
    # More rows than whole layers are taken for.
    with fused(model, 3, products):
        assert not any("forward" in vars(m) for m in model.modules() if type(m) is torch.nn.Linear)
    assert not clocked


def test_gated_layers_with_parameters_of_their_own_are_tried_as_others_are():
    model = tiny.build("llama", dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.gain = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        # The order of the parts says nothing either.
        layer.mlp._modules = dict(reversed(layer.mlp._modules.items()))
    products, clocked = chooses(True)
    with fused(model, 1, products):
        assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
    assert clocked


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt-neox", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_prompt_on_a_gpu(family, dtype):
    model, ids = tiny.build(family, "tree_attention").cuda(), tiny.tokens(2, 300).cuda()
    own = {name for name, module in model.named_modules() if "forward" in vars(module)}
    model = model.to(dtype)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with fusion.fused_prompt(model):
            assert any("forward" in vars(m) for m in model.modules() if type(m).__name__.endswith("Norm"))
            result = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        exact = model.double()(input_ids=ids).logits
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == own
    allowed = (plain.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (result.double() - exact).norm() <= 1.5 * allowed


def test_chunks_of_a_prompt_run_fused(monkeypatch):
    model, ids = tiny.build("llama"), tiny.tokens(2, 21)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    prepare_generation(model, prefill_chunk_size=8)
    widths, real = [], fusion.gated_activation
    monkeypatch.setattr(prefill, "fused_prompt", fused)
    monkeypatch.setattr(
        fusion, "gated_activation", lambda gate, up, **k: (widths.append(gate.shape), real(gate, up, **k))[1]
    )
    with torch.no_grad():
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    layers = len(model.model.layers)
    assert [shape[1] for shape in widths[-3 * layers :: layers]] == [8, 8, 5]
    assert not any("forward" in vars(layer.mlp) for layer in restore(model).model.layers)


@pytest.mark.parametrize("restored", [False, True], ids=["prepared", "restored between"])
def test_calls_of_generate_see_what_changed_since_the_last(restored, monkeypatch):
    monkeypatch.setattr(prefill, "fused_prompt", fused)
    model, plain, ids = tiny.build("llama"), tiny.build("llama"), tiny.tokens(2, 21)
    plain.load_state_dict(model.state_dict())
    prepare_generation(model, prefill_chunk_size=8)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    seen = []
    with torch.no_grad():
        for change in (lambda model: None, _quantise, _halve, _swap):
            if restored:
                prepare_generation(restore(model), prefill_chunk_size=8)
            change(model), change(plain)
            # The same numbers in both.
            plain.load_state_dict(model.state_dict())
            scores, expected = (m.generate(ids, **options).scores[0] for m in (model, plain))
            assert tiny.relative_error(scores, expected) <= 2e-6
            seen.append(expected)
    assert all(tiny.relative_error(one, other) > 1e-3 for one, other in itertools.pairwise(seen))


def test_every_module_is_found_once_in_the_order_of_torch():
    from hf_longattn.instance import every_module

    model = tiny.build("llama")
    shared = torch.nn.Sequential(model.model.norm, torch.nn.Sequential(model.model.norm, torch.nn.ReLU()))
    shared.register_module("none", None)
    for module in (model, shared):
        found = every_module(module)
        assert len(found) > 3 and all(a is b for a, b in zip(found, module.modules(), strict=True))
