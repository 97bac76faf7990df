"""Keys that attention functions of ours alone read: what answers, and what every other one meets."""

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F

from hf_longattn.cache import LongContextCache
from hf_longattn.cache.placement import Placement
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.cache.shared_prefix import SharedStates
from hf_longattn.cache.shares import ShardedLayer, ShardedQuantizedLayer

QUERY, PREFIX, NEW = torch.randn(3, 2, 1, 8), torch.randn(1, 2, 4, 8), torch.randn(3, 2, 6, 8)


def share(kind=None):
    """Keys and values that the first of two ranks returns, of all of which it holds."""
    layer = (SimpleNamespace(rank=0, world_size=2), Placement(0, 2), *([] if kind is None else [kind]))
    layer = (ShardedLayer if kind is None else ShardedQuantizedLayer)(*layer)
    return layer.update(NEW, NEW)


KINDS = {
    "forked": lambda: (SharedStates(PREFIX, NEW), SharedStates(PREFIX, NEW)),
    "shared": share,
    "shared-int8": lambda: share(torch.int8),
    "shared-fp8": lambda: share(torch.float8_e4m3fn),
    "state": lambda: RecurrentLayer().update(NEW, NEW),
}
WORDS = {
    "forked": "`attn_implementation` must be",
    "shared": "`past_key_values` is a cache shared by 2 proc",
    "state": "`past_key_values` keeps a state",
}
READS = {
    "sdpa": lambda key, value: F.scaled_dot_product_attention(QUERY, key, value),
    "matmul": lambda key, value: QUERY @ key.transpose(2, 3),
    "repeat": lambda key, value: key[:, :, None].expand(3, 2, 2, 10, 8),
    "cat": lambda key, value: torch.cat([QUERY, key], 2),
    "einsum": lambda key, value: torch.einsum("bhtk,bhsk->bhts", QUERY, key),
    "cast": lambda key, value: key.to(torch.float16),
    "in place": lambda key, value: torch.zeros_like(QUERY).copy_(key[:, :, :1]),
}
MODES = {"eager": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_no_operation_reads_them(kind, mode):
    with MODES[mode]():
        for read in READS.values():
            with pytest.raises(ValueError, match=WORDS[kind.split("-")[0]]):
                read(*KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_what_changes_nothing_gives_them_back(kind, mode):
    with MODES[mode]():
        key, _ = KINDS[kind]()
        length = 10 if kind == "forked" else 6
        assert key.shape == key.size() == (3, 2, length, 8) and key.dim() == 4 and len(key) == 3
        assert f"{type(key).__name__}(shape=(3, 2, {length}, 8), dtype=torch.float32" in repr(key)
        # In 8 bits, too: attention of torch asks for the dtype before it does anything.
        assert key.dtype == torch.float32 and key.device == NEW.device and not key.requires_grad
        for same in (key.to(NEW.device), key.to(torch.float32), key.contiguous()):
            assert type(same) is type(key) and vars(same) == vars(key)


def test_the_error_names_the_operation():
    with pytest.raises(ValueError, match=r"got a model that calls aten\.add\.Tensor"):
        share()[0] + 1


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tree_attention", "blockwise_attention"])
def test_a_state_is_refused_to_softmax(implementation):
    model = tiny.build("llama", "lightning_attention")
    cache = LongContextCache(model.config)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, 9), past_key_values=cache)
        # Of one token, sdpa takes no mask, and would find it alone.
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="`past_key_values` keeps a state.*'lightning_attention' alone"):
            model(input_ids=tiny.tokens(1, 1), past_key_values=cache)
