"""Whole models under `torch.compile(fullgraph=True)`."""

import pytest
import tiny
import torch
import transformers as tf
from torch._dynamo.testing import CompileCounter

import hf_longattn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("padded", "family", "implementation"),
    [
        (False, "llama", "tree_attention"),
        (True, "llama", "blockwise_attention"),
        (False, "gemma2", "blockwise_attention"),
        (True, "gemma2", "tree_attention"),
    ],
)
def test_forward_compiles_in_one_graph(family, implementation, padded):
    ids = tiny.tokens(2, 14)
    mask = tiny.padding([14, 9], 14, "left") if padded else None
    model = tiny.build(family, implementation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        result = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    real = slice(None) if mask is None else mask.bool()
    assert tiny.relative_error(result[real], expected[real]) <= 2e-6


@pytest.mark.slow
def test_documents_that_positions_tell_beside_a_mask_are_kept_apart():
    ids, mask = tiny.tokens(2, 14), tiny.padding([14, 9], 14, "right")
    positions = torch.cat([torch.arange(5), torch.arange(9)]).expand(2, -1)
    keywords = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    model, alone = tiny.build("llama", "tree_attention"), tiny.build("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = torch.cat([alone(ids[:, :5]).logits, alone(ids[:, 5:]).logits], dim=1)
        results = [model(ids, **keywords).logits, compiled(ids, **keywords).logits]
    for result in results:
        assert tiny.relative_error(result[mask.bool()], expected[mask.bool()]) <= 2e-5


@pytest.mark.slow
def test_training_step_compiles_in_one_graph():
    ids, gradients = tiny.tokens(2, 14), []
    for compile_it in (False, True):
        model = tiny.build("llama", "blockwise_attention")
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert tiny.relative_error(gradients[1], gradients[0]) <= 2e-6


@pytest.mark.slow
def test_decoding_on_a_static_cache_compiles_once():
    model, ids = tiny.build("llama", "tree_attention"), tiny.tokens(1, 20)
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model(input_ids=ids[:, :10], past_key_values=cache)
        for index in range(10, 20):
            positions = torch.tensor([[index]])
            logits = step(
                input_ids=ids[:, index : index + 1], position_ids=positions, past_key_values=cache
            ).logits
            assert tiny.relative_error(logits[:, 0], expected[:, index]) <= 2e-5
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_model_generates_the_same():
    plain, ids = tiny.build("llama"), tiny.tokens(2, 23)
    mask = tiny.padding([23, 15], 23, "left")
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(ids, **call)
    model = tiny.build("llama", "tree_attention")
    model.compile(backend="eager")
    hf_longattn.prepare_generation(model)
    assert torch.equal(model.generate(ids, **call), expected)
