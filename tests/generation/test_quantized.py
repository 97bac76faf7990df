"""Quantised weights under `prepare_generation`: the tokens of the same model unprepared."""

import pytest
import quantized
import tiny

import hf_longattn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quantized.save(tmp_path_factory.mktemp("model"))


@quantized.kinds
def test_tokens_are_those_of_the_unprepared_model(make, folder):
    ids, mask = tiny.tokens(2, 23), tiny.padding([23, 10], 23, "left")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    expected = quantized.load(folder, make).generate(ids, **options).tolist()
    model = hf_longattn.prepare_generation(quantized.load(folder, make), prefill_chunk_size=5)
    assert model.generate(ids, **options).tolist() == expected
