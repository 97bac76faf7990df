"""Greedy calls whose host reads one step late: same tokens, same scores, same streams, same caches."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import recorded
import tiny
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer, TextStreamer

import hf_longattn
from hf_longattn.cache import LongContextCache
from hf_longattn.generation import ahead

FAMILIES = ["llama", "gemma2", "mistral-window", "gpt-neox"]
gpu = pytest.mark.gpu


@pytest.fixture
def deferred(monkeypatch):
    """Lets calls on a CPU run ahead; the checks that were made one step late."""
    made, base = [], utils.DeferredStopCheck

    class Counted(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(ahead, "_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", recorded.NoEvent)
    monkeypatch.setattr(utils, "DeferredStopCheck", Counted)
    yield made
    assert utils.DeferredStopCheck is Counted


class _Recorder(BaseStreamer):
    def __init__(self, limit=None):
        self.got, self.limit, self.ended = [], limit, False

    def put(self, value):
        self.got.append(value.tolist())
        if self.limit is not None and len(self.got) > self.limit:
            raise KeyboardInterrupt

    def end(self):
        self.ended = True


def generate(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    call = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True, **kwargs}
    return model.generate(input_ids=ids, attention_mask=mask, **call)


def ends(model, ids, mask=None):
    """A token that each row's answer has in the middle, at different places."""
    plain = generate(model, ids, mask).sequences[:, ids.shape[1] :]
    return sorted({int(row[5 + 4 * index]) for index, row in enumerate(plain)})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_scores_and_cache_are_those_of_the_loop(family, rows, deferred):
    ids, mask = tiny.tokens(rows, 12), tiny.padding([12, 7, 9][:rows], 12, "left")
    model = tiny.build(family)
    call = {"eos_token_id": ends(model, ids, mask), "pad_token_id": 0, "output_scores": True}
    expected = generate(model, ids, mask, **call)
    assert not deferred
    result = generate(hf_longattn.prepare_generation(model), ids, mask, **call)
    assert len(deferred) == 1 and deferred[0].stop_reported
    assert result.sequences.tolist() == expected.sequences.tolist()
    assert len(result.scores) == len(expected.scores)
    torch.testing.assert_close(torch.stack(result.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    assert result.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_where_it_ended(family, deferred):
    ids, model = tiny.tokens(1, 12), tiny.build(family)
    end = ends(model, ids)
    prepared = hf_longattn.prepare_generation(tiny.build(family))
    cache = LongContextCache(prepared.config)
    whole = ids
    for turn in range(3):
        expected = generate(model, whole, eos_token_id=end, pad_token_id=0).sequences
        result = generate(prepared, whole, eos_token_id=end, pad_token_id=0, past_key_values=cache).sequences
        assert result.tolist() == expected.tolist()
        assert cache.get_seq_length() == result.shape[1] - 1
        whole = torch.cat([result, tiny.tokens(1, 5 + turn)], 1)
    assert len(deferred) == 3


@pytest.mark.parametrize("new_tokens", [1, 2, 24])
@pytest.mark.parametrize("ends_at_once", [False, True])
def test_a_streamer_gets_every_token_once(ends_at_once, new_tokens, deferred):
    ids, streams = tiny.tokens(1, 12), []
    end = ends(tiny.build("llama"), ids)
    if ends_at_once:
        end = generate(tiny.build("llama"), ids).sequences[0, 12].item()
    for model in (tiny.build("llama"), hf_longattn.prepare_generation(tiny.build("llama"))):
        streams.append(_Recorder())
        call = {"return_dict_in_generate": False, "eos_token_id": end, "pad_token_id": 0}
        generate(model, ids, streamer=streams[-1], max_new_tokens=new_tokens, **call)
    assert len(deferred) == 1
    assert streams[0].got == streams[1].got and streams[1].ended


def test_the_first_token_does_not_wait_for_the_second_step(deferred, monkeypatch):
    model, calls, seen = hf_longattn.prepare_generation(tiny.build("llama")), [], []
    real = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    )

    class Look(BaseStreamer):
        def put(self, value):
            seen.append(len(calls))

        def end(self):
            pass

    generate(model, tiny.tokens(1, 12), max_new_tokens=5, streamer=Look(), return_dict_in_generate=False)
    # The prompt before any forward, the first token after one, each other while the next step is under way.
    assert len(deferred) == 1 and seen == [0, 1, 3, 4, 5, 5]


def test_a_streamer_that_ends_the_call_leaves_a_cache_of_what_it_saw(deferred):
    ids, model = tiny.tokens(1, 12), hf_longattn.prepare_generation(tiny.build("llama"))
    cache = LongContextCache(model.config)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, past_key_values=cache, streamer=_Recorder(limit=4))
    # The prompt is streamed first; the fourth token ended the call and is not yet in the cache.
    assert not deferred and cache.get_seq_length() == 12 + 3


def test_a_streamer_may_be_given_by_its_place(deferred):
    ids, model = tiny.tokens(1, 12), hf_longattn.prepare_generation(tiny.build("llama"))
    cache, streamer = LongContextCache(model.config), _Recorder(limit=4)
    call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, None, None, None, None, None, None, streamer, past_key_values=cache, **call)
    assert not deferred and cache.get_seq_length() == 12 + 3


