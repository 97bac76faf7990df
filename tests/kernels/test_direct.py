"""Operators called as plain functions: when, and with the results and gradients of torch.library."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longattn.kernels.cache_write import cache_write
from hf_longattn.kernels.direct import _direct
from hf_longattn.kernels.gated_activation import gated_activation
from hf_longattn.kernels.lightning_attention import api
from hf_longattn.kernels.rotary_embedding import rotary_embedding
from hf_longattn.kernels.row_norm import gated_row_norm, row_norm


class _Counts(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class _Other(torch.Tensor):
    """A class that is not torch's own."""


def _ways(gradients=True):
    """What `_direct` makes of x -> 2 x, and the list of the ways that its calls went."""
    ways = []

    def run(x, scale):
        ways.append("function")
        return x * scale

    def operator(x, scale):
        ways.append("operator")
        return x * scale

    def save(ctx, inputs, output):
        ctx.scale = inputs[1]

    def backward(ctx, grad):
        return grad * ctx.scale, None

    return _direct(operator, run, *((save, backward) if gradients else (None, None))), ways


def test_plain_tensors_and_parameters_go_to_the_function_with_its_gradient():
    call, ways = _ways()
    call(torch.ones(2), 2.0)
    weight = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        assert not call(weight, 2.0).requires_grad
    output = call(weight, 3.0)
    assert ways == ["function"] * 3 and output.grad_fn is not None
    assert torch.autograd.grad(output.sum(), weight)[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("tensor", [torch.ones(2).as_subclass(_Other), torch.empty(2, device="meta")])
def test_other_classes_and_tensors_without_data_go_to_the_operator(tensor):
    call, ways = _ways()
    call(tensor, 2.0)
    assert ways == ["operator"]


def test_modes_transforms_and_tracing_see_the_operator():
    call, ways = _ways()
    with _Counts():
        call(torch.ones(2), 2.0)
    torch.func.vmap(lambda x: call(x, 2.0))(torch.ones(2, 2))
    torch.jit.trace(lambda x: call(x, 2.0), torch.ones(2), check_trace=False)
    for before_autograd in (False, True):
        make_fx(lambda x: call(x, 2.0), pre_dispatch=before_autograd)(torch.ones(2))
    assert ways == ["operator"] * 5


def test_forward_mode_is_refused():
    call, ways = _ways()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: call(x, 2.0), (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        call(torch.ones(2), 2.0)
        with pytest.raises(NotImplementedError, match="forward mode"):
            call(forward_ad.make_dual(torch.ones(2), torch.ones(2)), 2.0)
    assert ways == ["function"]


def test_nothing_is_recorded_in_inference_mode():
    call, _ = _ways()
    with torch.inference_mode(), torch.enable_grad():
        assert not call(torch.nn.Parameter(torch.ones(2)), 2.0).requires_grad


def test_the_graph_shows_the_name_of_the_operator():
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    output = api._scan(q, q, q, torch.ones(2), None, None, 1.0, api.FORWARD, True, False, "reference")[0]
    assert output.grad_fn.name() == "lightning_scanBackward"


def test_a_gradient_that_was_not_registered_is_left_to_the_operator_to_refuse():
    call, ways = _ways(gradients=False)
    call(torch.ones(2, requires_grad=True), 2.0)
    call(torch.ones(2), 2.0)
    assert ways == ["operator", "function"]


@pytest.mark.parametrize("direction", [api.FORWARD, api.BOTH], ids=["causal", "both"])
def test_results_and_gradients_are_bit_for_bit_those_of_the_operator(direction):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 4).requires_grad_() for heads in (4, 2, 2))
    causal = direction == api.FORWARD
    state = torch.randn(2, 4, 4, 4).requires_grad_() if causal else None
    slopes = torch.tensor([0.5, 0.2, 0.1, 0.0])
    leaves = [q, k, v, state] if causal else [q, k, v]
    found = []
    for scan in (api._scan, torch.ops.hf_longattn.lightning_scan):
        outputs = scan(q, k, v, slopes, state, None, 0.5, direction, causal, False, "reference")
        loss = sum(output.square().sum() for output in outputs)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        # The gradients are scans themselves, and have gradients.
        second = torch.autograd.grad(sum(part.square().sum() for part in first), leaves)
        found.append([*outputs, *first, *second])
    assert all(map(torch.equal, *found)) and len(found[0]) == 2 + 2 * len(leaves)


def test_a_compiled_graph_and_a_mode_still_see_the_scan():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    arguments = (q, k, v, torch.ones(2), None, None, 1.0, api.FORWARD, True, False, "reference")
    with _Counts() as seen:
        api._scan(*arguments)
    assert "hf_longattn::lightning_scan" in seen.names
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    output = torch.compile(lambda q: api._scan(q, *arguments[1:])[0], backend=backend, fullgraph=True)(q)
    assert torch.equal(output, api._scan(*arguments)[0])
    assert any("lightning_scan" in str(node.target) for node in graphs[0].graph.nodes)


def write(states, held):
    cache_write(held, held.clone(), torch.arange(states.shape[2]), states, states, impl="triton")
    return held


LAUNCHES = {
    "row_norm": lambda states, _: row_norm(states, states[0, 0, 0], eps=1e-5, impl="triton"),
    "gated_row_norm": lambda states, _: gated_row_norm(states, states, None, eps=1e-5, impl="triton"),
    "gated_activation": lambda states, _: gated_activation(states, states, impl="triton"),
    "rotary_embedding": lambda states, _: torch.cat(
        rotary_embedding(states, states, states[:, 0], states[:, 1], impl="triton")
    ),
    "cache_write": write,
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_compiler_sees_an_operator_in_place_of_a_launch(name):
    """It knows no launch with strides that vary, as they do where the length does."""
    graphs = []

    def compiled(graph, inputs):
        graphs.append(graph)
        return graph

    backend = aot_autograd(fw_compiler=compiled, decompositions=select_decomp_table())
    torch._dynamo.reset()
    function = torch.compile(LAUNCHES[name], fullgraph=True, backend=backend)
    for length in (3, 4):
        states, held = torch.randn(2, 2, length, 16), torch.zeros(2, 2, 9, 16)
        torch._dynamo.mark_dynamic(states, 2)
        with torch.no_grad():
            expected = LAUNCHES[name](states, held.clone())
            torch.testing.assert_close(function(states, held), expected)
        # What is written in place is written there.
        assert name != "cache_write" or torch.equal(held, expected)
    torch._dynamo.reset()
    operator = f"hf_longattn.{'row_norm' if 'norm' in name else name}"
    assert len(graphs) == 1 and operator in graphs[0].code and "triton" not in graphs[0].code
