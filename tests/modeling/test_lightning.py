"""The lightning model against its formulas and against itself: padding, packing, splits, strategies, loss."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.recurrent import RecurrentLayer
from hf_longattn.modeling.lightning import LightningConfig, LightningForCausalLM, register
from hf_longattn.modeling.lightning.convert import config_from_official, convert_checkpoint

register()
SMALL = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "initializer_range": 0.2, "eos_token_id": None}
VARIANTS = {
    "tnl": {},
    "6-heads": {"num_attention_heads": 6},
    "no-lrpe": {"lrpe_layers": []},
    "lrpe-everywhere": {"lrpe_layers": [0, 1, 2], "scale_embedding": False},
    "one-layer": {"num_hidden_layers": 1},
    "slopes": {"lightning_slopes": [0.7, 0.1, 0.01, 0.0]},
    "hybrid": {"lightning_layers": [0, 2]},
    "softmax-first": {"lightning_layers": [1, 2], "tie_word_embeddings": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
some_variants = pytest.mark.parametrize("variant", ["tnl", "hybrid"])
# fp32 sums in another order, through three layers; measured: at most 1e-6.
BOUND = 1e-5


def make(variant="tnl", seed=0, **fields):
    torch.manual_seed(seed)
    return LightningForCausalLM(LightningConfig(**(SMALL | VARIANTS[variant] | fields))).eval()


def tokens(batch, length, seed=1):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **kwargs).logits


def error(result, expected):
    result, expected = result.double(), expected.double()
    return ((result - expected).norm() / expected.norm()).item()


def left_padding(lengths, total):
    return torch.stack([torch.arange(total) >= total - n for n in lengths]).long()


def generate(model, ids, mask=None, **kwargs):
    torch.manual_seed(7)
    kwargs = {"do_sample": False, "max_new_tokens": 9, **kwargs}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **kwargs).tolist()


def uncached(model, ids, count=9):
    for _ in range(count):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids.tolist()


# Against the formulas


def norm(x):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def alibi(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    return slopes + [2 ** (-8 / (2 * power) * (i + 1)) for i in range(0, 2 * power, 2)][: heads - power]


def mixed_by_hand(config, weights, index, x):
    """q, k, v of one layer mixed over time, (T, D), in fp64."""
    heads, (length, width) = config.num_attention_heads, x.shape
    parts = (x @ weights["token_mixer.qkvu_proj.weight"].T).split(width, -1)
    q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in parts[:3])
    time = torch.arange(length, dtype=torch.float64)
    distance = time[:, None] - time
    if config.lightning_layers is not None and index not in config.lightning_layers:
        half = 10000.0 ** (-torch.arange(0, q.shape[-1], 2, dtype=torch.float64) / q.shape[-1])
        angle = torch.cat([time[:, None] * half] * 2, -1)
        turn = [torch.cat([-s.chunk(2, -1)[1], s.chunk(2, -1)[0]], -1) for s in (q, k)]
        q, k = (s * angle.cos() + t * angle.sin() for s, t in zip((q, k), turn, strict=True))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(distance < 0, -math.inf)
        mixed = scores.softmax(-1) @ v
    else:
        q, k = F.silu(q), F.silu(k)
        pairs = q @ k.mT
        if index in config.lrpe_layers:
            theta = weights["token_mixer.lrpe.theta"][:, 0]
            pairs = torch.einsum("htk,hsk,hkts->hts", q, k, torch.cos(theta[:, :, None, None] * distance))
        slopes = config.lightning_slopes
        if slopes is None:
            factor = 1 - index / max(config.num_hidden_layers - 1, 1) + 1e-5
            slopes = [slope * factor for slope in alibi(heads)]
        decay = torch.exp(-torch.tensor(slopes, dtype=torch.float64)[:, None, None] * distance)
        mixed = (pairs * decay).tril() @ v
    mixed = norm(mixed.transpose(0, 1).reshape(length, width))
    return (parts[3] * mixed) @ weights["token_mixer.out_proj.weight"].T


def by_hand(model, ids):
    """Logits of one row, (T, V), in fp64, from the model's weights and the formulas alone."""
    config, state = model.config, {name: w.double() for name, w in model.state_dict().items()}
    x = state["model.embed_tokens.weight"][ids]
    x = x * math.sqrt(config.hidden_size) if config.scale_embedding else x
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
        x = x + mixed_by_hand(config, weights, index, norm(x))
        y = norm(x)
        l1, l2, l3 = (weights[f"channel_mixer.{name}.weight"] for name in ("l1", "l2", "l3"))
        x = x + ((y @ l1.T) * (y @ l2.T)) @ l3.T
    return norm(x) @ state["lm_head.weight"].T


