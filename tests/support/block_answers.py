"""Answers of tiny Block Transformers, plain and prepared."""

import torch
from tiny_blocks import PAD, make, prompts

import hf_longattn

END = 59
EMBEDDERS = {
    "lookup": {},
    "roberta": {
        "embedder_type": "roberta",
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
        "embedder_num_hidden_layers": 1,
    },
}
DECODERS = {
    "prefix": {},
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "cross_attention": {"decoding_strategy": "cross_attention", "expansion_ratio": None},
}
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 11}
DRAW = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
DRAW |= {"min_p": 0.01, "typical_p": 0.98, "pad_token_id": PAD, "max_new_tokens": 11}


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, **options)


def both(model, ids, mask, **options):
    """(what the plain model gives, what the prepared one gives), the latter by programs of blocks."""
    plain = generate(model, ids, mask, **options)
    hf_longattn.prepare_generation(model)
    fast = generate(model, ids, mask, **options)
    hf_longattn.restore(model)
    return plain, fast


def answers(calls, **fields):
    """Each call's (tokens of a plain model, tokens of a model that was prepared once)."""
    plain, fast, results = make(**fields), hf_longattn.prepare_generation(make(**fields)), []
    for seed, (lengths, options) in enumerate(calls):
        ids, mask = prompts(*lengths)
        ids = torch.where(mask.bool(), (ids + 11 * seed) % 58, PAD)
        results.append([generate(model, ids, mask, **options) for model in (plain, fast)])
    return fast, results


def ends_inside(plain, row, place):
    """A token that row `row` has at new place `place`, and neither it nor the other row before."""
    new = plain[:, 9:]
    token = int(new[row, place])
    assert token not in new[row, :place].tolist() + new[1 - row, : place + 1].tolist()
    return token


class Collect:
    def __init__(self):
        self.parts = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.parts.append(value.tolist())

    def end(self):
        self.parts.append("end")
