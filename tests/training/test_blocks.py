"""How many tokens go through a layer at a time, where nobody says."""

import pytest
import torch
import transformers as tf

import hf_longattn
from hf_longattn.training import layer
from hf_longattn.training.blocks import block_tokens, even_size, token_numbers
from hf_longattn.training.visibility import split_rows

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MEASURE = 16384 * token_numbers(2048, 8192)


@pytest.mark.parametrize(
    ("width", "inner", "tokens"),
    [(2048, 8192, 16384), (4096, 14336, 16384), (2048, 5632, 21202), (1024, 2816, 42405), (64, 256, 65536)],
    ids=lambda value: str(value),
)
def test_a_block_takes_the_bytes_of_the_measure(width, inner, tokens):
    numbers = token_numbers(width, inner)
    assert block_tokens(CUDA, 1, numbers) == tokens
    assert block_tokens(CUDA, 4, numbers) == tokens // 4
    assert block_tokens(CUDA, 10**6, numbers) == 256
    # One more token is more than the measure, unless a bound decides.
    if 16384 < tokens < 65536:
        assert tokens * numbers <= MEASURE < (tokens + 1) * numbers
    assert block_tokens(CPU, 1, numbers) == 1024


@pytest.mark.parametrize(
    ("width", "inner", "tokens"),
    [(2048, 8192, 32768), (4096, 14336, 18022), (6144, 18432, 16384), (1024, 2816, 65536)],
    ids=lambda value: str(value),
)
def test_layers_with_states_take_twice_the_bytes_in_16_bits(width, inner, tokens):
    numbers = token_numbers(width, inner)
    for dtype in (torch.bfloat16, torch.float16):
        assert block_tokens(CUDA, 2, numbers, dtype) == tokens // 2
        assert block_tokens(CPU, 1, numbers, dtype) == 1024
    assert block_tokens(CUDA, 2, numbers, torch.float32) == block_tokens(CUDA, 2, numbers)
    if 16384 < tokens < 65536:
        assert tokens * numbers <= 2 * MEASURE < (tokens + 1) * numbers


@pytest.mark.parametrize("most", [256, 1024, 21202, 42405])
@pytest.mark.parametrize("length", [1, 127, 1025, 32768, 65536, 100_003, 1 << 20])
def test_blocks_of_a_sequence_are_as_few_and_as_even_as_they_can_be(length, most):
    rows = split_rows(length, even_size(length, most))
    sizes = [part.stop - part.start for part in rows]
    assert len(sizes) == -(-length // most) and max(sizes) <= most
    assert max(sizes[:-1], default=0) <= length // len(sizes) + 128


def test_a_prepared_model_picks_blocks_by_its_width(monkeypatch):
    asked = []

    def fewer(device, rows, numbers, dtype=None):
        asked.append((numbers, dtype))
        return 256

    monkeypatch.setattr(layer, "block_tokens", fewer)
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(64, (1, 300))
    found = {}
    for size in (None, 64, 300):
        hf_longattn.prepare_training(model, block_size=size)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found[size] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert set(asked) == {(token_numbers(32, 48), None)}
    # Two blocks, five and one, which is not copied.
    for size in (64, 300):
        assert (found[None] - found[size]).norm() <= 1e-5 * found[size].norm()


def test_layers_of_a_hybrid_have_blocks_of_their_own(monkeypatch):
    sizes = {None: 128, torch.float32: 384}
    monkeypatch.setattr(layer, "block_tokens", lambda device, rows, numbers, dtype=None: sizes[dtype])
    config = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    config.lightning_layers = [0]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="lightning_attention").train()
    ids, found, seen = torch.randint(64, (1, 300)), [], set()
    run = layer.BlockRun.block

    def block(self, index, hidden, attention, **options):
        seen.add((type(attention).__name__, len(self.rows)))
        return run(self, index, hidden, attention, **options)

    monkeypatch.setattr(layer.BlockRun, "block", block)
    for every in (None, 2):
        if every is not None:
            hf_longattn.prepare_training(model, keep_every=every)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert {("BlockStates", 1), ("PrefixAttention", 3)} <= seen
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()
