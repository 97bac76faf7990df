"""`prepare_generation`: the same tokens as transformers, and nothing left behind by `restore`."""

import copy
import logging
import pickle
import threading
import time

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.generation import prefill

FAMILIES = ["llama", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt-oss", "gpt-neox", "gpt2", "llama4"]
FAMILIES += tiny.SHARED_KEYS
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(7)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **{"max_new_tokens": 9, **kwargs}).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_transformers(family, mode):
    lengths = [23] if mode == "lookup" else [23, 10]
    ids, mask = tiny.tokens(len(lengths), 23), tiny.padding(lengths, 23, "left")
    expected = generate(tiny.build(family), ids, mask, **MODES[mode])
    model = hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=5)
    assert generate(model, ids, mask, **MODES[mode]) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_layers_that_differ_in_their_heads(beams):
    ids, mask = tiny.tokens(2, 23), tiny.padding([23, 10], 23, "left")
    call = {"do_sample": False, "num_beams": beams}
    expected = generate(tiny.build("gemma4"), ids, mask, **call)
    model = hf_longattn.prepare_generation(tiny.build("gemma4"), prefill_chunk_size=5)
    assert generate(model, ids, mask, **call) == expected
    cache = LongContextCache(model.config)
    assert generate(model, ids, mask, past_key_values=cache, **call) == expected
    with pytest.raises(ValueError, match="num_key_value_heads"):
        other = tiny.CONFIGS["gemma4"](num_global_key_value_heads=2)
        generate(model, ids, mask, past_key_values=LongContextCache(other))


def bert(is_decoder):
    config = tf.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.3, pad_token_id=0, is_decoder=is_decoder,
    )  # fmt: skip
    return tf.BertLMHeadModel(config)


def prefix():
    config = tf.HrmTextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    return tf.HrmTextForCausalLM(config)


def gemma3_both_ways():
    return tf.Gemma3ForCausalLM(tiny.CONFIGS["gemma3"](use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("make", "marked", "widest"),
    [
        (lambda: bert(False), 0, 23),
        (lambda: bert(True), 0, 5),
        (prefix, 15, 23),
        (prefix, 0, 5),
        (gemma3_both_ways, None, 23),
    ],
    ids=["bert", "bert-decoder", "prefix", "empty-prefix", "gemma3"],
)
def test_a_prompt_whose_tokens_see_later_ones_is_read_whole(make, marked, widest):
    ids, models = tiny.tokens(2, 23), []
    kinds = None if marked is None else (torch.arange(23) < marked).long().expand(2, -1)
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().eval())
    plain, model = models[0], hf_longattn.prepare_generation(models[1], prefill_chunk_size=5)
    widths = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    call = {"do_sample": False} | ({} if kinds is None else {"token_type_ids": kinds})
    assert generate(model, ids, **call) == generate(plain, ids, **call)
    assert max(widths) == widest


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 100])
def test_the_chunk_size_changes_nothing(family, chunk):
    ids, mask = tiny.tokens(2, 23), tiny.padding([23, 6], 23, "left")
    expected = generate(tiny.build(family), ids, mask, do_sample=False)
    model = hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=chunk)
    assert generate(model, ids, mask, do_sample=False) == expected


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_mask_of_a_prompt_is_looked_at_once_whatever_the_chunks(padded, monkeypatch):
    ids, mask = tiny.tokens(2, 40), tiny.padding([40, 33 if padded else 40], 40, "left")
    looks, to_list = [], torch.Tensor.tolist
    counts = []
    for chunk in (20, 5):
        model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=chunk)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: looks.append(self.shape) or to_list(self))
            model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        counts.append(len(looks))
        looks.clear()
    assert counts[0] == counts[1] > 0


def test_assisted_decoding_equals_greedy():
    ids = tiny.tokens(1, 23)
    expected = generate(tiny.build("gemma2"), ids, do_sample=False)
    model = hf_longattn.prepare_generation(tiny.build("gemma2"))
    assistant = hf_longattn.prepare_generation(tiny.build("gemma2", seed=3))
    assert generate(model, ids, do_sample=False, assistant_model=assistant) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_second_turn_on_a_filled_cache(family):
    plain, model = (
        tiny.build(family),
        hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=4),
    )
    conversation = tiny.tokens(1, 11)
    cache = LongContextCache(model.config)
    for turn in range(3):
        expected = generate(plain, conversation, do_sample=False)
        assert generate(model, conversation, do_sample=False, past_key_values=cache) == expected
        conversation = torch.cat([torch.tensor(expected), tiny.tokens(1, 7, seed=turn)], 1)


