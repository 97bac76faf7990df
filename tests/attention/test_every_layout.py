"""Every family, plain and prepared, in every layout: logits, gradients and tokens equal to eager."""

import pytest
import tiny
import torch
import transformers as tf

import hf_longattn
from hf_longattn.cache import LongContextCache

BOUND = 2e-5
LENGTHS = [9, 1, 12]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
SETUPS = {
    "plain": lambda family: tiny.build(family, "blockwise_attention"),
    "tree": lambda family: tiny.build(family, "tree_attention"),
    "generation": lambda family: hf_longattn.prepare_generation(tiny.build(family), prefill_chunk_size=5),
    "training": lambda family: hf_longattn.prepare_training(tiny.build(family), block_size=7),
}
GENERATE = ["plain", "tree", "generation"]
families = pytest.mark.parametrize("family", tiny.CAUSAL)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def outcome(model, ids, mask, labels, **kwargs):
    """Logits and the gradient of the loss in every parameter."""
    model.zero_grad()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, **kwargs).loss.backward()
    grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return logits, torch.cat(grads)


def generate(model, ids, mask, **kwargs):
    call = {"do_sample": False, "max_new_tokens": 7, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **call)


@pytest.mark.slow
@families
@pytest.mark.parametrize("setup", SETUPS)
def test_logits_and_gradients(family, setup):
    model, eager = SETUPS[setup](family), tiny.build(family)
    for side in ("none", "left", "right"):
        lengths = [21, 21, 21] if side == "none" else [21, 13, 4]
        ids, mask = tiny.tokens(3, 21), tiny.padding(lengths, 21, side)
        # What padding predicts counts for nothing: eager computes something there, and ours zeros.
        counted = mask.bool() & (mask.cumsum(-1) > 1)
        call = {"labels": torch.where(counted, ids, -100), "position_ids": positions(mask)}
        expected, result = (outcome(one, ids, mask, **call) for one in (eager, model))
        assert tiny.relative_error(result[0][mask.bool()], expected[0][mask.bool()]) <= BOUND, side
        assert tiny.relative_error(result[1], expected[1]) <= BOUND, side


@pytest.mark.slow
@families
@pytest.mark.parametrize("setup", SETUPS)
def test_packed_documents(family, setup):
    model, eager = SETUPS[setup](family), tiny.build(family)
    documents = [tiny.tokens(1, n, seed=n) for n in LENGTHS]
    packed = torch.cat(documents, 1)
    # The first token of a document is nobody's to predict.
    labels = torch.where(POSITIONS > 0, packed, -100)
    if family == "llama4":
        # Its chunks count from the start of the row: eager is held against as it packs.
        expected = outcome(eager, packed, None, labels, position_ids=POSITIONS)
    else:
        parts = [outcome(eager, ids, None, ids) for ids in documents if ids.shape[1] > 1]
        alone = [outcome_of_one(eager, ids) for ids in documents]
        share = [(n - 1) / (sum(LENGTHS) - len(LENGTHS)) for n in LENGTHS if n > 1]
        gradient = sum(weight * part[1] for weight, part in zip(share, parts, strict=True))
        expected = torch.cat(alone, 1), gradient
    packing = {}
    if family == "gpt2":
        # It does not hand position ids to its attention.
        bounds = torch.tensor([0, 9, 10, 22], dtype=torch.int32)
        packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    result = outcome(model, packed, None, labels, position_ids=POSITIONS, **packing)
    for got, want in zip(result, expected, strict=True):
        assert tiny.relative_error(got, want) <= BOUND


def outcome_of_one(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.slow
@families
@pytest.mark.parametrize("setup", GENERATE)
def test_tokens(family, setup):
    model, eager = SETUPS[setup](family), tiny.build(family)
    # On the right so short that windows and chunks of the last position still hold a token: without one,
    # eager answers with the mean of what is hidden.
    for side, length, short in (("none", 17, 17), ("left", 17, 9), ("right", 15, 11)):
        ids, mask = tiny.tokens(2, length), tiny.padding([length, short], length, side)
        for beams in (1, 3):
            expected, result = (generate(one, ids, mask, num_beams=beams) for one in (eager, model))
            assert torch.equal(result, expected), (side, beams)


@pytest.mark.slow
@families
@pytest.mark.parametrize("setup", GENERATE)
def test_turns_and_chunks_on_a_cache_that_stays(family, setup):
    model, eager = SETUPS[setup](family), tiny.build(family)
    cache = LongContextCache(model.config) if setup == "generation" else tf.DynamicCache(config=model.config)
    conversation, mask = tiny.tokens(2, 11), tiny.padding([11, 6], 11, "left")
    for turn in range(3):
        expected = generate(eager, conversation, mask)
        assert torch.equal(generate(model, conversation, mask, past_key_values=cache), expected), turn
        conversation = torch.cat([expected, tiny.tokens(2, 6, seed=turn)], 1)
        mask = torch.cat([mask, torch.ones(2, conversation.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    ids = tiny.tokens(2, 26)
    for side, short in (("none", 26), ("left", 15), ("right", 15)):
        mask, cache, parts = tiny.padding([26, short], 26, side), LongContextCache(model.config), []
        with torch.no_grad():
            expected = eager(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
            for part in (slice(0, 8), slice(8, 9), slice(9, 26)):
                where = {"position_ids": positions(mask)[:, part], "past_key_values": cache}
                parts.append(
                    model(input_ids=ids[:, part], attention_mask=mask[:, : part.stop], **where).logits
                )
        real = mask.bool()
        assert tiny.relative_error(torch.cat(parts, 1)[real], expected[real]) <= BOUND, side
