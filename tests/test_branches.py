"""Layers with parallel branches on one row or two: the operators in place of the modules, and where not."""

import copy

import pytest
import tiny
import tiny_blocks
import torch
from recorded import RecordedGraph
from torch import nn

import hf_longattn
from hf_longattn import branches
from hf_longattn.branches import FewRowLayer
from hf_longattn.fusion import fused
from hf_longattn.generation import blocks, graph, linear
from hf_longattn.generation import prompts as prompt_graphs

GREEDY = {"do_sample": False, "max_new_tokens": 13}


def products(ours=True):
    """Products whose clock says that ours are always, or never, the faster ones."""
    clocked = []

    def clock(calls):
        clocked.append(len(calls))
        for call in calls:
            call()
        return -float(len(clocked)) if ours else float(len(clocked))

    return linear.Products(clock)


def unlike(model):
    """The model, none of whose norms and biases are ones and zeros: a forgotten one shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def taken(model):
    """Which layers run the operators."""
    layers = [module for module in model.modules() if type(module).__name__ == "GPTNeoXLayer"]
    return [type(vars(layer).get("forward")) is FewRowLayer for layer in layers]


@pytest.fixture
def calls(monkeypatch):
    """The rows of every call of the operator in front."""
    seen, real = [], branches.normed_linears
    spy = lambda states, *a, **o: (seen.append(states.shape[:-1].numel()), real(states, *a, **o))[1]  # noqa: E731
    monkeypatch.setattr(branches, "normed_linears", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_layer_of_few_rows_takes_the_operators(rows, calls):
    model = unlike(tiny.build("gpt-neox", "tree_attention", dtype=torch.bfloat16))
    ids = tiny.tokens(rows, 1)
    expected = model(input_ids=ids).logits
    with fused(model, rows, products()):
        calls.clear()
        assert taken(model) == [rows <= 2] * 3
        # The reference rounds where the modules do.
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert calls == [rows] * 3 * (rows <= 2)
        calls.clear()
        longer = model(input_ids=tiny.tokens(1, 5)).logits
    assert not calls and not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=tiny.tokens(1, 5)).logits, longer)


def test_a_layer_that_is_not_faster_is_left_alone():
    model = tiny.build("gpt-neox", dtype=torch.bfloat16)
    with fused(model, 1, products(ours=False)):
        assert not any(taken(model))


def _adapted(layer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["dense_4h_to_h"])
    peft.inject_adapter_in_model(config, layer)


class OwnLinear(nn.Linear):
    """Stands for one that is quantised or sharded."""


def _other_class(layer):
    layer.attention.dense.__class__ = OwnLinear


def _strided(layer):
    layer.attention.dense.weight.data = layer.attention.dense.weight.data.T


CHANGES = {
    "sequential": lambda layer: setattr(layer, "use_parallel_residual", False),
    "training": lambda layer: layer.train(),
    "hook": lambda layer: layer.mlp.act.register_forward_hook(lambda *args: None),
    "pre-hook": lambda layer: layer.post_mlp_dropout.register_forward_pre_hook(lambda *args: None),
    "forward": lambda layer: setattr(layer.attention, "forward", layer.attention.forward),
    "bias": lambda layer: setattr(layer.attention.query_key_value, "bias", None),
    "norm": lambda layer: setattr(layer, "input_layernorm", nn.RMSNorm(64, dtype=torch.bfloat16)),
    "norm bias": lambda layer: setattr(layer.input_layernorm, "bias", None),
    "norm dtype": lambda layer: layer.input_layernorm.float(),
    "eps": lambda layer: setattr(layer.input_layernorm, "eps", 0.5),
    "activation": lambda layer: setattr(layer.mlp, "act", nn.GELU(approximate="tanh")),
    "dtype": lambda layer: layer.float(),
    "class": _other_class,
    "strides": _strided,
    "adapter": _adapted,
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_of_another_kind_are_left_alone(change):
    model = tiny.build("gpt-neox", dtype=torch.bfloat16)
    CHANGES[change](model.gpt_neox.layers[1])
    with fused(model, 1, products()):
        assert taken(model) == [True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["normed_linears", "residual_linears"])
def test_a_layer_that_disagrees_is_left_alone(wrong, monkeypatch):
    model, real = unlike(tiny.build("gpt-neox", dtype=torch.bfloat16)), getattr(branches, wrong)

    def other(states, *args, **options):
        return real(1.1 * states + 0.1 * states.flip(-1), *args, **options)

    monkeypatch.setattr(branches, wrong, other)
    with fused(model, 1, products()):
        assert not any(taken(model))


def test_states_of_another_dtype_go_through_the_modules(calls):
    layer, seen = tiny.build("gpt-neox", dtype=torch.bfloat16).gpt_neox.layers[0], []
    few = FewRowLayer(layer)
    few.many_rows = lambda states, **keywords: seen.append((states.dtype, keywords))
    few(torch.zeros(1, 1, 64), layer_past=None)
    assert seen == [(torch.float32, {"layer_past": None})] and not calls


@pytest.fixture
def captured(monkeypatch):
    """Captures on a CPU, in fp32, by models for which our kernels are always the faster ones."""

    def capture(rehearse, step, like=None):
        rehearse()
        recorded = RecordedGraph()
        with recorded:
            result = step()
        recorded.undo()
        return recorded, result

    for module in (blocks, graph, prompt_graphs):
        monkeypatch.setattr(module, "capture", capture)
    for module in (blocks, graph):
        monkeypatch.setattr(module, "_GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "Products", products)
    monkeypatch.setattr(linear, "_DTYPES", (torch.float32,))


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prepared_block_transformer_takes_the_operators_in_both_decoders(rows, calls):
    model = unlike(tiny_blocks.make())
    ids, mask = tiny_blocks.prompts(*[9] * rows)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    assert not calls
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    # The first step of a block has two prefix vectors a row, which are too many for two rows.
    assert set(calls) == {1, 2} if rows == 1 else set(calls) == {2}
    assert not any(taken(hf_longattn.restore(model)))


@pytest.mark.usefixtures("captured")
def test_a_prepared_gpt_neox_takes_the_operators(calls):
    model, ids = unlike(tiny.build("gpt-neox")), tiny.tokens(1, 9)
    expected = model.generate(ids, **GREEDY)
    hf_longattn.prepare_generation(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert set(calls) == {1} and not any(taken(hf_longattn.restore(model)))


@torch.no_grad()
def test_rows_that_are_too_many_still_take_the_norms_of_the_next_layer_with_the_sum(monkeypatch):
    from hf_longattn.modeling.block_transformer import steps

    model, joined, real = unlike(tiny_blocks.make().bfloat16()), [], steps.residual_norms
    spy = lambda states, *a, **o: (joined.append(states.shape[:-1].numel()), real(states, *a, **o))[1]  # noqa: E731
    monkeypatch.setattr(steps, "residual_norms", spy)
    decoder = model.model.block_decoder
    states = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with fused(model, 1, products()), model.few_launches():
        assert all(taken(model))
        few = [each.many_rows for each in (vars(layer)["forward"] for layer in decoder.layers)]
        for length in (3, 1, 3):
            decoder(inputs_embeds=states[:, :length], use_cache=False)
        assert joined == [3] * 4 and all(each.func is steps._run_layer for each in few)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_on_a_gpu_is_no_further_from_exact_arithmetic(dtype):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 4}
    model = unlike(tiny_blocks.make(**sizes, initializer_range=0.05)).cuda().to(dtype)
    decoder, prefix = model.model.token_decoder, torch.randn(1, 2, 512, device="cuda", dtype=dtype)
    ids = torch.tensor([[7]], device="cuda")

    def states(decoder, prefix, replayed=False):
        cache = decoder.make_cache()
        found = []
        for part, end in ((ids[:, :0], 0), (ids, 2)):
            step = lambda part=part, end=end: _step(decoder, prefix, part, cache, end)  # noqa: E731
            # The first step makes the cache, and so goes another way.
            step()
            found.append(step().clone())
            if replayed:
                captured, result = linear.capture(step, step)
                captured.replay()
                assert torch.equal(result, found[-1])
        return torch.stack(found).double()

    exact = states(copy.deepcopy(decoder).double(), prefix.double())
    plain = states(decoder, prefix)
    with fused(model, 1, products()), model.few_launches():
        assert all(taken(model))
        result = states(decoder, prefix, replayed=True)
    allowed = (plain - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (result - exact).norm() <= 1.5 * allowed


def _step(decoder, prefix, ids, cache, end):
    for layer in cache.layers:
        layer.end = end
    return decoder.step(prefix, ids, cache)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2], ids="B{}".format)
def test_prepared_models_on_a_gpu_choose_the_best_tokens(rows, monkeypatch, calls):
    monkeypatch.setattr(graph, "Products", products)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    model = unlike(tiny_blocks.make(**sizes)).cuda().bfloat16()
    ids, mask = (tensor.cuda() for tensor in tiny_blocks.prompts(*[30] * rows))
    hf_longattn.prepare_generation(model)
    tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40)
    hf_longattn.restore(model)
    assert set(calls) == ({1, 2} if rows == 1 else {2})
    # Teacher-forced, every token is the best but for what rounding changes in a pair of logits.
    with torch.no_grad():
        rounded = model(tokens[:, :-1]).logits[:, -40:].double()
        exact = model.double()(tokens[:, :-1]).logits[:, -40:]
    chosen = exact.gather(2, tokens[:, -40:, None])[..., 0]
    rounding = (rounded - exact).abs().amax(-1)
    assert (exact.amax(-1) - chosen <= 2 * rounding).all()
