"""Attention with all its weights at once, and inputs and options to hold kernels against it."""

import pytest
import torch

from hf_longattn.kernels.blockwise_attention import blockwise_attention
from hf_longattn.kernels.blockwise_attention.philox import keep_tile
from hf_longattn.kernels.dispatch import interpreting
from hf_longattn.kernels.key_range import KeyRange

# Run as they are, the tests go through the torch implementations; `test_interpreter_runs_the_kernels` runs
# its file again with TRITON_INTERPRET=1, and then the same cases go through the Triton kernels.
IMPLS = ("triton",) if interpreting() else ("reference", "sdpa")
# The interpreter takes its time for every head.
HEADS = 2 if interpreting() else 4
torch_only = pytest.mark.skipif(interpreting(), reason="does not depend on the implementation")


def make_inputs(B=2, H=4, G=2, T=63, S=63, K=16, V=None, dtype=torch.float32, std=1.0):
    value_dim = K if V is None else V
    shapes = ((B, H, T, K), (B, G, S, K), (B, G, S, value_dim))
    return [(std * torch.randn(shape)).to(dtype) for shape in shapes]


def dense_probs(query, key, *, scale=None, mask=None, bias=None, softcap=None, sinks=None, dropout=None):
    """The definition, with every pair in memory, in the dtype of its inputs: probabilities and lse."""
    (B, H, T, K), (G, S) = query.shape, key.shape[1:3]
    key = key.repeat_interleave(H // G, dim=1)
    logits = query @ key.mT * (K**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
    tile = (mask or KeyRange()).tile(slice(0, T), slice(0, S), T, S, query.device)
    logits = logits.masked_fill(~tile, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks[:, None, None].expand(B, H, T, 1).to(logits.dtype)), dim=3)
    lse = torch.logsumexp(logits, dim=3)
    probs = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0)[..., None])[..., :S]
    if dropout is not None:
        keep = keep_tile(dropout, (B, H), slice(0, T), slice(0, S), query.device)
        probs = probs * keep / (1 - dropout[0])
    return probs, lse


def dense(query, key, value, **options):
    probs, lse = dense_probs(query, key, **options)
    return probs @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1), lse


def sizes_before_cancelling(query, key, value, seeds, options):
    """Norms of output, lse and the gradients of query and key, every term of their sums taken positive.

    Rounding is relative to these: for a row of one key dp - delta is 0, and the rounding of both is left.
    """
    query, key, value, *seeds = (x.double().abs() for x in (query, key, value, *seeds))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    probs = options["probs"]
    pairs = probs * (seeds[0] @ value.mT)
    pairs = pairs + probs * (pairs.sum(dim=3, keepdim=True) + seeds[1][..., None])
    grad_query, grad_key = options["scale"] * pairs @ key, options["scale"] * pairs.mT @ query
    return [(probs @ value).norm(), 1.0, grad_query.norm(), group**0.5 * grad_key.norm()]


