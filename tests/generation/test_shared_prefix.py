"""Many questions about one document: `generate()` on a cache forked with `rows`."""

import pytest
import tiny
import torch

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.cache.preallocated import PreallocatedLayer
from hf_longattn.generation.graph import device_lengths

PREFIX, WIDTH, LENGTHS = 23, 19, [19, 5, 1]
FAMILIES = ["llama", "gemma2", "gpt-oss", "mistral-window", "llama4"]
MODES = {"greedy": {}, "beams": {"num_beams": 3}, "grown": {"max_new_tokens": 270}}
gpu = pytest.mark.gpu


def build(family, device="cpu", **fields):
    return hf_longattn.prepare_generation(tiny.build(family).to(device), prefill_chunk_size=7, **fields)


def read_prefix(model, tokens=PREFIX):
    """A cache that holds the document, read as a user reads it."""
    cache = LongContextCache(model.config)
    document = tiny.tokens(1, tokens).to(model.device)
    model.generate(document, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.get_seq_length() == tokens
    return cache


def questions(lengths=LENGTHS, seed=4):
    """Left-padded token ids, and the mask of document and questions."""
    width = max(lengths)
    padding = tiny.padding(lengths, width, "left")
    mask = torch.cat([torch.ones(len(lengths), PREFIX, dtype=torch.long), padding], 1)
    return tiny.tokens(len(lengths), width, seed=seed) * padding, mask


def answers(model, ids, mask, cache, **mode):
    call = {"do_sample": False, "max_new_tokens": 9, **mode}
    ids, mask = ids.to(model.device), mask.to(model.device)
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **call)[:, ids.shape[1] :].tolist()


