"""The registered operator: what it is given to, how it compiles, and what it refuses."""

import pytest
import torch
from dense_attention import IMPLS, OPTIONS, make_inputs, positions, run, torch_only

from hf_longattn.kernels.blockwise_attention import api, blockwise_attention
from hf_longattn.kernels.blockwise_attention.terms import Terms
from hf_longattn.kernels.key_range import KeyRange


@torch_only
def test_memory_grows_with_the_length_only():
    def saved_bytes(T):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        leaves = [x.requires_grad_() for x in make_inputs(B=1, T=T, S=T)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            blockwise_attention(*leaves, mask=KeyRange(causal=True))
        return total

    short, long = saved_bytes(64), saved_bytes(256)
    assert short >= 64 * (4 + 2 + 2 + 4) * 16 * 4
    assert long == 4 * short


@torch_only
def test_default_choice_equals_the_reference():
    tensors = make_inputs(T=300, S=300)
    mask = KeyRange(causal=True, lower=positions(300) - 50)
    chosen, exact = (
        blockwise_attention(*tensors, mask=mask),
        blockwise_attention(*tensors, mask=mask, impl="reference"),
    )
    torch.testing.assert_close(chosen, exact, rtol=0, atol=5e-6)


@torch_only
@pytest.mark.parametrize("name", ["causal", "bias-of-a-head", "sinks-and-padding"])
def test_compiles_into_one_graph(name):
    options = OPTIONS[name]()
    tensors, seeds = make_inputs(), (torch.randn(2, 4, 63, 16), torch.randn(2, 4, 63))
    compiled = torch.compile(blockwise_attention, fullgraph=True, backend="aot_eager")
    expected, got = run(blockwise_attention, tensors, seeds, options), run(compiled, tensors, seeds, options)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch_only
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lse_used", [False, True], ids=["output", "lse"])
def test_operator_is_well_formed(lse_used, impl):
    mask = KeyRange(causal=True, lower=positions(9))
    tensors = [x.requires_grad_() for x in make_inputs(T=9, S=9)]
    arguments = (*tensors, None, None, mask.lower, None, None, True, 0.25, None, 0.0, 0, impl)
    torch.library.opcheck(torch.ops.hf_longattn.blockwise_attention.default, arguments)
    output, lse = (x.detach() for x in torch.ops.hf_longattn.blockwise_attention(*arguments))
    detached = [x.detach() for x in tensors]
    backward = (torch.randn_like(output), torch.randn_like(lse) if lse_used else None, *detached, output, lse)
    torch.library.opcheck(
        torch.ops.hf_longattn.blockwise_attention_backward.default,
        (*backward, *arguments[3:], False),
        test_utils=("test_schema", "test_faketensor"),
    )


BAD_CALLS = {
    "`query`": lambda q, k, v: {"query": q[0]},
    "`query` must have a head dim": lambda q, k, v: {"query": q[..., :0], "key": k[..., :0]},
    "`key` must share": lambda q, k, v: {"key": k[..., :8]},
    "`key` heads": lambda q, k, v: {"query": q[:, :3]},
    "`value`": lambda q, k, v: {"value": v[:, :, :5]},
    "`mask.lower`": lambda q, k, v: {"mask": KeyRange(lower=positions(5))},
    "`mask.key_mask`": lambda q, k, v: {"mask": KeyRange(key_mask=torch.ones(3, 63, dtype=torch.bool))},
    "`bias`": lambda q, k, v: {"bias": torch.zeros(2, 4, 63, 1)},
    "`sinks`": lambda q, k, v: {"sinks": torch.zeros(3)},
    "`softcap`": lambda q, k, v: {"softcap": 0.0},
    "`scale`": lambda q, k, v: {"scale": -1.0},
    "`dropout`": lambda q, k, v: {"dropout": (1.0, 0)},
    "`dropout` must be": lambda q, k, v: {"dropout": 0.5},
    "`key` is on meta": lambda q, k, v: {"key": k.to("meta")},
    "`value` is on meta": lambda q, k, v: {"value": v.to("meta")},
    "`bias` is on meta": lambda q, k, v: {"bias": torch.zeros(1, 1, 63, 63, device="meta")},
    "`sinks` is on meta": lambda q, k, v: {"sinks": torch.zeros(4, device="meta")},
    "`impl` of": lambda q, k, v: {"impl": "flash"},
    "`impl='sdpa'`": lambda q, k, v: {"impl": "sdpa", "softcap": 1.0},
}


@torch_only
@pytest.mark.parametrize("message", BAD_CALLS)
def test_refuses_by_name(message):
    query, key, value = make_inputs()
    call = {"query": query, "key": key, "value": value, **BAD_CALLS[message](query, key, value)}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        blockwise_attention(call.pop("query"), call.pop("key"), call.pop("value"), **call)


@torch_only
@pytest.mark.parametrize(
    ("head_dim", "dtype", "chosen"),
    [
        (512, torch.bfloat16, "triton"), (520, torch.float16, "reference"), (256, torch.float32, "triton"),
        (300, torch.float32, "reference"), (64, torch.float64, "reference"),
    ],
)  # fmt: skip
def test_heads_wider_than_the_kernels_hold(head_dim, dtype, chosen, monkeypatch):
    monkeypatch.setattr(api.dispatch, "triton_runs_on", lambda device: True)
    tensors = [torch.empty(1, 2, 9, dim, dtype=dtype, device="meta") for dim in (head_dim, head_dim, 16)]
    terms = Terms(1.0, KeyRange(), None, 20.0, None, None)
    assert api._choose("auto", *tensors, terms, False) == chosen
    if chosen == "reference":
        with pytest.raises(ValueError, match=r"`impl='triton'` of .* cannot take (a head dim of|float64)"):
            api._choose("triton", *tensors, terms, False)


@torch_only
def test_refuses_what_is_of_another_type():
    query, key, value = make_inputs()
    with pytest.raises(TypeError, match="`value`"):
        blockwise_attention(query, key, value.half())
    with pytest.raises(TypeError, match="`query` must be bf16, fp16, fp32 or fp64, .* got float8_e4m3fn"):
        blockwise_attention(*(states.to(torch.float8_e4m3fn) for states in (query, key, value)))
    with pytest.raises(TypeError, match="`mask` must be a KeyRange or None, got Tensor"):
        blockwise_attention(query, key, value, mask=torch.ones(63, 63))
    with pytest.raises(TypeError, match="`mask.lower` must be an integer dtype"):
        blockwise_attention(query, key, value, mask=KeyRange(lower=positions(63).float()))
    with pytest.raises(TypeError, match="`mask.key_mask` must be bool"):
        blockwise_attention(query, key, value, mask=KeyRange(key_mask=torch.ones(1, 63)))