def test_batch_mates_and_padding_side_of_the_prompt_change_nothing():
    model = hf_longattn.prepare_generation(tiny.build("qwen3"), prefill_chunk_size=6)
    short = tiny.tokens(1, 8)
    alone = generate(model, short, do_sample=False)[0][8:]
    batch = torch.cat(
        [torch.cat([torch.zeros(1, 15, dtype=torch.long), short], 1), tiny.tokens(1, 23, seed=4)]
    )
    together = generate(model, batch, tiny.padding([8, 23], 23, "left"), do_sample=False)
    assert together[0][23:] == alone


def test_streamers_and_stopping_criteria_work_as_before():
    ids = tiny.tokens(1, 12)
    stop = tf.StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 15])])
    results = []
    for model in (
        tiny.build("llama"),
        hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5),
    ):
        streamer = tiny.Collect()
        tokens = generate(model, ids, do_sample=False, streamer=streamer, stopping_criteria=stop)
        assert streamer.ended
        results.append((tokens, streamer.parts))
    assert results[0] == results[1]
    assert len(results[0][0][0]) == 15


def test_logits_and_scores_are_those_of_transformers():
    ids, outputs = tiny.tokens(1, 12), []
    for model in (
        tiny.build("llama"),
        hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5),
    ):
        kwargs = {
            "output_logits": True,
            "return_dict_in_generate": True,
            "do_sample": False,
            "max_new_tokens": 4,
        }
        outputs.append(torch.stack(model.generate(input_ids=ids, **kwargs).logits))
    assert tiny.relative_error(outputs[1], outputs[0]) <= 2e-5


def test_the_prompt_never_goes_through_the_model_whole():
    model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5)
    widths = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    generate(model, tiny.tokens(1, 23), do_sample=False)
    assert max(widths) == 5


def test_the_cache_is_allocated_once(monkeypatch):
    allocations = []
    real = PreallocatedLayer._replace_buffers
    monkeypatch.setattr(
        PreallocatedLayer,
        "_replace_buffers",
        lambda self, change: (allocations.append(1), real(self, change)),
    )
    model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5)
    generate(model, tiny.tokens(1, 23), do_sample=False, max_new_tokens=30)
    assert not allocations


def test_restore_gives_back_what_was_there():
    config = tiny.CONFIGS["llama"]()
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    names, configs = set(vars(model)), [m.config for m in model.modules() if hasattr(m, "config")]
    weights = copy.deepcopy(model.state_dict())
    hf_longattn.prepare_generation(model)
    hf_longattn.prepare_generation(model, progress=True)
    assert model.config._attn_implementation == "tree_attention"
    assert hf_longattn.restore(model) is model
    assert set(vars(model)) == names
    assert all(
        m.config is c
        for m, c in zip((m for m in model.modules() if hasattr(m, "config")), configs, strict=True)
    )
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_other_models_that_share_the_config_keep_their_attention():
    config = tiny.CONFIGS["llama"]()
    one, other = (tf.LlamaForCausalLM(config) for _ in range(2))
    before = other.config._attn_implementation
    hf_longattn.prepare_generation(one)
    assert one.config._attn_implementation == "tree_attention"
    assert other.config._attn_implementation == before


def test_saved_config_and_state_dict_are_those_of_the_plain_model(tmp_path):
    plain, model = tiny.build("llama", "sdpa"), hf_longattn.prepare_generation(tiny.build("llama", "sdpa"))
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "prepared")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "prepared" / name).read_bytes()


def test_progress_is_shown_on_stderr_only_when_asked(capsys):
    for progress in (False, True):
        model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5, progress=progress)
        generate(model, tiny.tokens(1, 23), do_sample=False)
        captured = capsys.readouterr()
        assert captured.out == ""
        # The rate, and the time that is left.
        for words in ("reading the prompt", "23/23", " tokens/s", "0:00:00"):
            assert (words in captured.err) is progress


