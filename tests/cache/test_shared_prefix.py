"""A cache forked with `rows`: what the rows see, what is in memory once, and what is refused."""

import copy

import pytest
import tiny
import torch

from hf_longattn import LongContextCache
from hf_longattn.cache.shared_prefix import SharedPrefixLayer, SharedStates

PREFIX, SUFFIX, LENGTHS = 23, 24, [24, 9, 1]
FAMILIES = ["llama", "gemma2", "gpt-oss", "mistral-window", "llama4", "gemma4-shared"]


def filled(model, tokens=PREFIX):
    cache = LongContextCache(model.config, capacity=64)
    with torch.no_grad():
        model(input_ids=tiny.tokens(1, tokens), past_key_values=cache)
    return cache


def suffixes(lengths=LENGTHS, width=SUFFIX, seed=4):
    """Token ids of the suffixes, and the mask and positions of prefix and suffixes."""
    padding = tiny.padding(lengths, width, "left")
    mask = torch.cat([torch.ones(len(lengths), PREFIX, dtype=torch.long), padding], 1)
    return tiny.tokens(len(lengths), width, seed=seed), mask, (mask.cumsum(-1) - 1)[:, PREFIX:]


@torch.no_grad()
def read(model, cache, ids, mask, positions, steps=((0, SUFFIX),)):
    """Logits of the suffixes, read a step at a time."""
    parts = []
    for start, stop in steps:
        step = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        parts.append(model(**step, attention_mask=mask[:, : PREFIX + stop], past_key_values=cache).logits)
    return torch.cat(parts, 1)


@torch.no_grad()
def alone(model, ids, lengths=LENGTHS):
    """Logits of every suffix that was read by itself, whole, behind the prefix; one row an entry."""
    results = []
    for row, length in enumerate(lengths):
        whole = torch.cat([tiny.tokens(1, PREFIX), ids[row : row + 1, ids.shape[1] - length :]], 1)
        results.append(model(input_ids=whole).logits[:, PREFIX:])
    return results


def check_rows(logits, expected, bound=2e-5):
    for row, wanted in zip(logits, expected, strict=True):
        assert tiny.relative_error(row[len(row) - wanted.shape[1] :], wanted[0]) <= bound


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "steps", [((0, 24),), ((0, 17), (17, 18), (18, 21), (21, 24))], ids=["whole", "steps"]
)
@pytest.mark.parametrize("implementation", ["tree_attention", "blockwise_attention"])
def test_logits_are_those_of_rows_that_run_alone(family, steps, implementation):
    model = tiny.build(family, implementation)
    fork = filled(model).fork(rows=3)
    expected = alone(tiny.build(family, "eager"), suffixes()[0])
    check_rows(read(model, fork, *suffixes(), steps), expected)
    assert fork.get_seq_length() == PREFIX + SUFFIX


def storages(*caches):
    """Bytes by storage of all that the caches hold."""
    found = {}
    for layer in (layer for cache in caches for layer in cache.layers):
        shared = layer.prefix if isinstance(layer, SharedPrefixLayer) else ()
        for states in (*shared, layer._keys, layer._values):
            if states is not None:
                storage = states.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_prefix_is_in_memory_once(family):
    model = tiny.build(family, "tree_attention")
    cache = filled(model, 200)
    before = storages(cache)
    forks = [cache.fork(rows=16), cache.fork(rows=16).fork(), copy.deepcopy(cache.fork(rows=16))]
    windows = sum(layer.is_sliding for layer in cache.layers)
    # Keys and values of 2 heads of width 16 in fp32; the window of 7 is copied, one token less than it.
    copied = windows * 6 * 2 * 2 * 16 * 4
    grown = storages(cache, *forks)
    assert sum(grown.values()) - sum(before.values()) == 3 * copied
    with torch.no_grad():
        for fork in forks:
            model(input_ids=tiny.tokens(16, 5), past_key_values=fork)
    suffix = 3 * len(cache.layers) * 16 * 5 * 2 * 2 * 16 * 4
    assert sum(storages(cache, *forks).values()) - sum(grown.values()) == suffix
    assert before.keys() <= grown.keys()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("change", ["continue", "grow", "crop", "reset", "clock"])
