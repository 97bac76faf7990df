"""What a layer that trains copies and adds, beside what it computes: numbers that pass through memory."""

import pytest
import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import hf_longattn
from hf_longattn.training import attention

LENGTH, WIDTH = 104, 64
COPIES = ("copy_", "_to_copy")


class Moved(TorchDispatchMode):
    """Numbers that some operators move, those of tensors with a number for each token or more."""

    def __init__(self, names):
        super().__init__()
        self.names, self.numbers = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.names and result.numel() >= LENGTH * WIDTH // 4:
            # Weights have no such length.
            self.numbers += result.numel() if LENGTH in result.shape or LENGTH // 2 in result.shape else 0
            # Python's `x[i] += y` copies the sum to where it is.
            assert func.overloadpacket.__name__ != "copy_" or args[0].data_ptr() != args[1].data_ptr()
        return result


def moved(model, names, **options):
    """Hidden states that the operators move in a layer, forward and backward: of three layers less one's."""
    found = []
    hf_longattn.prepare_training(model, **options)
    for layers in (3, 1):
        model.model.layers = model.model.layers[:layers]
        ids = tiny.tokens(1, LENGTH)
        with Moved(names) as mode:
            model(input_ids=ids, labels=ids).loss.backward()
        found.append(mode.numbers / LENGTH / WIDTH)
    return (found[0] - found[1]) / 2


@pytest.mark.parametrize("implementation", ["eager", "lightning_attention"])
def test_one_block_copies_nothing(implementation):
    model = tiny.build("llama", implementation).train()
    assert moved(model, COPIES, block_size=LENGTH) == 0


def test_two_blocks_put_everything_in_its_place_once():
    # The output of the layer, that of attention and the gradient of the input; keys and values, half as many,
    # forward and again, their sums and their gradients; and half the gradient of the queries, in fp32.
    model = tiny.build("llama").train()
    assert moved(model, COPIES, block_size=LENGTH // 2) == 3 + 2 * 1 + 1 + 1 + 0.5


@pytest.mark.parametrize("family", ["phi3", "gpt-neox", "llama"])
def test_keys_of_one_block_hold_their_own_memory(family, monkeypatch):
    held, forgotten = [], []
    gradients, forget = attention.PrefixAttention.gradients, attention.PrefixAttention.forget

    def spy(self, *args):
        held.append([x.untyped_storage().nbytes() / x.nbytes for x in (self.keys, self.values)])
        return gradients(self, *args)

    def spy_too(self):
        forget(self)
        forgotten.append(self.keys is None and self.values is None)

    monkeypatch.setattr(attention.PrefixAttention, "gradients", spy)
    monkeypatch.setattr(attention.PrefixAttention, "forget", spy_too)
    model = hf_longattn.prepare_training(tiny.build_to_train(family), block_size=LENGTH)
    ids = tiny.tokens(1, LENGTH)
    model(input_ids=ids, labels=ids).loss.backward()
    # In a forward they go when attention is over.
    assert held == [[1, 1]] * 3 and forgotten == [True] * 3