@pytest.mark.parametrize("seconds", [0.0, 0.4], ids=["at-once", "slow"])
def test_the_bar_of_one_chunk_is_drawn_where_it_takes_its_time(seconds, capsys, monkeypatch):
    monkeypatch.setattr(prefill, "_BAR_AFTER_S", 0.1 if seconds else 60.0)
    model = hf_longattn.prepare_generation(tiny.build("llama"), progress=True)
    model.model.layers[0].register_forward_hook(lambda *call: time.sleep(seconds))
    generate(model, tiny.tokens(1, 23), do_sample=False, max_new_tokens=1)
    drawn = capsys.readouterr().err
    assert ("reading the prompt" in drawn and "23/23" in drawn) if seconds else drawn == ""
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_generate_works_again_after_an_error():
    model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=5)
    ids = tiny.tokens(1, 12)
    expected = generate(model, ids, do_sample=False)
    with pytest.raises(ValueError):
        generate(model, ids, torch.ones(1, 12, 12), do_sample=False)
    assert generate(model, ids, do_sample=False) == expected


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"cache_dtype": torch.bfloat16}, "cache_dtype"),
        ({"cache_dtype": "int4"}, "cache_dtype"),
        ({"cuda_graph": True}, "cuda_graph"),
        ({"cuda_graph": "always"}, "cuda_graph"),
        ({"device_mesh": object()}, "device_mesh"),
    ],
)
def test_settings_that_cannot_be_honoured(fields, name):
    model = tiny.build("llama", "sdpa")
    before = set(vars(model))
    with pytest.raises(ValueError, match=name):
        hf_longattn.prepare_generation(model, **fields)
    assert set(vars(model)) == before and model.config._attn_implementation == "sdpa"


def test_not_a_model():
    with pytest.raises(TypeError, match="`model`"):
        hf_longattn.prepare_generation(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="surprise"):
        hf_longattn.prepare_generation(tiny.build("llama"), surprise=1)


def test_wrapped_models_are_found():
    model = tiny.build("llama")
    wrapper = torch.nn.DataParallel(model)
    assert hf_longattn.prepare_generation(wrapper) is wrapper
    assert "_prefill" in vars(model)
    hf_longattn.restore(wrapper)
    assert "_prefill" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_plain_model_with_weights_of_its_own(copied):
    model, ids = hf_longattn.prepare_generation(tiny.build("llama", "sdpa")), tiny.tokens(1, 9)
    expected = model(input_ids=ids).logits
    twin = copied(model)
    assert twin.config._attn_implementation == "sdpa" and "_prefill" not in vars(twin)
    assert tiny.relative_error(twin(input_ids=ids).logits, expected) <= 2e-6
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(input_ids=ids).logits.any()
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_turn_that_brings_only_its_own_positions():
    plain, model = (
        tiny.build("llama"),
        hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=7),
    )
    ids, results = tiny.tokens(1, 40), []
    for one in (plain, model):
        cache = tf.DynamicCache(config=one.config)
        with torch.no_grad():
            one(input_ids=ids[:, :16], past_key_values=cache)
        positions = torch.arange(16, 40)[None]
        results.append(generate(one, ids, past_key_values=cache, position_ids=positions, do_sample=False))
    assert results[0] == results[1]


def test_hidden_states_of_the_prompt_are_whole():
    model = hf_longattn.prepare_generation(tiny.build("llama"), prefill_chunk_size=7)
    call = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    output = model.generate(input_ids=tiny.tokens(1, 30), do_sample=False, **call)
    assert output.hidden_states[0][0].shape[1] == 30


def test_a_cache_of_another_model_is_refused_before_any_work():
    model = hf_longattn.prepare_generation(tiny.build("llama"))
    with pytest.raises(ValueError, match="`past_key_values` was made for a model with model_type='gpt2'"):
        generate(model, tiny.tokens(1, 9), past_key_values=LongContextCache(tiny.CONFIGS["gpt2"]()))


def test_restore_leaves_what_somebody_put_on_top(caplog):
    model, ids = hf_longattn.prepare_generation(tiny.build("llama", "sdpa")), tiny.tokens(1, 9)
    inner, calls = model.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapper
    with caplog.at_level(logging.WARNING, logger="hf_longattn"):
        hf_longattn.restore(model)
    assert model.forward is wrapper and "`forward`" in caplog.text
    expected = tiny.build("llama", "sdpa")(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected) and calls