@every_variant
def test_logits_equal_the_formulas(variant):
    model, ids = make(variant), tokens(2, 150)
    result = logits(model, ids)
    for row in range(2):
        assert error(result[row], by_hand(model, ids[row])) <= BOUND


@every_variant
def test_theta_and_weights_start_as_published(variant):
    model = make(variant)
    for index, layer in enumerate(model.model.layers):
        mixer = layer.token_mixer
        assert hasattr(mixer, "lrpe") == (index in model.config.lrpe_layers)
        if hasattr(mixer, "lrpe"):
            expected = 10000.0 ** (-2 / 48 * torch.arange(48))
            torch.testing.assert_close(mixer.lrpe.theta.detach().flatten(), expected)
        assert mixer.qkvu_proj.weight.std().item() == pytest.approx(0.2, rel=0.05)


# Padding, packing, splits


@every_variant
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(variant, side):
    model, ids, lengths = make(variant), tokens(3, 21), [21, 13, 4]
    mask = left_padding(lengths, 21)
    mask = mask.flip(1) if side == "right" else mask
    if side == "holes":
        mask[0, [0, 5, 6, 20]] = 0
    result = logits(model, ids, mask)
    for row, exists in enumerate(mask.bool()):
        alone = logits(model, ids[row : row + 1, exists])[0]
        assert error(result[row][exists], alone) <= BOUND


PACKED = [9, 1, 12]
WORDS = {
    "positions": {"position_ids": torch.cat([torch.arange(n) for n in PACKED])[None]},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 0, 9, 10, 10, 22], dtype=torch.int32)},
    "documents": {"seq_idx": torch.repeat_interleave(torch.tensor([3, 0, 1]), torch.tensor(PACKED))[None]},
}


@every_variant
@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("form", ["plain", "cache", "mask", "padded"])
def test_packed_documents_equal_separate_ones(variant, words, form):
    model, documents = make(variant), [tokens(1, n, seed=n) for n in PACKED]
    expected = torch.cat([logits(model, ids) for ids in documents], 1)
    ids, mask, packing = torch.cat(documents, 1), None, WORDS[words]
    if form in ("mask", "padded"):
        mask = torch.ones_like(ids)
    if form == "padded":
        ids, mask = F.pad(ids, (0, 3), value=5), F.pad(mask, (0, 3))
        packing = {
            name: told if words == "lengths" else F.pad(told, (0, 3)) for name, told in packing.items()
        }
    result = logits(model, ids, mask, use_cache=form == "cache", **packing)
    assert error(result[:, :22], expected) <= BOUND


@settings(max_examples=20, deadline=None)
@given(data=st.data(), variant=st.sampled_from(["tnl", "hybrid"]), dynamic=st.booleans())
def test_any_split_and_padding_give_the_same_rows(data, variant, dynamic):
    length = data.draw(st.integers(2, 14))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(rows) for _ in range(2)])
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=3)))
    model, ids, parts = make(variant), tokens(2, length), []
    cache = tf.DynamicCache(config=model.config) if dynamic else LongContextCache(model.config)
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        parts.append(logits(model, ids[:, start:stop], mask[:, :stop].long(), past_key_values=cache))
    for row in range(2):
        if mask[row].any():
            alone = logits(model, ids[row : row + 1, mask[row]])[0]
            assert error(torch.cat(parts, 1)[row][mask[row]], alone) <= BOUND


@some_variants
def test_every_split_point_hands_the_state_over(variant):
    model, ids = make(variant), tokens(2, 70)
    expected = logits(model, ids)
    for cut in (1, 2, 31, 63, 64, 65, 69):
        cache = LongContextCache(model.config)
        parts = [logits(model, part, past_key_values=cache) for part in (ids[:, :cut], ids[:, cut:])]
        assert error(torch.cat(parts, 1), expected) <= BOUND, cut


# Generation


