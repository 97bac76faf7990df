"""What a prepared model is given: settings, prompts and masks that do not fit are refused before any work."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import BatchEncoding, DynamicCache

import hf_longattn
from hf_longattn.cache import LongContextCache

IDS = tiny.tokens(1, 9)
ONES = torch.ones(1, 9, dtype=torch.long)
PROMPTS = {
    "list": ({"inputs": [[3, 4]]}, TypeError, "`inputs` must be a tensor of token ids, got list"),
    "encoding": ({"inputs": BatchEncoding({"input_ids": IDS})}, TypeError, r"pass `\*\*inputs`"),
    "floating": ({"input_ids": IDS.float()}, TypeError, "`input_ids` must hold token ids"),
    "one row": ({"input_ids": IDS[0]}, ValueError, r"got shape \(9,\); `\[None\]` makes"),
    "three dims": ({"inputs": IDS[None]}, ValueError, r"`inputs` must be \(batch, tokens\)"),
    "no token": ({"input_ids": IDS[:, :0]}, ValueError, "a row and a token in it are needed"),
    "no row": ({"input_ids": IDS[:0], "attention_mask": ONES[:0]}, ValueError, r"got shape \(0, 9\)"),
    "mask list": (
        {"attention_mask": ONES.tolist()},
        TypeError,
        "`attention_mask` must be a tensor, got list",
    ),
    "short mask": ({"attention_mask": ONES[:, :5]}, ValueError, r"\(1, 9\) as the token ids, got \(1, 5\)"),
    "long mask": ({"attention_mask": ONES.repeat(1, 2)}, ValueError, r"got \(1, 18\)"),
    "other rows": ({"attention_mask": ONES.repeat(3, 1)}, ValueError, r"got \(3, 9\)"),
    "positions": ({"position_ids": torch.arange(8)[None]}, ValueError, r"9 token ids, .* got shape \(1, 8\)"),
    "no cache": ({"past_key_values": "dynamic"}, TypeError, "`past_key_values` must be a cache, got str"),
}
SETTINGS = [
    ({"config": {"progress": True}}, TypeError, "`config` must be a GenerationSetup, got dict"),
    ({"config": hf_longattn.TrainingSetup()}, TypeError, "got TrainingSetup"),
    ({"accelerator": 3}, TypeError, "`accelerator` must be an accelerate.Accelerator, got int"),
    ({"prefill_chunk_size": 2.5}, ValueError, "`prefill_chunk_size` must be"),
    ({"prefill_chunk_size": "big"}, ValueError, "`prefill_chunk_size` must be"),
    ({"prefill_chunk_size": True}, ValueError, "`prefill_chunk_size` must be"),
    ({"timeout": "1"}, ValueError, "`timeout` must be"),
    ({"progress": "yes"}, ValueError, "`progress` must be"),
]


@pytest.fixture(scope="module")
def model():
    return hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_and_masks_that_do_not_fit(model, kind, monkeypatch):
    changes, error, message = PROMPTS[kind]
    call = {"input_ids": IDS, "attention_mask": ONES, "max_new_tokens": 3, **changes}
    if "inputs" in changes:
        del call["input_ids"]
    with monkeypatch.context() as patch, pytest.raises(error, match=message):
        patch.setattr(type(model.model), "forward", lambda *args, **kwargs: pytest.fail("worked"))
        model.generate(**call)
    expected = tiny.build("llama").generate(IDS, attention_mask=ONES, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(IDS, attention_mask=ONES, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("make", [DynamicCache, LongContextCache])
def test_a_mask_may_cover_what_the_cache_holds(model, make):
    plain, results = tiny.build("llama"), []
    for one in (plain, model):
        cache = make(config=one.config)
        with torch.no_grad():
            one(input_ids=IDS[:, :4], past_key_values=cache)
        call = {"attention_mask": ONES, "past_key_values": cache, "max_new_tokens": 5, "do_sample": False}
        results.append(one.generate(IDS[:, 4:], **call))
        with pytest.raises(ValueError, match="with what `past_key_values` holds"):
            model.generate(IDS[:, :2], **call)
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_cache_that_another_model_filled(model, family, monkeypatch):
    other = tiny.build(family)
    cache = DynamicCache(config=other.config)
    with torch.no_grad():
        other(input_ids=IDS[:, :4], past_key_values=cache)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="heads x .* in layer 0, but .* 32 wide"),
    ):
        patch.setattr(type(model.model), "forward", lambda *args, **kwargs: pytest.fail("worked"))
        model.generate(IDS, attention_mask=ONES, past_key_values=cache, max_new_tokens=3)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "shallow"])
def test_a_cache_of_ours_that_another_model_filled(family):
    other = tiny.build("llama" if family == "shallow" else family, "tree_attention")
    if family == "shallow":
        other.model.layers, other.config.num_hidden_layers = other.model.layers[:2], 2
    cache = LongContextCache(other.config)
    with torch.no_grad():
        other(input_ids=IDS[:, :4], past_key_values=cache)
        expected = other(input_ids=IDS[:, 4:], past_key_values=cache.fork()).logits
        with pytest.raises(
            ValueError, match="`past_key_values` .* pass a cache made from this model's config"
        ):
            # The layers that there are take the tokens before one is missing.
            held = cache.fork() if family == "shallow" else cache
            tiny.build("llama", "tree_attention")(input_ids=IDS[:, 4:], past_key_values=held)
        assert torch.equal(other(input_ids=IDS[:, 4:], past_key_values=cache).logits, expected)


def test_embeddings_need_no_ids(model):
    embeddings = model.get_input_embeddings()(IDS)
    call = {"attention_mask": ONES, "max_new_tokens": 5, "do_sample": False}
    expected = tiny.build("llama").generate(inputs_embeds=embeddings, **call)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **call), expected)


@pytest.mark.parametrize(("fields", "error", "message"), SETTINGS)
def test_settings_of_another_kind_change_nothing(fields, error, message):
    plain = tiny.build("llama", "sdpa")
    before = set(vars(plain))
    with pytest.raises(error, match=message):
        hf_longattn.prepare_generation(plain, **fields)
    assert set(vars(plain)) == before and plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fields", [{"config": {}}, {"accelerator": 3}, {"block_size": 2.5}], ids=str)
def test_the_same_of_training(fields):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(fields))}`"):
        hf_longattn.prepare_training(tiny.build("llama"), **fields)


def test_anything_that_counts_processes_is_an_accelerator():
    hf_longattn.prepare_generation(tiny.build("llama"), accelerator=SimpleNamespace(num_processes=1))
