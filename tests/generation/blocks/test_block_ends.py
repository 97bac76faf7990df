"""Where the answer of a prepared Block Transformer ends, what sees it grow, and the cache left behind."""

import string

import pytest
import torch
import transformers as tf
from block_answers import END, GREEDY, Collect, both, ends_inside, generate
from tiny_blocks import PAD, make, prompts

import hf_longattn
from hf_longattn.generation import spectator
from hf_longattn.modeling.block_transformer import BlockTransformerCache, decoding


def test_ends_are_looked_for_on_the_host():
    config = tf.GenerationConfig(eos_token_id=[9, 4])
    # To read a tensor of this device raises.
    config._eos_token_tensor = torch.tensor([9, 4]).to("meta")
    own = tf.EosTokenCriteria(torch.tensor([7]))
    criteria = tf.StoppingCriteriaList(
        [tf.MaxLengthCriteria(4), tf.EosTokenCriteria(config._eos_token_tensor)]
    )
    on_host = spectator.criteria_on_host(tf.StoppingCriteriaList([*criteria, own]), config)
    assert on_host[0] is criteria[0] and on_host[2] is own
    for ids, ended in (([[4, 9], [9, 3]], [1, 0]), ([[1, 7], [1, 4]], [1, 1]), ([[1, 2, 3, 3]], [1])):
        assert on_host(torch.tensor(ids), None).tolist() == [bool(each) for each in ended]
    # Criteria of others see what lies on the device.
    others = tf.StoppingCriteriaList([*criteria, tf.MaxTimeCriteria(9.0)])
    assert spectator.criteria_on_host(others, config) is others


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("place", [5, *(pytest.param(place, marks=pytest.mark.slow) for place in (3, 6))])
def test_a_row_that_ends_inside_a_block_is_padded(place, captured, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    options = {**GREEDY, "repetition_penalty": 1.5, "max_new_tokens": 17}
    model, (ids, mask) = make(), prompts(9, 9)
    end = ends_inside(generate(model, ids, mask, **options), 0, place)
    options["eos_token_id"] = [end, 58]
    plain, fast = both(model, ids, mask, **options)
    assert torch.equal(fast, plain)
    assert (fast[0, 9 + place + 1 :] == PAD).all() and bool(graphs) == captured
    plain, fast = both(model, ids[:1], mask[:1], **options)
    assert torch.equal(fast, plain) and fast.shape[1] == 9 + place + 1


class EndAt:
    """Ends each row at a length of its own, and notes what it was shown."""

    def __init__(self, *lengths):
        self.lengths, self.seen = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.shape[1], None if scores is None else len(scores)))
        return input_ids.shape[1] >= self.lengths


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize("end", [None, END], ids=["no-eos", "eos"])
def test_streamers_and_criteria_see_every_token_in_order(end):
    model, (ids, mask), results = make(), prompts(9, 9), []
    for prepared in (False, True):
        if prepared:
            hf_longattn.prepare_generation(model)
        streamer, criterion = Collect(), EndAt(12, 19)
        # Plain `generate` streams one row only; its check is on beams alone.
        options = {**GREEDY, "max_new_tokens": 15, "eos_token_id": end, "streamer": streamer}
        tokens = generate(model, ids, mask, stopping_criteria=tf.StoppingCriteriaList([criterion]), **options)
        results.append((tokens.tolist(), streamer.parts, criterion.seen))
    assert results[0] == results[1]
    assert len(results[1][0][0]) == 19 and results[1][1][-1] == "end"


@pytest.mark.usefixtures("never_token_by_token", "recorded")
def test_stop_strings_end_inside_a_block():
    from tokenizers import Tokenizer, decoders, models

    letters = (string.ascii_letters + string.digits)[:61]
    words = Tokenizer(models.BPE({letter: token for token, letter in enumerate(letters)}, merges=[]))
    words.decoder = decoders.Fuse()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words)
    options = {**GREEDY, "repetition_penalty": 1.5, "max_new_tokens": 17, "tokenizer": tokenizer}
    model, (ids, mask) = make(), prompts(9, 9)
    stop = ends_inside(generate(model, ids, mask, **options), 0, 5)
    plain, fast = both(model, ids[:1], mask[:1], stop_strings=[letters[stop]], **options)
    assert torch.equal(fast, plain) and fast.shape[1] == 9 + 6


