"""What ends a kept program: every change to the model that its graph depends on, and nothing else."""

import pytest
import torch
from tiny_blocks import make
from torch import nn

from hf_longattn.generation import kept


def first(model, kind):
    return next(module for module in model.modules() if isinstance(module, kind))


def exchange_storage(model):
    weight = first(model, nn.Linear).weight
    weight.data = weight.data.clone()


def transpose_in_place(model):
    weight = model.lm_head.weight
    weight.data = weight.data.view(weight.shape[1], weight.shape[0])


def fill_an_empty_table(model):
    first(model, nn.Linear).register_buffer("scale", torch.ones(1))


def switch_attention(model):
    model.model.block_decoder.config._attn_implementation_internal = "eager"


CHANGES = {
    "storage": exchange_storage,
    "shape": transpose_in_place,
    "buffer": fill_an_empty_table,
    "parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.clone())),
    "module": lambda model: setattr(model, "lm_head", nn.Linear(32, 61, bias=False)),
    "module gone": lambda model: setattr(model.model, "embedder", None),
    "setting": lambda model: setattr(first(model, nn.LayerNorm), "eps", 0.5),
    "new setting": lambda model: setattr(first(model, nn.Linear), "scale", 2.0),
    "forward": lambda model: setattr(first(model, nn.Linear), "forward", lambda x: x),
    "implementation": switch_attention,
    "matmul precision": lambda model: torch.set_float32_matmul_precision("high"),
    "autocast": lambda model: torch.set_autocast_enabled("cuda", True),
}


@pytest.fixture
def model():
    was = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cuda")
    yield make(tie_word_embeddings=False)
    torch.set_float32_matmul_precision(was[0])
    torch.set_autocast_enabled("cuda", was[1])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name, model):
    seen = kept.SeenModel(model)
    assert seen.is_still(model)
    CHANGES[name](model)
    assert kept.fingerprint(model) != seen.noted
    assert not seen.is_still(model)


def test_nothing_is_spelled_out_where_every_module_holds_what_it_held(model, monkeypatch):
    calls, real = [], kept.fingerprint
    monkeypatch.setattr(kept, "fingerprint", lambda model: (calls.append(1), real(model))[1])
    seen = kept.SeenModel(model)
    assert seen.is_still(model) and seen.is_still(model) and len(calls) == 1
    # Another object of the same value, and one that no graph knows: equal, and again known by identity.
    first(model, nn.LayerNorm).eps = float(str(first(model, nn.LayerNorm).eps))
    model.answers = [1, 2]
    assert seen.is_still(model) and len(calls) == 2
    assert seen.is_still(model) and len(calls) == 2


def test_another_model_is_not_the_one_that_was_seen(model):
    assert not kept.SeenModel(model).is_still(make(tie_word_embeddings=False))