def test_what_becomes_of_the_first_cache_changes_no_fork(family, change):
    model = tiny.build(family, "tree_attention")
    cache, other = filled(model), filled(model)
    fork = cache.fork(rows=3)
    for one in (cache, other):
        if change == "crop":
            one.crop(-5)
        elif change == "reset":
            one.reset()
        results = []
        with torch.no_grad():
            for count in (100, 1) if change == "grow" else (9, 1, 1):
                results.append(model(input_ids=tiny.tokens(1, count, 8), past_key_values=one).logits)
        if one is cache:
            mine = results
    assert all(torch.equal(a, b) for a, b in zip(mine, results, strict=True))
    check_rows(read(model, fork, *suffixes()), alone(model, suffixes()[0]))


def test_a_fork_changes_nothing_of_the_first_cache():
    model = tiny.build("gemma2", "tree_attention")
    cache, other = filled(model), filled(model)
    read(model, cache.fork(rows=3), *suffixes())
    with torch.no_grad():
        for one in (cache, other):
            assert one.get_seq_length() == PREFIX
            one.logits = model(input_ids=tiny.tokens(1, 4, 8), past_key_values=one).logits
    assert torch.equal(cache.logits, other.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_crop_and_reset_go_back_as_far_as_the_prefix(family):
    model = tiny.build(family, "tree_attention")
    fork = filled(model).fork(rows=3)
    ids, mask, positions = suffixes()
    expected = alone(model, ids)
    read(model, fork, ids, mask, positions, ((0, 20),))
    read(model, fork, tiny.tokens(3, SUFFIX, 9), mask, positions, ((20, 24),))
    fork.crop(-4)
    assert (
        tiny.relative_error(read(model, fork, ids, mask, positions, ((20, 24),))[0], expected[0][0, 20:])
        <= 2e-5
    )
    with pytest.raises(ValueError, match="`crop` would remove 1 tokens of the shared prefix"):
        fork.crop(-SUFFIX - 1)
    with pytest.raises(ValueError, match="`crop` would remove 3 tokens of the shared prefix"):
        fork.crop(PREFIX - 3)
    assert fork.get_seq_length() == PREFIX + SUFFIX
    fork.reset()
    assert fork.get_seq_length() == PREFIX
    check_rows(read(model, fork, ids, mask, positions), expected)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
@pytest.mark.parametrize("early", [False, True], ids=["filled", "empty"])
def test_rows_are_changed_in_the_suffix_alone(change, early):
    model = tiny.build("gemma2", "tree_attention")
    cache = filled(model)
    fork = cache.fork(rows=3)
    ids, mask, positions = suffixes()
    start = 0 if early else 15
    if not early:
        read(model, fork, ids, mask, positions, ((0, start),))
    if change == "reorder":
        order = torch.tensor([2, 0, 0])
        fork.reorder_cache(order)
    elif change == "repeat":
        order = torch.tensor([0, 0, 1, 1, 2, 2])
        fork.batch_repeat_interleave(2)
    else:
        order = torch.tensor([1])
        fork.batch_select_indices(order)
    assert fork.layers[0].batch_size == len(order)
    result = read(model, fork, ids[order], mask[order], positions[order], ((start, SUFFIX),))
    straight = read(model, cache.fork(rows=3), ids, mask, positions)[order, start:]
    for row, wanted in zip(result, straight, strict=True):
        assert tiny.relative_error(row[-1], wanted[-1]) <= 2e-5


def test_forks_of_a_fork_are_independent():
    model = tiny.build("llama", "tree_attention")
    fork = filled(model).fork(rows=3)
    ids, mask, positions = suffixes()
    read(model, fork, ids, mask, positions, ((0, 20),))
    twin = fork.fork()
    read(model, twin, tiny.tokens(3, SUFFIX, 9), mask, positions, ((20, 24),))
    result = read(model, fork, ids, mask, positions, ((20, 24),))
    assert tiny.relative_error(result[0], alone(model, ids)[0][0, 20:]) <= 2e-5
    wide = fork.fork(batch_size=2)
    assert wide.layers[0].batch_size == 6 and wide.layers[0].prefix[0] is fork.layers[0].prefix[0]


def test_gradients_reach_the_weights_as_without_sharing():
    model = tiny.build("gemma2", "tree_attention")
    ids, mask, positions = suffixes([24, 24], 24)
    gradients = []
    for fork in (filled(model).fork(rows=2), filled(model).fork(batch_size=2)):
        model.zero_grad()
        model(input_ids=ids, past_key_values=fork).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert tiny.relative_error(*gradients) <= 2e-5


def test_autocast_is_followed():
    model = tiny.build("llama", "tree_attention")
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(model)
        results = [read(model, fork, *suffixes([24] * 3)) for fork in (cache.fork(rows=3), cache.fork(3))]
    exact = torch.cat(alone(tiny.build("llama"), suffixes()[0], [24] * 3))
    errors = [tiny.relative_error(result, exact) for result in results]
    assert errors[0] <= 1.5 * (errors[1] + torch.finfo(torch.bfloat16).eps)


def test_what_cannot_be_shared_is_refused():
    model = tiny.build("llama", "tree_attention")
    cache = filled(model)
    with pytest.raises(ValueError, match="`rows` must be positive"):
        cache.fork(rows=0)
    with pytest.raises(ValueError, match="`rows` takes the place of `batch_size`"):
        cache.fork(2, rows=2)
    with pytest.raises(ValueError, match="layer 0 holds 2 sequences"):
        cache.fork(2).fork(rows=2)
    with pytest.raises(ValueError, match="layer 0 holds 0 sequences"):
        LongContextCache(model.config).fork(rows=2)
    with pytest.raises(ValueError, match="layer 0 is a SharedPrefixLayer"):
        cache.fork(rows=2).fork(rows=2)
    config = copy.deepcopy(model.config)
    config._attn_implementation = "lightning_attention"
    with pytest.raises(ValueError, match="layer 0 is a RecurrentLayer"):
        LongContextCache(config).fork(rows=2)


def test_misuse_of_a_fork_is_refused(tmp_path):
    model = tiny.build("gemma2", "tree_attention")
    cache = filled(model)
    fork = cache.fork(rows=3)
    ids, mask, positions = suffixes()
    with pytest.raises(ValueError, match="forked for 3 sequences, got a batch of 2"):
        read(model, fork, ids[:2], mask[:2], positions[:2])
    with pytest.raises(ValueError, match="`save`"):
        fork.save(tmp_path / "fork.safetensors")
    hidden = mask.clone()
    hidden[1, 0] = 0
    with pytest.raises(ValueError, match="`attention_mask` hides tokens of the prefix"):
        read(model, fork, ids, hidden, positions)
    dense = torch.ones(3, 1, SUFFIX, PREFIX + SUFFIX, dtype=torch.bool)
    with pytest.raises(ValueError, match="`attention_mask`: this kind of attention"), torch.no_grad():
        model(input_ids=ids, attention_mask={"full_attention": dense, "sliding_attention": dense},
              position_ids=positions, past_key_values=cache.fork(rows=3))  # fmt: skip


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_implementations_are_refused_by_name(implementation):
    model = tiny.build("llama", implementation)
    fork = filled(model).fork(rows=3)
    with pytest.raises(ValueError, match="`attn_implementation`"):
        read(model, fork, *suffixes())


def test_shared_states_look_like_the_joined_tensor():
    prefix, suffix = torch.randn(1, 2, 5, 8), torch.randn(3, 2, 4, 8)
    states = SharedStates(prefix, suffix)
    assert states.shape == (3, 2, 9, 8) and states.dtype == suffix.dtype and states.device == suffix.device
    with pytest.raises(ValueError, match="`attn_implementation`"):
        states + 1