@every_variant
def test_generated_tokens_equal_those_without_a_cache(variant):
    model, ids = make(variant), tokens(1, 17)
    expected = uncached(model, ids)
    output = model.generate(ids, do_sample=False, max_new_tokens=9, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected
    kinds = [isinstance(layer, RecurrentLayer) for layer in output.past_key_values.layers]
    assert kinds == [model.config.is_lightning(index) for index in range(model.config.num_hidden_layers)]
    assert generate(model, ids, cache_implementation="static") == expected
    assert generate(model, ids, use_cache=False) == expected


@some_variants
def test_left_padded_prompts_generate_what_they_generate_alone(variant):
    model, ids, mask = make(variant), tokens(2, 17), left_padding([17, 6], 17)
    result = generate(model, ids, mask)
    assert result[1][17:] == generate(model, ids[1:, 11:])[0][6:]
    assert result[0] == generate(model, ids[:1])[0]


MODES = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 20},
}


@some_variants
@pytest.mark.parametrize("mode", MODES)
def test_strategies_on_the_state_equal_those_on_all_keys(variant, mode):
    model, lengths = make(variant), [23] if mode == "lookup" else [23, 10]
    ids, mask = tokens(len(lengths), 23), left_padding(lengths, 23)
    rows = len(lengths) * MODES[mode].get("num_beams", MODES[mode].get("num_return_sequences", 1))
    assert rows >= len(lengths)
    cache = tf.DynamicCache(config=model.config)
    expected = generate(model, ids, mask, past_key_values=cache, **MODES[mode])
    assert generate(model, ids, mask, **MODES[mode]) == expected
    prepared = hf_longattn.prepare_generation(copy.deepcopy(model), prefill_chunk_size=5)
    assert generate(prepared, ids, mask, **MODES[mode]) == expected


@some_variants
def test_assisted_decoding_equals_greedy(variant):
    model, ids = make(variant), tokens(1, 15)
    expected = generate(model, ids, max_new_tokens=20)
    for assistant in (make(variant, seed=3), make(variant)):
        assert generate(model, ids, assistant_model=assistant, max_new_tokens=20) == expected


def test_conversations_go_on_from_a_cache():
    model, conversation = make("hybrid"), tokens(1, 11)
    cache = LongContextCache(model.config)
    for turn in range(3):
        expected = generate(model, conversation)
        assert generate(model, conversation, past_key_values=cache) == expected
        conversation = torch.cat([torch.tensor(expected), tokens(1, 7, seed=turn)], 1)


def test_pages_of_keys_are_refused():
    model, plain, ids = make("hybrid"), tf.LlamaConfig(**SMALL), tokens(1, 5)
    flagged = tf.AutoModelForCausalLM.from_config(plain, attn_implementation="lightning_attention")
    for refusing in (model, hf_longattn.prepare_generation(model), hf_longattn.prepare_generation(flagged)):
        kept = refusing.config._attn_implementation
        with pytest.raises(ValueError, match="`generate_batch`"):
            refusing.generate_batch([ids[0].tolist()])
        with pytest.raises(ValueError, match="cache_implementation='paged'"):
            refusing.generate(ids, cache_implementation="paged")
        assert refusing.config._attn_implementation == kept
    hf_longattn.restore(flagged)
    assert "init_continuous_batching" not in vars(flagged)


def test_layers_may_be_listed_twice():
    ids = tokens(1, 9)
    assert torch.equal(logits(make("hybrid", lightning_layers=[2, 0, 0]), ids), logits(make("hybrid"), ids))


def test_prepare_and_restore():
    model, ids = make("hybrid"), tokens(2, 15)
    names, expected = set(vars(model)), generate(model, ids)
    hf_longattn.prepare_generation(model, prefill_chunk_size=4)
    assert generate(model, ids) == expected
    hf_longattn.restore(model)
    assert set(vars(model)) == names and generate(model, ids) == expected


# Training