def answers_alone(model, ids, lengths, **mode):
    """The answer to each question in a run of its own."""
    results = []
    for row, length in zip(ids, lengths, strict=True):
        prompt = torch.cat([tiny.tokens(1, PREFIX), row[None, len(row) - length :]], 1).to(model.device)
        call = {"do_sample": False, "max_new_tokens": 9, **mode}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **call)
        results.append(output[0, prompt.shape[1] :].tolist())
    return results


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("given", ["whole", "suffixes"])
def test_answers_are_those_of_separate_runs(family, mode, given):
    model = build(family)
    ids, mask = questions()
    if given == "whole":
        ids = torch.cat([tiny.tokens(1, PREFIX).expand(3, -1), ids], 1)
    fork = read_prefix(model).fork(rows=3 * MODES[mode].get("num_beams", 1))
    result = answers(model, ids, mask, fork, **MODES[mode])
    assert result == answers_alone(tiny.build(family), questions()[0], LENGTHS, **MODES[mode])
    # The tokens differ by question, so that rows cannot have been mixed up unseen.
    assert result[0] != result[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_sixteen_questions_about_one_document(device):
    lengths = [1 + 7 * row % WIDTH for row in range(16)]
    model, (ids, mask) = build("gemma2", device), questions(lengths)
    document = read_prefix(model)
    result = answers(model, ids, mask, document.fork(rows=16))
    assert result == answers_alone(tiny.build("gemma2").to(device), ids, lengths)
    assert len({tuple(row) for row in result}) == 16 and document.get_seq_length() == PREFIX


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_long_answers_grow_the_suffixes_alone(family):
    model = build(family)
    fork = read_prefix(model).fork(rows=2)
    before = fork.layers[0].prefix[0].data_ptr()
    ids, mask = questions([9, 4])
    # Memory that is kept from a short answer has no room for a long one.
    answers(model, ids, mask, fork, max_new_tokens=1)
    fork.reset()
    assert fork.layers[0].capacity < 20
    result = answers(model, ids, mask, fork, **MODES["grown"])
    assert result == answers_alone(tiny.build(family), ids, [9, 4], **MODES["grown"])
    assert fork.layers[0].prefix[0].data_ptr() == before and fork.layers[0].capacity > 256


@pytest.mark.parametrize("mode", [{"top_k": 20}, {"num_return_sequences": 2}], ids=str)
def test_sampling_draws_what_a_repeated_cache_draws(mode):
    model = build("gpt-oss")
    cache = read_prefix(model)
    ids, mask = questions([8, 8, 8])
    rows = 3 * mode.get("num_return_sequences", 1)
    results = []
    for fork in (cache.fork(rows=rows), cache.fork(rows)):
        torch.manual_seed(7)
        results.append(answers(model, ids, mask, fork, do_sample=True, temperature=0.8, **mode))
    assert results[0] == results[1] and results[0][0] != results[0][1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_second_question_follows_on_each_answer(family):
    model, plain = build(family), tiny.build(family)
    fork = read_prefix(model).fork(rows=2)
    together = torch.cat([tiny.tokens(1, PREFIX).expand(2, -1), questions([9, 9])[0]], 1)
    apart = together.split(1)
    for turn in range(3):
        more = tiny.tokens(2, 6, seed=turn)
        answer = torch.tensor(answers(model, together, torch.ones_like(together), fork))
        together = torch.cat([together, answer, more], 1)
        apart = [
            plain.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=9)
            for row in apart
        ]
        apart = [torch.cat([row, one], 1) for row, one in zip(apart, more.split(1), strict=True)]
        assert torch.equal(together, torch.cat(apart))
    # The last answer but its last token, and not the question after it.
    assert fork.get_seq_length() == together.shape[1] - 6 - 1


def test_reset_serves_one_batch_of_questions_after_another():
    model = build("gemma2")
    fork = read_prefix(model).fork(rows=2)
    for seed in (4, 5):
        ids, mask = questions([12, 3], seed)
        assert answers(model, ids, mask, fork) == answers_alone(tiny.build("gemma2"), ids, [12, 3])
        fork.reset()


def test_lookup_goes_on_behind_the_prefix():
    model = build("llama")
    whole = tiny.tokens(1, PREFIX + 5)
    expected = answers(tiny.build("llama"), whole, torch.ones_like(whole), None)
    for cache in (read_prefix(model), read_prefix(model).fork(rows=1)):
        assert answers(model, whole, torch.ones_like(whole), cache, prompt_lookup_num_tokens=3) == expected


def test_a_mask_that_leaves_the_document_out_is_refused():
    model = build("llama")
    cache = read_prefix(model)
    ids, mask = questions()
    for one in (cache.fork(rows=3), cache.fork(3)):
        with pytest.raises(
            ValueError, match="`attention_mask` covers 19 tokens, but `past_key_values` holds"
        ):
            answers(model, ids, mask[:, PREFIX:], one)
        assert one.get_seq_length() == PREFIX
    with pytest.raises(ValueError, match="forked for 2 sequences, got a batch of 3"):
        answers(model, ids, mask, cache.fork(rows=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_by_the_clock_equal_ordinary_ones(family):
    model = tiny.build(family, "tree_attention")
    first = LongContextCache(model.config)
    ids, mask = questions([30, 12, 1])
    positions = (mask.cumsum(-1) - 1)[:, PREFIX:]
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, PREFIX), past_key_values=first)
        caches, clocks = [first.fork(rows=3) for _ in range(2)], {}
        for cache in caches:
            step = {"input_ids": ids[:, :9], "position_ids": positions[:, :9]}
            model(**step, attention_mask=mask[:, : PREFIX + 9], past_key_values=cache)
        start = 9
        for count in (1, 1, 3, 1, 4, 1, 1, 9):
            stop = start + count
            step = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
            known = mask[:, : PREFIX + stop]
            expected = model(**step, attention_mask=known, past_key_values=caches[0]).logits
            future = torch.nn.functional.pad(known, (0, 64), value=1)
            with device_lengths(caches[1], clocks, count):
                used = {id(layer.clock): layer.clock for layer in caches[1].layers}.values()
                for clock in used:
                    clock.begin(count)
                result = model(**step, attention_mask=future, past_key_values=caches[1]).logits
                for clock in used:
                    clock.advance(count)
            for clock in used:
                clock.advanced(count)
            for layer in caches[1].layers:
                layer.advanced(count)
            # What a padded place attends to is nobody's business.
            seen = mask[:, PREFIX + start : PREFIX + stop].bool()
            assert tiny.relative_error(result[seen], expected[seen]) <= 2e-5
            start = stop


@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_gives_the_answers_of_separate_runs(family, mode):
    model = tiny.capturable(build(family, "cuda", cuda_graph=True))
    fork = read_prefix(model).fork(rows=3 * MODES[mode].get("num_beams", 1))
    ids, mask = questions()
    result = answers(model, ids, mask, fork, **MODES[mode])
    plain = tiny.capturable(tiny.build(family)).cuda()
    assert result == answers_alone(plain, ids, LENGTHS, **MODES[mode])


@gpu
def test_one_graph_serves_one_question_after_another(monkeypatch):
    from hf_longattn.generation.graph import GraphDecoder

    model = build("gemma2", "cuda", cuda_graph=True)
    fork = read_prefix(model).fork(rows=4)
    # Chunks of a few tokens are steps too: those of the document were captured, in a cache of their own.
    captures = []
    real = GraphDecoder._capture
    monkeypatch.setattr(GraphDecoder, "_capture", lambda self, *a: (captures.append(1), real(self, *a))[1])
    ids, mask = questions([5] * 4)
    result = answers(model, ids, mask, fork, max_new_tokens=300)
    assert len(captures) == 1
    assert result == answers_alone(tiny.build("gemma2").cuda(), ids, [5] * 4, max_new_tokens=300)


@pytest.mark.parametrize("given", ["whole", "suffixes"])
@pytest.mark.parametrize("beams", [1, 2])
def test_the_first_question_makes_room_for_the_whole_answer(given, beams, monkeypatch):
    model = build("gemma2")
    fork = read_prefix(model).fork(rows=2 * beams)
    ids, mask = questions([9, 4])
    ids = torch.cat([tiny.tokens(1, PREFIX).expand(2, -1), ids], 1) if given == "whole" else ids
    moved = []
    monkeypatch.setattr(PreallocatedLayer, "_replace_buffers", lambda *a: moved.append(1))
    answers(model, ids, mask, fork, max_new_tokens=40, num_beams=beams)
    assert not moved and all(layer.capacity == 9 + 40 - 1 for layer in fork.layers)
