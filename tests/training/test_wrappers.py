"""What others do to a prepared model: accelerate's wrapping, copies, casts, new embeddings, metrics."""

import copy
import pickle

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

import hf_longattn

BOUND = 2e-6
IDS = tiny.tokens(2, 43)


def prepared(**fields):
    return hf_longattn.prepare_training(tiny.build("llama").train(), block_size=16, **fields)


def step(model):
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def assert_same(result, expected, bound=BOUND):
    for ours, theirs in zip(result, expected, strict=True):
        assert tiny.relative_error(ours, theirs) <= bound


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def test_unwrapped_from_mixed_precision_it_is_prepared_still(accelerator):
    expected = step(tiny.build("llama").train())
    model = prepared()
    wrapped = accelerator.prepare(model)
    assert wrapped(input_ids=IDS, labels=IDS).logits is None
    assert tiny.relative_error(step(wrapped)[1], expected[1]) > 1e-3, "autocast is not in force"
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert_same(step(model), expected)
    assert model(input_ids=IDS, labels=IDS).logits is None
    hf_longattn.restore(model)
    assert "forward" not in vars(model)
    assert_same(step(model), expected, bound=0)


def test_prepared_inside_mixed_precision_and_unwrapped(accelerator):
    model = accelerator.prepare(tiny.build("llama").train())
    hf_longattn.prepare_training(model, block_size=16)
    before = step(model)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same(step(model), before, bound=0)
    assert model(input_ids=IDS, labels=IDS).logits is None


def test_generation_after_unwrapping(accelerator):
    expected = tiny.build("llama").generate(IDS, max_new_tokens=5, do_sample=False)
    wrapped = accelerator.prepare(hf_longattn.prepare_generation(tiny.build("llama")))
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_a_plain_model(kind):
    model = prepared()
    twin = COPIES[kind](model)
    assert twin.config._attn_implementation == "eager"
    assert_same(step(twin), step(tiny.build("llama").train()), bound=0)
    assert_same(step(model), step(twin))
    assert model(input_ids=IDS, labels=IDS).logits is None


def test_replicas_are_refused_by_name():
    model = prepared()
    wrapped = torch.nn.DataParallel(model)
    # Without a GPU it calls the model itself; with several it asks every module for a replica first.
    with pytest.raises(ValueError, match="nn.DataParallel.*torchrun"):
        [module._replicate_for_data_parallel() for module in wrapped.module.modules()]
    hf_longattn.restore(model)
    assert model._replicate_for_data_parallel() is not model


def test_new_embeddings():
    models = [tiny.build("llama").train(), prepared()]
    for model in models:
        torch.manual_seed(1)
        model.resize_token_embeddings(128, mean_resizing=False)
    assert_same(step(models[1]), step(models[0]))


CASTS = {"half": lambda m: m.half(), "bf16": lambda m: m.to(torch.bfloat16), "double": lambda m: m.double()}


@pytest.mark.parametrize("kind", CASTS)
def test_casts(kind):
    # The same weights, exactly, in both dtypes.
    exact = step(CASTS[kind](tiny.build("llama").train()).double())
    model, plain = (CASTS[kind](m) for m in (prepared(), tiny.build("llama").train()))
    for ours, theirs, reference in zip(step(model), step(plain), exact, strict=True):
        bound = 1.5 * (tiny.relative_error(theirs, reference) + torch.finfo(model.dtype).eps)
        # Gradients are compared in fp32, and Llama's norms compute in it.
        assert tiny.relative_error(ours, reference) <= max(bound, BOUND)


def rows():
    ids = tiny.tokens(6, 30, seed=90)
    return [{"input_ids": row, "labels": row} for row in ids]


def evaluate(folder, model, **options):
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return Trainer(model, arguments, eval_dataset=rows(), **options).evaluate()


def hits(predictions):
    return {"hits": float((predictions.predictions[:, :-1] == predictions.label_ids[:, 1:]).sum())}


def test_evaluation_takes_the_loss_alone(tmp_path):
    expected = evaluate(tmp_path, tiny.build("llama"))["eval_loss"]
    assert evaluate(tmp_path, prepared())["eval_loss"] == pytest.approx(expected, rel=BOUND)
    # A metric finds nothing in the place of logits, not those of some token.
    seen = []
    evaluate(tmp_path, prepared(), compute_metrics=lambda result: seen.append(result.predictions) or {})
    assert seen == [()]


def test_metrics_of_logits_with_the_loss_of_the_model(tmp_path):
    best = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    options = {"compute_metrics": hits, **best}
    expected = evaluate(tmp_path, tiny.build("llama"), **options)["eval_hits"]
    assert evaluate(tmp_path, prepared(loss="model"), **options)["eval_hits"] == expected