def test_the_loss_counts_what_it_should():
    model, ids = make(), tokens(2, 12)
    labels = ids.clone()
    labels[0, :5] = -100
    rows = logits(model, ids)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(rows, labels[:, 1:].flatten())
    assert model(ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    summed = F.cross_entropy(rows, labels[:, 1:].flatten(), reduction="sum")
    counted = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    assert counted.item() == pytest.approx(summed.item() / 100, rel=1e-6)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    assert model(ids, labels=labels, shift_labels=shifted).loss.item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_rows_of_logits_are_chosen():
    model, ids = make(), tokens(2, 12)
    whole = logits(model, ids)
    assert torch.equal(logits(model, ids, logits_to_keep=3), whole[:, -3:])
    assert torch.equal(logits(model, ids, logits_to_keep=torch.tensor([2, 7])), whole[:, [2, 7]])


@some_variants
def test_gradients_equal_the_formulas_and_checkpointing_changes_nothing(variant):
    ids, gradients = tokens(1, 70), []
    for checkpointing in (False, True):
        model = make(variant).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)
    model = make(variant).double()
    state = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    model.state_dict = lambda: state
    F.cross_entropy(by_hand(model, ids[0])[:-1], ids[0, 1:]).backward()
    assert error(gradients[0], torch.cat([p.grad.flatten() for p in state.values()])) <= BOUND


@some_variants
def test_one_batch_is_learnt(variant):
    model, ids = make(variant, initializer_range=0.05).train(), tokens(2, 24)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_trainer_smooths_labels_of_the_next_token(tmp_path):
    model = make(initializer_range=0.05)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(4, 10)]
    arguments = tf.TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, label_smoothing_factor=0.1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = tf.Trainer(model, arguments, train_dataset=rows, data_collator=tf.default_data_collator)
    inputs = trainer._prepare_inputs(tf.default_data_collator(rows[:2]))
    rows_of_logits = logits(model, inputs["input_ids"])[:, :-1].log_softmax(-1)
    picked = rows_of_logits.gather(-1, inputs["labels"][:, 1:, None]).mean()
    expected = -0.9 * picked - 0.1 * rows_of_logits.mean()
    with torch.no_grad():
        assert trainer.compute_loss(model.eval(), dict(inputs)).item() == pytest.approx(
            expected.item(), rel=1e-5
        )
    before = logits(model, inputs["input_ids"])
    assert trainer.train().training_loss > 0
    assert not torch.allclose(before, logits(model.eval(), inputs["input_ids"]), atol=1e-3)


# Files


@every_variant
def test_saved_and_loaded_through_the_auto_classes(variant, tmp_path):
    model, ids = make(variant), tokens(1, 9)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LightningForCausalLM
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    for field in LightningConfig.__annotations__:
        assert getattr(loaded.config, field) == getattr(model.config, field), field
    base = tf.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


def test_the_fields_of_the_configuration():
    ours = set(LightningConfig.__annotations__) - {"model_type"}
    assert ours == {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "hidden_act", "lightning_layers", "lightning_slopes", "lrpe_layers", "scale_embedding",
        "max_position_embeddings", "rope_parameters", "initializer_range", "use_cache", "pad_token_id",
        "bos_token_id", "eos_token_id", "tie_word_embeddings",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_attention_heads": 5}, "hidden_size"),
        ({"lightning_layers": [0, 3]}, "lightning_layers"),
        ({"lrpe_layers": [-1]}, "lrpe_layers"),
        ({"lightning_layers": [1], "lrpe_layers": [0]}, "lrpe_layers"),
        ({"lightning_layers": [1], "num_attention_heads": 16}, "num_attention_heads"),
    ],
)
def test_fields_that_do_not_fit(fields, name):
    # The validation of strict configurations wraps the ValueError.
    with pytest.raises(StrictDataclassError, match=f"`{name}`"):
        LightningConfig(**(SMALL | fields))


