"""What is alive at the highest point of a step: tensors of the whole sequence, and what should be gone."""

import gc

import pytest
import torch
import transformers as tf
from host_blocks import keep_on_host
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_longattn
from hf_longattn.training import attention
from hf_longattn.training.groups import waiting

WIDTH, HEADS, GROUPS, LAYERS, BLOCK = 64, 4, 1, 4, 64
HIDDEN = 4 * WIDTH
KEYS = 4 * 2 * GROUPS * WIDTH // HEADS
# Cosines and sines, ids, labels, positions, and what is made of them.
TABLES = 2 * 4 * WIDTH // HEADS + 8 * 8


class Alive(TorchDispatchMode):
    """The most bytes that are in tensors made inside, at a time."""

    def __init__(self):
        super().__init__()
        self.known, self.top = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        self.top = max(self.top, sum(size for _, size in self.known.values()))
        return result


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def build(**fields):
    config = tf.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, vocab_size=32,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).train()
    sizes = {"block_size": BLOCK, "loss_chunk_size": BLOCK}
    return hf_longattn.prepare_training(model, **sizes, **fields)


def highest(model, length):
    """(bytes of the forward, bytes of the step) at the highest point."""
    model.zero_grad(set_to_none=False)
    ids = torch.ones(1, length, dtype=torch.long)
    with Alive() as alive:
        loss = model(input_ids=ids, labels=ids).loss
        forward = alive.top
        loss.backward()
    return forward, alive.top


def slopes(model):
    highest(model, 128)
    points = [highest(model, length) for length in (512, 768)]
    return [(more - less) / 256 for less, more in zip(*points, strict=True)]


def test_a_token_on_the_host_leaves_its_share_of_one_layer(monkeypatch, no_collector):
    keep_on_host(monkeypatch)
    # What one call of the kernel takes for its keys is bounded: here below the lengths of the test.
    monkeypatch.setattr(attention, "MOST_KEYS", BLOCK)
    forward, step = slopes(build())
    # Embeddings, which the model holds, the output of a layer over its input, and keys and values; then the
    # final hidden states, which the loss reads, and their gradient; a gradient, keys and values, and theirs.
    assert max(forward, step) <= 2 * HIDDEN + KEYS + TABLES


def test_what_somebody_keeps_is_not_written_over(monkeypatch):
    ids, kept = torch.randint(32, (2, 150)), []
    expected = build(offload=False)
    keep_on_host(monkeypatch)
    model = build()
    model.load_state_dict(expected.state_dict())
    for way in ("plain", "hidden states", "hook", "embeddings"):
        arguments = {"labels": ids, "output_hidden_states": way == "hidden states"}
        results = []
        for each in (expected, model):
            each.zero_grad()
            embeddings = each.get_input_embeddings()(ids)
            before = embeddings.detach().clone()
            inputs = {"inputs_embeds": embeddings} if way == "embeddings" else {"input_ids": ids}
            hook = lambda layer, args, output: kept.append((output, output.detach().clone()))  # noqa: E731
            handles = (
                [layer.register_forward_hook(hook) for layer in each.model.layers] if way == "hook" else []
            )
            output = each(**inputs, **arguments)
            output.loss.backward()
            [handle.remove() for handle in handles]
            assert torch.equal(embeddings, before)
            states = (
                torch.stack(output.hidden_states) if arguments["output_hidden_states"] else torch.zeros(())
            )
            results.append([states, output.loss, *(p.grad for p in each.parameters())])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second), way
    assert kept and all(torch.equal(*pair) for pair in kept)


@pytest.mark.parametrize("blocks", [2, 4])
def test_a_layer_whose_keys_are_refilled_leaves_nothing_behind(monkeypatch, no_collector, blocks):
    model, alive = build(offload=False), []
    backward = attention.PrefixAttention.gradients

    def spy(self, *args):
        ended = [x for x in gc.get_objects() if type(x) is attention.KeysKnownError]
        alive.append((len(ended), sum(type(x) is attention.PrefixAttention for x in gc.get_objects())))
        return backward(self, *args)

    monkeypatch.setattr(attention.PrefixAttention, "gradients", spy)
    highest(model, blocks * BLOCK)
    # No exception that ended a pass for keys alone, and the keys and values of one layer.
    assert len(alive) == blocks * LAYERS and set(alive) == {(0, 1)}


def test_every_nth_layer_keeps_its_input(monkeypatch, no_collector):
    monkeypatch.setattr(attention, "MOST_KEYS", BLOCK)
    for every, saved in ((2, [4 * WIDTH, 4 * HEADS]), (3, [])):
        model = build(keep_every=every, save_attention=bool(saved))
        # Gradients of the parameters, and what is made once.
        model(input_ids=torch.ones(1, 128, dtype=torch.long)).logits.sum().backward()
        points = [held_and_highest(model, length) for length in (128, 192)]
        held, step = ((more - less) / 64 for less, more in zip(*points, strict=True))
        wanted = -(-LAYERS // every) * (HIDDEN + sum(saved))
        # The input of the final norm and its gradient; embeddings are the input of the first layer.
        assert 2 * HIDDEN + wanted <= held <= 2 * HIDDEN + wanted + TABLES, every
        again = sum(waiting(LAYERS, every, HIDDEN, saved))
        # A gradient, keys and values and theirs; or what the loss has beside the inputs.
        assert step <= max(again + HIDDEN + 2 * KEYS, wanted + 3 * HIDDEN) + TABLES, every


def held_and_highest(model, length):
    """(bytes that are alive after a forward, bytes of the step at its highest point)."""
    ids = torch.ones(1, length, dtype=torch.long)
    with Alive() as alive:
        loss = model(input_ids=ids, labels=ids).loss
        held = sum(size for reference, size in alive.known.values() if not reference.expired())
        loss.backward()
    return held, alive.top


def test_a_group_of_layers_with_inputs_on_the_host(monkeypatch):
    ids, results = torch.randint(32, (2, 150)), []
    weights = build().state_dict()
    for every in (1, 3):
        if every > 1:
            keep_on_host(monkeypatch)
        model = build(keep_every=every)
        model.load_state_dict(weights)
        model(input_ids=ids, labels=ids).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
