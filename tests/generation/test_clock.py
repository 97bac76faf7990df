"""What a plan counts for the time of prompts and steps, against the operators that run."""

import pytest
import tiny
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longattn.attention import quantized
from hf_longattn.attention.quantized import attend_pieces
from hf_longattn.generation import clock, linear
from hf_longattn.generation.clock import Clock, Hardware
from hf_longattn.generation.sizes import Ranks, Weights, has_few_row_layers

CHUNK, PIECE, HEADS, GROUPS, WIDTH = 32, 64, 4, 2, 64


class MovedBytes(TorchDispatchMode):
    """Bytes that operators read and write; views, and memory that is not written yet, are none."""

    MOVING = ("_to_copy", "mul_", "copy_", "new_zeros", "merge_partials")

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.MOVING:
            written = result if isinstance(result, tuple) else (result,)
            # A copy writes over its first argument without a look at it, and new zeros have none.
            read = args[1:] if name == "copy_" else () if name == "new_zeros" else args
            tensors = [part for part in (*read, *written) if isinstance(part, torch.Tensor)]
            self.total += sum(part.nbytes for part in tensors)
        return result


def config_of(window):
    fields = {"hidden_size": HEADS * WIDTH, "num_hidden_layers": 1, "num_attention_heads": HEADS}
    fields |= {"num_key_value_heads": GROUPS, "vocab_size": 99, "sliding_window": window}
    return tf.MistralConfig(**fields)


def moved_by_chunks(tokens, rows, window):
    """Bytes beside attention itself of a prompt that is read in chunks, its keys in 8 bits."""
    states = torch.zeros(rows, GROUPS, tokens, WIDTH, dtype=torch.int8)
    scales, query = torch.ones(rows, GROUPS, tokens, 2), torch.zeros(rows, HEADS, CHUNK, WIDTH)
    found = query.bfloat16(), torch.zeros(rows, HEADS, CHUNK)
    with MovedBytes() as moved:
        for start in range(0, tokens, CHUNK):
            seen = slice(max(start - (window or tokens), 0), start + CHUNK)
            keys = states[:, :, seen]
            attend_pieces(found[0], keys, keys, scales[:, :, seen], lambda *_: found)
    return moved.total


@pytest.mark.parametrize("window", [None, 80], ids=["full", "W80"])
@pytest.mark.parametrize(
    ("tokens", "rows"), [(32, 1), (480, 1), (256, 2)], ids=["T32-B1", "T480-B1", "T256-B2"]
)
def test_a_prompt_moves_what_keys_in_8_bits_cost(tokens, rows, window, monkeypatch):
    for module in (quantized, clock):
        monkeypatch.setattr(module, "PIECE_TOKENS", PIECE)
    # One byte a second: nothing else takes time that counts.
    sizes = config_of(window), Weights(0, 0, 0), Ranks(), Hardware(bandwidth=1.0), torch.bfloat16
    planned = [
        Clock(*sizes, kind).prefill(tokens, CHUNK * rows, rows) for kind in (torch.int8, torch.bfloat16)
    ]
    assert planned[1] < 1.0
    # Log-sum-exps and scales are not counted.
    assert rows * planned[0] == pytest.approx(moved_by_chunks(tokens, rows, window), rel=0.03)


def test_ranks_that_share_keys_in_8_bits_convert_their_own_for_the_queries_of_all(monkeypatch):
    # All keys are one piece: nothing is joined.
    monkeypatch.setattr(clock, "PIECE_TOKENS", 1 << 30)

    def converted(ranks):
        sizes = config_of(None), Weights(0, 0, 0), ranks, Hardware(bandwidth=1.0), torch.bfloat16
        alone, both = (Clock(*sizes, kind).prefill(1 << 20, 8192) for kind in (None, torch.int8))
        return both - alone

    one, two, eight = (converted(Ranks(sequence=count)) for count in (1, 2, 8))
    # Each goes through its share for its own two slices, and twice for those of the ranks before it, and
    # behind it: of two ranks one has none before it and one none behind it.
    assert two == pytest.approx(4 / 2 * one) and eight == pytest.approx(6 / 8 * one)
    assert converted(Ranks(tensor=2)) == pytest.approx(one / 2)


@pytest.mark.parametrize("change", [{}, {"use_parallel_residual": False}, {"attention_bias": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_layers_of_few_launches_are_those_that_run_so(change, dtype):
    config = tiny.CONFIGS["gpt-neox"](**change, hidden_act="gelu")
    layer = tf.GPTNeoXForCausalLM(config).to(dtype).eval().gpt_neox.layers[0]
    for rows in (1, 2, 3):
        most = next(kind.most_rows for kind in linear._KINDS if kind.fits is linear._has_plain_branches)
        runs = linear._has_plain_branches(layer) and rows <= most
        assert has_few_row_layers(config, rows, dtype) == runs, rows
    assert not has_few_row_layers(tiny.CONFIGS["llama"](), 1, dtype)


def test_a_layer_of_few_launches_adds_less():
    config = tiny.CONFIGS["gpt-neox"](hidden_act="gelu")
    times = Clock(config, Weights(0, 0, 0), Ranks(), Hardware(), torch.bfloat16)
    layers = config.num_hidden_layers
    assert times.overhead(2) == pytest.approx(layers * clock.FEW_ROW_OVERHEAD_A_LAYER)
    assert times.overhead(3) == pytest.approx(layers * clock.OVERHEAD_A_LAYER)
