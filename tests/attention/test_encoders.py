"""Encoders, cross-attention and position bias against eager attention."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.cache import LongContextCache

BOUND = 2e-5
implementations = pytest.mark.parametrize("implementation", ["tree_attention", "blockwise_attention"])
SMALL = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def pair(make, implementation):
    models = []
    for name in ("eager", implementation):
        torch.manual_seed(0)
        models.append(make(name).eval())
    return models


def bart(implementation):
    config = tf.BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=64, init_std=0.3, **SMALL,
    )  # fmt: skip
    config._attn_implementation = implementation
    return tf.BartForConditionalGeneration(config)


def bert(implementation, **changes):
    config = tf.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.3, vocab_size=97, pad_token_id=0, **changes,
    )  # fmt: skip
    config._attn_implementation = implementation
    return tf.BertForMaskedLM(config)


def t5(implementation):
    config = tf.T5Config(
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        **SMALL,
    )
    config._attn_implementation = implementation
    return tf.T5ForConditionalGeneration(config)


def modernbert(implementation):
    config = tf.ModernBertConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, local_attention=8,
        global_attn_every_n_layers=2, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    config._attn_implementation = implementation
    return tf.ModernBertForMaskedLM(config)


@implementations
@pytest.mark.parametrize("make", [bart, t5], ids=["bart", "t5"])
def test_encoder_decoder_equals_eager(make, implementation):
    ids, mask = tiny.tokens(2, 18), tiny.padding([18, 7], 18, "right")
    labels = tiny.tokens(2, 11, seed=3)
    losses, gradients, generated = [], [], []
    for model in pair(make, implementation):
        output = model(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        losses.append(output.logits)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        generated.append(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, num_beams=2).tolist()
        )
    assert tiny.relative_error(losses[1], losses[0]) <= BOUND
    assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND
    assert generated[1] == generated[0]


@implementations
@pytest.mark.parametrize("make", [bert, modernbert], ids=["bert", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder_equals_eager(make, implementation, side):
    ids, mask = tiny.tokens(2, 30), tiny.padding([30, 13], 30, side)
    eager, ours = pair(make, implementation)
    with torch.no_grad():
        expected, result = (m(input_ids=ids, attention_mask=mask).logits for m in (eager, ours))
    assert tiny.relative_error(result[mask.bool()], expected[mask.bool()]) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("make", [bart, t5], ids=["bart", "t5"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_answers_of_prepared_encoder_decoders(make, side):
    ids, mask = tiny.tokens(2, 18), tiny.padding([18, 18 if side == "none" else 7], 18, side)
    eager, model = pair(make, "tree_attention")
    hf_longattn.prepare_generation(model, prefill_chunk_size=5)
    real = tiny.padding([13, 13 if side == "none" else 6], 13, "left")
    begun = {"decoder_input_ids": tiny.tokens(2, 13, seed=5), "decoder_attention_mask": real}
    for beams in (1, 2):
        for prompt in ({}, begun):
            call = {
                "attention_mask": mask,
                "max_new_tokens": 7,
                "do_sample": False,
                "num_beams": beams,
                **prompt,
            }
            expected, result = (one.generate(ids, **call) for one in (eager, model))
            assert torch.equal(result, expected), (beams, len(prompt))


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("make", [bart, t5], ids=["bart", "t5"])
@pytest.mark.parametrize("kind", [tf.DynamicCache, LongContextCache])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_answers_in_parts_on_a_cache_that_stays(make, kind, prepared, side):
    # By the forward: `generate` of transformers reads what a cache of an encoder-decoder holds once more.
    eager, model = pair(make, "tree_attention")
    if prepared:
        hf_longattn.prepare_generation(model)
    ids, mask = tiny.tokens(2, 18), tiny.padding([18, 18 if side == "none" else 7], 18, side)
    answers, real = tiny.tokens(2, 21, seed=5), tiny.padding([21, 21 if side == "none" else 13], 21, side)
    cache, logits = tf.EncoderDecoderCache(*(kind(config=model.config) for _ in range(2))), []
    with torch.no_grad():
        expected = eager(ids, mask, decoder_input_ids=answers, decoder_attention_mask=real).logits
        encoded = model.get_encoder()(ids, mask)
        for part in (slice(0, 8), slice(8, 9), slice(9, 21)):
            call = {"decoder_input_ids": answers[:, part], "decoder_attention_mask": real[:, : part.stop]}
            output = model(attention_mask=mask, encoder_outputs=encoded, past_key_values=cache, **call)
            logits.append(output.logits)
    real = real.bool()
    assert tiny.relative_error(torch.cat(logits, 1)[real], expected[real]) <= BOUND


@implementations
def test_packed_documents_of_encoder_decoders(implementation):
    lengths = (5, 8, 7)
    texts, answers = ([tiny.tokens(1, n, seed=n + start) for n in lengths] for start in (0, 20))
    bounds = torch.tensor([0, 5, 13, 20], dtype=torch.int32)
    eager, model = pair(t5, implementation)
    with torch.no_grad():
        alone = [
            eager(input_ids=text, decoder_input_ids=answer)
            for text, answer in zip(texts, answers, strict=True)
        ]
        packed = {"input_ids": torch.cat(texts, 1), "decoder_input_ids": torch.cat(answers, 1)}
        result = model(**packed, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, use_cache=False).logits
    assert tiny.relative_error(result, torch.cat([one.logits for one in alone], 1)) <= BOUND


@pytest.mark.slow
@implementations
@pytest.mark.parametrize("make", [bart, t5], ids=["bart", "t5"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients_of_encoder_decoders(make, implementation, side):
    ids, mask = tiny.tokens(2, 18), tiny.padding([18, 18 if side == "none" else 7], 18, side)
    for answers in ("none", "left", "right"):
        real = tiny.padding([11, 11 if answers == "none" else 6], 11, answers)
        counted = real.bool() & (real.cumsum(-1) > 1)
        inputs = {
            "labels": torch.where(counted, tiny.tokens(2, 11, seed=3), -100),
            "decoder_attention_mask": real,
        }
        logits, gradients = [], []
        for model in pair(make, implementation):
            output = model(input_ids=ids, attention_mask=mask, **inputs)
            output.loss.backward()
            logits.append(output.logits[real.bool()])
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert tiny.relative_error(logits[1], logits[0]) <= BOUND, answers
        assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND, answers


@implementations
@pytest.mark.parametrize("make", [bert, modernbert], ids=["bert", "modernbert"])
def test_packed_documents_of_encoders(make, implementation):
    lengths, bounds = (5, 8, 8), torch.tensor([0, 5, 13, 21], dtype=torch.int32)
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = {"position_ids": position_ids, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    eager, ours = pair(make, implementation)
    with torch.no_grad():
        expected = torch.cat([eager(input_ids=ids).logits for ids in documents], 1)
        result = ours(input_ids=torch.cat(documents, 1), **packing).logits
    assert tiny.relative_error(result, expected) <= BOUND


@pytest.mark.slow
@implementations
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_gradients_of_encoders(implementation, side):
    ids, mask = tiny.tokens(2, 30), tiny.padding([30, 30 if side == "none" else 13], 30, side)
    labels = torch.where(mask.bool(), ids, -100)
    gradients = []
    for model in pair(bert, implementation):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= BOUND


def test_dropout_replays_with_the_seed_and_drops():
    model = bert("blockwise_attention", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    ids = tiny.tokens(1, 16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(input_ids=ids).logits)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])
    assert not torch.allclose(results[0], model.eval()(input_ids=ids).logits)
