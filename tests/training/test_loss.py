"""The chunked loss against the model's own, with every option that transformers or Trainer may pass."""

import pytest
import tiny
import torch
import transformers as tf
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.trainer_pt_utils import LabelSmoother

import hf_longattn
from hf_longattn.devices import HostCopy
from hf_longattn.training import loss
from hf_longattn.training.loss import _places

BOUND = 2e-6
IDS = tiny.tokens(2, 37)
LABELS = IDS.masked_fill(torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) < 0.3, -100)


def run(model, **inputs):
    model.zero_grad()
    loss = model(**{"input_ids": IDS, "labels": LABELS, "use_cache": False, **inputs}).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def prepared(family, **fields):
    return hf_longattn.prepare_training(tiny.build(family), block_size=16, loss_chunk_size=9, **fields)


def assert_same(result, expected):
    for ours, theirs in zip(result, expected, strict=True):
        assert tiny.relative_error(ours, theirs) <= BOUND


OPTIONS = {
    "mean": {},
    "sum over a count": {"num_items_in_batch": 53},
    "sum over a tensor": {"num_items_in_batch": torch.tensor(53)},
    "shifted": {"shift_labels": LABELS.roll(-2, 1)},
    "ignored": {"labels": LABELS.masked_fill(LABELS == -100, 5), "ignore_index": 5},
    "tuple": {"return_dict": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_options(name, family):
    assert_same(run(prepared(family), **OPTIONS[name]), run(tiny.build(family), **OPTIONS[name]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_label_smoothing_is_that_of_trainer(family):
    model = tiny.build(family)
    logits = model(input_ids=IDS, use_cache=False).logits
    expected = LabelSmoother(epsilon=0.2)({"logits": logits}, LABELS, shift_labels=True)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_same(run(prepared(family, label_smoothing=0.2)), (expected.detach(), gradient))


def test_tied_weights_get_one_gradient():
    config = tf.LlamaConfig(**{**tiny._COMMON, "tie_word_embeddings": True})
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    expected = run(model)
    assert_same(run(hf_longattn.prepare_training(model, block_size=16, loss_chunk_size=9)), expected)


def test_a_batch_without_a_label_that_counts():
    nothing = torch.full_like(IDS, -100)
    loss, gradient = run(prepared("llama"), labels=nothing, num_items_in_batch=7)
    assert loss == 0 and not gradient.any()
    assert prepared("llama")(input_ids=IDS, labels=nothing).loss.isnan()
    assert tiny.build("llama")(input_ids=IDS, labels=nothing).loss.isnan()


def test_the_gradient_is_scaled_with_the_loss():
    results = []
    for model in (tiny.build("llama"), prepared("llama")):
        loss = model(input_ids=IDS, labels=LABELS, use_cache=False).loss
        (loss * 1024).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert tiny.relative_error(results[1], results[0]) <= BOUND


def test_embeddings_as_input_get_their_gradient():
    results = []
    for model in (tiny.build("llama"), prepared("llama")):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=LABELS, use_cache=False).loss.backward()
        results.append(embeddings.grad)
    assert tiny.relative_error(results[1], results[0]) <= BOUND


def test_outside_the_graph_nothing_is_differentiated():
    model = tiny.build("llama")
    head = loss.Head(model, "model", model.forward, BaseModelOutputWithPast)
    hidden, options = torch.randn(2, 37, 64, requires_grad=True), loss.LossOptions(9, 0.0)
    expected = loss.chunked_loss(head, hidden, LABELS, None, options)
    with torch.no_grad():
        assert torch.equal(loss.chunked_loss(head, hidden, LABELS, None, options), expected)


def test_calls_that_ask_for_logits_get_them():
    plain, model = tiny.build("llama").eval(), prepared("llama").eval()
    for inputs in ({}, {"logits_to_keep": 3}):
        expected, result = (m(input_ids=IDS, use_cache=False, **inputs).logits for m in (plain, model))
        assert tiny.relative_error(result, expected) <= BOUND
    kept = hf_longattn.prepare_training(tiny.build("llama"), block_size=16, loss="model")
    output = kept(input_ids=IDS, labels=LABELS)
    assert output.logits.shape == (2, 37, 97)
    assert_same(run(kept), run(plain))


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_models_without_a_language_head_keep_their_own(kind):
    classes = {"base": tf.LlamaModel, "classifier": tf.LlamaForSequenceClassification}
    config = tf.LlamaConfig(**tiny._COMMON)
    results = []
    for block_size in (None, 16):
        torch.manual_seed(0)
        model = classes[kind]._from_config(config, attn_implementation="eager")
        if block_size:
            hf_longattn.prepare_training(model, block_size=block_size)
        result = model(input_ids=IDS, use_cache=False)[0]
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        results.append((result.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert_same(results[1], results[0])


def overwritten(model, monkeypatch):
    """Whether each chunk's gradient went over the logits, and loss and gradients, `model` being prepared."""
    seen, real = [], loss.cross_entropy

    def spy(logits, targets, **options):
        losses, gradient = real(logits, targets, **options)
        seen.append(gradient.data_ptr() == logits.data_ptr())
        return losses, gradient

    monkeypatch.setattr(loss, "cross_entropy", spy)
    return seen, run(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_gradients_are_written_over_the_logits(family, monkeypatch):
    seen, result = overwritten(prepared(family), monkeypatch)
    assert len(seen) > 3 and all(seen)
    assert_same(result, run(tiny.build(family)))


# What becomes of logits on their way, and what somebody keeps of them; the backward of tanh reads its output.
WAYS = {
    "itself": lambda logits: (logits, logits),
    "a view": lambda logits: (logits, logits.detach()[..., :3]),
    "by autograd": lambda logits: (logits.tanh(), None),
    "as a part": lambda logits: (logits[..., :97], None),
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_that_others_hold_are_left_alone(way, monkeypatch):
    kept, model, plain = [], prepared("llama"), tiny.build("llama")

    def look(module, args, output):
        output, held = WAYS[way](output)
        if held is not None:
            kept.append((held, held.detach().clone()))
        return output

    for each in (model, plain):
        each.lm_head.register_forward_hook(look)
    seen, result = overwritten(model, monkeypatch)
    assert seen and not any(seen)
    assert all(torch.equal(held, before) for held, before in kept)
    assert_same(result, run(plain))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_that_count_are_found_without_asking_the_device(share):
    counts = torch.rand(1000) < share
    known = _places(counts, HostCopy(counts.sum()))
    assert torch.equal(known, counts.nonzero()[:, 0])
