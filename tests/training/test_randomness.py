"""The random numbers of blocks that are computed twice, and what layers without any are spared."""

import pytest
import torch
import transformers as tf

import hf_longattn
from hf_longattn.training.randomness import BlockRandomness

CPU = torch.device("cpu")


class Block:
    """A block that draws, or does not, and counts its calls."""

    def __init__(self, draws):
        self.draws, self.calls = draws, 0

    def __call__(self):
        self.calls += 1
        return torch.rand(3) if self.draws else torch.ones(3)


def own_numbers(seed):
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("known", [False, True])
def test_blocks_that_draw_get_numbers_of_their_own_twice(known):
    numbers, before = BlockRandomness(11, CPU, draws=known), torch.get_rng_state()
    first, second = Block(True), Block(True)
    forward = [numbers.run(0, first), numbers.run(16, second)]
    assert (first.calls, second.calls) == (1 if known else 2, 1)
    numbers.watches = False
    backward = [numbers.run(16, second), numbers.run(0, first)]
    assert all(map(torch.equal, forward, [own_numbers(11), own_numbers(27)]))
    assert all(map(torch.equal, backward, forward[::-1]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_later_block_may_be_the_first_to_draw():
    numbers, before = BlockRandomness(11, CPU), torch.get_rng_state()
    assert torch.equal(numbers.run(0, Block(False)), torch.ones(3)) and not numbers.draws
    found = numbers.run(16, Block(True))
    numbers.watches = False
    assert numbers.draws and torch.equal(found, own_numbers(27))
    assert torch.equal(numbers.run(16, Block(True)), found)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_that_draw_nothing_are_computed_once_and_seed_nothing(monkeypatch):
    numbers, block = BlockRandomness(11, CPU), Block(False)
    monkeypatch.setattr(numbers, "_seeded", None)
    numbers.run(0, block)
    numbers.watches = False
    monkeypatch.setattr(numbers, "_generators", None)
    numbers.run(0, block)
    assert block.calls == 2


def test_outside_training_numbers_are_the_callers():
    numbers = BlockRandomness(None, CPU)
    torch.manual_seed(3)
    found = numbers.run(16, Block(True))
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(3))


def test_a_layer_that_begins_to_draw_is_noticed():
    """Numbers of a block of the layer are the same in forward and backward, from the step it draws first."""
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    torch.manual_seed(0)
    model = hf_longattn.prepare_training(tf.AutoModelForCausalLM.from_config(config).train(), block_size=16)
    shares, masks = [0.0], []

    def drop(module, args, output):
        if shares[-1]:
            masks.append(torch.rand_like(output) >= shares[-1])
            output = output * masks[-1]
        return output

    model.model.layers[0].mlp.register_forward_hook(drop)
    ids = torch.randint(64, (1, 48))
    for share, calls in ((0.0, 0), (0.5, 7), (0.5, 6), (0.0, 0)):
        masks.clear()
        shares.append(share)
        model(input_ids=ids, labels=ids).loss.backward()
        # Three blocks forward, the first of them twice where nobody knew; then three backward.
        assert len(masks) == calls
        forward, backward = masks[len(masks) - 6 : len(masks) - 3], masks[len(masks) - 3 :]
        assert all(map(torch.equal, forward, backward[::-1]))
        assert len({tuple(mask.flatten().tolist()) for mask in forward}) == len(forward)


@pytest.mark.gpu
def test_numbers_of_the_device_are_the_blocks_own_too():
    device = torch.device("cuda")
    torch.rand(1, device=device)
    before = torch.cuda.get_rng_state(device), torch.get_rng_state()
    numbers, found = BlockRandomness(11, device), []
    for place in (0, 16, 0):
        found.append(numbers.run(place, lambda: torch.rand(5, device=device)))
    numbers.watches = False
    found.append(numbers.run(16, lambda: torch.rand(5, device=device)))
    generator = torch.Generator(device)
    expected = [torch.rand(5, device=device, generator=generator.manual_seed(11 + n)) for n in (0, 16, 0, 16)]
    assert numbers.draws and all(map(torch.equal, found, expected))
    assert torch.equal(torch.cuda.get_rng_state(device), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
