"""Few queries on many keys: into how many parts the keys are cut, by which kernel, and how parts join."""

from dataclasses import replace

import pytest
import torch

from hf_longattn.kernels.blockwise_attention import reference, sdpa
from hf_longattn.kernels.blockwise_attention.key_parts import cut_keys, pick_parts
from hf_longattn.kernels.blockwise_attention.terms import Terms
from hf_longattn.kernels.key_range import KeyRange
from hf_longattn.kernels.merge_partials import merge_over_first

PROCESSORS = 132
H, G, K = 4, 2, 16
LONG = 131072


def share_of_waves(tiles, parts):
    """How much of the processors' time the programs take."""
    return tiles * parts / (-(-tiles * parts // PROCESSORS) * PROCESSORS)


@pytest.mark.parametrize("heads", [1, 8, 14, 32, 40, 96])
def test_parts_fill_the_processors(heads):
    for row_tiles in range(1, 6):
        tiles = heads * row_tiles
        parts = pick_parts(tiles, LONG, PROCESSORS)
        # One head makes as many programs as there may be parts.
        assert share_of_waves(tiles, parts) >= min(0.84, 0.9 * tiles * 16 / PROCESSORS)
        assert all(share_of_waves(tiles, fewer) < share_of_waves(tiles, parts) for fewer in range(1, parts))


def test_many_queries_and_few_keys_stay_whole():
    assert pick_parts(4 * PROCESSORS, LONG, PROCESSORS) == 1
    # A prompt's chunk of 8192 queries, and one of 4096 of a model with eight heads.
    assert pick_parts(32 * 64, LONG, PROCESSORS) == pick_parts(8 * 32, LONG, PROCESSORS) == 1
    assert pick_parts(8, 1024, PROCESSORS) == pick_parts(1, 0, PROCESSORS) == 1
    # A conversation that grows keeps its cut, and so cuDNN's plan, up to the next power of two.
    assert len({pick_parts(32, keys, PROCESSORS) for keys in range(LONG // 2 + 1, LONG + 1, 997)}) == 1


def test_cut_keys_are_views():
    states = torch.randn(1, G, 50, K)[:, :, :45]
    parts = cut_keys(states, 3, 14)
    assert parts.shape == (3, G, 14, K) and parts.data_ptr() == states.data_ptr()
    assert all(torch.equal(parts[i], states[0, :, 14 * i : 14 * (i + 1)]) for i in range(3))


def inputs(T, S, dtype=torch.float32):
    """A query in either layout of a model, and views of a longer cache."""
    query = torch.randn(1, T, H, K).to(dtype).transpose(1, 2)
    return query, *(torch.randn(1, G, S + 9, K).to(dtype)[:, :, :S] for _ in range(2))


def attend(query, key, value, causal=False, scale=K**-0.5):
    return reference.forward(query, key, value, Terms(scale, KeyRange(causal=causal)))


@pytest.fixture
def calls(monkeypatch):
    """What both of torch's kernels were asked, each played by the reference on the CPU."""
    seen = []

    def play(name):
        def kernel(q, k, v, is_causal, scale):
            seen.append((name, q.shape[0], q.shape[2], k.shape[2], is_causal))
            assert k.data_ptr() != 0 and k.untyped_storage().nbytes() > k.nbytes / 2
            output, lse = attend(q, k, v, is_causal, scale)
            return output.transpose(1, 2).contiguous().transpose(1, 2), lse

        return kernel

    monkeypatch.setattr(sdpa, "_attend_cudnn", play("cudnn"))
    monkeypatch.setattr(sdpa, "_attend_flash", play("flash"))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("S", [512, 700, 1023])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("T", [1, 17, 64])
def test_parts_join_to_the_whole(calls, T, parts, S, dtype):
    tensors = inputs(T, S, dtype)
    results = sdpa.attend_in_parts(*tensors, K**-0.5, parts)
    length = S // parts // 128 * 128
    rest = [("flash", 1, T, S - parts * length, False)] if S > parts * length else []
    assert calls == [("cudnn", parts, T, length, False), *rest]
    # Alike in memory, so that the merge reads them where they are.
    assert {output.stride()[1:] for output, _ in results} == {(K, H * K, 1)}
    assert len({lse.stride()[1:] for _, lse in results}) == 1
    output, lse = merge_over_first(results)
    exact = attend(*(x.double() for x in tensors))
    usual = attend(*tensors)
    eps = torch.finfo(dtype).eps
    for got, standard, truth in zip((output, lse), usual, exact, strict=True):
        bound = 1.5 * ((standard - truth).abs().max() + eps * truth.abs().max())
        assert (got - truth).abs().max() <= bound


TURNS = {
    "a-question": (64, 1, 131072, ["flash"]),
    "a-turn": (512, 1, 16384, ["flash"]),
    "sixteen-questions": (1024, 1, 131072, ["cudnn"]),
    "a-long-turn-on-much": (512, 1, 131072, ["cudnn"]),
    "uneven-waves": (768, 1, 131072, ["cudnn", "parts-2"]),
    "few-of-a-batch": (512, 4, 16384, ["cudnn"]),
    "a-short-prompt": (512, 1, 512, ["cudnn"]),
}


@pytest.mark.parametrize("T, B, S, chosen", TURNS.values(), ids=TURNS)
def test_kernel_follows_the_count(monkeypatch, T, B, S, chosen):
    monkeypatch.setattr(sdpa, "_uses_cudnn", lambda query, key: min(query.shape[2], key.shape[2]) >= 128)
    monkeypatch.setattr(sdpa, "num_processors", lambda device: PROCESSORS)
    seen = []

    def record(name):
        return lambda q, k, v, *rest: seen.append(name) or (q, q[..., 0])

    def parts(q, k, v, scale, count):
        seen.extend(["cudnn", f"parts-{count}"])
        return []

    monkeypatch.setattr(sdpa, "_attend_cudnn", record("cudnn"))
    monkeypatch.setattr(sdpa, "_attend_flash", record("flash"))
    monkeypatch.setattr(sdpa, "attend_in_parts", parts)
    query, key = (torch.empty(B, heads, length, 128, device="meta") for heads, length in ((32, T), (8, S)))
    sdpa._attend_cuda(query, key, key, False, 1.0, S)
    assert seen == chosen
    if T < S:
        # The square at the end of a turn is small: no plan is made for it.
        seen.clear()
        sdpa._attend_cuda(query, key[:, :, -T:], key[:, :, -T:], True, 1.0, S)
        assert seen == (["flash"] if B == 1 and T < 1024 else ["cudnn"])


@pytest.mark.parametrize("T", [17, 20, 64, 512])
def test_what_lies_before_a_turn_is_one_piece(T):
    # A multiple of the turn's length by chance: nothing comes back that pieces would share.
    query, key = torch.empty(1, H, T, K, device="meta"), torch.empty(1, G, T * 331 + T, K, device="meta")
    terms = Terms(1.0, KeyRange(causal=True))
    sizes = [part.columns.stop - part.columns.start for part in sdpa._parts(query, key, terms)]
    assert sizes == ([T * 331, T] if T * 332 >= 4096 else [T, 2 * T, 8 * T, 64 * T, 256 * T, T])


MASKS = {
    "full": lambda T, S: KeyRange(),
    "causal": lambda T, S: KeyRange(causal=True),
    "window": lambda T, S: KeyRange(causal=True, lower=torch.arange(T)[None].int() + S - T - 20),
    "padding": lambda T, S: KeyRange(causal=True, lower=torch.full((1, T), 70, dtype=torch.int32)),
    "few": lambda T, S: KeyRange(lower=torch.arange(T)[None].int(), upper=torch.arange(T)[None].int() + 3),
    "holes": lambda T, S: KeyRange(key_mask=torch.rand(1, S) > 0.5),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", MASKS)
def test_the_kernel_in_parts(name):
    from hf_longattn.kernels.blockwise_attention import triton_forward

    T, S, sinks = 5, 99, torch.randn(H)
    query, key, value = inputs(T, S)
    terms = Terms(0.25, MASKS[name](T, S), None, 3.0, sinks)
    exact = reference.forward(
        *(x.double() for x in (query, key, value)), replace(terms, sinks=sinks.double())
    )
    usual = reference.forward(query, key, value, terms)
    # The last of five parts lies behind the keys.
    got = triton_forward.forward(query, key, value, terms, parts=5)
    for x, standard, truth in zip(got, usual, exact, strict=True):
        bound = 1.5 * ((standard - truth).norm() + torch.finfo(torch.float32).eps * truth.norm())
        assert x.dtype == torch.float32 and (x - truth).norm() <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("T", [64, 200, 768])
@pytest.mark.parametrize("S", [16384, 20001])
def test_parts_on_a_gpu(T, S):
    query, key, value = (x.cuda() for x in inputs(T, S, torch.bfloat16))
    exact = attend(query.double(), key.double(), value.double())
    usual = attend(query, key, value)
    for parts in (2, 5, 16):
        output, lse = merge_over_first(sdpa.attend_in_parts(query, key, value, K**-0.5, parts))
        eps = torch.finfo(torch.bfloat16).eps
        for got, standard, truth in zip((output, lse), usual, exact, strict=True):
            assert (got - truth).norm() <= 1.5 * ((standard - truth).norm() + eps * truth.norm())
