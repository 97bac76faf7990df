"""Quantised weights under `prepare_generation`: the tokens of the same model unprepared.

Where a package is missing, `test_graph.py` still captures steps through layers of 8-bit weights of its own.
"""

import pytest
import quantized
import tiny

import hf_longattn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return quantized.save(tmp_path_factory.mktemp("model"))


@quantized.kinds
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_are_those_of_the_unprepared_model(make, folder, device):
    ids, mask = tiny.tokens(2, 23).to(device), tiny.padding([23, 10], 23, "left").to(device)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    expected = quantized.load(folder, make, device).generate(ids, **options).tolist()
    # On a GPU every step is captured, or the call is refused.
    fields = {"prefill_chunk_size": 5, "cuda_graph": device == "cuda"}
    model = hf_longattn.prepare_generation(quantized.load(folder, make, device), **fields)
    assert model.generate(ids, **options).tolist() == expected
