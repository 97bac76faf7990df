"""Prepared Block Transformers: several tokens a program, and all that plain `generate` gives."""

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation import GenerationMixin

import hf_longattn
from hf_longattn.generation import blocks
from hf_longattn.modeling.block_transformer import BlockTransformerConfig, BlockTransformerForCausalLM

PAD, END = 60, 59
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": PAD, "eos_token_id": None}
EMBEDDERS = {
    "lookup": {},
    "roberta": {
        "embedder_type": "roberta",
        "projection_method": "projection_layer",
        "embedder_num_attention_heads": 2,
        "embedder_num_hidden_layers": 1,
    },
}
DECODERS = {
    "prefix": {},
    "summation": {"decoding_strategy": "summation", "expansion_ratio": None},
    "cross_attention": {"decoding_strategy": "cross_attention", "expansion_ratio": None},
}
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 11}
DRAW = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3}
DRAW |= {"min_p": 0.01, "typical_p": 0.98, "pad_token_id": PAD, "max_new_tokens": 11}


def make(**fields):
    torch.manual_seed(0)
    model = BlockTransformerForCausalLM(BlockTransformerConfig(**(SMALL | fields))).eval()
    # `generate` reads its own file of defaults; a test says what it wants.
    model.generation_config = tf.GenerationConfig(bos_token_id=0)
    return model


def prompts(*lengths):
    """Left-padded rows (B, T) and their mask."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(100 * row + length)
        drawn = torch.randint(0, 58, (length,), generator=generator)
        ids[row, -length:], mask[row, -length:] = drawn, 1
    return ids, mask


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, **options)


def both(model, ids, mask, **options):
    """(what the plain model gives, what the prepared one gives), the latter by programs of blocks."""
    plain = generate(model, ids, mask, **options)
    hf_longattn.prepare_generation(model)
    fast = generate(model, ids, mask, **options)
    hf_longattn.restore(model)
    return plain, fast


class RecordedGraph(TorchDispatchMode):
    """A CUDA graph on a CPU: replays operators on the tensors and numbers that it was recorded with.

    What waits for the device raises, as it does while a graph is captured.
    """

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "multinomial")

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.before = [], 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in self.WAITING:
            raise RuntimeError(f"{func} waits for the device")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write:
                storage = value.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self):
        """Takes back what recording did: a capture runs nothing."""
        for storage, copy in self.before.values():
            storage.copy_(copy)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Programs are captured in recorded graphs, which it lists."""
    graphs = []

    def capture(rehearse, step):
        rehearse()
        graphs.append(RecordedGraph())
        state = torch.get_rng_state()
        with graphs[-1]:
            result = step()
        torch.set_rng_state(state)
        graphs[-1].undo()
        return graphs[-1], result

    monkeypatch.setattr(blocks, "_GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(blocks, "capture", capture)
    return graphs


@pytest.fixture
def never_token_by_token(monkeypatch):
    """The prepared model may not use transformers' loop; the plain one may."""
    real = GenerationMixin._sample

    def _sample(self, *args, **kwargs):
        assert "_sample" not in vars(self), "fell back to the loop of transformers"
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", _sample)


def cases():
    for embedder in EMBEDDERS:
        for decoder in DECODERS:
            for length in (1, 2, 4):
                fast = embedder == "lookup" if length == 4 else (embedder, decoder) == ("lookup", "prefix")
                marks = () if fast else pytest.mark.slow
                yield pytest.param(
                    embedder, decoder, length, marks=marks, id=f"{embedder}-{decoder}-L{length}"
                )


@pytest.mark.usefixtures("never_token_by_token")
@pytest.mark.parametrize("options", [{**GREEDY, "repetition_penalty": 1.5}, DRAW], ids=["greedy", "sampling"])
@pytest.mark.parametrize(("embedder", "decoder", "length"), list(cases()))
def test_tokens_equal_those_of_the_plain_model(embedder, decoder, length, options, recorded):
    fields = {**EMBEDDERS[embedder], **DECODERS[decoder], "block_length": length}
    if decoder == "prefix":
        fields["expansion_ratio"] = 2
    plain, fast = both(make(**fields), *prompts(9, 9), **options)
    assert torch.equal(fast, plain)
    assert recorded and recorded[0].replays >= 2
    assert plain[:, 9:].unique().numel() > 8, "a model that repeats itself would hide an error"