def run(function, tensors, seeds, options, dtype=None):
    """[output, lse, gradients ...] of `function`; tensors and floating options are leaves in `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    options = dict(options)
    for name in ("bias", "sinks"):
        if is_floating(extra := options.get(name)):
            options[name] = extra.detach().to(dtype or extra.dtype).requires_grad_()
            leaves.append(options[name])
    output, lse = function(*leaves[:3], **options)
    seen = lse > -torch.inf
    loss = (output * seeds[0].to(output.dtype)).sum() + (
        lse.masked_fill(~seen, 0) * seeds[1].to(lse.dtype)
    ).sum()
    return [output.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def is_floating(option):
    return isinstance(option, torch.Tensor) and option.is_floating_point()


def error(got, exact):
    assert got.shape == exact.shape
    assert torch.equal(got.isfinite(), exact.isfinite())
    return (got.double() - exact).nan_to_num(0, 0, 0).norm().item()


def check(tensors, impl, with_lse=True, **options):
    """Error against fp64 at most 1.5 times that of the dense formula in the dtype of the inputs."""
    query, value = tensors[0], tensors[2]
    seeds = (torch.randn(*query.shape[:3], value.shape[3]), torch.randn(query.shape[:3]) * with_lse)
    options = {name: option for name, option in options.items() if option is not None}
    exact = run(dense, tensors, seeds, options, torch.float64)
    plain = run(dense, tensors, seeds, options)
    got = run(lambda *a, **k: blockwise_attention(*a, **k, impl=impl), tensors, seeds, options)
    eps = torch.finfo(query.dtype).eps
    wide = {name: x.double() if is_floating(x) else x for name, x in options.items()}
    probs = dense_probs(query.double(), tensors[1].double(), **wide)[0]
    scale = options.get("scale", query.shape[3] ** -0.5)
    sizes = sizes_before_cancelling(*tensors, seeds, {"probs": probs, "scale": scale})
    for index, (x, standard, truth) in enumerate(zip(got, plain, exact, strict=True)):
        size = max(truth[truth.isfinite()].norm(), sizes[index] if index < len(sizes) else 0)
        bound = 1.5 * (error(standard, truth) + eps * size)
        assert error(x, truth) <= bound, f"result {index}: {error(x, truth)} > {bound}"


def supported(impl, options):
    return impl != "sdpa" or not (is_floating(options.get("bias")) or {"softcap", "dropout"} & options.keys())


def positions(T=63):
    return torch.arange(T, dtype=torch.int32)[None]


def documents(length, T=63):
    start = positions(T) // length * length
    return {"lower": start, "upper": (start + length).clamp(max=T).int()}


def rows(*starts, T=63):
    return torch.tensor(starts, dtype=torch.int32)[:, None].expand(len(starts), T)


OPTIONS = {
    "full": dict,
    "causal": lambda: {"mask": KeyRange(causal=True)},
    "scale": lambda: {"mask": KeyRange(causal=True), "scale": 0.7},
    "window": lambda: {"mask": KeyRange(causal=True, lower=positions() - 8)},
    "bidirectional-window": lambda: {"mask": KeyRange(lower=positions() - 8, upper=positions() + 9)},
    "left-padding": lambda: {"mask": KeyRange(causal=True, lower=rows(5, 40))},
    "right-padding": lambda: {"mask": KeyRange(causal=True, upper=rows(50, 7))},
    "packed": lambda: {"mask": KeyRange(causal=True, **documents(20))},
    "packed-bidirectional": lambda: {"mask": KeyRange(**documents(20))},
    "chunks": lambda: {"mask": KeyRange(causal=True, lower=positions() // 16 * 16)},
    "holes": lambda: {"mask": KeyRange(causal=True, key_mask=torch.rand(2, 63) > 0.4)},
    "nothing": lambda: {"mask": KeyRange(upper=rows(0, 9))},
    "bool-bias": lambda: {"bias": torch.rand(2, 1, 63, 63) > 0.5},
    "bias": lambda: {"mask": KeyRange(causal=True), "bias": torch.randn(2, HEADS, 63, 63)},
    "bias-of-a-head": lambda: {"bias": torch.randn(1, HEADS, 63, 63)},
    "bias-of-a-key": lambda: {"bias": torch.randn(2, 1, 1, 63)},
    "bias-with-inf": lambda: {
        "bias": torch.randn(1, 1, 63, 63).masked_fill(torch.rand(63, 63) > 0.8, -torch.inf)
    },
    "softcap": lambda: {"mask": KeyRange(causal=True), "softcap": 2.0},
    "sinks": lambda: {"mask": KeyRange(causal=True), "sinks": torch.randn(HEADS)},
    "sinks-and-padding": lambda: {
        "mask": KeyRange(causal=True, lower=rows(5, 40)),
        "sinks": torch.randn(HEADS),
    },
    "dropout": lambda: {"mask": KeyRange(causal=True), "dropout": (0.3, 1234)},
    "dropout-wide-seed": lambda: {"dropout": (0.1, 2**41 + 17)},
    "softcap-sinks-window-dropout": lambda: {
        "mask": KeyRange(causal=True, lower=positions() - 8),
        "softcap": 1.5,
        "sinks": torch.randn(HEADS),
        "dropout": (0.2, 3),
    },
}
