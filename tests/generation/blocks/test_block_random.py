"""What a sampled call of a prepared Block Transformer leaves of the random numbers, for the next one."""

import pytest
import torch
import transformers as tf
from block_answers import DRAW, ends_inside, generate
from tiny_blocks import make, prompts

import hf_longattn


class EndAt:
    """Ends every row at a length."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.length)


class Shake(tf.LogitsProcessor):
    """Draws random numbers of its own for every token."""

    def __call__(self, input_ids, scores):
        return scores + torch.rand(2)[0]


ENDS = {
    "length": lambda model: {},
    "criterion": lambda model: {"stopping_criteria": tf.StoppingCriteriaList([EndAt(15)])},
    "processor": lambda model: {
        "stopping_criteria": tf.StoppingCriteriaList([EndAt(15)]),
        "logits_processor": tf.LogitsProcessorList([Shake()]),
    },
    "eos": lambda model: {
        "eos_token_id": ends_inside(generate(model, *prompts(9, 9), **DRAW, min_new_tokens=11), 0, 5)
    },
    "first": lambda model: {"max_new_tokens": 1},
}


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("length", [15, 14])
def test_the_next_call_draws_what_it_would_behind_the_loop_of_transformers(end, captured, length, request):
    graphs = request.getfixturevalue("recorded") if captured else []
    options = {**DRAW, "max_new_tokens": length, **ENDS[end](make())}
    ids, mask = prompts(9, 9)
    # Of rows that end by a token, one alone: both end it at the same place.
    ids, mask = (ids[:1], mask[:1]) if end == "eos" else (ids, mask)
    found = []
    for prepared in (False, True):
        model = hf_longattn.prepare_generation(make()) if prepared else make()
        torch.manual_seed(3)
        tokens, states = [], []
        for _ in range(3):
            tokens.append(model.generate(ids, attention_mask=mask, **options))
            states.append(torch.get_rng_state())
        found.append((tokens, states))
    for plain, fast in zip(*found, strict=True):
        assert all(map(torch.equal, plain, fast))
    assert bool(graphs) == (captured and end not in ("first", "processor"))


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["captured", "eager"])
def test_the_next_call_on_a_gpu_draws_behind_the_last_token(cuda_graph):
    ids, mask = (each.cuda() for each in prompts(9, 9))
    found = []
    for prepared in (False, True):
        model = make().cuda()
        if prepared:
            hf_longattn.prepare_generation(model, cuda_graph=cuda_graph)
        torch.manual_seed(3)
        offsets = []
        for length in (14, 15, 14, 14):
            criteria = tf.StoppingCriteriaList([tf.MaxLengthCriteria(9 + length - 2)])
            options = {**DRAW, "max_new_tokens": length, "stopping_criteria": criteria}
            model.generate(ids, attention_mask=mask, **options)
            offsets.append(torch.cuda.get_rng_state())
        found.append(offsets)
    assert all(map(torch.equal, *found))