def test_inputs_that_do_not_fit():
    model, ids = make(), tokens(1, 6)
    with pytest.raises(ValueError, match="`input_ids` or `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    cache = LongContextCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


OFFICIAL = {
    "architectures": ["TransnormerForCausalLM"], "model_type": "transnormer", "vocab_size": 61,
    "decoder_embed_dim": 48, "decoder_layers": 3, "decoder_attention_heads": 4, "hidden_dim": 48,
    "glu_dim": 40, "linear_act_fun": "swish", "linear_use_lrpe_list": [1, 0, 0], "norm_type": "simplermsnorm",
    "no_scale_embedding": False, "bias": False, "init_std": 0.02, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
OFFICIAL_KEYS = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.token_mixer.lrpe.theta"] + [
    f"model.layers.{index}.{name}.weight"
    for index in range(3)
    for name in ("token_mixer.qkvu_proj", "token_mixer.out_proj")
    + tuple(f"channel_mixer.l{i}" for i in (1, 2, 3))
]


def official(path, kind, **changes):
    """A folder as the official code writes it, and the model that it describes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(OFFICIAL | changes))
    (path / "tokenizer.model").write_bytes(b"pieces")
    model = make()
    state = {name: model.state_dict()[name].clone() for name in OFFICIAL_KEYS}
    assert state.keys() == model.state_dict().keys()
    if kind == "whole":
        save_file(state, path / "model.safetensors")
    else:
        half = len(state) // 2
        for part, names in enumerate((OFFICIAL_KEYS[:half], OFFICIAL_KEYS[half:])):
            shard = {name: state[name] for name in names}
            save_file(shard, path / f"model-0000{part + 1}-of-00002.safetensors")
    return model


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        convert_checkpoint(tmp_path, tmp_path / "dst")


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_official_checkpoints_are_converted(kind, tmp_path):
    model, seen = official(tmp_path / "src", kind), []
    config = convert_checkpoint(
        tmp_path / "src", tmp_path / "dst", progress=lambda done, total, name: seen.append((done, total))
    )
    assert seen[-1] == (len(OFFICIAL_KEYS), len(OFFICIAL_KEYS))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval()
    ids = tokens(1, 30)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert error(logits(loaded, ids)[0], by_hand(loaded, ids[0])) <= BOUND
    assert (config.lrpe_layers, config.intermediate_size, config.eos_token_id) == ([0], 40, 2)
    assert (tmp_path / "dst" / "tokenizer.model").read_bytes() == b"pieces"


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"bias": True}, "bias"), ({"norm_type": "layernorm"}, "norm_type"), ({"hidden_dim": 96}, "hidden_dim"),
     ({"linear_act_fun": "1+elu"}, "linear_act_fun"), ({"vocab_size": None}, "vocab_size"),
     ({"decoder_layers": "3"}, "decoder_layers"), ({"linear_use_lrpe_list": [1]}, "linear_use_lrpe_list")],
)  # fmt: skip
def test_official_models_of_another_kind_are_refused(changes, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        config_from_official(OFFICIAL | changes)


def test_a_tied_head_may_be_left_out(tmp_path):
    model = official(tmp_path / "src", "whole", tie_word_embeddings=True)
    state = load_file(tmp_path / "src" / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "src" / "model.safetensors")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    loaded, ids = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval(), tokens(1, 9)
    hidden = model.model(ids).last_hidden_state
    assert torch.equal(logits(loaded, ids), F.linear(hidden, model.model.embed_tokens.weight))


def test_checkpoints_that_do_not_fit_their_config(tmp_path):
    official(tmp_path / "src", "whole", glu_dim=44)
    with pytest.raises(ValueError, match="channel_mixer.l1.weight: needs .44, 48., got .40, 48."):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    (tmp_path / "src" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")


# The compiler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "padded"),
    [(None, False), (None, True), ("positions", False), ("positions", True), ("documents", False)],
)
@some_variants
def test_forward_compiles_in_one_graph(variant, words, padded):
    torch._dynamo.reset()
    model, ids = make(variant), tokens(2, 22)
    mask = left_padding([22, 17], 22).flip(1) if padded else None
    packing = {} if words is None else WORDS[words]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = logits(model, ids, mask, use_cache=False, **packing)
    with torch.no_grad():
        result = compiled(input_ids=ids, attention_mask=mask, use_cache=False, **packing).logits
    real = slice(None) if mask is None else mask.bool()
    assert error(result[real], expected[real]) <= BOUND


# The guide


def test_the_guide_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "guides" / "lightning.md").read_text()
    *blocks, convert = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    small = tf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4
    )
    tf.LlamaForCausalLM(small).save_pretrained(tmp_path / "vanilla")
    official(tmp_path / "official", "bin")
    names = {"HuggingFaceTB/SmolLM2-135M-Instruct": "vanilla", "TransNormerLLM-1B": "official"}
    names["lightning-1b"] = "converted"
    scope = {}
    for block in [*blocks, convert]:
        for name, folder in names.items():
            block = block.replace(f'"{name}"', repr(str(tmp_path / folder)))
        exec(compile(block, "lightning.md", "exec"), scope)
    assert scope["output"].shape == (1, 45) and scope["loss"].isfinite()
    assert type(scope["model"]) is LightningForCausalLM
    assert (tmp_path / "converted" / "config.json").is_file()
