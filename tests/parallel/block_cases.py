"""What the ranks of the Block Transformer's tests do. Run as `python block_cases.py P,P... TOPIC...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import ranks
import torch
from tiny_blocks import PAD, make, prompts
from torch.distributed.device_mesh import init_device_mesh

import hf_longattn

MODELS = {
    "prefix": {},
    "llama": {"decoder_type": "llama", "num_key_value_heads": 1},
    "columns": {"block_alignment": "columns"},
    "two-vectors": {"n_embedding_tokens": 2},
    "one-a-block": {"block_length": 1, "expansion_ratio": 1},
}
GREEDY = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 15}
# (lengths of the prompts, options, settings of the preparation)
CALLS = {
    "even": ((150, 150), {}, {}),
    "ragged": ((40, 3, 77, 1), {}, {}),
    "short": ((5,), {}, {}),
    "chunks": ((200, 200), {}, {"prefill_chunk_size": 100}),
    "beams": ((150, 130), {"num_beams": 3}, {}),
    "sampling": ((60, 60), {"do_sample": True, "top_k": 9}, {}),
    "lookup": ((150,), {"prompt_lookup_num_tokens": 3}, {}),
}
FEW = [("prefix", "even"), ("llama", "ragged"), ("prefix", "lookup")]
MORE = [(name, call) for name in MODELS for call in ("even", "ragged")]
MORE += [("prefix", call) for call in CALLS if call not in ("even", "ragged")]
EXPECTED = {}


def converse(model, call):
    """The tokens of two turns on one cache, and that cache."""
    lengths, options, _ = CALLS[call]
    (ids, mask), options = prompts(*lengths), {**GREEDY, **options}
    torch.manual_seed(3)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, prompts(*[40] * len(lengths))[0]], dim=1)
    mask = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1)
    if "num_beams" in options or "prompt_lookup_num_tokens" in options:
        return [first.sequences], first.past_key_values
    second = model.generate(more, attention_mask=mask, past_key_values=first.past_key_values, **options)
    return [first.sequences, second], first.past_key_values


def few(rank, size, mesh):
    for name, call in FEW:
        compare(name, call, mesh)


def more(rank, size, mesh):
    for name, call in MORE:
        compare(name, call, mesh)


def compare(name, call, mesh):
    model = hf_longattn.prepare_generation(make(**MODELS[name]), device_mesh=mesh, **CALLS[call][2])
    found, _ = converse(model, call)
    for ours, theirs in zip(found, EXPECTED[name, call], strict=True):
        assert torch.equal(ours, theirs), (name, call)


def shares(rank, size, mesh):
    """No rank holds, or computes, all of a prompt's blocks."""
    model, rows = hf_longattn.prepare_generation(make(), device_mesh=mesh), []
    layer = model.model.block_decoder.layers[0]
    layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    result = model.generate(*prompts(400)[:1], **{**GREEDY, "max_new_tokens": 21})
    together = 100 // (2 * size) * 2 * size
    # The slices of this rank, what is left of the prompt, and a block at a time.
    assert rows[0] == together // size and sum(rows[1:]) == (100 - together) + 5, rows
    assert result.shape == (1, 421)
    cache = converse(model, "even")[1]
    used = torch.tensor([layer.used for layer in cache.layers])
    torch.distributed.all_reduce(used)
    lengths = [layer.length for layer in cache.layers]
    assert used.tolist() == lengths and lengths[0] >= 50
    assert max(layer.used for layer in cache.layers) <= lengths[0] // size + 32


def refusals(rank, size, mesh):
    model = hf_longattn.prepare_generation(make(), device_mesh=mesh, cache_dtype="int8")
    for word, ask in (
        ("cache_dtype", lambda: model.generate(prompts(9)[0], **GREEDY)),
        ("one process", lambda: model.generate_batch([[1, 2]], **GREEDY)),
        (f"a cache shared by {size} processes", lambda: read_restored("sdpa", mesh)),
        (f"a cache shared by {size} processes", lambda: read_restored("eager", mesh)),
    ):
        try:
            ask()
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)


def read_restored(attention, mesh):
    """One more block on a shared cache, by a model that knows nothing of it any more."""
    model = hf_longattn.prepare_generation(make(), device_mesh=mesh)
    ids, (_, cache) = prompts(164, 164)[0], converse(model, "even")
    hf_longattn.restore(model).set_attn_implementation(attention)
    model.generate(ids, past_key_values=cache, **GREEDY)


def expect(topics):
    """Computes the expectations here, so that every rank inherits them."""
    cases = MORE if "more" in topics else FEW
    for name, call in cases if {"few", "more"} & {*topics} else ():
        EXPECTED[name, call] = converse(make(**MODELS[name]), call)[0]


if __name__ == "__main__":
    ranks.run_topics(globals(), expect, lambda size: init_device_mesh("cpu", (size,), mesh_dim_names=("cp",)))