@pytest.mark.usefixtures("never_token_by_token", "recorded")
@pytest.mark.parametrize("new", [9, *(pytest.param(new, marks=pytest.mark.slow) for new in (6, 10))])
@pytest.mark.parametrize("alignment", ["tokens", "columns"])
def test_a_second_turn_goes_on_from_the_cache(alignment, new):
    model, (ids, mask) = make(block_alignment=alignment), prompts(12, 9, 2)
    options = {**GREEDY, "max_new_tokens": new, "return_dict_in_generate": True}
    answers = []
    for prepared in (False, True):
        if prepared:
            hf_longattn.prepare_generation(model)
        turn, seen, cache, said = ids, mask, None, []
        for _ in range(3):
            result = generate(model, turn, seen, past_key_values=cache, **options)
            cache = result.past_key_values
            assert cache.get_seq_length() == result.sequences.shape[1] - 1
            said.append((result.sequences, cache.num_blocks.clone(), cache.context_valid.clone()))
            turn = torch.cat([result.sequences, prompts(5, 5, 5)[0]], dim=1)
            seen = torch.nn.functional.pad(seen, (0, turn.shape[1] - seen.shape[1]), value=1)
        answers.append(said)
    for plain, fast in zip(*answers, strict=True):
        assert torch.equal(fast[0], plain[0])


@pytest.mark.usefixtures("never_token_by_token", "recorded")
def test_a_streamer_that_raises_leaves_the_callers_cache_in_order():
    class Break(Collect):
        def put(self, value):
            super().put(value)
            if len(self.parts) == 5:
                raise KeyboardInterrupt

    model, (ids, mask) = make(), prompts(6, 12, 9)
    cache = BlockTransformerCache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
    expected = generate(model, ids, mask, **GREEDY)
    hf_longattn.prepare_generation(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, mask, past_key_values=cache, streamer=Break(), **GREEDY)
    assert cache.get_seq_length() == ids.shape[1]
    cache.crop(-1)
    assert torch.equal(generate(model, ids, mask, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("place", ["processor", "first step"])
def test_an_error_before_the_first_block_leaves_the_callers_rows_in_order(place, monkeypatch):
    def fail(*args, **keywords):
        raise RuntimeError("from outside")

    model, (ids, mask) = make(), prompts(6, 12, 9)
    hf_longattn.prepare_generation(model)
    cache = BlockTransformerCache(model.config)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="from outside"):
        if place == "first step":
            patch.setattr(decoding.BlockGroup, "__init__", fail)
        processors = tf.LogitsProcessorList([fail] if place == "processor" else [])
        generate(model, ids, mask, past_key_values=cache, logits_processor=processors, **GREEDY)
    assert cache.get_seq_length() == ids.shape[1]
    cache.crop(-1)
    result = generate(model, ids, mask, past_key_values=cache, **GREEDY)
    assert torch.equal(result, generate(model, ids, mask, **GREEDY))


@torch.no_grad()
def test_the_cache_left_behind_is_that_of_a_forward(recorded):
    model, (ids, mask) = make(), prompts(12, 9, 6)
    hf_longattn.prepare_generation(model)
    options = {**GREEDY, "max_new_tokens": 11, "return_dict_in_generate": True}
    result = generate(model, ids, mask, **options)
    cache, every = result.past_key_values, torch.nn.functional.pad(mask, (0, 11), value=1)
    seen = model(result.sequences[:, :-1], attention_mask=every[:, :-1]).past_key_values
    assert recorded and torch.equal(cache.num_slots, seen.num_slots)
    for row, (held, whole) in enumerate(zip(cache.num_blocks, seen.num_blocks, strict=True)):
        # Tokens decoded beyond the end open their block again, and the one before it.
        assert whole - 1 <= held <= whole
        for ours, theirs in zip(cache.layers, seen.layers, strict=True):
            for name in ("keys", "values"):
                pair = (getattr(layer, name)[row, :, :held] for layer in (ours, theirs))
                torch.testing.assert_close(*pair, rtol=1e-4, atol=2e-4)
    last = result.sequences[:, -1:]
    logits = model(last, attention_mask=every, past_key_values=cache).logits
    torch.testing.assert_close(
        logits, model(last, attention_mask=every, past_key_values=seen).logits, rtol=1e-4, atol=2e-4
    )