def test_the_name_in_transformers_stays_that_of_its_class(deferred):
    model, base, seen = hf_longattn.prepare_generation(tiny.build("llama")), utils.DeferredStopCheck, []

    class Look(_Recorder):
        def put(self, value):
            # As another thread would ask, and one whose call is under way.
            cache = LongContextCache(model.config)
            pool = ThreadPoolExecutor(1)
            ask = functools.partial(utils.DeferredStopCheck.is_supported, torch.device("cpu"), cache)
            seen.append((pool.submit(ask, False, False).result(), ask(False, False)))
            pool.shutdown()
            assert issubclass(utils.DeferredStopCheck, base)

    call = {"return_dict_in_generate": False, "streamer": Look(), "max_new_tokens": 3}
    generate(model, tiny.tokens(1, 12), **call)
    assert seen and not any(thread or nested for thread, nested in seen)
    assert isinstance(deferred[0], base)


class _Numbers:
    """A tokenizer whose text is the list of tokens, which it notes."""

    def __init__(self, seen):
        self.seen = seen

    def decode(self, tokens, **kwargs):
        self.seen.append(list(tokens))
        return "\n"


class _Always(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class _Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    "call",
    [
        {"do_sample": True, "streamer": _Recorder(), "return_dict_in_generate": False},
        {"num_beams": 2},
        {"logits_processor": LogitsProcessorList([_Always()])},
        {"stopping_criteria": StoppingCriteriaList([_Never()])},
        {"prefix_allowed_tokens_fn": lambda row, ids: list(range(97))},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda call: next(iter(call)),
)
def test_what_could_tell_stays_with_the_loop(call, deferred):
    ids, model = tiny.tokens(1, 12), tiny.build("llama")
    torch.manual_seed(3)
    expected = generate(model, ids, **call)
    torch.manual_seed(3)
    result = generate(hf_longattn.prepare_generation(model), ids, **call)
    tokens = [getattr(output, "sequences", output).tolist() for output in (result, expected)]
    assert tokens[0] == tokens[1]
    assert not deferred


@pytest.mark.parametrize("end", ["an end", "none"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_sampled_calls_draw_no_number_too_many(rows, streamed, end, deferred):
    ids, mask = tiny.tokens(rows, 12), tiny.padding([12, 7, 9][:rows], 12, "left")
    call = {"do_sample": True, "top_k": 40, "temperature": 0.9, "pad_token_id": 0}
    model = tiny.build("llama")
    torch.manual_seed(3)
    plain = generate(model, ids, mask, **call).sequences[:, 12:]
    if end == "an end":
        call["eos_token_id"] = sorted({int(row[5 + 4 * index]) for index, row in enumerate(plain)})
    seen = []
    for model in (tiny.build("llama"), hf_longattn.prepare_generation(tiny.build("llama"))):
        torch.manual_seed(3)
        if streamed and rows == 1:
            call |= {"streamer": TextStreamer(_Numbers(seen)), "return_dict_in_generate": False}
        output = generate(model, ids, mask, **call)
        # The next call goes on where this one ended.
        seen += [getattr(output, "sequences", output).tolist(), torch.rand(3).tolist()]
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and len(deferred) == 1
    assert deferred[0].stop_reported == (end == "an end")


def test_a_hook_sees_no_call_too_many(deferred):
    ids, model = tiny.tokens(1, 12), hf_longattn.prepare_generation(tiny.build("llama"))
    seen = []
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    generate(model, ids, max_new_tokens=5)
    assert len(seen) == 5 and not deferred


def test_others_are_served_as_before_while_a_call_is_under_way(deferred):
    ids, other = tiny.tokens(1, 12), tiny.build("llama")
    model = hf_longattn.prepare_generation(tiny.build("llama"))
    inner = []

    class Nested(_Recorder):
        def put(self, value):
            inner.append(generate(other, ids, max_new_tokens=3).sequences.tolist())

    generate(model, ids, max_new_tokens=4, streamer=Nested(), return_dict_in_generate=False)
    assert len(deferred) == 1 and len(inner) == 5
    hf_longattn.restore(model)
    generate(model, ids, max_new_tokens=4)
    assert len(deferred) == 1


@gpu
def test_sampled_calls_on_a_gpu_go_on_with_the_same_numbers(monkeypatch):
    ids, model = tiny.tokens(1, 12).cuda(), tiny.build("llama").cuda()
    call, seen = {"do_sample": True, "top_k": 40, "pad_token_id": 0}, []
    torch.manual_seed(3)
    call["eos_token_id"] = int(generate(model, ids, **call).sequences[0, 20])
    made, base = [], utils.DeferredStopCheck.__call__
    monkeypatch.setattr(
        utils.DeferredStopCheck, "__call__", lambda self, *a: (made.append(1), base(self, *a))[1]
    )
    for prepare in (lambda model: model, hf_longattn.prepare_generation):
        prepared = prepare(model)
        torch.manual_seed(3)
        tokens = generate(prepared, ids, **call).sequences.tolist()
        seen.append((tokens, torch.rand(3, device="cuda").tolist()))
    assert made and seen[0] == seen[1]


@gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_tokens_and_cache_on_a_gpu(family, cuda_graph, monkeypatch):
    ids, model = tiny.tokens(2, 12).cuda(), tiny.build(family).cuda()
    call = {"eos_token_id": ends(model, ids), "pad_token_id": 0}
    expected = generate(model, ids, **call)
    made, base = [], utils.DeferredStopCheck.__call__
    monkeypatch.setattr(
        utils.DeferredStopCheck, "__call__", lambda self, *a: (made.append(1), base(self, *a))[1]
    )
    result = generate(hf_longattn.prepare_generation(model, cuda_graph=cuda_graph), ids, **call)
    assert made and result.sequences.tolist() == expected.sequences.tolist()
    assert result.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
